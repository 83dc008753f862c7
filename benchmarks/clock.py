"""Interleaved timing of several steps, and signs of a disturbed measurement."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.recorder import query_gpu

FLUSH_BYTES = 256 << 20
MIN_STEPS, MAX_STEPS = 5, 30  # timed steps of a variant


class Outcome(NamedTuple):
    loss: Tensor | None = None  # [] mean
    dhidden: Tensor | None = None
    dweight: Tensor | None = None
    is_buffer: bool = False  # dweight is the caller's buffer


class Prepared(NamedTuple):
    step: Callable[[], Outcome]  # what is timed
    restore: Callable[[], Any] = lambda: None  # runs before each step, untimed


class Timer:
    """Milliseconds of one step, from cold caches."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        size = FLUSH_BYTES if self.cuda else 0
        self.flush = torch.empty(size, dtype=torch.int8, device=device)

    def __call__(self, prepared: Prepared) -> float:
        prepared.restore()
        if not self.cuda:
            start = time.perf_counter()
            prepared.step()
            return 1e3 * (time.perf_counter() - start)
        self.flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        prepared.step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def take_turns(
    prepared: dict[str, Prepared],
    device: torch.device,
    budget_s: float,
    deadline: float = float("inf"),
    min_steps: int = MIN_STEPS,
) -> tuple[dict[str, dict[str, Any]], dict[str, Exception]]:
    """(times, failures), by name. `budget_s` is per step function; past `deadline` it stops early.

    Each turn has a new order, drawn from a fixed seed, so that no variant always runs with the heat
    or the cached memory that the same other variant leaves.
    """
    timer, order = Timer(device), random.Random(0)
    retries = allocator_retries(device)
    times: dict[str, list[float]] = {name: [] for name in prepared}
    failures: dict[str, Exception] = {}
    wanted: dict[str, int] = {}
    for turn in range(-2, MAX_STEPS):  # two turns of warm-up
        for name, each in order.sample(sorted(prepared.items()), len(prepared)):
            if name in failures or turn >= wanted.get(name, MAX_STEPS):
                continue
            try:
                times[name].append(timer(each))
            except Exception as error:
                failures[name] = error.with_traceback(None)
        if turn == -1:
            for name, warm_up in times.items():
                best = max(min(warm_up, default=1.0), 1e-6)
                wanted[name] = int(np.clip(1e3 * budget_s / best, min_steps, MAX_STEPS))
                warm_up.clear()
        if turn >= 0 and time.monotonic() > deadline:
            break
    about = {"allocator_retries": None, "clocks": None}
    if timer.cuda:
        about = {
            "allocator_retries": allocator_retries(device) - retries,
            "clocks": query_gpu("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu"),
        }
    done = {n: {**summary(each), **about} for n, each in times.items() if n not in failures}
    return done, failures


def allocator_retries(device: torch.device) -> int:
    """How often an allocation failed and was retried after returning the cache to the device."""
    if device.type != "cuda":
        return 0
    return torch.cuda.memory_stats(device).get("num_alloc_retries", 0)


def summary(times: Iterable[float]) -> dict[str, Any]:
    milliseconds = list(times)
    low, middle, high = (float(x) for x in np.percentile(milliseconds, [10, 50, 90]))
    return {
        "median_ms": round(middle, 5),
        "p10_ms": round(low, 5),
        "p90_ms": round(high, 5),
        "repetitions": len(milliseconds),
        "drift": drift(milliseconds),
    }


def drift(times: list[float]) -> float | None:
    """Median of the last half of the steps over that of the first half; None for fewer than 4."""
    half = len(times) // 2
    if half < 2:
        return None
    return round(float(np.median(times[-half:]) / np.median(times[:half])), 4)
