"""Statistics of a run: sums over micro-batches, means over steps, effective sample sizes.

With l the log-ratio of the student to the policy that sampled, and w weights, the share

    ESS = (sum w e^l)^2 / (sum w * sum w e^2l)

is what the samples are worth as samples of the student: 1 while it is that policy, near 0
where a few carry all weight (Kish). It is no mean, so its three sums are kept, by their logs:
the l of a long sequence is far beyond what its exponential can hold.
"""

import math
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lopd_kernels import linear_topk

# Names of the three sums, and of the share that they make.
ESS = {"token_moments": "ess_tokens", "sequence_moments": "ess_sequences"}
# Pairs of sums whose ratio is told, [2] or [2, len(POSITIONS)].
RATIOS = ("topk_overlap", "divergence_from")
POSITIONS = (0, 16, 64, 256, 1024, 4096, 16384)  # where parts of an answer begin


def sequence_sums(
    rows: Tensor,  # [N]
    sequence_index: Tensor,  # [N] int64 in [0, count)
    count: int,
) -> Tensor:  # [count]
    return rows.new_zeros(count).index_add_(0, sequence_index, rows)


def by_position(
    rows: Tensor,  # [N]
    row_weights: Tensor,  # [N]
    parts: Tensor,  # [N] int64, of POSITIONS
) -> Tensor:  # [2, len(POSITIONS)]
    """Weighted sums of the rows, and sums of their weights, in each part of the answers."""
    pair = torch.stack([row_weights * rows, row_weights])
    return pair.new_zeros(2, len(POSITIONS)).index_add_(1, parts, pair)


def drift_moments(
    log_ratio: Tensor,  # [N]
    row_weights: Tensor,  # [N]
    sequence_index: Tensor,  # [N]
    count: int,
) -> dict[str, Tensor]:
    """Logs of the three sums, [3] each: over tokens by their weights, over whole sequences."""
    by_sequence = sequence_sums(log_ratio, sequence_index, count)
    return {
        "token_moments": _moments(log_ratio, row_weights.log()),
        "sequence_moments": _moments(by_sequence, torch.zeros_like(by_sequence)),
    }


def _moments(log_ratio: Tensor, log_weights: Tensor) -> Tensor:
    powers = torch.arange(3, device=log_ratio.device)[:, None]
    return torch.logsumexp(log_weights + powers * log_ratio, 1)


def _share(moments: Tensor) -> float:
    none, first, second = moments.tolist()
    return math.exp(2 * first - none - second)


def _ratios(name: str, pair: Tensor) -> dict[str, float]:
    """Those of parts that have any weight."""
    if pair.dim() == 1:
        pair, names = pair[:, None], [name]
    else:
        names = [f"{name}_{start}" for start in POSITIONS]
    sums, weights = pair.tolist()
    found = zip(names, sums, weights, strict=True)
    return {name: total / weight for name, total, weight in found if weight}


WINDOW_NAME = "window.pt"  # in a checkpoint: the statistics since the last log
Gather = Callable[[Any], list[Any]]


def alone(value: Any) -> list[Any]:
    return [value]


def _together(name: str, first: Tensor | None, second: Tensor) -> Tensor:
    if first is None:
        return second
    first = first.to(second.device)  # a checkpoint's are on the CPU
    return torch.logaddexp(first, second) if name in ESS else first + second


class StatsWindow:
    """Statistics since the last log: means over optimizer steps, and loss tokens per second.

    Effective sample sizes and ratios are of all tokens and sequences since the last log. Each
    process adds its own micro-batches; what is told is of all of them.

    Args:
        gather: a value of this process to those of every process, in order; called by all of
            them at once.
    """

    def __init__(self, gather: Gather = alone) -> None:
        self._gather = gather
        self._step_moments: Tensor | None = None
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps, self._tokens, self._began = 0, 0, 0.0

    def begin_step(self) -> None:
        if self._steps == 0:
            self._began = time.perf_counter()
        self._steps += 1
        self._step_moments = None

    def add(self, stats: dict[str, Tensor], tokens: int) -> None:
        """One micro-batch of the step that was begun last."""
        self._tokens += tokens
        for name, value in stats.items():
            self._sums[name] = _together(name, self._sums.get(name), value)
        if (found := stats.get("token_moments")) is not None:
            self._step_moments = _together("token_moments", self._step_moments, found)

    def leave_out(self, seconds: float) -> None:
        """Time since the last log that was not spent on its tokens."""
        self._began += seconds

    def step_ess(self) -> float | None:
        """Effective share of the tokens of the step begun last; None where it is unknown."""
        mine = self._step_moments
        found = self._gather(None if mine is None else mine.cpu())
        if any(moments is None for moments in found):
            return None
        return _share(torch.stack(found).logsumexp(0)) if len(found) > 1 else _share(found[0])

    def _totals(self) -> tuple[dict[str, Tensor], int]:
        """Sums and tokens over all processes."""
        mine = {name: value.cpu() for name, value in self._sums.items()}
        sums: dict[str, Tensor] = {}
        tokens = 0
        for theirs, count in self._gather((mine, self._tokens)):
            tokens += count
            for name, value in theirs.items():
                sums[name] = _together(name, sums.get(name), value)
        return sums, tokens

    def pop(self) -> dict[str, float]:
        """What was added since the last call."""
        sums, tokens = self._totals()
        means: dict[str, float] = {}
        for name, value in sums.items():
            if name in ESS:
                means[ESS[name]] = _share(value)
            elif name in RATIOS:
                means |= _ratios(name, value)
            else:
                means[name] = value.item() / self._steps
        means["tokens_per_second"] = tokens / (time.perf_counter() - self._began)
        self._reset()
        return means

    def state(self) -> dict[str, Any]:
        """What `load` of one process, the first, continues from."""
        sums, tokens = self._totals()
        seconds = time.perf_counter() - self._began
        return {"sums": sums, "tokens": tokens, "steps": self._steps, "seconds": seconds}

    def load(self, state: dict[str, Any], *, first: bool = True) -> None:
        """Go on from a state; processes other than the first add to its sums."""
        self._steps, self._began = state["steps"], time.perf_counter() - state["seconds"]
        if first:
            self._sums, self._tokens = dict(state["sums"]), state["tokens"]


STRIDE = 64


def is_probed(name: str, positions: np.ndarray) -> np.ndarray:  # [T] bool
    """Which positions of the answer of the sequence of this name are measured."""
    return (positions + zlib.crc32(name.encode())) % STRIDE == 0


@torch.no_grad()
def topk_overlap(
    rows: Tensor,  # [P, D]
    weight: Tensor,  # [V, D]
    topk_ids: Tensor,  # [P, K] int, -1 pads
    row_weights: Tensor,  # [P]
    options: dict[str, Any],
) -> Tensor:  # [2]
    """Weighted sum of the rows' overlaps, and of the weights of the rows that have a list.

    Args:
        options: of `linear_topk`.
    """
    listed = topk_ids >= 0
    lengths = listed.sum(1)
    if not len(rows):
        return row_weights.new_zeros(2)
    top = linear_topk(rows, weight, min(topk_ids.shape[1], weight.shape[0]), **options)
    ranks = torch.arange(top.ids.shape[1], device=rows.device)
    own = torch.where(ranks < lengths[:, None], top.ids.to(topk_ids.dtype), -2)
    found = (topk_ids[:, :, None] == own[:, None, :]).any(2) & listed
    overlap = found.sum(1) / lengths.clamp(min=1)
    weights = torch.where(lengths > 0, row_weights, 0.0)
    return torch.stack([(weights * overlap).sum(), weights.sum()])
