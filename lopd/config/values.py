"""Values of settings by the types of their fields: from flags, YAML and Python."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import Field
from numbers import Number
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

from lopd.errors import ConfigError

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping",
}


def choices_of(item: Field[Any]) -> tuple[str, ...]:
    """The strings that a field allows; empty if it declares none."""
    literal = get_origin(item.type) is Literal
    return get_args(item.type) if literal else item.metadata.get("choices", ())


def kinds_of(item: Field[Any]) -> tuple[type, ...]:
    """The types that a field takes, None excluded.

    >>> from dataclasses import dataclass, fields
    >>> from lopd.config.fields import setting
    >>> @dataclass
    ... class Example:
    ...     size: int | str | None = setting(None, group="Memory", help="Size.")
    >>> kinds_of(fields(Example)[0])
    (<class 'int'>, <class 'str'>)
    """
    if choices_of(item):
        return (str,)
    kinds = get_args(item.type) if isinstance(item.type, UnionType) else (item.type,)
    return tuple(get_origin(kind) or kind for kind in kinds if kind is not NoneType)


def convert(item: Field[Any], value: Any) -> Any:
    """A setting's value in the type of its field.

    Args:
        value: text, or what is such a value already; also a path, or a number of numpy.

    Raises:
        ConfigError: the value has another type, or is empty text, as that of an unset shell
            variable; numbers are decimal, switches true or false.
    """
    kinds = kinds_of(item)
    found = typed(kinds, value)
    if found is None:
        expected = " or ".join(_WORDS[kind] for kind in kinds)
        if value == "" and str in kinds:
            expected += "; for none, leave the setting out"
        raise ConfigError(f"{item.name}: found {_shown(value)}; expected {expected}")
    return found


def pairs(name: str, texts: Sequence[str]) -> str | dict[str, str]:
    """The value of a flag that may be given several times: its one text, or pairs as a mapping.

    Raises:
        ConfigError: one of several is no NAME=VALUE, or a name is given twice.

    >>> pairs("teacher", ["runs/lr=1"]), pairs("teacher", ["math=a", "code=b"])
    ('runs/lr=1', {'math': 'a', 'code': 'b'})
    """
    if len(texts) == 1:
        return texts[0]
    found: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"{name}: found '{text}' beside others; expected NAME=VALUE of each")
        if key in found:
            raise ConfigError(
                f"{name}: the name '{key}' is given twice, for '{found[key]}' and '{value}'; give "
                "each name once"
            )
        found[key] = value
    return found


def typed(kinds: Sequence[type], value: Any) -> Any:
    """The value as the first of these types that it can be; None if it can be none of them.

    >>> typed((int, float), "010"), typed((int, float), "8e-5"), typed((bool,), "yes")
    (10, 8e-05, None)
    """
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        return next((found for kind in kinds if (found := _read(kind, value)) is not None), None)
    if isinstance(value, Mapping) and dict in kinds:
        return dict(value)
    if isinstance(value, Number) and hasattr(value, "item"):  # of numpy
        value = value.item()
    if type(value) is int and int not in kinds and float in kinds:
        return float(value)
    return value if type(value) in kinds else None


def _read(kind: type, text: str) -> Any:
    if kind is str:
        return text or None
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower())
    try:
        return kind(text) if kind in (int, float) else None
    except ValueError:
        return None


def _shown(value: Any) -> str:
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "a mapping"
    text = str(value)
    return f"'{text}'" if len(text) <= 80 else f"'{text[:77]}...'"
