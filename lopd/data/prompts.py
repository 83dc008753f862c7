"""Prompts from JSONL or parquet, as token ids.

A line or row is `{"prompt": "text"}`, `{"prompt": [messages]}` or `{"messages": [messages]}`,
with an optional `id` and, for evaluation, an `answer`. A tokenizer's chat template is applied (a
plain string becomes one user message); without a template, a string is tokenised as it is and
messages are refused. A trailing assistant message is the answer that `lopd sft` trains on; it is
not part of the prompt.
"""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lopd.data.jsonl import read_records
from lopd.errors import ConfigError, DataError
from lopd.models.limits import ModelLimits


@dataclass(frozen=True)
class Prompt:
    """One prompt; its id does not depend on its position in the file."""

    id: str
    tokens: list[int]
    answer: str | None


def prompt_messages(record: dict[str, Any], where: str) -> str | list[dict[str, Any]]:
    """The prompt of a record: a string, or messages without a trailing assistant turn."""
    keys = [key for key in ("prompt", "messages") if key in record]
    if len(keys) != 1:
        found = " and ".join(keys) or f"keys {sorted(record)}"
        raise DataError(f"{where}: found {found}; expected exactly one of 'prompt', 'messages'")
    value = record[keys[0]]
    if isinstance(value, str) and keys[0] == "prompt":
        if not value:
            raise DataError(f"{where}: 'prompt' is empty; expected text or a list of messages")
        return value
    if not isinstance(value, list) or not all(
        isinstance(m, dict)
        and isinstance(m.get("role"), str)
        and isinstance(m.get("content"), str | list)
        for m in value
    ):
        raise DataError(
            f"{where}: '{keys[0]}' is not a list of messages, each with 'role' and 'content' "
            "as text; expected the chat format"
        )
    messages = value[:-1] if value and value[-1]["role"] == "assistant" else value
    if not messages:
        raise DataError(f"{where}: '{keys[0]}' holds no message before the assistant's")
    return messages


def encode_prompt(tokenizer: Any, record: dict[str, Any], where: str) -> list[int]:
    """Token ids of a record's prompt, up to the start of the model's answer.

    Raises:
        DataError: the record has no usable prompt; names `where`.
    """
    prompt = prompt_messages(record, where)
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            tokens = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except Exception as error:
            found = " ".join(str(error).split())
            raise DataError(
                f"{where}: the tokenizer's chat template refuses it ({found})"
            ) from error
    elif isinstance(prompt, str):
        tokens = tokenizer(prompt)["input_ids"]
    else:
        raise DataError(
            f"{where}: found messages, but the tokenizer has no chat template; write 'prompt' as "
            "text, or use a model folder whose tokenizer has a template"
        )
    if not tokens:
        raise DataError(f"{where}: the prompt has no tokens; expected at least one")
    return [int(token) for token in tokens]


def load_prompts(path: str | Path, tokenizer: Any, *, limit: int | None = None) -> list[Prompt]:
    """Read and tokenise a prompt file: parquet by its suffix, else JSONL.

    The id is the record's `id`, or a digest of the prompt; a repeated digest gets `#1`, `#2`, ...
    so that reordering the file permutes ids and prompts alike.

    Raises:
        DataError: the file has no prompts, or two records have the same `id`.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit: found {limit}; expected at least 1")
    prompts: list[Prompt] = []
    places: dict[str, str] = {}
    repeats: Counter[str] = Counter()
    for where, record in read_records(path):
        tokens = encode_prompt(tokenizer, record, where)
        if "id" in record:
            if not isinstance(record["id"], str | int):
                raise DataError(f"{where}: id is {record['id']!r}; expected a string or a number")
            name = str(record["id"])
            if name in places:
                raise DataError(f"{where}: id '{name}' was used at {places[name]}; ids are unique")
            places[name] = where
        else:
            text = json.dumps(prompt_messages(record, where), sort_keys=True)
            digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
            name = f"{digest}#{repeats[digest]}" if repeats[digest] else digest
            repeats[digest] += 1
        answer = record.get("answer")
        prompts.append(Prompt(name, tokens, None if answer is None else str(answer)))
        if limit is not None and len(prompts) == limit:
            break
    if not prompts:
        raise DataError(f"{path}: holds no prompts; expected one record per line or row")
    return prompts


def check_prompts(
    prompts: list[Prompt],
    source: str | Path,
    *,
    context: int | None,
    vocab_size: int,
    max_new_tokens: int,
) -> None:
    """Refuse prompts that a model cannot read, or has no room to answer.

    Raises:
        DataError: names the first prompt that exceeds the context with `max_new_tokens`, or has a
            token id beyond the vocabulary.
    """
    limits = ModelLimits(
        "the model",
        vocab_size,
        context,
        length_remedy="lower --max_new_tokens or remove long prompts",
        id_remedy="use the tokenizer that belongs to the model",
    )
    for prompt in prompts:
        name = f"{source}: prompt '{prompt.id}'"
        limits.check(name, prompt.tokens, max_new_tokens=max_new_tokens)
