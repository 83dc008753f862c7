"""The three GEMMs, with sums in the compute dtype whatever the operands are.

On CUDA, 16-bit operands go in as they are and fp32 comes out. On a CPU, fp32 and fp64
weights are used where they lie; 16-bit weights are widened one panel of rows at a time into a
buffer, so that logits never pass through 16 bits.
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


def is_mixed(like: Tensor) -> bool:
    """Whether GEMMs take 16-bit operands, and so want dz in 16 bits."""
    return like.is_cuda and like.dtype in (torch.bfloat16, torch.float16)


def operand_dtype(like: Tensor) -> torch.dtype:
    """The dtype of hidden and dz in the GEMMs."""
    return like.dtype if is_mixed(like) else compute_dtype(like.dtype)


def in_place(u: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for the gradient of u [R, V] in `dtype`, in the first part of each row of u."""
    return u if dtype == u.dtype else u.view(dtype)[:, : u.shape[1]]


def widened_rows(columns: int) -> int:
    """Rows of a 16-bit weight that fit in the buffer which widens them."""
    return max(1, PANEL_BYTES // (4 * max(1, columns)))


def panel_rows(weight: Tensor) -> int:
    """Rows of `weight` that are widened at a time; 0 when it needs no widening."""
    if weight.dtype == operand_dtype(weight):
        return 0
    return min(weight.shape[0], widened_rows(weight.shape[1]))


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
    """The rows of a weight as the GEMMs take them, in order, one buffer for all."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.rows = panel_rows(weight)
        shape = (self.rows, weight.shape[1])
        self.buffer = weight.new_empty(shape, dtype=operand_dtype(weight))

    def between(self, first: int, stop: int) -> Iterator[tuple[slice, Tensor]]:
        """(columns from `first` on, rows of the weight) for its rows first to stop."""
        if not self.rows:
            yield slice(0, stop - first), self.weight[first:stop]
            return
        for start in range(first, stop, self.rows):
            end = min(start + self.rows, stop)
            panel = self.buffer[: end - start]
            panel.copy_(self.weight[start:end])
            yield slice(start - first, end - first), panel


def _mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def _addmm(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def project(hidden: Tensor, panels: Panels, first: int, out: Tensor) -> None:
    """out [R, P] = hidden [R, D] W^T, for rows first to first + P of W [V, D]."""
    for part, panel in panels.between(first, first + out.shape[1]):
        _mm(hidden, panel.t(), out[:, part])


def hidden_grad(dz: Tensor, panels: Panels, first: int, total: Tensor, fresh: bool) -> None:
    """total [R, D] += dz [R, P] W, for rows first to first + P of W; `fresh` starts at 0."""
    for part, panel in panels.between(first, first + dz.shape[1]):
        if fresh:
            _mm(dz[:, part], panel, total)
        else:
            _addmm(total, dz[:, part], panel)
        fresh = False


def weight_grad(dz: Tensor, hidden: Tensor, total: Tensor, scale: Tensor | None = None) -> None:
    """total [P, D] += scale dz^T [P, R] hidden [R, D]."""
    if scale is None:
        _addmm(total, dz.t(), hidden)
    else:
        total.add_(_wide_weight_grad(dz, hidden, scale))


def new_weight_grad(dz: Tensor, hidden: Tensor, out: Tensor, scale: Tensor | None = None) -> None:
    """out [P, D] = scale dz^T [P, R] hidden [R, D], rounded once."""
    if scale is None and out.dtype == dz.dtype:
        torch.mm(dz.t(), hidden, out=out)
    else:
        out.copy_(_wide_weight_grad(dz, hidden, scale))


def _wide_weight_grad(dz: Tensor, hidden: Tensor, scale: Tensor | None) -> Tensor:
    shape = dz.shape[1], hidden.shape[1]
    wide = dz.new_empty(shape, dtype=compute_dtype(dz.dtype))
    _mm(dz.t(), hidden, wide)
    return wide if scale is None else wide.mul_(scale)
