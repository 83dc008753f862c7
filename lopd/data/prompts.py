"""Prompts from data files, as token ids.

A record is `{"prompt": "text"}`, `{"prompt": [messages]}` or `{"messages": [messages]}`, with an
optional `id` and, for evaluation, an `answer`; `lopd.data.shapes` lists further shapes. A
tokenizer's chat template is applied (a plain string becomes one user message); without a template,
a string is tokenised as it is and messages are refused. A trailing assistant message is the answer
that `lopd sft` trains on; it is not part of the prompt.

`chat_template_kwargs`, `tools`, `documents` and fields that the chat template reads are given to
it. Other fields are ignored, unless the name is close to one that is read and absent.
"""

import difflib
import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lopd.config.prompts import chosen_options
from lopd.data.messages import Message, check_messages
from lopd.data.records import describe_data, read_records
from lopd.data.rendering import PromptEncoder
from lopd.data.shapes import after_marker, at, columns_for, keys_of, shaped
from lopd.data.skipped import Skipped
from lopd.errors import ConfigError, DataError
from lopd.models.limits import ModelLimits

LOG = logging.getLogger(__name__)

# Columns that hold a part of the prompt in other tools.
_SYSTEM = ("system", "system_prompt")
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
MAX_LINE = 1 << 26  # bytes of a record of prompts, its metadata included


@dataclass(frozen=True)
class Prompt:
    """One prompt; its id does not depend on its position in the file."""

    id: str
    tokens: list[int]
    answer: str | None
    place: str = field(default="", compare=False)  # of its record
    teacher: str | None = None  # the name of the teacher that its record is routed to


@dataclass(frozen=True)
class Routes:
    """Which teacher a record goes to: the one whose name is the value of a field."""

    field: str
    teachers: Sequence[str]  # their names
    encoders: Mapping[str, PromptEncoder] | None = None  # of each; None: nothing is encoded

    def teacher_of(self, value: Any, where: str) -> str:
        """The name of the teacher for the value of the field.

        Raises:
            DataError: the record has no such field, or it names no teacher.
        """
        if value is None or not isinstance(value, str | int):
            found = "no such field" if value is None else f"{value!r:.60}"
            raise DataError(
                f"{where}: {self.field}: found {found}; expected the name of a teacher, one of "
                f"{', '.join(self.teachers)}"
            )
        if str(value) not in self.teachers:
            raise DataError(
                f"{where}: {self.field}: found '{value}', which names no teacher; expected one of "
                f"{', '.join(self.teachers)}, or add --teacher '{value}=PATH'"
            )
        return str(value)

    def check_used(self, names: Collection[str | None], path: str | Path) -> None:
        """Raise ConfigError for a teacher that no record goes to."""
        if unused := [name for name in self.teachers if name not in names]:
            raise ConfigError(
                f"teacher: no record of {path} has {self.field} '{unused[0]}'; leave that teacher "
                "out, or correct its name"
            )


