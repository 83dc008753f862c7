"""Settings: complete declarations, checks of ranges and choices, stable identity."""

import json
import math
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pytest

from lopd.cli.commands import COMMANDS
from lopd.config.distill import DistillConfig
from lopd.config.evaluate import EvalConfig
from lopd.config.fields import (
    GROUPS,
    MOST,
    Settings,
    identity_of,
    parse_range,
    setting,
    setting_of,
)
from lopd.config.inference import Sampling
from lopd.config.sft import SftConfig
from lopd.config.training import TrainOptions
from lopd.config.values import kinds_of
from lopd.errors import ConfigError
from lopd.provenance.identity import difference, settings_identity
from lopd.training import run as runs

CONFIGS = [command.config_class() for command in COMMANDS.values()]
SETTINGS = [
    pytest.param(config, item, id=f"{config.__name__}.{item.name}")
    for config in CONFIGS
    for item in fields(config)
]
NUMERIC = [
    pytest.param(*param.values, id=param.id)
    for param in SETTINGS
    for types in [set(get_args(param.values[1].type)) or {param.values[1].type}]
    if types & {int, float} and str not in types
]


def build(config, **changes):
    """A config with the required settings filled in."""
    known = {"gpu_memory": "8GiB", "format": "rollouts"}
    required = [item.name for item in fields(config) if item.default is MISSING]
    required += ["prompts"] * (config is EvalConfig)  # or a cache
    return config(**{name: known.get(name, name) for name in required} | changes)


@pytest.mark.parametrize(("config", "item"), SETTINGS)
def test_every_setting_has_help_group_and_identity(config, item):
    assert item.metadata["help"].endswith(".") and "%" not in item.metadata["help"]
    assert item.metadata["group"] in GROUPS
    assert (item.metadata["group"] == "Required") == (item.default is MISSING)
    assert isinstance(item.metadata["identity"], bool)


@pytest.mark.parametrize(("config", "item"), NUMERIC)
def test_every_number_has_a_range_that_is_checked(config, item):
    allowed = parse_range(item.metadata["within"])
    good = build(config)
    outside = [math.nan, math.inf, -math.inf]
    for bound, away in ((allowed.low, -math.inf), (allowed.high, math.inf)):
        outside.append(math.nextafter(bound, away))
        whole = int(max(-MOST, min(bound, MOST)))
        setattr(good, item.name, bound if float in kinds_of(item) else whole)
        Settings.__post_init__(good)
    for value in outside:
        setattr(good, item.name, value)
        with pytest.raises(ConfigError) as error:
            Settings.__post_init__(good)
        assert str(error.value).startswith(f"{item.name}: found {value}; expected {allowed.words}")


@pytest.mark.parametrize(
    ("text", "inside", "outside", "words"),
    [
        ("[1, inf)", [1, 7.5, 2**64], [0, -1, math.inf, math.nan, "1", None], "at least 1"),
        ("(0, inf)", [5e-324, 1e308], [0, -0.0, math.inf], "a positive number"),
        ("[0, inf)", [0, 3], [-5e-324, math.inf], "0 or a positive number"),
        ("[0, 1)", [0, 0.999], [1, -0.1], "a number in [0, 1)"),
        ("(0, 1]", [1, 5e-324], [0, 1.01], "a number in (0, 1]"),
        ("(-inf, inf)", [0, -1e308], [math.inf, -math.inf, math.nan], "a finite number"),
        ("[1, inf) or -1", [-1, 1], [0, -2, math.nan], "at least 1, or -1"),
    ],
)
def test_ranges(text, inside, outside, words):
    allowed = parse_range(text)
    assert all(value in allowed for value in inside)
    assert not any(value in allowed for value in outside)
    assert allowed.words == words


def test_a_misspelt_range_or_group_fails_at_declaration():
    with pytest.raises(AssertionError, match="expected an interval"):
        setting(0, within="0..1", group="Memory", help="Number.")
    with pytest.raises(AssertionError, match="Memry"):
        setting(0, group="Memry", help="Number.")


@dataclass(kw_only=True)
class Example(Settings):
    path: str = setting(identity=False, help="A folder.")
    count: int = setting(0, within="[0, inf)", group="Memory", remedy="; use 0", help="Count.")
    limit: int | None = setting(None, within="[0, inf)", group="Memory", help="Limit.")
    kind: Literal["a", "b"] = setting("a", group="Memory", help="Kind.")
    engine: str = setting("x", choices=("x", "y"), group="Memory", identity=False, help="Engine.")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": -1}, "count: found -1; expected 0 or a positive number; use 0"),
        ({"count": "3"}, "count: found 3; expected 0 or a positive number; use 0"),
        ({"count": None}, "count: found None; expected 0 or a positive number; use 0"),
        ({"count": 10**5000}, "count: beyond 2^53; expected a smaller number; use 0"),
        ({"limit": -2}, "limit: found -2; expected 0 or a positive number"),
        ({"kind": "c"}, "kind: found 'c'; expected one of a, b"),
        ({"engine": "z"}, "engine: found 'z'; expected one of x, y"),
    ],
)
def test_messages_state_name_value_and_expectation(changes, message):
    with pytest.raises(ConfigError) as error:
        Example(path="p", **changes)
    assert str(error.value) == message


