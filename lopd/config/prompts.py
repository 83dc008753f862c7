"""Settings of the stages that read prompts: columns, template variables, special tokens, date."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import date
from functools import partial
from typing import Any

from lopd.config.fields import Settings, setting
from lopd.config.parse import check_keys
from lopd.config.strict_yaml import parse_yaml
from lopd.errors import ConfigError

# The names that `--columns` can give to the columns of a file.
TARGETS = (
    "prompt",
    "messages",
    "completion",
    "answer",
    "id",
    "system",
    "tools",
    "documents",
    "chat_template_kwargs",
)

_NOT_TEXT = re.compile(r"(?i)true|false|null|none|-?(0|[1-9]\d*)(\.\d+)?")

_data = partial(setting, group="Model and data")


@dataclass(kw_only=True)
class PromptOptions(Settings):
    """How the records of a file become prompts. The defaults decide nothing."""

    columns: dict[str, Any] | str | None = setting(
        None,
        group="Model and data",
        help="Columns to read, such as prompt=question,answer=reward_model.ground_truth; all "
        "others are ignored. By default the names of the file's columns decide.",
    )
    chat_template_kwargs: dict[str, Any] | str | None = setting(
        None,
        group="Model and data",
        help="Variables for the chat template, a mapping such as '{\"enable_thinking\": false}'; "
        "those of a record override them.",
    )
    special_tokens: str | None = _data(
        None,
        choices=("once", "as_text", "keep"),
        help="Where special tokens are doubtful. once: at most one BOS, and no token after the "
        "text. as_text: the text holds them all; nothing is added and no template applied. keep: "
        "as the tokenizer gives them. By default such a prompt is refused.",
    )
    prompt_date: str | None = _data(
        None,
        help="YYYY-MM-DD: the date that a chat template can write; by default the day on which "
        "the output folder was begun.",
    )
    skip_bad_records: bool = _data(
        False,
        identity=False,  # a run without it fails where it would change the result
        help="Leave out records that cannot be used; they are counted and named.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # One spelling of each, so that runs with the same settings are the same run.
        if columns := self.column_map():
            self.columns = ",".join(f"{name}={columns[name]}" for name in sorted(columns))
        if kwargs := self.template_kwargs():
            self.chat_template_kwargs = json.dumps(kwargs, sort_keys=True)
        if self.prompt_date is not None:
            try:
                date.fromisoformat(self.prompt_date)
            except ValueError:
                raise ConfigError(
                    f"prompt_date: found '{self.prompt_date}'; expected YYYY-MM-DD"
                ) from None

    def column_map(self) -> dict[str, str]:
        """`columns` as a mapping from lopd's names to the file's; empty if it is not set."""
        if self.columns is None:
            return {}
        if isinstance(self.columns, str):
            pairs = [pair.partition("=")[::2] for pair in self.columns.split(",")]
        else:
            pairs = [(name, str(column)) for name, column in self.columns.items()]
        names = {name.strip(): column.strip() for name, column in pairs}
        if len(names) < len(pairs) or not all(name and column for name, column in names.items()):
            raise ConfigError(
                f"columns: found '{self.columns}'; expected NAME=COLUMN,... with each name once"
            )
        check_keys(names, TARGETS, "columns", "name")
        return names

    def template_kwargs(self) -> dict[str, Any]:
        """`chat_template_kwargs` as a mapping; empty if it is not set."""
        given = self.chat_template_kwargs
        if given is None:
            return {}
        if isinstance(given, str):
            try:
                value = json.loads(given)
                json.dumps(value, allow_nan=False)  # what manifests can hold
            except RecursionError:
                raise ConfigError("chat_template_kwargs: nested too deeply") from None
            except ValueError:  # YAML, whose values are text
                given = parse_yaml(given, "chat_template_kwargs")
            else:
                if isinstance(value, dict):
                    return value
                raise ConfigError(
                    f"chat_template_kwargs: found '{given}'; expected a mapping such as "
                    "'{\"enable_thinking\": false}'"
                )
        return {name: _from_text(value) for name, value in given.items()}


def _from_text(value: Any) -> Any:
    """A value of a YAML mapping, where booleans and numbers are text."""
    if isinstance(value, Mapping):
        return {name: _from_text(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_from_text(item) for item in value]
    if not isinstance(value, str) or not _NOT_TEXT.fullmatch(value):
        return value
    return json.loads(value.lower().replace("none", "null"))


def chosen_options(options: PromptOptions) -> dict[str, Any]:
    """The options that are set and always change what is read, for a manifest."""
    values = asdict(options)
    names = [item.name for item in fields(PromptOptions) if item.name != "prompt_date"]
    return {name: values[name] for name in names if values[name]}
