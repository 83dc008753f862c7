"""Top-k lists: the cut at `top_p`, appended and dropped ids, and the tail of each list.

A list is a prefix of the teacher's top-k, followed by extra ids. Its tail is the log of the
mass outside the list *as stored*, computed in fp64 from exact values before anything is
quantised: log-probs of dropped entries are added to the tail by logaddexp. An id that moves
from the tail to the list is subtracted by

    tail' = tail + log(1 - exp(lp - tail))

and never by 1 - sum, which has the rounding error of the whole row.
"""

import math

import numpy as np

from lopd.errors import DataError
from lopd.store.ragged import TopKLists
from lopd.store.types import TeacherColumns, TeacherScores
from lopd.store.validate import MASS_TOLERANCE

# The remainder of a tail is at least this share of it. Engines' tails have a relative error of
# about 2e-6, so a smaller remainder is rounding, and its log would be noise.
REMAINDER_FLOOR = 2.0**-20
# A derived tail below this is rounding of a mass near one.
TAIL_FLOOR = math.log(2.0**-23)


def to_columns(scores: TeacherScores, top_p: float) -> TeacherColumns:
    """The scores of one sequence with the lists that are stored.

    A list is the smallest prefix of the top-k whose mass reaches `top_p` (all of it when
    `top_p` is 1), then the extra ids that the prefix lacks.
    """
    top = scores.topk_logprobs.astype(np.float64)
    before = np.cumsum(np.exp(top), axis=1) - np.exp(top)
    keep = np.ones(top.shape, bool) if top_p >= 1 else before < top_p
    tail = scores.tail_logprobs.astype(np.float64)
    ids, logprobs = scores.topk_ids, scores.topk_logprobs
    dropped = ~keep
    if scores.extra_ids is not None and scores.extra_logprobs is not None:
        extra = scores.extra_ids
        matches = extra[:, None, :] == ids[:, :, None]  # [R, K, E]
        dropped = dropped & ~matches.any(axis=2)
        keep_extra = (extra != -1) & ~(matches & keep[:, :, None]).any(axis=1)
        if scores.extra_tail_logprobs is not None:
            tail = scores.extra_tail_logprobs.astype(np.float64)
        else:
            from_tail = (extra != -1) & ~matches.any(axis=1)
            moved = _logsumexp(np.where(from_tail, scores.extra_logprobs, -np.inf))
            tail = subtract_from_tail(tail, moved)
        keep = np.concatenate([keep, keep_extra], axis=1)
        ids = np.concatenate([ids, extra], axis=1)
        logprobs = np.concatenate([logprobs, scores.extra_logprobs], axis=1)
    tail = np.logaddexp(tail, _logsumexp(np.where(dropped, top, -np.inf)))
    return TeacherColumns(
        teacher_logprobs=scores.teacher_logprobs,
        teacher_entropy=scores.teacher_entropy,
        lists=TopKLists(
            ids[keep].astype(np.int32), logprobs[keep].astype(np.float32), keep.sum(axis=1)
        ),
        tail_logprobs=tail.astype(np.float32),
    )


def derived_tail(
    logprobs: np.ndarray,  # [R, K], -inf pads
    outside: np.ndarray,  # [R], log-prob of a token outside the list, -inf where none is
    full: bool | np.ndarray,  # [R], whether the list is the whole vocabulary
) -> np.ndarray:  # [R] fp32
    """log(1 - sum of the list) in fp64, for engines that do not return a tail.

    -inf when the list is the whole vocabulary. Otherwise at least log 2^-23, the rounding of
    a mass near one, and at least `outside`, whose mass is part of the tail.

    Raises:
        DataError: the mass of a list exceeds 1 by more than rounding.
    """
    mass = _logsumexp(logprobs.astype(np.float64))
    if (over := mass > math.log1p(MASS_TOLERANCE)).any():
        row = int(np.flatnonzero(over)[0])
        raise DataError(f"the list of response token {row} has mass {math.exp(mass[row]):.6f} > 1")
    left = -np.expm1(np.minimum(mass, 0.0))
    with np.errstate(divide="ignore"):
        tail = np.maximum(np.maximum(np.log(left), TAIL_FLOOR), outside)
    return np.where(full, -np.inf, tail).astype(np.float32)