def read_shaped(
    path: str | Path,
    encoder: PromptEncoder,
    skipped: Skipped,
    *reads: str,
    also: Sequence[str] = (),
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield `(place, fields)` of each record, under lopd's names; prints the shapes it recognised.

    Args:
        reads: the fields that the caller reads beside the prompt.
        also: columns, or fields inside one (`column.field`), that it reads under their own names.
    """
    columns, shapes = encoder.options.column_map(), set()
    found: set[str] = set()
    skip = skipped.handle if skipped.allowed else None
    for where, record in read_records(path, max_bytes=MAX_LINE, skip=skip):
        try:
            known = shaped(record, where, columns)
            for name in also:
                if (value := at(record, name)) is not None:
                    known.fields[name] = value
            if not columns:
                _check_names(known.fields, where, [*reads, *also, *encoder.fields])
                _check_whole(known.fields, where, encoder.fields)
        except DataError as error:
            skipped.handle(error)
            continue
        found |= known.fields.keys()
        if known.shape is not None and known.shape not in shapes:
            shapes.add(known.shape)
            LOG.info(f"{where}: read as {known.shape}")
        yield where, known.fields
    if found and (unused := sorted(columns.keys() - found - {"system"})):
        raise DataError(f"{path}: no record has '{columns[unused[0]]}', which --columns names")


def _check_names(fields: Mapping[str, Any], where: str, reads: Iterable[str]) -> None:
    """Refuse a name that is close to one that is read and absent, such as `enable_thinkng`."""
    absent = [name for name in reads if name not in fields]
    for key in fields:
        if key in reads or key in ("prompt", "messages", "id"):
            continue
        if near := difflib.get_close_matches(key, absent, n=1, cutoff=0.85):
            raise DataError(
                f"{where}: found '{key}'; did you mean '{near[0]}'? Rename it or, if it is not "
                "meant to be read, name the columns to read with --columns"
            )


def _check_whole(fields: Mapping[str, Any], where: str, reads: Iterable[str]) -> None:
    """Refuse columns that hold a part of the prompt, which would be lost."""
    name = "messages" if "messages" in fields else "prompt"
    for key in (*_SYSTEM, *_MEDIA, "history"):
        value = fields.get(key)
        if key in reads or not value or (key == "history" and not isinstance(value, list)):
            continue
        if key in _SYSTEM:
            read = f"pass --columns {name}=COLUMN,system={key} to put it before the prompt"
        else:
            read = "lopd reads text only" if key in _MEDIA else "write earlier turns as 'messages'"
        raise DataError(
            f"{where}: found '{key}' beside the prompt; {read}, or --columns {name}=COLUMN to "
            "leave it out"
        )


def prompt_of(fields: Mapping[str, Any], where: str) -> str | list[Message]:
    """The prompt of a record: a string, or messages without a trailing assistant turn."""
    name, value = _raw_prompt(fields, where)
    if isinstance(value, str):
        _check_text(value, where)
        return value
    messages = check_messages(value, where, name)
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise DataError(f"{where}: '{name}' holds no message before the assistant's")
    if messages[-1]["role"] == "user" and not messages[-1]["content"].strip():
        raise DataError(f"{where}: the last message of '{name}' is blank; expected text")
    return messages


def _raw_prompt(fields: Mapping[str, Any], where: str) -> tuple[str, Any]:
    keys = [key for key in ("prompt", "messages") if key in fields]
    if len(keys) != 1:
        found = " and ".join(keys) or keys_of(fields)
        choose = "; choose with --columns prompt=prompt or messages=messages" if keys else ""
        raise DataError(
            f"{where}: found {found}; expected exactly one of 'prompt', 'messages'{choose}"
        )
    value = fields[keys[0]]
    if not isinstance(value, list) and not (isinstance(value, str) and keys[0] == "prompt"):
        raise DataError(
            f"{where}: '{keys[0]}' is a {type(value).__name__}, not a list of messages, each with "
            "'role' and 'content' as text; expected the chat format"
        )
    return keys[0], value


def _check_text(text: str, where: str) -> None:
    if not text.strip():
        blank = "blank" if text else "empty"
        raise DataError(f"{where}: 'prompt' is {blank}; expected text or a list of messages")
    if text.lstrip()[:1] == "[" and "role" in text and "content" in text:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return
        if value and all(isinstance(item, dict) and "role" in item for item in value):
            raise DataError(
                f"{where}: 'prompt' is text that holds messages as JSON; expected the messages "
                "themselves: decode it with json.loads"
            )


def encode_record(
    encoder: PromptEncoder, fields: Mapping[str, Any], where: str
) -> tuple[list[int], dict[str, Any]]:
    """Token ids of a record's prompt, and the template's variables that the record sets itself.

    Raises:
        DataError: the record has no usable prompt; names `where`.
    """
    prompt = prompt_of(fields, where)
    kwargs = encoder.template_kwargs(fields, where)
    return encoder.encode(prompt, kwargs, where), encoder.own(kwargs)


def load_prompts(
    path: str | Path,
    encoder: PromptEncoder,
    *,
    limit: int | None = None,
    answers: bool = False,
    routes: Routes | None = None,
) -> list[Prompt]:
    """Read and tokenise the prompts of a file or folder.

    The id is the record's `id`, or a digest of the prompt; a repeated digest gets `#1`, `#2`, ...
    so that reordering the file permutes ids and prompts alike.

    Args:
        answers: whether to read `answer` too, which every record must have then.
        routes: which teacher a record goes to, whose encoder encodes the prompt; `encoder` then
            only says how records are read.

    Raises:
        DataError: there are no prompts, two records have the same `id`, or a record is unusable
            and `skip_bad_records` is not set.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit: found {limit}; expected at least 1")
    prompts: list[Prompt] = []
    places: dict[str, str] = {}
    repeats: Counter[str] = Counter()
    skipped = Skipped(str(path), encoder.options.skip_bad_records)
    reads, also = ["answer"] if answers else [], [] if routes is None else [routes.field]
    for where, fields in read_shaped(path, encoder, skipped, *reads, also=also):
        try:
            teacher = None if routes is None else routes.teacher_of(fields.get(routes.field), where)
            if routes is not None and routes.encoders is not None:
                encoder = routes.encoders[str(teacher)]
            tokens, own = encode_record(encoder, fields, where)
            name = _given_id(fields, where, places)
            answer = _answer(fields, where) if answers else None
        except DataError as error:
            skipped.handle(error)
            continue
        if name is None:
            digest = _digest(fields, own, where)
            name = f"{digest}#{repeats[digest]}" if repeats[digest] else digest
            repeats[digest] += 1
        else:
            places[name] = where
        prompts.append(Prompt(name, tokens, answer, where, teacher))
        skipped.kept += 1
        if limit is not None and len(prompts) == limit:
            break
    skipped.report()
    if not prompts:
        raise DataError(f"{path}: holds no prompts; expected one record per line or row")
    return prompts


def _given_id(fields: Mapping[str, Any], where: str, places: Mapping[str, str]) -> str | None:
    if "id" not in fields:
        return None
    if not isinstance(fields["id"], str | int):
        raise DataError(f"{where}: id is {fields['id']!r:.60}; expected a string or a number")
    name = str(fields["id"])
    if name in places:
        raise DataError(f"{where}: id '{name}' was used at {places[name]}; ids are unique")
    return name


def _digest(fields: Mapping[str, Any], own: Mapping[str, Any], where: str) -> str:
    """16 hex digits of the prompt as the file holds it, and of the variables beside it."""
    _, value = _raw_prompt(fields, where)
    if isinstance(value, list) and value[-1]["role"] == "assistant":
        value = value[:-1]
    text = json.dumps([value, own] if own else value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def _answer(fields: Mapping[str, Any], where: str) -> str:
    if (text := answer_text(fields.get("answer"), where)) is not None:
        return text
    others = {str(key): value for key, value in fields.items() if key != "answer"}
    hint = "expected one in each record, or a column with it: --columns prompt=COLUMN,answer=COLUMN"
    if near := difflib.get_close_matches("answer", others, n=1, cutoff=0.8):
        hint = f"did you mean 'answer' by '{near[0]}'?"
    elif flag := columns_for(others, "prompt", "answer"):
        hint = f"pass {flag}"
    raise DataError(f"{where}: has no 'answer'; {hint}")


def answer_text(value: Any, where: str) -> str | None:
    r"""The expected answer as text; of a solution in GSM8K's form, what follows its `####`.

    >>> answer_text("3 + 5 = 8\n#### 8", "p.jsonl:1"), answer_text(18.0, "p.jsonl:2")
    ('8', '18')
    """
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, list | dict) or (isinstance(value, float) and not math.isfinite(value)):
        raise DataError(
            f"{where}: the answer is {value!r:.60}; expected one text or number; name the column "
            "that holds it with --columns answer=COLUMN"
        )
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)  # a column of integers with gaps is read as floats
    if value is None:
        return None
    text = str(value)
    final = after_marker(text)
    return text if final is None else final


