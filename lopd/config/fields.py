"""Settings as dataclass fields: help, group, range and run identity are field metadata."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from numbers import Real
from typing import Any, Literal, get_args, get_origin

from lopd.errors import ConfigError

# The groups of `--help`, in their order.
GROUPS = (
    "Required",
    "Model and data",
    "Sampling",
    "Objective",
    "Cache",
    "Evaluation",
    "Optimizer",
    "LoRA",
    "Memory",
    "Engine",
    "Devices and processes",
    "Hold-out and staleness",
    "Logging and checkpoints",
    "Provenance overrides",
)


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, and those in `also`. NaN and infinities are outside."""

    low: float
    high: float
    words: str  # as error messages state it
    also: tuple[float, ...] = ()

    def __contains__(self, value: Any) -> bool:
        is_number = isinstance(value, Real)
        return is_number and (self.low <= value <= self.high or value in self.also)


_LARGEST = sys.float_info.max
ANY_NUMBER = Range(-_LARGEST, _LARGEST, "a finite number")
AT_LEAST_ONE = Range(1, _LARGEST, "at least 1")
NOT_NEGATIVE = Range(0, _LARGEST, "0 or a positive number")
POSITIVE = Range(math.ulp(0.0), _LARGEST, "a positive number")
FROM_0_TO_1 = Range(0, 1, "a number in [0, 1]")
FROM_0_BELOW_1 = Range(0, math.nextafter(1.0, 0.0), "a number in [0, 1)")
ABOVE_0_TO_1 = Range(math.ulp(0.0), 1, "a number in (0, 1]")
BETWEEN_0_AND_1 = Range(math.ulp(0.0), math.nextafter(1.0, 0.0), "a number in (0, 1)")
SEED = Range(0, 2**32 - 1, "an integer in [0, 2**32)")


def setting(
    default: Any = MISSING,
    *,
    help: str,
    group: str = "Required",
    within: Range | None = None,
    choices: Sequence[str] = (),
    remedy: str = "",
    identity: bool = True,
) -> Any:
    """A dataclass field that declares everything there is to know about one setting.

    Args:
        default: leave it out for a required setting.
        help: text of `--help`.
        group: one of GROUPS, under which `--help` shows the setting.
        within: numbers that are allowed.
        choices: strings that are allowed; a `Literal` annotation declares them by itself.
        remedy: what the error message adds for a value that is not allowed.
        identity: whether the setting belongs to the identity of a run: whether it changes the
            result by more than rounding. Inputs and outputs do not, since inputs are identified
            by their digests.
    """
    about = {
        "help": help,
        "group": group,
        "within": within,
        "choices": tuple(choices),
        "remedy": remedy,
        "identity": identity,
    }
    return field(default=default, metadata=about)


def setting_of(declared_in: type, name: str, **changes: Any) -> Any:
    """The setting `name` of another class, with changes such as another `default`."""
    (found,) = (item for item in fields(declared_in) if item.name == name)
    return setting(**{"default": found.default, **found.metadata, **changes})


class Settings:
    """Base of dataclasses of settings: values are checked on construction.

    A subclass checks relations between its settings in `__post_init__`, after `super()`'s.
    """

    def __post_init__(self) -> None:
        check_settings(self)


def check_settings(config: Any) -> None:
    """Raise ConfigError for the first value outside its declared range or choices."""
    for item in fields(config):
        value = getattr(config, item.name)
        if value is None and item.default is None:
            continue
        remedy = item.metadata.get("remedy", "")
        if (choices := choices_of(item)) and value not in choices:
            expected = f"one of {', '.join(choices)}"
            raise ConfigError(f"{item.name}: found '{value}'; expected {expected}{remedy}")
        within = item.metadata.get("within")
        if within is not None and value not in within:
            raise ConfigError(f"{item.name}: found {value}; expected {within.words}{remedy}")


def choices_of(item: Field) -> tuple[str, ...]:
    """The strings that a field allows; empty if it declares none."""
    literal = get_origin(item.type) is Literal
    return get_args(item.type) if literal else item.metadata.get("choices", ())


def identity_of(config: Any, stored: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The settings that belong to the identity of a run.

    Args:
        config: the run's config; its fields declare which settings these are.
        stored: settings of an earlier run of the same stage, such as the `config` of a manifest,
            to return instead of the config's. Keys that are not fields, as of another version,
            are kept.
    """
    excluded = {item.name for item in fields(config) if not item.metadata.get("identity", True)}
    settings = asdict(config) if stored is None else stored
    return {name: value for name, value in settings.items() if name not in excluded}