def subtract_from_tail(tail: np.ndarray, logprobs: np.ndarray) -> np.ndarray:
    """log(exp(tail) - exp(logprobs)), elementwise, floored at log(2^-20) below the tail.

    Without the floor the result would be -inf, or undefined, where the id is all of the tail
    within rounding. `is_floored` returns where the floor applies.
    """
    tail, logprobs = np.broadcast_arrays(
        np.asarray(tail, np.float64), np.asarray(logprobs, np.float64)
    )
    result = tail.copy()
    nonzero = ~np.isneginf(logprobs)
    share = -np.expm1(logprobs[nonzero] - tail[nonzero])
    result[nonzero] += np.log(np.maximum(share, REMAINDER_FLOOR))
    return result


def is_floored(tail: np.ndarray, logprobs: np.ndarray) -> np.ndarray:  # [R] bool
    """Where the floor of `subtract_from_tail` applies."""
    gap = np.asarray(logprobs, np.float64) - np.asarray(tail, np.float64)
    return -np.expm1(gap) < REMAINDER_FLOOR


def insert_first(
    lists: TopKLists,
    ids: np.ndarray,  # [n] int32
    logprobs: np.ndarray,  # [n] fp32
    rows: np.ndarray,  # [R] bool, n of them True
) -> TopKLists:
    """Insert an entry at the start of each list where `rows` is True."""
    lengths = lists.lengths + rows
    heads = (np.cumsum(lengths) - lengths)[rows]
    others = np.arange(len(lists.ids)) + np.repeat(np.cumsum(rows), lists.lengths)
    all_ids = np.empty(len(lists.ids) + len(ids), np.int32)
    all_logprobs = np.empty(len(all_ids), np.float32)
    all_ids[heads], all_ids[others] = ids, lists.ids
    all_logprobs[heads], all_logprobs[others] = logprobs, lists.logprobs
    return TopKLists(all_ids, all_logprobs, lengths)


def add_sampled(
    lists: TopKLists,
    tail: np.ndarray,  # [R] fp32
    sampled: np.ndarray,  # [R] int32
    logprobs: np.ndarray,  # [R] fp32, the teacher's, of the sampled tokens
) -> tuple[TopKLists, np.ndarray]:  # , [R] fp32
    """Append each sampled token to the list that lacks it, and subtract it from the tail."""
    absent = ~lists.contains(sampled)
    if not absent.any():
        return lists, tail
    ends = np.cumsum(lists.lengths)[absent]
    grown = TopKLists(
        np.insert(lists.ids, ends, sampled[absent]),
        np.insert(lists.logprobs, ends, logprobs[absent]),
        lists.lengths + absent,
    )
    tail = tail.copy()
    tail[absent] = subtract_from_tail(tail[absent], logprobs[absent])
    return grown, tail


def drop_ids(
    lists: TopKLists,
    tail: np.ndarray,  # [R] fp32
    vocab_size: int,
) -> tuple[TopKLists, np.ndarray]:  # , [R] fp32
    """Drop entries whose id is `vocab_size` or more; add their mass to the tail."""
    drop = lists.ids >= vocab_size
    if not drop.any():
        return lists, tail
    rows = lists.rows
    total = tail.astype(np.float64)
    np.logaddexp.at(total, rows[drop], lists.logprobs[drop].astype(np.float64))
    remaining = TopKLists(
        lists.ids[~drop],
        lists.logprobs[~drop],
        lists.lengths - np.bincount(rows[drop], minlength=len(tail)),
    )
    return remaining, total.astype(np.float32)


def _logsumexp(values: np.ndarray) -> np.ndarray:  # [R] of [R, K], -inf for an empty row
    return np.logaddexp.reduce(values, axis=1, initial=-np.inf)
