"""Settings of the stages: a dataclass filled from YAML, from flags, or from both."""

import difflib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from lopd.errors import ConfigError, MissingFileError


def load_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping, or an error that names the file."""
    import yaml

    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file; expected YAML")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"{path}: not YAML ({text})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: found {type(values).__name__}; expected a mapping of settings")
    return values


def check_keys(given: Any, known: Sequence[str], where: str) -> None:
    """Refuse keys that are not settings, with the nearest that is."""
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"expected one of {', '.join(known)}"
            raise ConfigError(f"{where}: unknown setting '{key}'; {hint}")


def build_config(
    config_class: type, settings: dict[str, Any], argv: Sequence[str], where: str, prog: str
) -> Any:
    """A stage's config from a mapping (of the file `where`), overridden by flags.

    Raises ConfigError for an unknown name, a missing one or a value of the wrong type.
    """
    from transformers import HfArgumentParser

    names = [item.name for item in fields(config_class)]
    check_keys(settings, names, where)
    flags = [str(word) for key, value in settings.items() for word in _flag(key, value)]
    check_keys(
        [word[2:].split("=")[0].replace("-", "_") for word in argv if word.startswith("--")],
        [*names, "help", *(f"no_{name}" for name in names)],
        prog,
    )

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ConfigError(f"{where if settings else prog}: {message}; see {prog} --help")

    parser = Parser(config_class, prog=prog, allow_abbrev=False)
    config, stray = parser.parse_args_into_dataclasses(
        [*flags, *argv], look_for_args_file=False, return_remaining_strings=True
    )
    if stray:
        raise ConfigError(f"{prog}: found '{stray[0]}'; expected --flag value pairs")
    return config


def _flag(key: str, value: Any) -> list[Any]:
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{key}", *value]
    return [f"--{key}={value}"]
