"""A config from YAML and flags, and its `--help`."""

import re

import pytest

from lopd.config.distill import DistillConfig
from lopd.config.parse import build_config, load_yaml
from lopd.config.rollout import RolloutConfig
from lopd.errors import ConfigError, MissingFileError


def build(settings=None, argv=()):
    return build_config(RolloutConfig, settings or {}, argv, "r.yaml", "lopd rollout")


NEEDED = {"student": "s", "prompts": "p", "out": "o"}


def test_flags_override_yaml():
    config = build(NEEDED | {"top_p": 0.5, "seed": 3}, ["--seed", "4", "--max-new-tokens=7"])
    assert (config.top_p, config.seed, config.max_new_tokens) == (0.5, 4, 7)
    assert config.temperature == 1.0


def test_null_in_yaml_keeps_the_default():
    assert build(NEEDED | {"limit": None}).limit is None


@pytest.mark.parametrize(
    ("settings", "argv", "message"),
    [
        (
            NEEDED | {"max_new_token": 3},
            [],
            "r.yaml: unknown setting 'max_new_token'; did you mean",
        ),
        (NEEDED, ["--tempratur", "1"], "unknown setting 'tempratur'; did you mean 'temperature'"),
        (NEEDED | {"seed": "many"}, [], "r.yaml: argument --seed: invalid int value: 'many'"),
        ({"student": "s"}, [], "the following arguments are required"),
        (NEEDED | {"top_p": 2}, [], "top_p: found 2.0"),
        (NEEDED | {"shard_size": 0}, [], "shard_size: found 0"),
        (NEEDED, ["stray"], "stray"),
    ],
)
def test_invalid_settings_are_refused(settings, argv, message):
    with pytest.raises(ConfigError, match=message):
        build(settings, argv)


def test_unreadable_yaml_is_refused(tmp_path):
    with pytest.raises(MissingFileError, match="no such file"):
        load_yaml(tmp_path / "absent.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match="bad.yaml: not YAML"):
        load_yaml(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="found list; expected a mapping"):
        load_yaml(tmp_path / "list.yaml")


def test_dashes_and_no_flags_are_accepted():
    flags = ["--student", "s", "--cache", "c", "--out", "o", "--max-steps", "3", "--no-verify"]
    config = build_config(DistillConfig, {"keep_best": False}, flags, "d.yaml", "lopd distill")
    assert (config.max_steps, config.verify, config.keep_best) == (3, False, False)


def test_help_lists_each_flag_once_by_group_with_the_required_first(capsys):
    with pytest.raises(SystemExit):
        build_config(DistillConfig, {}, ["--help"], "lopd distill", "lopd distill")
    shown = capsys.readouterr().out
    groups = re.findall(r"^([A-Z][\w ,-]*):$", shown, re.MULTILINE)
    assert groups[0] == "Required" and len(groups) == len(set(groups)) > 5
    required = shown[shown.index("Required:") : shown.index("Model and data:")]
    assert re.findall(r"^  (--\w+)", required, re.MULTILINE) == ["--student", "--cache", "--out"]
    assert "default" not in required and "(default: None)" not in shown
    flags = re.findall(r"^  (--[\w-]+)", shown, re.MULTILINE)
    assert len(flags) == len(set(flags)) and not any("-" in flag[2:] for flag in flags)
    assert re.search(r"--no_verify +Turn off --verify\.\n", shown)
