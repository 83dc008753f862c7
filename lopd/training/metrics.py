"""Training metrics: sums over micro-batches, means over steps, effective sample sizes.

With l the log-ratio of the student to the rollout policy and w the row weights, the share

    ESS = (sum w e^l)^2 / (sum w * sum w e^2l)

is the effective sample size of the rollouts as samples of the student: 1 while the student is the
rollout policy, near 0 if a few tokens have all the weight (Kish). It is not a mean, so its three
sums are accumulated, in log space: the exponential of a long sequence's l would overflow.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Name of the three sums: name of the ESS computed from them.
ESS = {
    "token_moments": "ess_tokens",
    "sequence_moments": "ess_sequences",
    "weight_moments": "ess_weights",  # with l the log of the factor of `--token-weights`
}
# Pairs of sums whose ratio is logged, [2] or [2, len(POSITIONS)].
RATIOS = ("topk_overlap", "divergence_from")
# Followed by a name: such a pair [2] over the records of one of several teachers.
OF_TEACHER = "divergence/"
POSITIONS = (0, 16, 64, 256, 1024, 4096, 16384)  # first positions of the parts of an answer

Gather = Callable[[Any], list[Any]]


def gather_single(value: Any) -> list[Any]:
    """The `Gather` of a run with one process."""
    return [value]


def sequence_sums(
    rows: Tensor,  # [N]
    sequence_index: Tensor,  # [N] int64 in [0, count)
    count: int,
) -> Tensor:  # [count]
    """Sums of the rows of each sequence."""
    return rows.new_zeros(count).index_add_(0, sequence_index, rows)


def by_position(
    rows: Tensor,  # [N]
    row_weights: Tensor,  # [N]
    parts: Tensor,  # [N] int64, indices into POSITIONS
) -> Tensor:  # [2, len(POSITIONS)]
    """Weighted sums of the rows and sums of their weights, for each part of the answers."""
    pair = torch.stack([row_weights * rows, row_weights])
    return pair.new_zeros(2, len(POSITIONS)).index_add_(1, parts, pair)


def by_teacher(
    rows: Tensor,  # [N]
    row_weights: Tensor,  # [N]
    index: Tensor,  # [N] int64, indices into names
    names: Sequence[str],
) -> dict[str, Tensor]:  # [2] each
    """Weighted sum of the rows, and sum of their weights, for the records of each teacher."""
    pair = torch.stack([row_weights * rows, row_weights])
    sums = pair.new_zeros(2, len(names)).index_add_(1, index, pair)
    return {f"{OF_TEACHER}{name}": sums[:, i] for i, name in enumerate(names)}


def drift_moments(
    log_ratio: Tensor,  # [N]
    row_weights: Tensor,  # [N]
    sequence_index: Tensor,  # [N]
    count: int,
) -> dict[str, Tensor]:
    """Logs of the three sums of an ESS, [3] each: over weighted tokens and over sequences."""
    by_sequence = sequence_sums(log_ratio, sequence_index, count)
    return {
        "token_moments": _moments(log_ratio, row_weights.log()),
        "sequence_moments": _moments(by_sequence, torch.zeros_like(by_sequence)),
    }


def _moments(log_ratio: Tensor, log_weights: Tensor) -> Tensor:
    powers = torch.arange(3, device=log_ratio.device)[:, None]
    return torch.logsumexp(log_weights + powers * log_ratio, 1)


def _ess(moments: Tensor) -> float:
    zeroth, first, second = moments.tolist()
    return math.exp(2 * first - zeroth - second)


def _ratios(name: str, pair: Tensor) -> dict[str, float]:
    """Ratios of a pair of sums, without those whose weight is 0."""
    if pair.dim() == 1:
        pair, names = pair[:, None], [name]
    else:
        names = [f"{name}_{start}" for start in POSITIONS]
    sums, weights = pair.tolist()
    return {
        name: total / weight
        for name, total, weight in zip(names, sums, weights, strict=True)
        if weight
    }


def _combine(name: str, first: Tensor | None, second: Tensor) -> Tensor:
    if first is None:
        return second
    first = first.to(second.device)  # sums from a checkpoint are on the CPU
    return torch.logaddexp(first, second) if name in ESS else first + second


class MetricsAccumulator:
    """Metrics since the last log: means over optimizer steps, and loss tokens per second.

    Effective sample sizes and ratios are over all tokens and sequences since the last log. Each
    process adds its own micro-batches; the results are over all processes.

    Args:
        gather: maps a value of this process to the list of every process's value, in order; all
            processes call it together.
    """

    def __init__(self, gather: Gather = gather_single) -> None:
        self._gather = gather
        self._step_moments: Tensor | None = None
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps, self._tokens, self._began = 0, 0, 0.0

    def begin_step(self) -> None:
        """Start an optimizer step; `add` follows for each of its micro-batches."""
        if self._steps == 0:
            self._began = time.perf_counter()
        self._steps += 1
        self._step_moments = None

    def add(self, stats: dict[str, Tensor], tokens: int) -> None:
        """Add the statistics of one micro-batch of the current step.

        Args:
            stats: as `lopd.training.step.step` returns them.
            tokens: loss tokens of the micro-batch.
        """
        self._tokens += tokens
        for name, value in stats.items():
            self._sums[name] = _combine(name, self._sums.get(name), value)
        if (moments := stats.get("token_moments")) is not None:
            self._step_moments = _combine("token_moments", self._step_moments, moments)

    def exclude_time(self, seconds: float) -> None:
        """Do not count this time, which was not spent on training, in the tokens per second."""
        self._began += seconds

    def step_ess(self) -> float | None:
        """ESS of the tokens of the current step; None if a log-ratio is unknown."""
        local = self._step_moments
        moments = self._gather(None if local is None else local.cpu())
        if any(each is None for each in moments):
            return None
        return _ess(torch.stack(moments).logsumexp(0)) if len(moments) > 1 else _ess(moments[0])

    def _totals(self) -> tuple[dict[str, Tensor], int]:
        """Sums and tokens over all processes."""
        local = {name: value.cpu() for name, value in self._sums.items()}
        sums: dict[str, Tensor] = {}
        tokens = 0
        for process_sums, process_tokens in self._gather((local, self._tokens)):
            tokens += process_tokens
            for name, value in process_sums.items():
                sums[name] = _combine(name, sums.get(name), value)
        return sums, tokens

    def pop(self) -> dict[str, float]:
        """Metrics of what was added since the last call."""
        sums, tokens = self._totals()
        means: dict[str, float] = {}
        for name, value in sums.items():
            if name in ESS:
                means[ESS[name]] = _ess(value)
            elif name in RATIOS or name.startswith(OF_TEACHER):
                means |= _ratios(name, value)
            else:
                means[name] = value.item() / self._steps
        means["tokens_per_second"] = tokens / (time.perf_counter() - self._began)
        self._reset()
        return means

    def state(self) -> dict[str, Any]:
        """State for a checkpoint, over all processes."""
        sums, tokens = self._totals()
        seconds = time.perf_counter() - self._began
        return {"sums": sums, "tokens": tokens, "steps": self._steps, "seconds": seconds}

    def load(self, state: dict[str, Any], *, first: bool = True) -> None:
        """Continue from a state of `state`; only the first process takes over its sums."""
        self._steps, self._began = state["steps"], time.perf_counter() - state["seconds"]
        if first:
            self._sums, self._tokens = dict(state["sums"]), state["tokens"]
