"""Text to values, by the types of fields."""

import doctest
from dataclasses import dataclass, fields
from typing import Any, Literal

import pytest

from lopd.config import parse, strict_yaml, values
from lopd.config.fields import Settings, setting
from lopd.config.values import convert
from lopd.errors import ConfigError


@dataclass(kw_only=True)
class Example(Settings):
    count: int = setting(0, within="[0, inf)", group="Memory", help="Count.")
    share: float | None = setting(None, within="[0, inf)", group="Memory", help="Share.")
    switch: bool = setting(False, group="Memory", help="Switch.")
    size: int | str | None = setting(None, group="Memory", help="Size.")
    kind: Literal["no", "1"] = setting("no", group="Memory", help="Kind.")
    more: dict[str, Any] | str | None = setting(None, group="Memory", help="More.")


ITEMS = {item.name: item for item in fields(Example)}


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("count", "010", 10),
        ("count", "-1", -1),
        ("count", 3, 3),
        ("share", "8e-5", 8e-5),
        ("share", "1", 1.0),
        ("share", 1, 1.0),
        ("switch", "true", True),
        ("switch", "False", False),
        ("size", "12", 12),
        ("size", "2GiB", "2GiB"),
        ("kind", "no", "no"),
        ("kind", "1", "1"),
        ("more", "{a: 1}", "{a: 1}"),
        ("more", {"a": "1"}, {"a": "1"}),
    ],
)
def test_values_take_the_type_of_their_field(name, value, expected):
    found = convert(ITEMS[name], value)
    assert found == expected and type(found) is type(expected)


NONE = "; for none, leave the setting out"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("count", "0x10", "count: found '0x10'; expected a whole number"),
        ("more", "", f"more: found ''; expected a mapping or text{NONE}"),
        ("size", "", f"size: found ''; expected a whole number or text{NONE}"),
        ("count", "1e3", "count: found '1e3'; expected a whole number"),
        ("count", True, "count: found 'True'; expected a whole number"),
        ("count", 1.0, "count: found '1.0'; expected a whole number"),
        ("count", "9" * 9999, f"count: found '{'9' * 77}...'; expected a whole number"),
        ("share", "1:30", "share: found '1:30'; expected a number"),
        ("share", "", "share: found ''; expected a number"),
        ("switch", "yes", "switch: found 'yes'; expected true or false"),
        ("switch", 1, "switch: found '1'; expected true or false"),
        ("kind", {}, "kind: found a mapping; expected text"),
        ("more", ["a"], "more: found a list; expected a mapping or text"),
    ],
)
def test_other_types_are_refused(name, value, message):
    with pytest.raises(ConfigError) as error:
        convert(ITEMS[name], value)
    assert str(error.value) == message


@pytest.mark.parametrize("module", [parse, strict_yaml, values], ids=lambda module: module.__name__)
def test_the_examples_run(module):
    failed, attempted = doctest.testmod(module)
    assert attempted and not failed