def test_values_of_python_take_the_types_of_their_fields():
    """Manifests hold JSON, which knows no paths and no numbers of numpy."""
    found = Example(path=Path("p"), count=np.int64(3), limit=np.uint8(2), kind="b")
    assert found == Example(path="p", count=3, limit=2, kind="b")
    assert [type(value) for value in vars(found).values()] == [str, int, int, str, str]
    rate = TrainOptions(learning_rate=np.float32(0.5), adam_beta1=0).learning_rate
    assert (type(rate), rate) == (float, 0.5)
    assert Sampling(max_new_tokens=np.int32(3)).max_new_tokens.bit_length() == 2  # it is frozen


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": None}, "path: found 'None'; expected text"),
        ({"path": ["p"]}, "path: found a list; expected text"),
        ({"path": b"p"}, "path: found 'b'p''; expected text"),
        ({"count": 1.0}, "count: found '1.0'; expected a whole number"),
        ({"count": True}, "count: found 'True'; expected a whole number"),
    ],
)
def test_values_of_other_types_are_refused(changes, message):
    with pytest.raises(ConfigError) as error:
        Example(**{"path": "p", **changes})
    assert str(error.value) == message


def test_none_is_allowed_where_it_is_the_default():
    assert Example(path="p", limit=None).limit is None


def test_setting_of_copies_a_declaration_with_changes():
    @dataclass(kw_only=True)
    class Other(Settings):
        count: int = setting_of(Example, "count", default=5, help="Another count.")

    (original,) = (item for item in fields(Example) if item.name == "count")
    (copied,) = fields(Other)
    assert Other().count == 5
    assert copied.metadata == {**original.metadata, "help": "Another count."}
    with pytest.raises(ConfigError, match="count: found -1; expected 0 or a positive number"):
        Other(count=-1)


def test_identity_excludes_declared_settings_and_keeps_unknown_keys():
    config = Example(path="p", count=2)
    assert identity_of(config) == {"count": 2, "limit": None, "kind": "a"}
    stored = {"path": "elsewhere", "count": 1, "engine": "y", "of_another_version": 3}
    older = {"limit": None, "kind": "a"}  # settings that it lacks have their defaults
    assert identity_of(config, stored) == {"count": 1, "of_another_version": 3, **older}


TRAINING = {
    "adam_beta1": 0.9,
    "adam_beta2": 0.98,
    "adam_epsilon": 1e-08,
    "drop_truncated": False,
    "dtype": "float32",
    "fsdp": False,
    "lora_alpha": 32.0,
    "lora_dropout": 0.0,
    "lora_rank": 0,
    "lora_targets": "all-linear",
    "loss_aggregation": "token_mean",
    "max_grad_norm": 1.0,
    "max_steps": -1,
    "min_lr_ratio": 0.0,
    "mixed_precision": "none",
    "num_epochs": 1.0,
    "optim": "adamw_torch_fused",
    "seed": 0,
    "warmup_steps": 0,
}
# None counts as absent, so that older folders, which lack these, can be continued.
READING = dict.fromkeys(("columns", "chat_template_kwargs", "special_tokens", "prompt_date"))
SFT_RECIPE = (
    TRAINING
    | READING
    | {
        "learning_rate": 1e-05,
        "lr_scheduler_type": "cosine",
        "sequences_per_step": 8,
        "weight_decay": 0.0,
    }
)
DISTILL_RECIPE = TRAINING | {
    "advantage_clip": None,
    "allow_incomplete_cache": False,
    "allow_student_mismatch": False,
    "allow_teacher_mismatch": False,
    "allow_tokenizer_mismatch": False,
    "beta": 0.3,
    "clip_range": None,
    "delta": None,  # newer than some runs: a missing key is equal to None
    "entropy_bonus": None,
    "eval_steps": 100,
    "holdout": 0.0,
    "importance": "none",
    "importance_cap": None,
    "keep_best": False,
    "learning_rate": 2e-06,
    "lr_scheduler_type": "constant",
    "objective": "jsd",
    "patience": 0,
    "refresh_batch_size": 64,
    "refresh_every": 0,
    "sequences_per_step": 32,
    "support": "list+sampled",
    "tail": "bucket",
    "temperature": None,
    "token_weights": "none",  # newer too, as are its settings: a missing key counts as the default
    "weight_beta": None,
    "weight_decay": 0.1,
    "weight_entropy": None,
    "weight_share": None,
    "dense_share": None,  # newer, as is tolerance
    "tolerance": None,
}


@pytest.mark.parametrize(
    ("config", "changes", "recipe"),
    [
        (SftConfig, {}, SFT_RECIPE),
        (
            DistillConfig,
            {"objective": "jsd", "beta": 0.3, "gradient_accumulation_steps": 4},
            DISTILL_RECIPE,
        ),
    ],
)
def test_recipes_of_training_runs_are_stable(config, changes, recipe):
    """Folders hold these recipes, so another one would refuse to continue their runs."""
    built = build(config, **changes)
    assert json.dumps(settings_identity(built), sort_keys=True) == json.dumps(
        recipe, sort_keys=True
    )
    stored = json.loads(json.dumps(vars(built))) | {"of_another_version": 1}
    assert settings_identity(built, stored) == recipe | {"of_another_version": 1}


def test_runs_of_a_version_without_a_setting_can_be_continued(tmp_path):
    built = build(DistillConfig)
    new, older = settings_identity(built), asdict(built)
    del older["token_weights"]
    assert settings_identity(built, older) == new
    recorded = {key: value for key, value in new.items() if key != "token_weights"}
    (tmp_path / runs.RECIPE_NAME).write_text(json.dumps(recorded))
    assert not difference(runs.recorded_recipe(tmp_path, built), new)
    changed = settings_identity(build(DistillConfig, token_weights="prefix"))
    words = difference(runs.recorded_recipe(tmp_path, built), changed)
    assert words.startswith("token_weights was 'none', is 'prefix'")


def test_identity_of_evaluations_is_stable():
    assert identity_of(build(EvalConfig)).keys() == {
        *("kl_k", "num_samples", "limit", "max_new_tokens", "temperature", "top_p", "seed"),
        *("judge", "answer_regex", "dtype", *READING),
        "eos_class",  # newer than some runs; None by default
    }
