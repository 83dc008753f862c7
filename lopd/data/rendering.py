"""Prompts as token ids: the chat template, its variables and date, and special tokens."""

import difflib
import json
import logging
import re
from collections.abc import Mapping
from datetime import date, datetime, time
from typing import Any

from lopd.config.prompts import PromptOptions
from lopd.data.messages import Message, check_messages
from lopd.errors import ConfigError, DataError

LOG = logging.getLogger(__name__)

MAX_PROMPT = 1 << 23  # characters, some 2 million tokens; tokenising takes 200 bytes for each
RENDERED_TWICE = 32  # prompts, to find a template or tokenizer that is not deterministic
_PROBE = "lopd"
_CALLER = frozenset(  # names that apply_chat_template takes or sets itself
    (
        *("conversation", "messages", "tools", "documents", "chat_template", "tokenize", "padding"),
        *("add_generation_prompt", "continue_final_message", "truncation", "max_length"),
        *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
        *("strftime_now", "raise_exception"),
    )
)
# Fields of a record that other tools give to the template, besides `chat_template_kwargs`.
_PROMPT_FIELDS = ("tools", "documents", "enable_thinking")
# Variables of well-known templates. A field of such a name is not for other readers.
_TEMPLATE_FIELDS = (
    *("reasoning_effort", "thinking_budget", "date_string", "model_identity"),
    *("builtin_tools", "custom_tools"),
)
_FIXED = {"add_generation_prompt": True, "continue_final_message": False}


