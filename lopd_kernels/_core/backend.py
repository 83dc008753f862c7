"""The interface of the two implementations, and the choice between them.

`_triton` serves CUDA tensors, and CPU tensors with TRITON_INTERPRET=1 in the environment.
`_torch` serves all others, and fp64 on every device.
"""

from __future__ import annotations

import importlib
import os
from typing import Protocol, cast

import torch
from torch import Tensor

from lopd_kernels._core.listed_ids import Entries
from lopd_kernels._core.rules import Rule
from lopd_kernels._core.types import ListedIds, LogitGrads, LogitOptions, RowState, SplitGrads
from lopd_kernels._core.waves import Gpu


class RowFunctions(Protocol):
    """Functions of rows u of H W^T, in the compute dtype. They overwrite u."""

    def locate(self, ids: Tensor, row_weights: Tensor | None, vocab: int) -> ListedIds: ...

    def gpu(
        self, like: Tensor, width: int, buckets: int, rule: Rule, logit_options: LogitOptions
    ) -> Gpu | None:
        """How much of `row_pass` on rows of this width runs at a time; None: not known."""

    def nonfinite_rows(
        self, hidden: Tensor, weight: Tensor, logit_options: LogitOptions
    ) -> Tensor | None:
        """[N] bool: rows with an infinite logit that the functions below would not detect."""

    def row_pass(
        self,
        u: Tensor,  # [R, V]
        listed_ids: ListedIds,
        target: Tensor,  # [R, M], see the rule
        weights: Tensor | None,  # [R] factor of the gradient; None: no gradient
        rule: Rule,
        logit_options: LogitOptions,
        want_entropy: bool,
        stats: Tensor,  # [R, 4 + extras] output, see STATS; left as it is in inactive rows
        out: Tensor | None,  # [R, V] w dL/dz (1 - tanh^2); may share the storage of u
        inf_masks: bool = False,  # -inf in u marks an id without mass
        split: SplitGrads | None = None,  # output in place of `out`; rows start at zero
    ) -> None:
        """Whole rows to losses and gradients."""

    def write_unlisted(
        self,
        u: Tensor,  # [R, V] as `row_pass` with `split` has left it
        rows: Tensor,  # [C] int64
        unlisted_max: Tensor,  # [C]
        factor: Tensor,  # [C]
        logit_options: LogitOptions,
        out: Tensor,  # [C, V] with storage of its own
    ) -> None:
        """The gradient of the given rows, 0 at their listed ids."""

    def reduce(
        self,
        u: Tensor,  # [R, P], columns first to first + P of the vocabulary
        first: int,
        listed_ids: ListedIds,
        logit_options: LogitOptions,
        want_entropy: bool,
        state: RowState,  # of these rows and all previous columns; updated in place
    ) -> None:
        """Add a panel to the row state."""

    def write(
        self,
        u: Tensor,  # [R, P]
        first: int,
        listed_ids: ListedIds,
        logit_options: LogitOptions,
        grads: LogitGrads,
        listed: Tensor,  # [R, K] z at the ids
        out: Tensor,  # [R, P] (1 - tanh^2) dL/dz; may share the storage of u
    ) -> None:
        """The gradient of a panel."""


class ListedFunctions(Protocol):
    """Products with the listed rows of the weight; `rows` bounds how many are gathered at once."""

    def dots(self, hidden: Tensor, weight: Tensor, ids: Tensor, rows: int) -> Tensor:
        """hidden[n] . weight[ids[n, k]] in the compute dtype, [N, K]."""

    def hidden_grad(
        self, grad: Tensor, weight: Tensor, ids: Tensor, rows: int, dtype: torch.dtype
    ) -> Tensor:
        """sum_k grad[n, k] weight[ids[n, k]] in `dtype`, [N, D]."""

    def weight_grad(
        self, entries: Entries, hidden: Tensor, rows: int, first: int, out: Tensor, add: bool
    ) -> None:
        """out[v - first] (+)= the sum of grad[n, k] hidden[n] over the entries with the id v."""


def uses_triton(like: Tensor) -> bool:
    """Whether the Triton kernels serve tensors like this one."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return like.dtype != torch.float64 and (like.is_cuda or interpreted)


def _package(like: Tensor) -> str:
    root = __name__.removesuffix("._core.backend")  # another name if loaded from the Hub
    return f"{root}._triton" if uses_triton(like) else f"{root}._torch"


def row_functions(like: Tensor) -> RowFunctions:
    return cast(RowFunctions, importlib.import_module(f"{_package(like)}.rows"))


def listed_functions(like: Tensor) -> ListedFunctions:
    return cast(ListedFunctions, importlib.import_module(f"{_package(like)}.listed"))
