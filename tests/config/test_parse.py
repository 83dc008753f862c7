"""A config from settings of a file and from flags."""

import pytest

from lopd.config.distill import DistillConfig
from lopd.config.parse import build_config
from lopd.config.rollout import RolloutConfig
from lopd.errors import ConfigError


def build(settings=None, flags=None):
    return build_config(RolloutConfig, settings or {}, flags or {}, "r.yaml", "lopd rollout")


NEEDED = {"student": "s", "prompts": "p", "out": "o"}


def test_flags_override_yaml():
    config = build(NEEDED | {"top_p": "0.5", "seed": 3}, {"seed": "4", "max_new_tokens": "7"})
    assert (config.top_p, config.seed, config.max_new_tokens) == (0.5, 4, 7)
    assert config.temperature == 1.0


def test_none_keeps_the_default():
    assert build(NEEDED | {"limit": None}, {"seed": None}).limit is None


def test_dashes_and_underscores_name_the_same_setting():
    assert build(NEEDED | {"max-new-tokens": "7"}).max_new_tokens == 7
    with pytest.raises(ConfigError, match=r"r.yaml: 'top_p' is set twice, with dashes and with"):
        build(NEEDED | {"top-p": "1", "top_p": "1"})


@pytest.mark.parametrize(
    ("settings", "flags", "message"),
    [
        ({"max_new_token": 3}, {}, "r.yaml: unknown setting 'max_new_token'; did you mean"),
        ({"seed": "many"}, {}, "r.yaml: seed: found 'many'; expected a whole number"),
        ({}, {"seed": "1.5"}, "lopd rollout: seed: found '1.5'; expected a whole number"),
        ({"seed": ["--out", "x"]}, {}, "r.yaml: seed: found a list; expected a whole number"),
        ({"out": ["o", "--seed", "3"]}, {}, "r.yaml: out: found a list; expected text"),
        ({"out": {"a": "b"}}, {}, "r.yaml: out: found a mapping; expected text"),
        ({"seed": True}, {}, "r.yaml: seed: found 'True'; expected a whole number"),
        (
            {"student": None},
            {},
            "r.yaml: 'student' is missing [(]Folder .*of the fine-tuned student",
        ),
        ({"top_p": 2}, {}, "top_p: found 2.0"),
        ({}, {"top_p": "nan"}, "top_p: found nan"),
        ({"shard_size": 0}, {}, "shard_size: found 0"),
    ],
)
def test_invalid_settings_are_refused(settings, flags, message):
    with pytest.raises(ConfigError, match=message):
        build(NEEDED | settings, flags)


def test_a_missing_flag_is_named():
    with pytest.raises(ConfigError, match=r"lopd rollout: missing --prompts \(JSONL"):
        build({}, {"student": "s", "out": "o"})


def test_switches():
    paths = {"student": "s", "cache": "c", "out": "o"}
    config = build_config(
        DistillConfig, {"keep_best": "false", "verify": False}, paths, "d.yaml", "lopd distill"
    )
    assert (config.verify, config.keep_best) == (False, False)
