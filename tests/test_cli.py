"""The command line: settings from YAML and flags, and one line for every error of a caller."""

import os

import pytest

from lopd.cli import COMMANDS, main, split_config
from lopd.config.parse import build_config, load_yaml
from lopd.errors import ConfigError, MissingFileError
from lopd.stages.rollout import RolloutConfig


def build(settings=None, argv=()):
    return build_config(RolloutConfig, settings or {}, argv, "r.yaml", "lopd rollout")


NEEDED = {"student": "s", "prompts": "p", "out": "o"}


def test_flags_override_yaml():
    config = build(NEEDED | {"top_p": 0.5, "seed": 3}, ["--seed", "4", "--max-new-tokens=7"])
    assert (config.top_p, config.seed, config.max_new_tokens) == (0.5, 4, 7)
    assert config.temperature == 1.0


def test_null_in_yaml_leaves_the_default():
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
def test_settings_that_cannot_be_used(settings, argv, message):
    with pytest.raises(ConfigError, match=message):
        build(settings, argv)


def test_yaml_that_cannot_be_read(tmp_path):
    with pytest.raises(MissingFileError, match="no such file"):
        load_yaml(tmp_path / "absent.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match="bad.yaml: not YAML"):
        load_yaml(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="found list; expected a mapping"):
        load_yaml(tmp_path / "list.yaml")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--a", "1"], (None, ["--a", "1"])),
        (["--a", "1", "--config", "f.yaml", "--b"], ("f.yaml", ["--a", "1", "--b"])),
        (["--config=f.yaml", "--b=2"], ("f.yaml", ["--b=2"])),
    ],
)
def test_the_config_file_may_stand_anywhere(words, expected):
    assert split_config(words, "sft") == expected


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_describes_its_flags(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "--help" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["rolout"], "unknown setting 'rolout'; did you mean 'rollout'?"),
        (["rollout", "--config"], "--config needs a file"),
        (["run", "absent.yaml"], "absent.yaml: no such file"),
        (
            ["rollout", "--student", "absent", "--prompts", "p", "--out", "o"],
            "absent: no such folder",
        ),
    ],
)
def test_errors_are_one_line_and_exit_code_2(argv, message, capsys):
    assert main(argv) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


def test_rehash_forgets_what_is_remembered_of_models(teacher_folder, tmp_path, monkeypatch):
    from lopd.provenance import fingerprint_weights

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    os.utime(teacher_folder / "model.safetensors", (1e9, 1e9))
    fingerprint_weights(teacher_folder)
    (memo,) = (file for file in tmp_path.rglob("*") if file.is_file())
    memo.write_text(memo.read_text().replace(fingerprint_weights(teacher_folder), "0" * 64))
    assert fingerprint_weights(teacher_folder) == "0" * 64
    declared = ["declare", "--model", str(teacher_folder), "--teacher", "absent"]
    assert main([*declared, "--rehash"]) == 2
    assert fingerprint_weights(teacher_folder) != "0" * 64
