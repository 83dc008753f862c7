"""Ragged top-k lists: the cut at `top_p`, the tail that goes with it, and the bytes.

A list is a prefix of the teacher's top-k and then extra ids. Its tail is the log of the
mass outside the list *as stored*, computed in fp64 from exact values before anything is
quantised: log-probs of dropped entries are added to the tail by logaddexp. Where an id
that the engine's tail contained is listed, it is taken out by

    tail' = tail + log(1 - exp(lp - tail))

and never by 1 - sum, whose error would be that of the whole row.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lopd.cache.records import TeacherScores
from lopd.errors import DataError

Codec = Literal["exact", "packed"]
CODECS: tuple[Codec, ...] = ("exact", "packed")
# What is left of a tail is floored at this share of it: engines' tails are right to about
# 2e-6 of themselves, so a smaller remainder is rounding, and its log would be noise.
REMAINDER_FLOOR = 2.0**-20
_FP16_LOWEST = float(np.finfo(np.float16).min)
_CHUNK = 1 << 16  # entries per step of the bit packer; a multiple of 8


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
        from_tail = (extra != -1) & ~matches.any(axis=1)
        taken = _logsumexp(np.where(from_tail, scores.extra_logprobs, -np.inf))
        tail = take_from_tail(tail, taken)
        keep = np.concatenate([keep, keep_extra], axis=1)
        ids = np.concatenate([ids, extra], axis=1)
        logprobs = np.concatenate([logprobs, scores.extra_logprobs], axis=1)
    tail = np.logaddexp(tail, _logsumexp(np.where(dropped, top, -np.inf)))
    lists = Lists(ids[keep].astype(np.int32), logprobs[keep].astype(np.float32), keep.sum(axis=1))
    return lists, tail.astype(np.float32)


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


def pad_lists(lists: Lists) -> tuple[np.ndarray, np.ndarray]:  # [R, K_i] int32, [R, K_i] fp32
    """Rectangular copies, -1 and -inf where a list is shorter than the longest."""
    width = int(lists.lengths.max(initial=0))
    mask = np.arange(width) < lists.lengths[:, None]
    ids = np.full(mask.shape, -1, np.int32)
    logprobs = np.full(mask.shape, -np.inf, np.float32)
    ids[mask], logprobs[mask] = lists.ids, lists.logprobs
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


def encode(lists: Lists, codec: Codec, vocab_size: int) -> dict[str, np.ndarray]:
    """The arrays that a shard stores for `ids` and `logprobs`.

    `exact`: int32 and fp32. `packed`: ceil(log2 V) bits per id, little-endian, end to end,
    and fp16; the error of a log-prob x is at most 2^-11 |x|, or 2^-25 near zero.
    """
    if codec == "exact":
        return {"list_ids": lists.ids, "list_logprobs": lists.logprobs}
    return {
        "list_ids": pack_bits(lists.ids, id_bits(vocab_size)),
        "list_logprobs": lists.logprobs.astype(np.float16),
    }


def check_packable(name: str, lists: Lists) -> None:
    """Refuse a log-prob that fp16 cannot hold.

    Raises:
        DataError: names the sequence, the response token and the id.
    """
    low = np.flatnonzero(lists.logprobs < _FP16_LOWEST)
    if len(low):
        row = int(np.searchsorted(np.cumsum(lists.lengths), low[0], side="right"))
        raise DataError(
            f"{name}: the list of response token {row} has log-prob {lists.logprobs[low[0]]} "
            f"for id {lists.ids[low[0]]}, codec 'packed' holds {_FP16_LOWEST:.0f} at the "
            "lowest; use codec 'exact' or a top_p below 1"
        )


def decode(
    ids: np.ndarray, logprobs: np.ndarray, start: int, stop: int, codec: Codec, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:  # [stop - start] int32, [stop - start] fp32
    """Entries start..stop of a shard's stored arrays: views for `exact`, new for `packed`."""
    if codec == "exact":
        return ids[start:stop], logprobs[start:stop]
    unpacked = unpack_bits(ids, start, stop, id_bits(vocab_size))
    return unpacked, logprobs[start:stop].astype(np.float32)


def id_bits(vocab_size: int) -> int:
    """Bits that hold every id of the vocabulary: ceil(log2 V), at least 1."""
    return max(1, math.ceil(math.log2(vocab_size)))


def packed_bytes(entries: int, bits: int) -> int:
    """Bytes that `pack_bits` needs."""
    return (entries * bits + 7) // 8


def pack_bits(ids: np.ndarray, bits: int) -> np.ndarray:  # [ceil(E * bits / 8)] uint8
    """`bits` low bits of every id, end to end, least significant first."""
    out = np.empty(packed_bytes(len(ids), bits), np.uint8)
    for start in range(0, len(ids), _CHUNK):
        part = np.ascontiguousarray(ids[start : start + _CHUNK], "<u4")
        planes = np.unpackbits(part.view(np.uint8).reshape(-1, 4), axis=1, bitorder="little")
        packed = np.packbits(planes[:, :bits].reshape(-1), bitorder="little")
        at = start * bits // 8
        out[at : at + len(packed)] = packed
    return out


def unpack_bits(
    packed: np.ndarray, start: int, stop: int, bits: int
) -> np.ndarray:  # [stop - start] int32
    """Ids start..stop of what `pack_bits` wrote, without touching the others.

    Eight ids take `bits` whole bytes, so the j-th id of every group of eight lies at the
    same bits of its group: eight strided passes, no index arrays.
    """
    group = start // 8
    groups = (stop + 7) // 8 - group
    window = np.zeros(groups * bits + 8, np.uint8)
    stored = packed[group * bits : packed_bytes(stop, bits)]
    window[: len(stored)] = stored
    ids = np.empty((groups, 8), np.int32)
    for column in range(8):
        byte, shift = divmod(column * bits, 8)
        word = np.zeros(groups, np.uint64)
        for offset in range((shift + bits + 7) // 8):
            part = window[byte + offset :][: groups * bits : bits]
            word |= part.astype(np.uint64) << np.uint64(8 * offset)
        ids[:, column] = (word >> np.uint64(shift)) & np.uint64((1 << bits) - 1)
    return ids.reshape(-1)[start - group * 8 : stop - group * 8]


def _logsumexp(values: np.ndarray) -> np.ndarray:  # [R] of [R, K], -inf for an empty row
    return np.logaddexp.reduce(values, axis=1, initial=-np.inf)
