"""Rows of logits to losses and gradients: what both implementations share, and the choice.

The K support logits of a row are gathered and overwritten by -inf; the log-sum-exp of what
is left is the student's tail, taken directly: `lse = logaddexp(lse_on, lse_off)`,
`log p_tail = lse_off - lse` keeps six digits at any tail where `1 - sum_k p_k` has none.
Off the support the gradient is the softmax times one number per row; the K entries on it
are overwritten.

`triton_rows` serves CUDA tensors, and with TRITON_INTERPRET=1 in the environment CPU tensors
too; `torch_rows` serves the others, and fp64, which is for oracles, everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

STATS = ("loss", "lse", "tail_logprobs", "entropy")


@dataclass(frozen=True)
class Head:
    """z = softcap(logit_scale * (u + bias)) / temperature, with u = H W^T."""

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    bias: Tensor | None = None  # [V]

    @property
    def gain(self) -> float:
        """Factor of u + bias: z itself, or tanh's argument under a softcap."""
        return self.logit_scale / (self.temperature if self.softcap is None else self.softcap)

    @property
    def cap(self) -> float:
        """Factor of tanh."""
        return 1.0 if self.softcap is None else self.softcap / self.temperature

    @property
    def slope(self) -> float:
        """The constant part of dz/du; a softcap multiplies it by 1 - tanh^2."""
        return self.logit_scale / self.temperature


class Support(Protocol):
    """Where the buckets of each row are."""

    @property
    def active(self) -> Tensor: ...  # [N] bool: has an id and a weight other than 0

    def rows(self, part: slice) -> Support: ...


class Reduction(NamedTuple):
    """Rows of logits reduced to their support and the log-sum-exp of the rest."""

    state: (
        Tensor  # [N, 4]: max off the support, sum of e = exp(z - max), sum of e (z - max), broken
    )
    on: Tensor  # [N, K] z at the ids, -inf at pads

    @classmethod
    def start(cls, like: Tensor, rows: int, width: int, dtype: torch.dtype) -> Reduction:
        state = like.new_zeros((rows, 4), dtype=dtype)
        state[:, 0] = torch.finfo(dtype).min
        return cls(state, like.new_full((rows, width), -math.inf, dtype=dtype))

    def rows(self, part: slice) -> Reduction:
        return Reduction(self.state[part], self.on[part])


class Coefficients(NamedTuple):
    """The gradient dL/dz: e (factor - pull (z - own)), e = exp(z - own), and `on` at the ids."""

    own: Tensor  # [N]
    factor: Tensor  # [N]
    pull: Tensor | None  # [N]
    on: Tensor  # [N, K]

    def rows(self, part: slice) -> Coefficients:
        pull = None if self.pull is None else self.pull[part]
        return Coefficients(self.own[part], self.factor[part], pull, self.on[part])
