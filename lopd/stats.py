"""Statistics of a run: sums over micro-batches, means over steps, effective sample sizes.

With l the log-ratio of the student to the policy that sampled, and w weights, the share

    ESS = (sum w e^l)^2 / (sum w * sum w e^2l)

is what the samples are worth as samples of the student: 1 while it is that policy, near 0
where a few carry all weight (Kish). It is no mean, so its three sums are kept, by their logs:
the l of a long sequence is far beyond what its exponential can hold.
"""

import math
import time

import torch
from torch import Tensor

# Names of the three sums, and of the share that they make.
ESS = {"token_moments": "ess_tokens", "sequence_moments": "ess_sequences"}


def sequence_sums(
    rows: Tensor,  # [N]
    sequence_index: Tensor,  # [N] int64 in [0, count)
    count: int,
) -> Tensor:  # [count]
    return rows.new_zeros(count).index_add_(0, sequence_index, rows)


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


class StatsWindow:
    """Statistics since the last log: means over optimizer steps, and loss tokens per second.

    Effective sample sizes are of all tokens and sequences since the last log.
    """

    def __init__(self) -> None:
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
            together = torch.logaddexp if name in ESS else torch.add
            seen = self._sums.get(name)
            self._sums[name] = value if seen is None else together(seen, value)
        if (found := stats.get("token_moments")) is not None:
            seen = self._step_moments
            self._step_moments = found if seen is None else torch.logaddexp(seen, found)

    def leave_out(self, seconds: float) -> None:
        """Time since the last log that was not spent on its tokens."""
        self._began += seconds

    def step_ess(self) -> float | None:
        """Effective share of the tokens of the step begun last; None where it is unknown."""
        return None if self._step_moments is None else _share(self._step_moments)

    def pop(self) -> dict[str, float]:
        """What was added since the last call."""
        means = {
            ESS.get(name, name): _share(value) if name in ESS else value.item() / self._steps
            for name, value in self._sums.items()
        }
        means["tokens_per_second"] = self._tokens / (time.perf_counter() - self._began)
        self._reset()
        return means
