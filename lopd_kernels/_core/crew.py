"""Work on a CPU in pieces, which threads take as they become free.

An operator of torch gives each thread an equal part and waits for the last one. If another process
takes one of the cores, the thread there has a third of it, and all wait for it at the end of every
operator. Pieces that are handed out let a thread do as many as it has time for. What a piece
computes does not depend on the thread that does it, so neither do the bits of the result.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

import torch

Piece = TypeVar("Piece")
MOST = 8  # threads that take pieces; more cores than that are divided among them
FEWEST = 8  # pieces; fewer are done one after the other, each by all threads of torch


def size() -> int:
    """How many threads take pieces."""
    return min(torch.get_num_threads(), MOST)


# torch.compile cannot trace the question. `torch.compiler.assume_constant_result` sets this too,
# but imports the compiler and Triton for it.
size._dynamo_marked_constant = True  # type: ignore[attr-defined]


def hand_out(work: Callable[[Piece], None], pieces: Sequence[Piece]) -> None:
    """Call `work` on every piece, in any order and several at a time."""
    count = size()
    if count == 1 or len(pieces) < FEWEST:
        for piece in pieces:
            work(piece)
        return
    left, inference = iter(pieces), torch.is_inference_mode_enabled()
    crew = _crew(os.getpid(), torch.get_num_threads())
    running = [crew.submit(_take, work, left, inference) for _ in range(count)]
    for each in running:
        each.result()


def _take(work: Callable[[Piece], None], left: Iterator[Piece], inference: bool) -> None:
    with torch.inference_mode(inference), torch.no_grad():  # modes belong to a thread
        for piece in left:
            work(piece)


@functools.lru_cache(maxsize=2)
def _crew(process: int, threads: int) -> ThreadPoolExecutor:
    """The threads of a process (a fork has none) in which torch may use `threads`."""
    count = min(threads, MOST)
    crew, ready = ThreadPoolExecutor(count, "lopd"), Barrier(count + 1)

    def prepare() -> None:
        torch.get_num_threads()  # a thread's first question sets its number to the default
        torch.set_num_threads(threads // count)
        ready.wait()

    for _ in range(count):
        crew.submit(prepare)
    ready.wait()
    torch.set_num_threads(threads)  # what a thread sets is also the default of new ones
    return crew
