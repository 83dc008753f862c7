"""Codecs: how the columns of a shard are encoded, and the error of each encoding.

`exact`    int32 ids, fp32 log-probs.
`packed`   ceil(log2 V)-bit ids, fp16 log-probs of the lists; the rest as in `exact`.
`compact`  the sampled token is left out of its list (one bit says whether it was listed), the
           other ids are stored as varints of ascending differences, their log-probs as 8-bit
           floats; tokens are bit-packed, and the remaining columns are fp16.

The lossy codecs store the tail and shift each decoded list to the mass that the tail leaves,
so that list and tail have mass 1 after rounding.
"""

from collections.abc import Mapping
from typing import get_args

import numpy as np

from lopd.config.score import Codec
from lopd.errors import DataError
from lopd.store.bits import (
    MINIFLOAT_LARGEST,
    MINIFLOATS,
    id_bits,
    pack_bits,
    pack_varints,
    to_minifloats,
    unpack_bits,
    unpack_varints,
)
from lopd.store.lists import insert_first, subtract_from_tail
from lopd.store.ragged import Spans, TopKLists, offsets_of
from lopd.store.types import TeacherColumns
from lopd.store.validate import MASS_TOLERANCE

CODECS: tuple[Codec, ...] = get_args(Codec)
_FP16_LOWEST = float(np.finfo(np.float16).min)
_LOWEST = {"exact": -np.inf, "packed": _FP16_LOWEST, "compact": -MINIFLOAT_LARGEST}
# A list of less mass is not shifted: its tail is too close to 1 to determine that mass.
_SHIFTED_MASS = 2.0**-10


def encode(
    columns: TeacherColumns,
    sampled: np.ndarray,  # [R] int32
    row_offsets: np.ndarray,  # [n + 1] int64, sequences among the R tokens
    codec: Codec,
    vocab_size: int,
) -> tuple[dict[str, np.ndarray], TopKLists]:
    """The arrays of a shard, and the lists in the order in which `decode` returns them."""
    lists, tail = columns.lists, columns.tail_logprobs
    dtype = np.float16 if codec == "compact" else np.float32
    arrays: dict[str, np.ndarray] = {}
    stored = lists
    if codec == "exact":
        arrays = {"list_ids": lists.ids, "list_logprobs": lists.logprobs}
    elif codec == "packed":
        ids = pack_bits(lists.ids, id_bits(vocab_size))
        arrays = {"list_ids": ids, "list_logprobs": lists.logprobs.astype(np.float16)}
    else:
        arrays, stored, lists, listed = _encode_compact(lists, sampled, row_offsets)
        tail = tail.copy()
        tail[~listed] = subtract_from_tail(tail[~listed], columns.teacher_logprobs[~listed])
    longest = int(stored.lengths.max(initial=0))
    return {
        "teacher_logprobs": columns.teacher_logprobs.astype(dtype),
        "teacher_entropy": columns.teacher_entropy.astype(dtype),
        "tail_logprobs": tail.astype(dtype),
        "list_offsets": offsets_of(stored.lengths)[row_offsets],
        "list_lengths": stored.lengths.astype(np.min_scalar_type(longest)),
        **arrays,
    }, lists


def _encode_compact(
    lists: TopKLists, sampled: np.ndarray, row_offsets: np.ndarray
) -> tuple[dict[str, np.ndarray], TopKLists, TopKLists, np.ndarray]:
    """Arrays; the lists as stored; the lists as decoded; whether each holds its sampled token."""
    rows = lists.rows
    order = np.argsort(rows << 32 | lists.ids)
    ids, logprobs = lists.ids[order], lists.logprobs[order]
    is_sampled = ids == sampled[rows]
    listed = lists.contains(sampled)
    others = TopKLists(ids[~is_sampled], logprobs[~is_sampled], lists.lengths - listed)
    decoded = insert_first(others, sampled[listed], logprobs[is_sampled], listed)
    first = np.zeros(len(others.ids), bool)
    first[offsets_of(others.lengths)[:-1][others.lengths > 0]] = True
    steps = np.diff(others.ids, prepend=0) - 1
    packed, sizes = pack_varints(np.where(first, others.ids, steps))
    entries = offsets_of(others.lengths)[row_offsets]
    arrays = {
        "list_ids": packed,
        "list_id_offsets": offsets_of(sizes)[entries],
        "list_logprobs": to_minifloats(-others.logprobs),
        "sampled_listed": pack_bits(listed, 1),
    }
    return arrays, others, decoded, listed


def decode(
    arrays: Mapping[str, np.ndarray],
    positions: np.ndarray,  # [n] int64, which sequences of the shard
    sampled: np.ndarray,  # [R] int32, their response tokens
    codec: Codec,
    vocab_size: int,
    *,
    with_sampled: bool = False,
) -> TeacherColumns:
    """The columns of some sequences of a shard, end to end: views where nothing is decoded.

    With `with_sampled`, for codec `compact` only, every list holds its sampled token, and the tail
    is the mass outside that list; otherwise lists and tails are those that were written.

    Raises:
        DataError: the bytes were not written by an encoder.
    """
    rows = Spans.of(arrays["response_offsets"], positions)
    entries = Spans.of(arrays["list_offsets"], positions)
    lengths = rows.take(arrays["list_lengths"]).astype(np.int64)
    wrong = np.add.reduceat(lengths, offsets_of(rows.lengths)[:-1]) != entries.lengths
    if wrong.any():
        raise DataError(f"list lengths of sequence {positions[wrong][0]} do not add up")
    names = ("teacher_logprobs", "teacher_entropy", "tail_logprobs")
    logprobs, entropy, tail = (
        rows.take(arrays[name]).astype(np.float32, copy=False) for name in names
    )
    listed_logprobs = entries.take(arrays["list_logprobs"])
    if codec == "exact":
        ids = entries.take(arrays["list_ids"])
    elif codec == "packed":
        ids = unpack_bits(arrays["list_ids"], entries.index, id_bits(vocab_size))
    else:
        ids = _decode_ids(arrays, positions, lengths)
        listed_logprobs = -MINIFLOATS[listed_logprobs]
    lists = TopKLists(ids, listed_logprobs.astype(np.float32, copy=False), lengths)
    _check_entries(lists, entries, positions, vocab_size)
    if codec == "exact":
        return TeacherColumns(logprobs, entropy, lists, tail)
    if codec == "compact":
        listed = unpack_bits(arrays["sampled_listed"], rows.index, 1).astype(bool)
        insert = np.ones_like(listed) if with_sampled else listed
        tail = np.where(insert, tail, np.logaddexp(tail, logprobs))
        lists = insert_first(lists, sampled[insert], logprobs[insert], insert)
    return TeacherColumns(logprobs, entropy, shift_to_tail(lists, tail), tail)


