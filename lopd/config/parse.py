"""A stage's config from settings by name: those of a YAML file, and flags that override them."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from lopd.config.values import convert
from lopd.errors import ConfigError

Config = TypeVar("Config")


def flag(name: str) -> str:
    """The flag of a setting.

    >>> flag("batch_size")
    '--batch-size'
    """
    return "--" + name.replace("_", "-")


def check_keys(
    names: Iterable[Any], known: Sequence[str], where: str, what: str = "setting"
) -> None:
    """Raise ConfigError for a name that is not known, with the closest one that is."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"expected one of {', '.join(known)}"
            raise ConfigError(f"{where}: unknown {what} '{name}'; {hint}")


def underscored(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings by the names of their fields; YAML may write dashes, as flags do.

    Raises:
        ConfigError: a setting is given in both spellings.
    """
    found: dict[str, Any] = {}
    for key, value in settings.items():
        name = key.replace("-", "_")
        if name in found:
            raise ConfigError(f"{where}: '{name}' is set twice, with dashes and with underscores")
        found[name] = value
    return found


def build_config(
    config_class: type[Config],
    settings: Mapping[str, Any],
    flags: Mapping[str, Any],
    where: str,
    prog: str,
) -> Config:
    """A stage's config from a mapping (of the file `where`), overridden by flags.

    A value of None keeps the default.

    Raises:
        ConfigError: an unknown name, a missing one, or a value of the wrong type or range.
    """
    known = {item.name: item for item in fields(config_class)}  # type: ignore[arg-type]
    settings = underscored(settings, where)
    check_keys(settings, list(known), where)
    values = {}
    for source, given in ((where, settings), (prog, flags)):
        for name, value in given.items():
            if value is not None:
                try:
                    values[name] = convert(known[name], value)
                except ConfigError as error:
                    raise ConfigError(f"{source}: {error}") from None
    for name, item in known.items():
        if item.default is MISSING and name not in values:
            about = item.metadata["help"].rstrip(".")
            missing = f"'{name}' is missing" if settings else f"missing {flag(name)}"
            raise ConfigError(f"{where if settings else prog}: {missing} ({about})")
    return config_class(**values)
