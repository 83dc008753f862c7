"""The LM head of a call: hidden states, weight and logit options."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lopd_kernels._core.backend import RowFunctions, row_functions
from lopd_kernels._core.gemm import compute_dtype, operand_dtype
from lopd_kernels._core.types import LogitOptions
from lopd_kernels._core.workspace import Sizes


class Linear(NamedTuple):
    """u = hidden weight^T, then `logit_options`."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    logit_options: LogitOptions

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return compute_dtype(self.hidden.dtype)

    @property
    def functions(self) -> RowFunctions:
        return row_functions(self.hidden)

    def sizes(self, width: int) -> Sizes:
        return Sizes.of(self.hidden, self.weight, width)

    def operand(self, active: Tensor | None) -> Tensor:
        """hidden [N, D] for the GEMMs: zeros in inactive rows, NaN in rows that are not finite."""
        nonfinite = self.functions.nonfinite_rows(self.hidden, self.weight, self.logit_options)
        if nonfinite is None and active is None:
            return self.hidden.to(operand_dtype(self.hidden))
        hidden = self.hidden.to(operand_dtype(self.hidden), copy=True)
        if nonfinite is not None:
            hidden.masked_fill_(nonfinite.unsqueeze(1), math.nan)
        if active is not None:
            hidden.masked_fill_(~active.unsqueeze(1), 0.0)
        return hidden


def make_linear(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
) -> Linear:
    bias = None if bias is None else bias.to(compute_dtype(hidden.dtype)).contiguous()
    return Linear(hidden, weight, LogitOptions(logit_scale, softcap, temperature, bias))
