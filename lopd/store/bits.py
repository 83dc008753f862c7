"""Packed arrays: fixed-width ids, varints, 8-bit log-probs.

Every function is exact integer arithmetic or rounds to a table of binary fractions, so that the
same input gives the same bytes on every machine.
"""

import math

import numpy as np

from lopd.errors import DataError

_CHUNK = 1 << 16  # numbers per step of the bit packer; a multiple of 8
_VARINT_BYTES = 5  # 35 bits, more than an int32 has

# An unsigned number of four exponent and four mantissa bits: 16 steps of 2^-9 below 2^-5, and
# 16 steps to the octave from there to 992.
MINIFLOATS = np.concatenate(
    [np.arange(16) * 2.0**-9, *((1 + np.arange(16) / 16) * 2.0**e for e in range(-5, 10))]
).astype(np.float32)
_MIDPOINTS = (MINIFLOATS[1:] + MINIFLOATS[:-1]) / 2
MINIFLOAT_LARGEST = float(MINIFLOATS[-1])


def id_bits(vocab_size: int) -> int:
    """Bits that hold every id of the vocabulary: ceil(log2 V), at least 1."""
    return max(1, math.ceil(math.log2(vocab_size)))


def packed_bytes(entries: int, bits: int) -> int:
    """Bytes that `pack_bits` writes."""
    return (entries * bits + 7) // 8


def pack_bits(numbers: np.ndarray, bits: int) -> np.ndarray:  # [ceil(E * bits / 8)] uint8
    """`bits` low bits of every number, end to end, least significant first."""
    out = np.empty(packed_bytes(len(numbers), bits), np.uint8)
    for start in range(0, len(numbers), _CHUNK):
        part = np.ascontiguousarray(numbers[start : start + _CHUNK], "<u4")
        planes = np.unpackbits(part.view(np.uint8).reshape(-1, 4), axis=1, bitorder="little")
        packed = np.packbits(planes[:, :bits].reshape(-1), bitorder="little")
        at = start * bits // 8
        out[at : at + len(packed)] = packed
    return out


def unpack_bits(
    packed: np.ndarray,  # [B] uint8
    index: np.ndarray,  # [n] int64
    bits: int,
) -> np.ndarray:  # [n] int32
    """The numbers at the positions `index` of what `pack_bits` wrote; others are not read.

    A number lies within the 8 bytes that start at its first byte or, near the end, within the
    last 8.
    """
    if len(packed) < 8:
        packed = np.concatenate([packed, np.zeros(8, np.uint8)])
    words = np.ndarray((len(packed) - 7,), "<u8", packed, strides=(1,))
    mask = np.uint64((1 << bits) - 1)
    out = np.empty(len(index), np.int32)
    for start in range(0, len(index), _CHUNK):
        first = index[start : start + _CHUNK] * bits
        byte = np.minimum(first >> 3, len(words) - 1)
        shift = (first - 8 * byte).astype(np.uint64)
        out[start : start + _CHUNK] = (words[byte] >> shift) & mask
    return out


def pack_varints(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # [B] uint8, [E] int64
    """Numbers >= 0 in 7-bit groups, least significant first, bit 7 set on all but the last.

    Also returns the bytes of each number.
    """
    numbers = numbers.astype(np.int64)
    sizes = np.ones(len(numbers), np.int64)
    for step in range(1, _VARINT_BYTES):
        sizes += numbers >= 1 << 7 * step
    starts = np.cumsum(sizes) - sizes
    out = np.empty(int(sizes.sum()), np.uint8)
    for step in range(_VARINT_BYTES):
        wide = slice(None) if step == 0 else np.flatnonzero(sizes > step)
        more = sizes[wide] > step + 1
        out[starts[wide] + step] = (numbers[wide] >> 7 * step & 127) | more * 128
    return out, sizes


def unpack_varints(packed: np.ndarray) -> np.ndarray:  # [E] int64
    """The numbers that `pack_varints` wrote.

    Raises:
        DataError: the bytes end within a number, or one is longer than 5 bytes.
    """
    ends = np.flatnonzero(packed < 128)
    if len(packed) and (not len(ends) or ends[-1] != len(packed) - 1):
        raise DataError("varints end within a number")
    starts = np.empty(len(ends), np.int64)
    starts[:1] = 0
    starts[1:] = ends[:-1] + 1
    numbers = (packed[starts] & 127).astype(np.int64)
    wide = np.flatnonzero(ends > starts)
    step = 1
    while len(wide):
        if step == _VARINT_BYTES:
            raise DataError(f"a varint is longer than {_VARINT_BYTES} bytes")
        at = starts[wide] + step
        numbers[wide] |= (packed[at] & 127).astype(np.int64) << 7 * step
        wide = wide[ends[wide] > at]
        step += 1
    return numbers


def to_minifloats(values: np.ndarray) -> np.ndarray:  # uint8
    """Codes of the nearest `MINIFLOATS`, ties to the larger; negatives become 0."""
    return np.searchsorted(_MIDPOINTS, values, side="right").astype(np.uint8)