def _check_entries(
    lists: TopKLists, entries: Spans, positions: np.ndarray, vocab_size: int
) -> None:
    """Refuse ids outside the vocabulary and invalid log-probs."""
    ids, logprobs = lists.ids, lists.logprobs
    if not len(ids):
        return
    if ids.min() < 0 or ids.max() >= vocab_size:
        odd, what = (ids < 0) | (ids >= vocab_size), f"id outside [0, {vocab_size})"
    elif not (logprobs.max() <= MASS_TOLERANCE and logprobs.min() > -np.inf):
        odd = ~(np.isfinite(logprobs) & (logprobs <= MASS_TOLERANCE))
        what = "invalid log-prob (NaN, infinite or above 0)"
    else:
        return
    first = np.flatnonzero(odd)[0]
    owner = positions[np.searchsorted(np.cumsum(entries.lengths), first, side="right")]
    raise DataError(f"sequence {owner} has a listed {what}")


def _decode_ids(
    arrays: Mapping[str, np.ndarray], positions: np.ndarray, lengths: np.ndarray
) -> np.ndarray:  # [E] int32
    steps = unpack_varints(Spans.of(arrays["list_id_offsets"], positions).take(arrays["list_ids"]))
    if len(steps) != lengths.sum():
        raise DataError(f"list ids from sequence {positions[0]} on do not match the list lengths")
    ends = np.cumsum(steps + 1)
    before = np.concatenate([[0], ends])[offsets_of(lengths)[:-1]]
    ids = ends - 1 - np.repeat(before, lengths)
    return np.minimum(ids, np.iinfo(np.int32).max).astype(np.int32)


def shift_to_tail(lists: TopKLists, tail: np.ndarray) -> TopKLists:
    """Shift each list's log-probs so that its mass and its tail's are 1."""
    mass = -np.expm1(tail.astype(np.float64))
    sums = lists.row_sums(np.exp(lists.logprobs))
    shifted = (mass >= _SHIFTED_MASS) & (sums > 0)
    shift = np.zeros(len(tail), np.float32)
    shift[shifted] = np.log(mass[shifted] / sums[shifted])
    return TopKLists(lists.ids, lists.logprobs + np.repeat(shift, lists.lengths), lists.lengths)


def bucket_error(
    exact: TopKLists, exact_tail: np.ndarray, decoded: TopKLists, tail: np.ndarray
) -> np.ndarray:  # [R] fp64
    """sum_b p_b log(p_b / q_b) - p_b + q_b over K + 1 buckets, p exact, q decoded, nat.

    The KL divergence where both have mass 1, and never negative where the mass that an engine
    returned is off by rounding. The lists hold the same ids in the same order.
    """
    listed = exact.row_sums(kl_terms(exact.logprobs, decoded.logprobs))
    return listed + kl_terms(exact_tail, tail)


def kl_terms(p: np.ndarray, q: np.ndarray) -> np.ndarray:  # fp64, as p and q, of log-probs
    """p log(p / q) - p + q of each bucket, never negative; q where p is 0."""
    p, q = p.astype(np.float64), q.astype(np.float64)
    with np.errstate(invalid="ignore"):  # log 0 - log 0, of an empty bucket
        ratio = np.where(np.isneginf(p), 0.0, p - q)
    return np.exp(p) * ratio - np.exp(p) + np.exp(q)


def check_storable(name: str, codec: Codec, columns: TeacherColumns, *more: np.ndarray) -> None:
    """Refuse a log-prob that the codec cannot hold; `more` are those of the rollout.

    Raises:
        DataError: names the sequence, the response token and the id.
    """
    lists, lowest = columns.lists, _LOWEST[codec]
    low = np.flatnonzero(lists.logprobs < lowest)
    if len(low):
        row = int(np.searchsorted(np.cumsum(lists.lengths), low[0], side="right"))
        raise DataError(
            f"{name}: the list of response token {row} has log-prob {lists.logprobs[low[0]]} "
            f"for id {lists.ids[low[0]]}, codec '{codec}' holds {lowest:.0f} at the "
            "lowest; use codec 'exact' or a top_p below 1"
        )
    if codec != "compact":
        return
    for values in (columns.teacher_logprobs, columns.tail_logprobs, *more):
        low = np.flatnonzero((values < _FP16_LOWEST) & ~np.isneginf(values))
        if len(low):
            raise DataError(
                f"{name}: response token {low[0]} has log-prob {values[low[0]]}, codec "
                f"'compact' holds {_FP16_LOWEST:.0f} at the lowest; use codec 'exact'"
            )
