"""The two implementations: what they have to offer, and which one serves a tensor.

`_triton` serves CUDA tensors, and with TRITON_INTERPRET=1 in the environment CPU tensors
too; `_torch` serves the others, and fp64, which is for oracles, everywhere.
"""

from __future__ import annotations

import importlib
import os
from typing import Protocol, cast

import torch
from torch import Tensor

from lopd_kernels._core.rules import RowRule
from lopd_kernels._core.types import Coefficients, Head, Reduction, Support


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
    name = "_triton.rows" if uses_triton(like) else "_torch.rows"
    return cast(RowFunctions, importlib.import_module(f"lopd_kernels.{name}"))


class ListedFunctions(Protocol):
    """Products with listed rows of the weight; `rows` bounds what is gathered at a time."""

    def dots(self, hidden: Tensor, weight: Tensor, ids: Tensor, rows: int) -> Tensor:
        """hidden[n] . weight[ids[n, k]] in the compute dtype, [N, K]."""

    def hidden_grad(self, grad: Tensor, weight: Tensor, ids: Tensor, rows: int) -> Tensor:
        """sum_k grad[n, k] weight[ids[n, k]] in the weight's dtype, [N, D]."""

    def weight_grad(
        self, grad: Tensor, hidden: Tensor, ids: Tensor, rows: int, out: Tensor, add: bool
    ) -> None:
        """out[v] (+)= the sum of grad[n, k] hidden[n] over the entries with ids[n, k] = v."""


def listed_functions(like: Tensor) -> ListedFunctions:
    name = "_triton.listed" if uses_triton(like) else "_torch.listed"
    return cast(ListedFunctions, importlib.import_module(f"lopd_kernels.{name}"))
