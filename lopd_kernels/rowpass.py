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

import importlib
import math
import os
from dataclasses import dataclass
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from lopd_kernels.divergence import RowRule

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


class Settled(NamedTuple):
    """A reduction as log-probs. `lse` is less `top`: an offset that all logits share would
    cost the log-probs digits, so it stays there."""

    buckets: Tensor  # [N, K+1] log-probs of the support and the tail, -inf at pads
    top: Tensor  # [N, 1] largest logit of the row
    lse: Tensor  # [N, 1]
    shift: Tensor  # [N, 1] largest logit off the support, less top and lse
    entropy: Tensor  # [N], if the spread was asked for


class Coefficients(NamedTuple):
    """The gradient dL/dz: e (factor - pull (z - own)), e = exp(z - own), and `on` at the ids."""

    own: Tensor  # [N]
    factor: Tensor  # [N]
    pull: Tensor | None  # [N]
    on: Tensor  # [N, K]

    def rows(self, part: slice) -> Coefficients:
        pull = None if self.pull is None else self.pull[part]
        return Coefficients(self.own[part], self.factor[part], pull, self.on[part])


class RowFunctions(Protocol):
    """An implementation. `u` are rows of H W^T in the compute dtype and are overwritten."""

    def locate(self, ids: Tensor, row_weights: Tensor | None, vocab: int) -> Support: ...

    def spoilt(self, hidden: Tensor, weight: Tensor, head: Head) -> Tensor | None:
        """[N] rows whose logits this implementation would not know to be infinite."""

    def row_pass(
        self,
        u: Tensor,  # [R, V]
        support: Support,
        target: Tensor,  # [R, M] what the rule compares with
        weights: Tensor | None,  # [R] factor of the gradient; None wants none
        rule: RowRule,
        head: Head,
        want_entropy: bool,
        stats: Tensor,  # [R, 4 + extras] output, see STATS; zeros in inactive rows
        out: Tensor | None,  # [R, V] w dL/dz (1 - tanh^2); may lie in the storage of u
        inf_masks: bool = False,  # -inf in u is an id without mass
    ) -> None: ...

    def reduce(
        self,
        u: Tensor,  # [R, P], columns first to first + P of the vocabulary
        first: int,
        support: Support,
        head: Head,
        want_spread: bool,
        reduction: Reduction,  # of these rows and the columns before; updated
    ) -> None: ...

    def write(
        self,
        u: Tensor,  # [R, P]
        first: int,
        support: Support,
        head: Head,
        coefficients: Coefficients,
        on: Tensor,  # [R, K] z at the ids
        out: Tensor,  # [R, P] (1 - tanh^2) dL/dz; may lie in the storage of u
    ) -> None: ...


def uses_triton(like: Tensor) -> bool:
    """Whether the kernels of `_triton` serve tensors like this one."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return like.dtype != torch.float64 and (like.is_cuda or interpreted)


def row_functions(like: Tensor) -> RowFunctions:
    """The implementation for logits of `like`, a hidden state or a logit."""
    name = "triton_rows" if uses_triton(like) else "torch_rows"
    return cast(RowFunctions, importlib.import_module(f"lopd_kernels.{name}"))


def settle(reduction: Reduction) -> Settled:
    """Log-probs of the buckets; NaN in broken rows."""
    own, total, spread, broken = reduction.state.unsqueeze(2).unbind(1)
    on = reduction.on
    top = torch.maximum(own, on.amax(1, keepdim=True)) if on.shape[1] else own
    top = top.masked_fill(top == torch.finfo(top.dtype).min, 0.0)
    top = top.masked_fill(broken > 0, math.nan)
    z_on = on - top
    total_log = torch.where(total == 0.0, -math.inf, total.log())
    lse_off = (own - top) + total_log
    lse = torch.logaddexp(lse_off, z_on.logsumexp(1, keepdim=True)) if on.shape[1] else lse_off
    buckets = torch.cat([z_on, lse_off], 1) - lse
    empty = torch.isneginf(torch.cat([on, total_log], 1)) & (broken == 0.0)
    buckets = buckets.masked_fill(empty, -math.inf)
    shift = own - top - lse
    off = torch.where(total == 0.0, 0.0, shift.exp() * (spread + total * shift))[:, 0]
    listed = buckets[:, :-1]
    listed = (listed.exp() * listed).masked_fill(listed == -math.inf, 0.0).sum(1)
    return Settled(buckets, top, lse, shift, -off - listed)


def centred(g: Tensor, p: Tensor) -> Tensor:
    """g - p sum(g) over buckets whose p sum to one.

    In a bucket that holds nearly all the mass the two terms cancel, so the largest one is
    written as g (1 - p) - p (sum(g) - g) with both differences taken as sums of the others.
    """
    largest = p.argmax(1, keepdim=True)
    own_g, own_p = g.gather(1, largest), p.gather(1, largest)
    other_g = g.scatter(1, largest, 0.0).sum(1, keepdim=True)
    other_p = p.scatter(1, largest, 0.0).sum(1, keepdim=True)
    plain = g - p * (own_g + other_g)
    return plain.scatter(1, largest, own_g * other_p - own_p * other_g)


def coefficients(
    reduction: Reduction, g: Tensor, p: Tensor, weights: Tensor | None
) -> Coefficients:
    """The gradient of a loss with dL/dlog p_b = g [N, K+1], times the row's weight."""
    grad = centred(g, p)
    if weights is not None:
        grad = grad * weights.unsqueeze(1)
    own, total = reduction.state[:, 0], reduction.state[:, 1]
    factor = torch.where(total == 0.0, 0.0, grad[:, -1] / total)
    return Coefficients(own, factor, None, grad[:, :-1].contiguous())
