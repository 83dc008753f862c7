"""vLLM's output as arrays: log-probs, checked, and the tail derived from them."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lopd.errors import DataError, ModelError
from lopd.store import TeacherScores
from lopd.store.lists import derived_tail
from lopd.store.validate import MASS_TOLERANCE

# Log-probs are returned as Python lists; this many are held at a time.
_ENTRIES_AT_ONCE = 1 << 23


def read_prompt_logprobs(
    i: int,
    flat: Any,  # FlatLogprobs: for each token but the first, its id and the top-k ids
    tokens: np.ndarray,  # [T]
    k: int,
) -> tuple[np.ndarray, np.ndarray]:  # [T - 1, 1 + k] int32, [T - 1, 1 + k] fp32
    """Ids and log-probs of tokens 1 to T - 1: column 0 is the token itself, then the top-k.

    Raises:
        ModelError: entries are missing or belong to other tokens, or a log-prob is invalid.
    """
    expected = (len(tokens) - 1) * (k + 1)
    found = 0 if flat is None else len(flat.token_ids)
    if found != expected or len(flat.logprobs) != expected:
        raise ModelError(
            f"vllm: sequence {i} of {len(tokens)} tokens came back with {found} log-probs, "
            f"expected {expected}; nothing is written, check vllm's version and log"
        )
    ids = np.asarray(flat.token_ids, np.int32).reshape(-1, k + 1)
    logprobs = np.asarray(flat.logprobs, np.float32).reshape(-1, k + 1)
    apart = np.flatnonzero(ids[:, 0] != tokens[1:])
    if len(apart):
        at = int(apart[0])
        raise ModelError(
            f"vllm: sequence {i}: entry {at + 1} is of token {ids[at, 0]}, expected "
            f"{tokens[at + 1]}; its log-probs are not aligned with the tokens"
        )
    bad = np.argwhere(~(logprobs <= MASS_TOLERANCE) | np.isneginf(logprobs))
    if len(bad):
        row, column = bad[0]
        raise ModelError(
            f"vllm: sequence {i}: token {row + 1} has log-prob {logprobs[row, column]}, expected a "
            "finite one, at most 0; check the model's weights, or use a wider --dtype"
        )
    return ids, logprobs


def to_scores(
    i: int,
    ids: np.ndarray,  # [R, 1 + k]
    logprobs: np.ndarray,  # [R, 1 + k]
    vocab_size: int,
) -> TeacherScores:
    """The scores of sequence i, without entropy."""
    sampled, listed = logprobs[:, 0], logprobs[:, 1:]
    inside = (ids[:, 1:] == ids[:, :1]).any(axis=1)
    try:
        tail = derived_tail(
            listed, np.where(inside, -np.inf, sampled), listed.shape[1] == vocab_size
        )
    except DataError as error:
        raise DataError(f"vllm: sequence {i}: {error}; nothing is written") from None
    entropy = np.full(len(sampled), np.nan, np.float32)
    return TeacherScores(sampled.copy(), entropy, ids[:, 1:].copy(), listed.copy(), tail)


def by_entries(sequences: Sequence[np.ndarray], width: int) -> Iterator[range]:
    """Runs of sequences whose log-probs number at most `_ENTRIES_AT_ONCE` (or one sequence)."""
    start, entries = 0, 0
    for i, tokens in enumerate(sequences):
        size = len(tokens) * width
        if i > start and entries + size > _ENTRIES_AT_ONCE:
            yield range(start, i)
            start, entries = i, 0
        entries += size
    if start < len(sequences):
        yield range(start, len(sequences))