class PromptEncoder:
    """Turns prompts into token ids, up to the start of the model's answer.

    Args:
        tokenizer: of the model that answers.
        options: settings of the stage; by default none is set.
        today: the date that templates write if the settings name none.

    Raises:
        ConfigError: the chat template does not read a variable of `chat_template_kwargs`.
        DataError: the chat template does not write the text of messages.
    """

    def __init__(
        self, tokenizer: Any, options: PromptOptions | None = None, today: date | None = None
    ) -> None:
        options = options or PromptOptions()
        self.tokenizer, self.options = tokenizer, options
        self.wrote_date = False
        self._now = datetime.combine(
            date.fromisoformat(options.prompt_date)
            if options.prompt_date
            else today or date.today(),
            time(),
        )
        self._as_text = options.special_tokens == "as_text"
        self._encoded, self._said_bare = 0, False
        bare, added = (
            tokenizer(_PROBE, add_special_tokens=add)["input_ids"] for add in (False, True)
        )
        places = [i for i in range(len(added)) if bare and added[i : i + len(bare)] == bare]
        at, end = (places[0], places[0] + len(bare)) if places else (0, len(added))
        self._prefix, self._suffix = added[:at], added[end:]
        self.has_template = bool(tokenizer.chat_template) and not self._as_text
        self.variables = _variables(tokenizer.chat_template) if self.has_template else frozenset()
        self._kwargs = options.template_kwargs()
        self._check_kwargs(self._kwargs, "chat_template_kwargs", ConfigError)
        self._takes_parts, self._written = False, frozenset[str]()
        self._writes_role: dict[str, bool] = {}
        if self.has_template:
            self._takes_parts = self._needs_parts()
            self._written = self._written_tokens()

    @property
    def date(self) -> str | None:
        """The date that the template wrote into prompts, None if it wrote none."""
        return self._now.date().isoformat() if self.wrote_date else None

    def template_kwargs(self, fields: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The template's variables for a record: its own fields over those of the settings.

        Raises:
            DataError: a field that changes prompts elsewhere is not read by this template.
        """
        own = fields.get("chat_template_kwargs") or {}
        if isinstance(own, str):
            own = _from_json(own, where, "chat_template_kwargs")
        if not isinstance(own, Mapping):
            raise DataError(f"{where}: 'chat_template_kwargs' is {own!r:.60}; expected an object")
        named = {key: fields[key] for key in fields if key in self.variables - _CALLER}
        for key in (*_PROMPT_FIELDS, *_TEMPLATE_FIELDS):
            value = fields.get(key)
            if value is not None and value != []:
                is_text = key in ("tools", "documents") and isinstance(value, str)
                named[key] = _from_json(value, where, key) if is_text else value
        if isinstance(named.get("enable_thinking"), str):
            raise DataError(f"{where}: 'enable_thinking' is text; expected true or false")
        for key, only in _FIXED.items():
            if fields.get(key, only) != only or own.get(key, only) != only:
                raise DataError(
                    f"{where}: found {key} {not only}; expected a prompt that ends where the "
                    f"answer begins; remove it"
                )
        if fields.get("chat_template"):
            raise DataError(
                f"{where}: found a chat_template; the template is the tokenizer's; save it there"
            )
        named |= {key: value for key, value in own.items() if key not in _FIXED}
        named = {key: value for key, value in named.items() if value is not None}
        for key in ("tools", "documents"):
            value = named.get(key, [])
            if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
                raise DataError(f"{where}: '{key}' is {value!r:.60}; expected a list of objects")
        self._check_kwargs(named, where, DataError)
        return {**self._kwargs, **named}

    @property
    def fields(self) -> list[str]:
        """The names of a record's fields that this encoder reads."""
        return ["chat_template_kwargs", *_PROMPT_FIELDS, *sorted(self.variables - _CALLER)]

    def own(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Those of a record's `template_kwargs` that it sets itself."""
        missing = object()
        return {k: v for k, v in kwargs.items() if self._kwargs.get(k, missing) != v}

    def _check_kwargs(
        self, kwargs: Mapping[str, Any], where: str, error: type[ConfigError | DataError]
    ) -> None:
        readable = self.variables - _CALLER | self.variables & {"tools", "documents"}
        remedy = "remove it"
        if error is DataError:
            remedy += ", or name the columns to read with --columns"
        for key in kwargs:
            if key in readable:
                continue
            if not self.has_template:
                raise error(f"{where}: found '{key}', but {self._no_template()}; {remedy}")
            near = difflib.get_close_matches(key, readable, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"it reads {sorted(readable)}"
            raise error(f"{where}: the chat template does not read '{key}'; {hint}; {remedy}")

    def encode(
        self, prompt: str | list[Message], kwargs: Mapping[str, Any], where: str
    ) -> list[int]:
        """Token ids of a prompt.

        Raises:
            DataError: the template refuses it, it is too long, its special tokens are doubtful, or
                encoding it again gives something else.
        """
        texts = [prompt] if isinstance(prompt, str) else [m["content"] for m in prompt]
        if (length := sum(map(len, texts))) > MAX_PROMPT:
            raise DataError(f"{where}: found {length} characters; expected at most {MAX_PROMPT}")
        tokens = self._tokens(prompt, kwargs, where)
        self._encoded += 1
        again = self._encoded <= RENDERED_TWICE and length < 1 << 16
        if again and tokens != self._tokens(prompt, kwargs, where):
            raise DataError(
                f"{where}: encoded twice, the prompt gave different tokens; expected a chat "
                "template and a tokenizer without random parts (filter random, dropout)"
            )
        if not tokens:
            raise DataError(f"{where}: the prompt has no tokens; expected at least one")
        return [int(token) for token in tokens]

    def _tokens(
        self, prompt: str | list[Message], kwargs: Mapping[str, Any], where: str
    ) -> list[int]:
        if self.has_template:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            text = self._chat(messages, kwargs, where)
            tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            return self._once(tokens, [self.tokenizer.bos_token_id], [], where)
        if not isinstance(prompt, str):
            raise DataError(
                f"{where}: found messages, but {self._no_template()}; write 'prompt' as text, or "
                "use a model folder whose tokenizer has a template"
            )
        tokens = self.tokenizer(prompt, add_special_tokens=not self._as_text)["input_ids"]
        if not self._as_text:
            return self._once(tokens, self._prefix, self._suffix, where)
        if tokens[: len(self._prefix)] != self._prefix and not self._said_bare:
            self._said_bare = True
            first = self.tokenizer.convert_ids_to_tokens(self._prefix)[0]
            LOG.warning(
                f"{where}: as_text: the text does not begin with {first!r}, which the tokenizer "
                "puts before other texts"
            )
        return tokens

    def chat(self, messages: Any, kwargs: Mapping[str, Any], where: str) -> str:
        """What the chat template writes for messages, up to the start of the answer.

        Raises:
            DataError: there is no chat template, it refuses them, or does not read a variable.
        """
        if not self.has_template:
            raise DataError(f"{where}: {self._no_template()}; write the text of the prompt itself")
        self._check_kwargs(kwargs, where, DataError)
        return self._chat(check_messages(messages, where, "messages"), kwargs, where)

    def _chat(self, messages: list[Message], kwargs: Mapping[str, Any], where: str) -> str:
        self._check_unrendered(messages, where)
        try:
            text = self._render(messages, kwargs)
        except Exception as error:
            found = " ".join(str(error).split())
            raise DataError(
                f"{where}: the tokenizer's chat template refuses it ({found})"
            ) from error
        self._check_roles(messages, where)
        return text

    def _no_template(self) -> str:
        if self._as_text:
            return "--special-tokens as_text applies no chat template"
        return "the tokenizer has no chat template"

    def _render(self, messages: list[Message], kwargs: Mapping[str, Any]) -> str:
        if self._takes_parts:
            messages = [
                {**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages
            ]
        pinned = {"strftime_now": self._strftime} if "strftime_now" in self.variables else {}
        text = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, **pinned, **kwargs
        )
        assert isinstance(text, str)
        return text

    def _strftime(self, form: str) -> str:
        self.wrote_date = True
        return self._now.strftime(form)

    def _once(
        self, tokens: list[int], prefix: list[int], suffix: list[int], where: str
    ) -> list[int]:
        """Check, or repair, what stands before and after the text."""
        choice, size = self.options.special_tokens, len(prefix)
        twice = bool(prefix) and tokens[:size] == tokens[size : 2 * size] == prefix
        if choice == "keep" or not (twice or suffix):
            return tokens
        if choice == "once":
            tokens = tokens[size:] if twice else tokens
            return tokens[: len(tokens) - len(suffix)] if suffix else tokens
        names = self.tokenizer.convert_ids_to_tokens(prefix if twice else suffix)
        found = (
            f"begins with {names[0]!r} twice, once in the text and once added"
            if twice
            else f"ends with {names[0]!r}, which the tokenizer adds, so the answer would follow it"
        )
        raise DataError(
            f"{where}: the prompt {found}; pass --special-tokens once to have it "
            f"{'once' if twice else 'left out'}, or keep to leave it so"
        )

    def _check_unrendered(self, messages: list[Message], where: str) -> None:
        if self.options.special_tokens == "keep":
            return
        for message in messages:
            if message["role"] == "assistant":  # may hold calls or channels in the model's format
                continue
            text = message["content"]
            if found := [token for token in self._written if token in text]:
                first = min(found, key=text.find)
                raise DataError(
                    f"{where}: the text holds {first!r}, which the chat template writes: a "
                    "template seems to be applied already; pass --special-tokens as_text to take "
                    "the text as it is, or keep to apply the template to it"
                )

    def _check_roles(self, messages: list[Message], where: str) -> None:
        """Refuse messages of a role of which the template writes nothing."""
        for message in messages:
            role = message["role"]
            if role in ("user", "assistant", "tool") or not message["content"].strip():
                continue  # a template can write answers and results of tools in its own way
            if role not in self._writes_role:
                self._writes_role[role] = self._probe(role) != "lost"
            if not self._writes_role[role]:
                raise DataError(
                    f"{where}: found a message of the role '{role}', of which the chat template "
                    "writes nothing; put its text into the user's message, or leave it out"
                )

    def _needs_parts(self) -> bool:
        """Whether the template writes the text of a message only if it is a list of parts."""
        outcomes = []
        for takes_parts in (False, True):
            self._takes_parts = takes_parts  # which `_probe` renders by
            outcomes.append(self._probe())
            if outcomes[-1] == "written":
                return takes_parts
        if outcomes[0] == "refused":  # each record will say why
            return False
        raise DataError(
            "the tokenizer's chat template writes prompts without the text of the user's message; "
            "use a model folder with a template for text"
        )

    def _probe(self, role: str = "user") -> str:
        messages, other = [{"role": role, "content": _PROBE}], {"role": "user", "content": "1"}
        if role in ("system", "developer"):
            messages = [*messages, other]
        elif role != "user":
            messages = [other, *messages]
        try:
            text = self._render(messages, self._kwargs)
        except Exception:  # a template can ask for other messages
            return "refused"
        return "written" if _PROBE in text else "lost"

    def _written_tokens(self) -> frozenset[str]:
        """The special tokens that the template itself writes."""
        user, answer = ({"role": role, "content": _PROBE} for role in ("user", "assistant"))
        rendered = ""
        for messages in ([user], [user, answer, user]):
            try:
                rendered += self._render(messages, self._kwargs)
            except Exception:  # as above
                continue
        added = self.tokenizer.added_tokens_decoder.values()
        special = {str(token) for token in added if token.special}
        self.wrote_date = False  # by the probes
        return frozenset(
            token for token in special | set(self.tokenizer.all_special_tokens) if token in rendered
        )


def _variables(template: str | Mapping[str, str]) -> frozenset[str]:
    """The variables that a chat template takes; empty if it cannot be parsed.

    A name that the template sets itself is taken only if the template asks whether it is defined,
    as in `{% if not date_string is defined %}{% set date_string = ... %}`, or has a default for it.

    >>> sorted(_variables("{% set a = b %}{{ a }}{% set c = c | default(1) %}"))
    ['b', 'c']
    """
    from jinja2 import TemplateError, meta, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    found: set[str] = set()
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    for text in [template] if isinstance(template, str) else template.values():
        # A tag of transformers, which marks the text of answers.
        text = re.sub(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}", "", text)
        try:
            tree = environment.parse(text)
            read = meta.find_undeclared_variables(tree)
        except TemplateError:
            continue  # rendering names the fault
        names = list(tree.find_all(nodes.Name))
        own, arguments = ({n.name for n in names if n.ctx == c} for c in ("store", "param"))
        for node in tree.find_all((nodes.Test, nodes.Filter)):
            asks = node.name in ("defined", "undefined", "default", "d")
            if asks and isinstance(node.node, nodes.Name) and node.node.name not in arguments:
                own.discard(node.node.name)
        found |= read - own
    return frozenset(found - set(environment.globals))


def parse_date(text: Any, where: str) -> date:
    """The date that an artefact records.

    Raises:
        DataError: it is not one; names `where`.
    """
    try:
        return date.fromisoformat(text)
    except (TypeError, ValueError):
        raise DataError(
            f"{where}: the date of its prompts is {text!r:.40}; restore the file"
        ) from None


def _from_json(text: str, where: str, key: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise DataError(f"{where}: '{key}' is {text!r:.60}; expected an object, not text") from None
