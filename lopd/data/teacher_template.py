"""A template of the teacher's own prompt: text from the fields of a record, as token ids."""

import hashlib
from collections.abc import Mapping
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from lopd.config.prompts import PromptOptions
from lopd.data.rendering import RENDERED_TWICE, PromptEncoder
from lopd.data.shapes import keys_of
from lopd.errors import ConfigError, DataError, LopdError, MissingFileError

# What a template can use besides the fields of a record.
GIVEN = frozenset(("chat", "bos_token", "eos_token", "raise_exception"))


def read_template(path: str | Path) -> str:
    """The text of a template file.

    Raises:
        MissingFileError: there is no such file. ConfigError: it is not text.
    """
    file = Path(path)
    if not file.is_file():
        raise MissingFileError(f"teacher_template: {path}: no such file; expected a jinja template")
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"teacher_template: {path}: cannot be read as UTF-8 ({error})") from error


class TeacherTemplate:
    """Turns a record into the teacher's prompt, up to the start of the answer.

    What the template renders is the text of the prompt, with all of its special tokens; nothing is
    added to it. It can use the record's fields, `chat(messages, **variables)`, which is what the
    teacher's chat template writes for messages, `bos_token` and `eos_token`, and
    `raise_exception(message)`. It runs in jinja's sandbox, like a chat template, and a field that
    the record lacks is an error.

    Args:
        text: of the template.
        source: its file, for messages.
        tokenizer: of the teacher.
        today: the date that chat templates write.

    Raises:
        ConfigError: the template has a syntax error, or reads no field of a record.
    """

    def __init__(self, text: str, source: str, tokenizer: Any, today: date | None = None) -> None:
        from jinja2 import StrictUndefined, TemplateSyntaxError, meta
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self.source, self._tokenizer = source, tokenizer
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols"],
            undefined=StrictUndefined,
        )
        environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
        try:
            self._template = environment.from_string(text)
            reads = meta.find_undeclared_variables(environment.parse(text))
        except TemplateSyntaxError as error:
            raise ConfigError(
                f"teacher_template: {source}:{error.lineno}: {error.message}; expected a jinja "
                "template"
            ) from None
        if not reads - GIVEN - environment.globals.keys():
            raise ConfigError(
                f"teacher_template: {source}: reads no field of the records, so that the teacher "
                "would see no question; expected a field such as {{ prompt }}"
            )
        self._rendered, self._chat = 0, None
        if "chat" in reads:
            self._chat = PromptEncoder(tokenizer, PromptOptions(), today)
        self._plain = PromptEncoder(tokenizer, PromptOptions(special_tokens="as_text"))

    def tokens(self, fields: Mapping[str, Any], where: str) -> list[int]:
        """The teacher's prompt for a record, as token ids.

        Args:
            fields: of the record; those that are None count as absent.

        Raises:
            DataError: the template reads a field that the record lacks, fails, or renders nothing.
        """
        text = self._render(fields, where)
        self._rendered += 1
        if self._rendered <= RENDERED_TWICE and text != self._render(fields, where):
            raise DataError(
                f"{where}: rendered twice, {self.source} gave different texts; expected a template "
                "without random parts"
            )
        if not text.strip():
            raise DataError(
                f"{where}: {self.source} renders nothing; expected the teacher's prompt"
            )
        return self._plain.encode(text, {}, where)

    def _render(self, fields: Mapping[str, Any], where: str) -> str:
        from jinja2 import UndefinedError

        def chat(messages: Any, **variables: Any) -> str:
            assert self._chat is not None
            return self._chat.chat(messages, variables, where)

        given = {
            "chat": chat,
            "bos_token": self._tokenizer.bos_token,
            "eos_token": self._tokenizer.eos_token,
            "raise_exception": partial(_refuse, where, self.source),
        }
        known = {name: value for name, value in (given | dict(fields)).items() if value is not None}
        try:
            return str(self._template.render(known | {"chat": chat}))
        except LopdError:
            raise
        except UndefinedError as error:
            raise DataError(
                f"{where}: {self.source}: {error.message}; found {keys_of(fields)}; write the "
                "field into the record, or ask for it with {% if NAME is defined %}"
            ) from None
        except Exception as error:  # whatever an expression can raise
            found = " ".join((str(error) or type(error).__name__).split())
            raise DataError(f"{where}: {self.source} fails: {found:.200}") from error


def _refuse(where: str, source: str, message: Any) -> None:
    raise DataError(f"{where}: {source} refuses it: {message!s:.200}")


def template_digest(text: str) -> str:
    """sha256 of a template, by which messages name it."""
    return hashlib.sha256(text.encode()).hexdigest()
