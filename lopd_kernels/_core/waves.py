"""How many rows of a chunk keep a GPU busy: a model of a call's time from operations and bytes.

A GPU hands out work in waves: as many programs of the row pass as fit, or as many tiles of a
product as it has multiprocessors, run at a time. A last wave that is almost empty takes nearly as
long as a full one. The model counts whole waves, and of each product the larger of its operations
and its bytes. It decides nothing but sizes, so a wrong prediction costs time only.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

TILE_ROWS, TILE_COLUMNS = 128, 256  # of a product, by one multiprocessor
BALANCE = 200  # 16-bit operations in the time in which memory moves a byte: 150 to 280
CLOSE = 1.01  # a difference in time below the model's precision


class Gpu(NamedTuple):
    """What runs at a time."""

    multiprocessors: int
    programs: int  # of the row pass, on one multiprocessor


class Work(NamedTuple):
    """A call with 16-bit operands."""

    n: int
    v: int
    d: int
    hidden_grad: bool  # whether each chunk runs GEMM 2
    weight_grad: bool  # GEMM 3


def occupancy(registers: int, warps: int) -> int:
    """Programs that the registers of a multiprocessor hold, 64 Ki of 32 bits since 2012."""
    return (64 << 10) // (-(-registers // 8) * 8 * 32 * warps)


def best_rows(work: Work, gpu: Gpu, candidates: Iterable[int]) -> int:
    """The most rows among those whose time is within `CLOSE` of the shortest."""
    times = {rows: call_time(work, gpu, rows) for rows in candidates}
    shortest = min(times.values())
    return max(rows for rows, time in times.items() if time <= CLOSE * shortest)


def call_time(work: Work, gpu: Gpu, rows: int) -> float:
    """Of all chunks; the unit is the time in which memory moves a byte."""
    full, rest = divmod(work.n, rows)
    last = _chunk_time(work, gpu, rest) if rest else 0.0
    return full * _chunk_time(work, gpu, rows) + last


def _chunk_time(work: Work, gpu: Gpu, rows: int) -> float:
    v, d = work.v, work.d
    weight = 2.0 * v * d
    time = _product(gpu, rows, v, d, weight + 4.0 * rows * v)  # GEMM 1
    time += 10.0 * rows * v / filled(rows, gpu.multiprocessors * gpu.programs)  # the row pass
    if work.hidden_grad:
        time += _product(gpu, rows, d, v, weight + 2.0 * rows * v)  # GEMM 2
    if work.weight_grad:
        time += _product(gpu, v, d, rows, 4.0 * weight + 2.0 * rows * v)  # GEMM 3, added in fp32
    return time


def _product(gpu: Gpu, rows: int, columns: int, inner: int, moved: float) -> float:
    """Of a product [rows, columns] with sums over `inner` terms."""
    high, wide = -(-rows // TILE_ROWS), -(-columns // TILE_COLUMNS)
    operations = 2.0 * high * TILE_ROWS * wide * TILE_COLUMNS * inner
    return max(operations / BALANCE / filled(high * wide, gpu.multiprocessors), moved)


def filled(pieces: int, places: int) -> float:
    """The share of the places that is used, over all waves.

    >>> round(filled(1664, 132 * 4), 2), round(filled(2048, 132 * 4), 2)
    (0.79, 0.97)
    """
    return pieces / (-(-pieces // places) * places)
