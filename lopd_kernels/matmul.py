"""The three GEMMs of a chunk, with results in the compute dtype whatever the operands are.

fp32 and fp64 weights are used where they lie. bf16 and fp16 weights are widened one
panel of rows at a time into a buffer, so that logits never pass through 16 bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

PANEL_BYTES = 16 << 20
P = ParamSpec("P")
T = TypeVar("T")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def panel_rows(weight: Tensor) -> int:
    """Rows of `weight` that are widened at a time; 0 when it needs no widening."""
    if weight.dtype == compute_dtype(weight.dtype):
        return 0
    return min(weight.shape[0], max(1, PANEL_BYTES // (4 * max(1, weight.shape[1]))))


def without_autocast(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, whose first argument is a tensor, in the dtypes that it chooses itself."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        like = args[0]
        assert isinstance(like, Tensor)
        with torch.autocast(like.device.type, enabled=False):
            return function(*args, **kwargs)

    return wrapped


class Panels:
    """The rows of a weight in its compute dtype, in order, one buffer for all."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.rows = panel_rows(weight)
        shape = (self.rows, weight.shape[1])
        self.buffer = weight.new_empty(shape, dtype=compute_dtype(weight.dtype))

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        vocab = self.weight.shape[0]
        if not self.rows:
            yield slice(0, vocab), self.weight
            return
        for start in range(0, vocab, self.rows):
            part = slice(start, min(start + self.rows, vocab))
            panel = self.buffer[: part.stop - start]
            panel.copy_(self.weight[part])
            yield part, panel


def project(
    hidden: Tensor,  # [R, D] compute dtype
    panels: Panels,  # of [V, D]
    bias: Tensor | None,  # [V] compute dtype
    gain: float,
    out: Tensor,  # [R, V] compute dtype
) -> None:
    """out = gain * (hidden W^T + bias)."""
    for part, panel in panels:
        piece = out[:, part]
        if bias is None:
            torch.addmm(piece, hidden, panel.t(), beta=0.0, alpha=gain, out=piece)
        else:
            torch.addmm(bias[part], hidden, panel.t(), beta=gain, alpha=gain, out=piece)


def hidden_grad(grad: Tensor, panels: Panels, out: Tensor) -> None:
    """out [R, D] = grad [R, V] W."""
    out.zero_()
    for part, panel in panels:
        out.addmm_(grad[:, part], panel)


def weight_grad(grad: Tensor, hidden: Tensor, total: Tensor) -> None:
    """total [V, D] += grad^T [V, R] hidden [R, D]."""
    total.addmm_(grad.t(), hidden)
