"""Demonstrations: prompts with the answers to fine-tune on, from JSONL."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lopd.data.jsonl import read_jsonl
from lopd.data.prompts import encode_prompt
from lopd.errors import DataError, ModelError


@dataclass(frozen=True)
class Demonstration:
    """An answer to a prompt that no model sampled: a rollout without log-probs."""

    prompt_id: str
    sample: int
    tokens: np.ndarray  # [T] int32, prompt, answer, end-of-sequence token
    prompt_length: int
    finish_reason: str
    loss_mask: np.ndarray  # [T] bool


def load_sft_jsonl(path: str | Path, tokenizer: Any) -> list[Demonstration]:
    """Demonstrations from JSONL, tokenised: prompt, answer, end-of-sequence token.

    A line is `{"prompt": ..., "completion": "text"}` or `{"messages": [..., {"role":
    "assistant", "content": "text"}]}`. The prompt is encoded as for rollouts, so that the
    answer starts where generation does.

    Raises:
        DataError: a record has no prompt or no answer (names file and line), or the file is empty.
        ModelError: the tokenizer has no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{path}: answers end with an end-of-sequence token, and the tokenizer has none; "
            "set tokenizer.eos_token and save the folder again"
        )
    records = list(read_jsonl(path))
    prompts = [encode_prompt(tokenizer, record, where) for where, record in records]
    texts = [_answer(record, where) for where, record in records]
    answers = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    demonstrations = []
    for (where, record), prompt, answer in zip(records, prompts, answers, strict=True):
        tokens = np.array([*prompt, *answer, tokenizer.eos_token_id], dtype=np.int32)
        demonstrations.append(
            Demonstration(
                prompt_id=str(record.get("id", where)),
                sample=0,
                tokens=tokens,
                prompt_length=len(prompt),
                finish_reason="stop",
                loss_mask=np.arange(len(tokens)) >= len(prompt),
            )
        )
    if not demonstrations:
        raise DataError(f"{path}: holds no demonstrations; expected one JSON object per line")
    return demonstrations


def _answer(record: dict[str, Any], where: str) -> str:
    if "completion" in record:
        answer = record["completion"]
    else:
        value = record.get("messages", record.get("prompt"))
        last = value[-1] if isinstance(value, list) else {}
        answer = last.get("content") if last.get("role") == "assistant" else None
    if not isinstance(answer, str) or not answer:
        raise DataError(
            f"{where}: found no answer text; expected 'completion', or messages that end with an "
            "assistant message"
        )
    return answer
