"""Ragged top-k lists: the cut at `top_p`, and the tail that goes with it.

A list is a prefix of the teacher's top-k and then extra ids. Its tail is the log of the
mass outside the list *as stored*, computed in fp64 from exact values before anything is
quantised: log-probs of dropped entries are added to the tail by logaddexp. Where an id
that the engine's tail contained is listed, it is taken out by

    tail' = tail + log(1 - exp(lp - tail))

and never by 1 - sum, whose error would be that of the whole row.
"""

import math
from dataclasses import dataclass

import numpy as np

from lopd.errors import DataError
from lopd.store.types import TeacherScores
from lopd.store.validate import MASS_TOLERANCE

# What is left of a tail is floored at this share of it: engines' tails are right to about
# 2e-6 of themselves, so a smaller remainder is rounding, and its log would be noise.
REMAINDER_FLOOR = 2.0**-20
# A derived tail below this is the rounding of a mass near one.
TAIL_FLOOR = math.log(2.0**-23)


@dataclass(frozen=True)
class Lists:
    """The lists of R tokens, end to end."""

    ids: np.ndarray  # [E] int32
    logprobs: np.ndarray  # [E] fp32
    lengths: np.ndarray  # [R] int64, sums to E


def build_lists(scores: TeacherScores, top_p: float) -> tuple[Lists, np.ndarray]:  # , [R] fp32
    """The stored lists of one sequence and the log of the mass outside each.

    A list is the smallest prefix of the top-k whose mass reaches `top_p` (all of it when
    `top_p` is 1), then the extra ids that the prefix does not hold.
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
            taken = _logsumexp(np.where(from_tail, scores.extra_logprobs, -np.inf))
            tail = take_from_tail(tail, taken)
        keep = np.concatenate([keep, keep_extra], axis=1)
        ids = np.concatenate([ids, extra], axis=1)
        logprobs = np.concatenate([logprobs, scores.extra_logprobs], axis=1)
    tail = np.logaddexp(tail, _logsumexp(np.where(dropped, top, -np.inf)))
    lists = Lists(ids[keep].astype(np.int32), logprobs[keep].astype(np.float32), keep.sum(axis=1))
    return lists, tail.astype(np.float32)


def derived_tail(
    logprobs: np.ndarray,  # [R, K], -inf pads
    outside: np.ndarray,  # [R], log-prob of a token outside the list, -inf where none is
    full: bool | np.ndarray,  # [R], whether the list is the whole vocabulary
) -> np.ndarray:  # [R] fp32
    """log(1 - sum of the list), in fp64, where nothing better is known.

    -inf when the list is the whole vocabulary. Otherwise at least log 2^-23, the rounding of
    a mass near one, and at least `outside`, whose mass is part of the tail.

    Raises:
        DataError: a list's mass is above 1 by more than rounding.
    """
    mass = _logsumexp(logprobs.astype(np.float64))
    if (over := mass > math.log1p(MASS_TOLERANCE)).any():
        row = int(np.flatnonzero(over)[0])
        raise DataError(f"the list of response token {row} has mass {math.exp(mass[row]):.6f} > 1")
    left = -np.expm1(np.minimum(mass, 0.0))
    with np.errstate(divide="ignore"):
        tail = np.maximum(np.maximum(np.log(left), TAIL_FLOOR), outside)
    return np.where(full, -np.inf, tail).astype(np.float32)


def take_from_tail(tail: np.ndarray, logprobs: np.ndarray) -> np.ndarray:
    """log(exp(tail) - exp(logprobs)), elementwise, floored at log(2^-20) below the tail.

    Exact arithmetic would give -inf, or nothing, where the id taken is all of the tail
    within rounding; the floor leaves what the rounding could hide. `is_floored` tells where.
    """
    tail, logprobs = np.broadcast_arrays(
        np.asarray(tail, np.float64), np.asarray(logprobs, np.float64)
    )
    result = tail.copy()
    some = ~np.isneginf(logprobs)
    share = -np.expm1(logprobs[some] - tail[some])
    result[some] += np.log(np.maximum(share, REMAINDER_FLOOR))
    return result


def is_floored(tail: np.ndarray, logprobs: np.ndarray) -> np.ndarray:  # [R] bool
    """Where `take_from_tail` meets its floor."""
    gap = np.asarray(logprobs, np.float64) - np.asarray(tail, np.float64)
    return -np.expm1(gap) < REMAINDER_FLOOR


def row_sums(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:  # [R] fp64
    """Sums over the rows of flat values [E] of these lengths, 0 for an empty row."""
    sums = np.zeros(len(lengths))
    some = lengths > 0
    starts = np.cumsum(lengths) - lengths
    if some.any():
        sums[some] = np.add.reduceat(values, starts[some], dtype=np.float64)
    return sums


def insert_first(
    lists: Lists,
    ids: np.ndarray,  # [n] int32
    logprobs: np.ndarray,  # [n] fp32
    rows: np.ndarray,  # [R] bool, n of them True
) -> Lists:
    """Put an entry at the head of the lists where `rows` is True."""
    lengths = lists.lengths + rows
    heads = (np.cumsum(lengths) - lengths)[rows]
    others = np.arange(len(lists.ids)) + np.repeat(np.cumsum(rows), lists.lengths)
    all_ids = np.empty(len(lists.ids) + len(ids), np.int32)
    all_logprobs = np.empty(len(all_ids), np.float32)
    all_ids[heads], all_ids[others] = ids, lists.ids
    all_logprobs[heads], all_logprobs[others] = logprobs, lists.logprobs
    return Lists(all_ids, all_logprobs, lengths)


def pad_lists(lists: Lists) -> tuple[np.ndarray, np.ndarray]:  # [R, K_i] int32, [R, K_i] fp32
    """Rectangular copies, -1 and -inf where a list is shorter than the longest."""
    width = int(lists.lengths.max(initial=0))
    shape = (len(lists.lengths), width)
    ids, logprobs = np.full(shape, -1, np.int32), np.full(shape, -np.inf, np.float32)
    starts = np.cumsum(lists.lengths) - lists.lengths
    rows = np.arange(len(lists.lengths)) * width - starts
    places = np.repeat(rows, lists.lengths) + np.arange(len(lists.ids))
    ids.reshape(-1)[places], logprobs.reshape(-1)[places] = lists.ids, lists.logprobs
    return ids, logprobs


def add_sampled(
    lists: Lists,
    tail: np.ndarray,  # [R] fp32
    sampled: np.ndarray,  # [R] int32
    logprobs: np.ndarray,  # [R] fp32, the teacher's, of the sampled tokens
) -> tuple[Lists, np.ndarray]:  # , [R] fp32
    """Append each sampled token to the list that lacks it, and take it out of the tail."""
    absent = ~in_lists(lists, sampled)
    if not absent.any():
        return lists, tail
    ends = np.cumsum(lists.lengths)[absent]
    grown = Lists(
        np.insert(lists.ids, ends, sampled[absent]),
        np.insert(lists.logprobs, ends, logprobs[absent]),
        lists.lengths + absent,
    )
    tail = tail.copy()
    tail[absent] = take_from_tail(tail[absent], logprobs[absent])
    return grown, tail


def in_lists(lists: Lists, tokens: np.ndarray) -> np.ndarray:  # [R] bool
    """Whether row t's list holds tokens[t]."""
    rows = np.repeat(np.arange(len(tokens)), lists.lengths)
    found = np.zeros(len(tokens), bool)
    found[rows[lists.ids == tokens[rows]]] = True
    return found


def drop_ids(
    lists: Lists,
    tail: np.ndarray,  # [R] fp32
    vocab_size: int,
) -> tuple[Lists, np.ndarray]:  # , [R] fp32
    """Drop entries whose id is `vocab_size` or more; their mass goes to the tail."""
    drop = lists.ids >= vocab_size
    if not drop.any():
        return lists, tail
    rows = np.repeat(np.arange(len(tail)), lists.lengths)
    total = tail.astype(np.float64)
    np.logaddexp.at(total, rows[drop], lists.logprobs[drop].astype(np.float64))
    kept = Lists(
        lists.ids[~drop],
        lists.logprobs[~drop],
        lists.lengths - np.bincount(rows[drop], minlength=len(tail)),
    )
    return kept, total.astype(np.float32)


def _logsumexp(values: np.ndarray) -> np.ndarray:  # [R] of [R, K], -inf for an empty row
    return np.logaddexp.reduce(values, axis=1, initial=-np.inf)
