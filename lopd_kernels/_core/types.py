"""Data that the schedules and the row functions exchange."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

STATS = ("loss", "lse", "tail_logprobs", "entropy")
# after the extras of a rule, where a call has a `Skip`
SKIP_STATS = ("listed_l1", "unlisted_l1", "probability", "kept")


@dataclass(frozen=True)
class LogitOptions:
    """z = softcap(logit_scale * (u + bias)) / temperature, with u = H W^T."""

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    bias: Tensor | None = None  # [V]

    @property
    def gain(self) -> float:
        """Factor of u + bias: gives z itself, or the argument of tanh under a softcap."""
        return self.logit_scale / (self.temperature if self.softcap is None else self.softcap)

    @property
    def cap(self) -> float:
        """Factor of tanh."""
        return 1.0 if self.softcap is None else self.softcap / self.temperature

    @property
    def slope(self) -> float:
        """The constant part of dz/du; a softcap multiplies it by 1 - tanh^2."""
        return self.logit_scale / self.temperature


class Needs(NamedTuple):
    """The gradients that a call computes."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False


# A larger dense_share costs more than forming every row's gradient; benchmarks/NOTES.md.
LARGEST_SHARE = 0.85


class Skip(NamedTuple):
    """Which rows form their gradient outside the list; one of the two settings is used."""

    dense_share: float | None  # a sample of this share of the rows
    tolerance: float  # all but rows whose parts add up to at most this share of the gradient
    seed: Tensor | None  # [] int64, of the sample

    def capacity(self, rows: int) -> int:
        """How many of `rows` rows are kept at most."""
        if self.dense_share is None:
            return rows
        return min(rows, math.ceil(self.dense_share * rows - 1e-9))


class ListedIds(Protocol):
    """The listed ids of each row, in the form that an implementation indexes with."""

    @property
    def active(self) -> Tensor: ...  # [N] bool: has an id and a weight other than 0

    def rows(self, part: slice) -> ListedIds: ...


class RowState(NamedTuple):
    """Rows of logits, reduced to the listed logits and a log-sum-exp of the others."""

    unlisted: Tensor  # [N, 4]: max m of z, sum of e = exp(z - m), sum of e (z - m), invalid
    listed: Tensor  # [N, K] z at the ids, -inf at pads

    @classmethod
    def start(cls, like: Tensor, rows: int, width: int, dtype: torch.dtype) -> RowState:
        unlisted = like.new_zeros((rows, 4), dtype=dtype)
        unlisted[:, 0] = torch.finfo(dtype).min
        return cls(unlisted, like.new_full((rows, width), -math.inf, dtype=dtype))

    def rows(self, part: slice) -> RowState:
        return RowState(self.unlisted[part], self.listed[part])


class LogitGrads(NamedTuple):
    """dL/dz: `listed` at the ids, elsewhere e (factor - entropy_factor d).

    Here d = z - unlisted_max and e = exp(d).
    """

    unlisted_max: Tensor  # [N]
    factor: Tensor  # [N]
    entropy_factor: Tensor | None  # [N]
    listed: Tensor  # [N, K]

    def rows(self, part: slice) -> LogitGrads:
        entropy_factor = None if self.entropy_factor is None else self.entropy_factor[part]
        return LogitGrads(
            self.unlisted_max[part], self.factor[part], entropy_factor, self.listed[part]
        )


class SplitGrads(NamedTuple):
    """w dL/dz of rows: at the ids, elsewhere exp(z - unlisted_max) factor; and their L1 norms."""

    listed: Tensor  # [N, K] times 1 - tanh^2
    unlisted: Tensor  # [N, 4]: the fields below, all 0 in inactive rows

    @classmethod
    def zeros(cls, like: Tensor, rows: int, width: int, dtype: torch.dtype) -> SplitGrads:
        return cls(*(like.new_zeros((rows, columns), dtype=dtype) for columns in (width, 4)))

    def rows(self, part: slice) -> SplitGrads:
        return SplitGrads(self.listed[part], self.unlisted[part])

    @property
    def unlisted_max(self) -> Tensor:
        return self.unlisted[:, 0]

    @property
    def factor(self) -> Tensor:
        return self.unlisted[:, 1]

    @property
    def listed_l1(self) -> Tensor:
        return self.unlisted[:, 2]

    @property
    def unlisted_l1(self) -> Tensor:
        return self.unlisted[:, 3]
