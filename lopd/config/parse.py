"""A stage's config dataclass from YAML, from flags, or from both."""

import difflib
from collections.abc import Sequence
from copy import copy
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, NoReturn

from lopd.config.fields import GROUPS, choices_of
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


def check_keys(names: Any, known: Sequence[str], where: str, what: str = "setting") -> None:
    """Raise ConfigError for a name that is not known, with the closest one that is."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"expected one of {', '.join(known)}"
            raise ConfigError(f"{where}: unknown {what} '{name}'; {hint}")


def build_config(
    config_class: type, settings: dict[str, Any], argv: Sequence[str], where: str, prog: str
) -> Any:
    """A stage's config from a mapping (of the file `where`), overridden by flags.

    Raises ConfigError for an unknown name, a missing one or a value of the wrong type.
    """
    names = [item.name for item in fields(config_class)]
    check_keys(settings, names, where)
    flags = [str(word) for key, value in settings.items() for word in _flag(key, value)]
    check_keys(
        [word[2:].split("=")[0].replace("-", "_") for word in argv if word.startswith("--")],
        [*names, "help", *(f"no_{name}" for name in names)],
        prog,
    )
    parser = _parser(config_class, prog, where if settings else prog)
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


def _parser(config_class: type, prog: str, where: str) -> Any:
    """An argument parser with the settings of a config class, by group."""
    from argparse import ArgumentDefaultsHelpFormatter

    from transformers import HfArgumentParser

    class Formatter(ArgumentDefaultsHelpFormatter):
        def _get_help_string(self, action: Any) -> str | None:
            has_default = action.default is not None and action.nargs != 0
            return super()._get_help_string(action) if has_default else action.help

        def _get_default_metavar_for_optional(self, action: Any) -> str:
            kinds = {int: "INT", float: "FLOAT", str: action.dest.upper()}
            return kinds.get(action.type, "BOOL")

        def _format_action_invocation(self, action: Any) -> str:
            """One spelling of each flag, though dashes are accepted in place of underscores."""
            default = self._get_default_metavar_for_optional(action)
            return f"{action.option_strings[0]} {self._format_args(action, default)}".strip()

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ConfigError(f"{where}: {message}; see {prog} --help")

        def _parse_dataclass_field(self, parser: Any, item: Field) -> None:
            group = groups.get(item.metadata["group"], self)
            item, choices = copy(item), choices_of(item)
            shown = {"metavar": f"{{{','.join(choices)}}}"} if choices else {}
            item.metadata = {"help": item.metadata["help"], **shown}  # type: ignore[assignment]
            super()._parse_dataclass_field(group, item)
            if item.type is bool and item.default is True:
                group._group_actions[-1].help = f"Turn off --{item.name}."

    required = [item.name for item in fields(config_class) if item.default is MISSING]
    words = "".join(f" --{name} {name.upper()}" for name in required)
    used = {item.metadata["group"] for item in fields(config_class)}
    parser = Parser(
        [],
        prog=prog,
        allow_abbrev=False,
        add_help=False,
        formatter_class=Formatter,
        usage=f"{prog} [--config FILE.yaml]{words} [--flag value ...]",
        description=config_class.__doc__,
        epilog="Flags override the settings of the YAML file, which has the same names.",
    )
    groups = {name: parser.add_argument_group(name) for name in GROUPS if name in used}
    parser.dataclass_types = [config_class]
    parser._add_dataclass_arguments(config_class)
    other = parser.add_argument_group("Other")
    other.add_argument("--help", "-h", action="help", help="Show this message and exit.")
    return parser
