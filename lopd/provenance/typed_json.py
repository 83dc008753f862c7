"""Dataclasses from JSON objects, and back."""

import dataclasses
from collections.abc import Callable, Mapping
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from lopd.config.fields import parse_range

T = TypeVar("T")
Unfit = Callable[[str], Exception]  # the error for a field, by its dotted name


def parse(cls: type[T], value: Any, at: str, unfit: Unfit, **known: Any) -> T:
    """An instance of a dataclass from a JSON object, by the types of the dataclass's fields.

    A field without a default is required. A field `raw` receives the object itself, unknown keys
    included. The metadata `at` of a field is the dotted name of its value, `within` the range of
    its number.

    Args:
        at: the object's name in messages, followed by a dot; empty for the outermost.
        unfit: makes the error for a field that is missing, has another type or is out of range.
        known: fields that are already parsed.
    """
    items = [item for item in dataclasses.fields(cls) if item.name not in known]  # type: ignore[arg-type]
    if not isinstance(value, dict):
        required = (item.name for item in items if item.default is dataclasses.MISSING)
        name = next((name for name in required if name != "raw"), "")
        raise unfit((at + name).removesuffix("."))
    hints = get_type_hints(cls)
    for item in items:
        name = item.metadata.get("at", item.name)
        if item.name == "raw":
            known["raw"] = value
        elif (found := value_at(value, name)) is not None:
            known[item.name] = _convert(hints[item.name], found, at + name, unfit)
            within = item.metadata.get("within")
            if within and found not in (allowed := parse_range(within)):
                raise unfit(f"{at}{name} that is {allowed.words} (found {found})")
        elif item.default is dataclasses.MISSING:
            raise unfit(at + name)
    return cls(**known)


def _convert(hint: Any, value: Any, at: str, unfit: Unfit) -> Any:
    kind = hint
    if NoneType in get_args(hint):
        (kind,) = (option for option in get_args(hint) if option is not NoneType)
    if dataclasses.is_dataclass(kind):
        return parse(kind, value, at + ".", unfit)  # type: ignore[arg-type]
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise unfit(at)
        return tuple(_convert(get_args(kind)[0], item, at, unfit) for item in value)
    if get_origin(kind) is Mapping and dataclasses.is_dataclass(get_args(kind)[1]):
        if not isinstance(value, dict):
            raise unfit(at)
        return {
            name: parse(get_args(kind)[1], item, f"{at}.{name}.", unfit)
            for name, item in value.items()
        }
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not (dict if get_origin(kind) is Mapping else kind):
        raise unfit(at)
    return value


def value_at(value: Any, name: str) -> Any:
    """The value under a dotted name; None if there is none."""
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def plain(value: Any) -> Any:
    """A value with its dataclasses as JSON objects; parsed ones as the objects on disk."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return value.raw if hasattr(value, "raw") else plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
