"""Settings as dataclass fields: help, group, range and run identity are field metadata."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cache
from numbers import Real
from typing import Any, cast

from lopd.config.values import choices_of, convert
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

MOST = 2**53  # schedules, shares and estimates compute with floats, which hold no larger counts
_UNITS = {"": 1, "b": 1} | {
    letter + unit: base**power
    for power, letter in enumerate("kmgt", 1)
    for unit, base in (("b", 1000), ("ib", 1024), ("", 1024))
}


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, and the number `also`. NaN is never included."""

    low: float
    high: float
    also: float | None
    words: str  # as error messages state it

    def __contains__(self, value: Any) -> bool:
        is_number = isinstance(value, Real)
        return is_number and (self.low <= value <= self.high or value == self.also)


@cache
def parse_range(text: str) -> Range:
    """The range that `[0, 1)`, `(0, inf)` or `[1, inf) or -1` stands for."""
    match = re.fullmatch(r"([\[(])(\S+), (\S+)([\])])(?: or (\S+))?", text)
    assert match is not None, f"found '{text}'; expected an interval such as [0, 1)"
    low, high = float(match[2]), float(match[3])
    if match[1] == "(":
        low = math.nextafter(low, math.inf)
    if match[4] == ")":
        high = math.nextafter(high, -math.inf)
    interval, _, also = text.partition(" or ")
    known = {
        "(-inf, inf)": "a finite number",
        "[0, inf)": "0 or a positive number",
        "(0, inf)": "a positive number",
        "[1, inf)": "at least 1",
    }
    words = known.get(interval, f"a number in {interval}") + (f", or {also}" if also else "")
    return Range(low, high, float(also) if also else None, words)


def setting(
    default: Any = MISSING,
    *,
    help: str,
    group: str = "Required",
    within: str | None = None,
    choices: Sequence[str] = (),
    remedy: str = "",
    off: str = "",
    identity: bool = True,
    many: bool = False,
) -> Any:
    """A dataclass field that declares one setting: its help, group, range and identity.

    Args:
        default: leave it out for a required setting.
        help: text of `--help`.
        group: one of GROUPS, under which `--help` shows the setting.
        within: allowed numbers, an interval such as `[0, 1)`.
        choices: allowed strings; not needed with a `Literal` annotation.
        remedy: end of the error message for a value that is not allowed.
        off: text of `--help` for the flag `--no-NAME` of a switch that is on by default.
        identity: whether the setting belongs to the identity of a run, that is, whether it changes
            the result by more than rounding. Paths do not: inputs are identified by digests.
        many: whether its flag may be given several times, each NAME=VALUE of a mapping.
    """
    assert group in GROUPS, group
    assert within is None or parse_range(within)
    assert (default is True) == bool(off), "only a switch that is on has help for turning it off"
    about = {
        "help": help,
        "group": group,
        "within": within,
        "choices": tuple(choices),
        "remedy": remedy,
        "off": off,
        "identity": identity,
        "many": many,
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
        for item in fields(cast(Any, self)):
            value, remedy = getattr(self, item.name), item.metadata.get("remedy", "")
            if value is None and item.default is None:
                continue
            if (choices := choices_of(item)) and value not in choices:
                expected = f"one of {', '.join(choices)}"
                raise ConfigError(f"{item.name}: found '{value}'; expected {expected}{remedy}")
            if type(value) is int and abs(value) > MOST:
                raise ConfigError(f"{item.name}: beyond 2^53; expected a smaller number{remedy}")
            within = item.metadata.get("within")
            if within and value not in (allowed := parse_range(within)):
                raise ConfigError(f"{item.name}: found {value}; expected {allowed.words}{remedy}")
            if "group" in item.metadata:
                value = convert(item, value)
                object.__setattr__(self, item.name, value)  # the dataclass may be frozen
            check_text(item.name, value)


def check_text(name: str, value: Any) -> None:
    """Refuse text that a stage would take for another file or folder than is meant.

    Raises:
        ConfigError: it begins with `~`, which would be a folder of that name, or ends with the
            carriage return of a script with line ends of Windows; or its bytes are not UTF-8, which
            Python shows as halves of surrogate pairs and manifests cannot hold.
    """
    for text in value.values() if isinstance(value, Mapping) else (value,):
        if not isinstance(text, str):
            continue
        fault = None
        if text.startswith("~/") or text == "~":
            fault = "which is a folder named ~ here: only shells expand it; write the whole path"
        elif text.endswith("\r"):
            fault = "which ends with a carriage return; give the script line ends of Unix"
        elif text != text.encode("utf-8", "replace").decode():
            fault = "whose bytes are not UTF-8; rename the file or folder"
        if fault is not None:
            raise ConfigError(f"{name}: found {text!a}, {fault}")


def defaults_of(config: Any) -> dict[str, Any]:
    """The defaults of a config's settings, but for those that have to be given."""
    return {item.name: item.default for item in fields(config) if item.default is not MISSING}


def identity_of(config: Any, stored: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The settings that belong to the identity of a run.

    Args:
        config: the run's config; its fields declare which settings these are.
        stored: settings of an earlier run of the same stage, such as the `config` of a manifest,
            to return instead of the config's, unknown keys included; those that it lacks, since it
            is older, have their defaults.
    """
    excluded = {item.name for item in fields(config) if not item.metadata.get("identity", True)}
    settings = asdict(config) if stored is None else {**defaults_of(config), **stored}
    return {name: value for name, value in settings.items() if name not in excluded}


def parse_bytes(name: str, value: int | str) -> int:
    """Bytes of `24GiB`, `24G` (the same), `80GB`, `24000MiB` or a number of bytes.

    Raises:
        ConfigError: `value` is not a size, or is not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(value).lower())
    if match is None or match[2] not in _UNITS or not (size := float(match[1]) * _UNITS[match[2]]):
        raise ConfigError(f"{name}: found '{value}'; expected a size such as 24GiB, 80GB or bytes")
    return int(size)
