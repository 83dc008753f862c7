"""vLLM's output as arrays: log-probs, checked, and the tail derived from them."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lopd.errors import ConfigError, DataError, ModelError
from lopd.store import TeacherScores
from lopd.store.lists import derived_tail
from lopd.store.validate import AGREEMENT_NATS, MASS_TOLERANCE

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


def ids_to_ask(tokens: np.ndarray, ids: np.ndarray) -> np.ndarray:  # [R, 1 + E] int32
    """The ids [R, E] to score at the last R tokens, each after the token itself."""
    return np.column_stack([tokens[len(tokens) - len(ids) :], ids]).astype(np.int32)


def read_chosen(
    i: int,
    found: Any,  # [R, 1 + E] of `ids_to_ask`, or None
    ids: np.ndarray,  # [R, 1 + k], the token and the top k
    logprobs: np.ndarray,  # [R, 1 + k]
    asked: np.ndarray,  # [R, E], -1 pads
) -> np.ndarray:  # [R, E] fp32
    """The log-probs of chosen ids of sequence i; what they are at pads is undefined.

    Raises:
        ModelError: they are missing, not finite, or those of other tokens.
    """
    shape = (len(asked), 1 + asked.shape[1])
    if found is None or np.shape(found) != shape:
        raise ModelError(
            f"vllm: sequence {i}: its chosen ids came back as {np.shape(found)}, expected {shape}; "
            "nothing is written, check vllm's version and log"
        )
    apart = np.flatnonzero(~(np.abs(found[:, 0] - logprobs[:, 0]) <= AGREEMENT_NATS))
    if len(apart):
        t = int(apart[0])
        raise ModelError(
            f"vllm: sequence {i}: response token {t} (id {ids[t, 0]}) has log-prob "
            f"{logprobs[t, 0]:.4g} and {found[t, 0]:.4g} among the chosen ids, which are not "
            "aligned with the tokens; nothing is written"
        )
    chosen = np.asarray(found[:, 1:], np.float32)
    if not np.isfinite(chosen[asked >= 0]).all():
        raise ModelError(f"vllm: sequence {i}: a chosen id has no finite log-prob; check the model")
    return chosen


def look_up(
    ids: np.ndarray,  # [R, 1 + V]: the token, then every id
    logprobs: np.ndarray,  # [R, 1 + V]
    asked: np.ndarray,  # [R, E], -1 pads
) -> np.ndarray:  # [R, E] fp32
    """The log-probs of chosen ids, from those of the whole vocabulary."""
    by_id = np.empty((len(ids), ids.shape[1] - 1), np.float32)
    np.put_along_axis(by_id, ids[:, 1:], logprobs[:, 1:], axis=1)
    return np.take_along_axis(by_id, np.maximum(asked, 0), axis=1)


def with_extra(
    i: int,
    scores: TeacherScores,
    sampled: np.ndarray,  # [R] the tokens
    asked: np.ndarray,  # [R, E], -1 pads
    logprobs: np.ndarray,  # [R, E] fp32
    vocab_size: int,
) -> TeacherScores:
    """The scores of sequence i with extra ids, and the tail outside them and the list."""
    ids = asked.astype(np.int32)
    more = (ids >= 0) & ~(ids[:, :, None] == scores.topk_ids[:, None, :]).any(axis=2)
    listed = np.concatenate([scores.topk_logprobs, np.where(more, logprobs, -np.inf)], axis=1)
    inside = (np.concatenate([scores.topk_ids, ids], axis=1) == sampled[:, None]).any(axis=1)
    outside = np.where(inside, -np.inf, scores.teacher_logprobs)
    full = scores.topk_ids.shape[1] + more.sum(axis=1) == vocab_size
    try:
        tail = derived_tail(listed, outside, full)
    except DataError as error:
        raise DataError(f"vllm: sequence {i}: {error}; nothing is written") from None
    return replace(scores, extra_ids=ids, extra_logprobs=logprobs.copy(), extra_tail_logprobs=tail)


def check_readable(sequences: Sequence[np.ndarray], vocab_size: int) -> None:
    """Refuse to read the whole vocabulary at every token of sequences that are too long for it.

    Raises:
        ConfigError: says which vLLM can score chosen ids.
    """
    longest = max(map(len, sequences), default=0)
    if longest * (vocab_size + 1) > _ENTRIES_AT_ONCE:
        raise ConfigError(
            f"support, extra_ids, eos_class: this vllm cannot score chosen ids, and {vocab_size} "
            f"log-probs of each of {longest} tokens are too many to read; use vllm 0.32 or newer "
            "with its V2 model runner (a GPU), or --engine transformers"
        )


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