def describe_prompts(path: str | Path, encoder: PromptEncoder) -> dict[str, Any]:
    """A file of prompts for a manifest, with what else decided how it was read."""
    reading = chosen_options(encoder.options)
    if encoder.date is not None:
        reading["date"] = encoder.date
    return describe_data(path) | ({"reading": reading} if reading else {})


def check_prompts(
    prompts: Sequence[Prompt],
    source: str | Path,
    *,
    context: int | None,
    vocab_size: int,
    max_new_tokens: int,
    skip: bool = False,
) -> list[Prompt]:
    """Refuse, or leave out, prompts that a model cannot read or has no room to answer.

    Raises:
        DataError: names the first prompt that exceeds the context with `max_new_tokens`, or has a
            token id beyond the vocabulary; or none is left.
    """
    limits = ModelLimits(
        "the model",
        vocab_size,
        context,
        length_remedy="lower --max-new-tokens or remove long prompts",
        id_remedy="use the tokenizer that belongs to the model",
    )
    skipped, usable = Skipped(str(source), skip), []
    for prompt in prompts:
        name = f"{source}: prompt '{prompt.id}'"
        try:
            limits.check(name, prompt.tokens, max_new_tokens=max_new_tokens)
        except DataError as error:
            skipped.handle(error)
            continue
        usable.append(prompt)
        skipped.kept += 1
    skipped.report()
    if not usable:
        raise DataError(f"{source}: no prompt is left; {skipped.errors[0]}")
    return usable
