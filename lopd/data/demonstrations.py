"""Demonstrations: prompts with the answers to fine-tune on, from data files."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lopd.data.messages import check_messages
from lopd.data.prompts import encode_record, read_shaped
from lopd.data.rendering import MAX_PROMPT, PromptEncoder
from lopd.data.shapes import columns_for
from lopd.data.skipped import Skipped
from lopd.errors import DataError, ModelError

# Keys of an assistant message that a chat template writes and `content` does not hold.
_BESIDE_CONTENT = ("reasoning_content", "reasoning", "thinking", "tool_calls")


@dataclass(frozen=True)
class Demonstration:
    """An answer to a prompt that no model sampled: a rollout without log-probs."""

    prompt_id: str
    sample: int
    tokens: np.ndarray  # [T] int32, prompt, answer, end-of-sequence token
    prompt_length: int
    finish_reason: str
    loss_mask: np.ndarray  # [T] bool


def load_demonstrations(path: str | Path, encoder: PromptEncoder) -> list[Demonstration]:
    """Demonstrations from a file or folder, tokenised: prompt, answer, end-of-sequence token.

    A record is `{"prompt": ..., "completion": "text"}`, `{"messages": [..., {"role": "assistant",
    "content": "text"}]}` or another of the shapes in `lopd.data.shapes`. The prompt is encoded as
    for rollouts, so that the answer starts where generation does.

    Raises:
        DataError: a record has no prompt or no answer (names its place) and `skip_bad_records` is
            not set, or no record is left.
        ModelError: the tokenizer has no end-of-sequence token.
    """
    tokenizer = encoder.tokenizer
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{path}: answers end with an end-of-sequence token, and the tokenizer has none; "
            "set tokenizer.eos_token and save the folder again"
        )
    skipped = Skipped(str(path), encoder.options.skip_bad_records)
    rows, texts = [], []
    for where, fields in read_shaped(path, encoder, skipped, "completion"):
        try:
            text = _answer_text(fields, where)
            prompt, _ = encode_record(encoder, fields, where)
        except DataError as error:
            skipped.handle(error)
            continue
        rows.append((where, str(fields.get("id", where)), prompt))
        texts.append(text)
        skipped.kept += 1
    answers = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    demonstrations = []
    for (where, name, prompt), answer in zip(rows, answers, strict=True):
        try:
            ends = _with_end(answer, encoder, where)
        except DataError as error:
            skipped.kept -= 1
            skipped.handle(error)
            continue
        tokens = np.array([*prompt, *ends], dtype=np.int32)
        demonstrations.append(
            Demonstration(
                prompt_id=name,
                sample=0,
                tokens=tokens,
                prompt_length=len(prompt),
                finish_reason="stop",
                loss_mask=np.arange(len(tokens)) >= len(prompt),
            )
        )
    skipped.report()
    if not demonstrations:
        raise DataError(f"{path}: holds no demonstrations; expected one JSON object per line")
    return demonstrations


def _answer_text(fields: Mapping[str, Any], where: str) -> str:
    answer = fields.get("completion")
    if answer is None:
        value = fields.get("messages", fields.get("prompt"))
        answer = value[-1:] if isinstance(value, list) else None
    if isinstance(answer, list):  # TRL's conversational completion, or the last message
        answer = _assistant_text(answer, where)
    if isinstance(answer, str) and answer and not answer.strip():
        raise DataError(
            f"{where}: the answer is blank ({answer[:20]!r}); expected a text; training on it "
            "would teach the model to say nothing"
        )
    if not isinstance(answer, str) or not answer:
        others = {key: value for key, value in fields.items() if key != "completion"}
        flag = columns_for(others, "prompt", "completion")
        other = f"; or pass {flag}" if flag else ""
        raise DataError(
            f"{where}: found no answer text; expected 'completion', or messages that end with an "
            f"assistant message{other}"
        )
    if len(answer) > MAX_PROMPT:
        raise DataError(
            f"{where}: the answer has {len(answer)} characters; expected at most {MAX_PROMPT}"
        )
    return answer


def _assistant_text(messages: list[Any], where: str) -> str | None:
    if len(messages) != 1 or not isinstance(messages[0], dict):
        raise DataError(
            f"{where}: 'completion' holds {len(messages)} messages; expected one, the assistant's"
        )
    if messages[0].get("role") != "assistant":
        return None
    (message,) = check_messages(messages, where, "the answer")
    if beside := [key for key in _BESIDE_CONTENT if message.get(key)]:
        raise DataError(
            f"{where}: the assistant's message has '{beside[0]}', which training on its content "
            "leaves out; write the whole answer, as the model samples it, as 'content'"
        )
    return str(message["content"])


def _with_end(answer: list[int], encoder: PromptEncoder, where: str) -> list[int]:
    """The ids of an answer and one end-of-sequence token, which must not be inside it."""
    end, choice = encoder.tokenizer.eos_token_id, encoder.options.special_tokens
    if choice == "once" and answer and answer[-1] == end:
        answer = answer[:-1]
    if end in answer and choice != "keep":
        raise DataError(
            f"{where}: the answer holds {encoder.tokenizer.eos_token!r}, the end-of-sequence token "
            "that lopd appends; remove it, or pass --special-tokens once to have one at its end, "
            "or keep to train on it"
        )
    return [*answer, end]
