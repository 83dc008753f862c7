"""The three GEMMs; sums are in the compute dtype, whatever the operands are.

On CUDA, 16-bit operands go in as they are and fp32 comes out. On a CPU, fp32 and fp64 weights
are used as they are; 16-bit weights are widened a few rows at a time into a buffer, so that
logits are never rounded to 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

WIDEN_BYTES = 16 << 20


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_mixed(like: Tensor) -> bool:
    """Whether the GEMMs take 16-bit operands, so that dL/dz is rounded to 16 bits."""
    return like.is_cuda and like.dtype in (torch.bfloat16, torch.float16)


def operand_dtype(like: Tensor) -> torch.dtype:
    """The dtype of hidden and dL/dz in the GEMMs."""
    return like.dtype if is_mixed(like) else compute_dtype(like.dtype)


def in_place(u: Tensor, dtype: torch.dtype) -> Tensor:
    """Storage for the gradient of u [R, V] in `dtype`: the first part of each row of u."""
    return u if dtype == u.dtype else u.view(dtype)[:, : u.shape[1]]


def buffer_rows(vocab: int, columns: int) -> int:
    """Rows of a 16-bit weight that are widened at a time."""
    return min(vocab, max(1, WIDEN_BYTES // (4 * max(1, columns))))


def widened_rows(weight: Tensor) -> int:
    """`buffer_rows` of this weight; 0 if it needs no widening."""
    return 0 if weight.dtype == operand_dtype(weight) else buffer_rows(*weight.shape)


class WeightRows:
    """The rows of a weight in the operands' dtype, through one buffer if they need widening."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.rows = widened_rows(weight)
        shape = (self.rows, weight.shape[1])
        self.buffer = weight.new_empty(shape, dtype=operand_dtype(weight))

    def between(self, first: int, stop: int) -> Iterator[tuple[slice, Tensor]]:
        """(slice relative to `first`, rows of the weight) that together cover first to stop."""
        if not self.rows:
            yield slice(0, stop - first), self.weight[first:stop]
            return
        for start in range(first, stop, self.rows):
            end = min(start + self.rows, stop)
            rows = self.buffer[: end - start]
            rows.copy_(self.weight[start:end])
            yield slice(start - first, end - first), rows


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


def project(hidden: Tensor, weight: WeightRows, first: int, out: Tensor) -> None:
    """out [R, P] = hidden [R, D] W^T, for rows first to first + P of W [V, D]."""
    for part, rows in weight.between(first, first + out.shape[1]):
        _mm(hidden, rows.t(), out[:, part])


def hidden_grad(
    dlogits: Tensor, weight: WeightRows, first: int, total: Tensor, accumulate: bool
) -> None:
    """total [R, D] (+)= dlogits [R, P] W, for rows first to first + P of W."""
    for part, rows in weight.between(first, first + dlogits.shape[1]):
        if accumulate:
            _addmm(total, dlogits[:, part], rows)
        else:
            _mm(dlogits[:, part], rows, total)
        accumulate = True


def weight_grad(
    dlogits: Tensor, hidden: Tensor, total: Tensor, scale: Tensor | None = None
) -> None:
    """total [P, D] += scale dlogits^T [P, R] hidden [R, D]."""
    if scale is None:
        _addmm(total, dlogits.t(), hidden)
    else:
        wide = _wide(dlogits, hidden)
        _mm(dlogits.t(), hidden, wide)
        total.addcmul_(wide, scale)


def new_weight_grad(
    dlogits: Tensor,
    hidden: Tensor,
    out: Tensor,
    scale: Tensor | None = None,
    add: Callable[[Tensor], None] = lambda wide: None,
) -> None:
    """out [P, D] = scale dlogits^T [P, R] hidden [R, D], rounded once.

    `add` adds more to the product in the compute dtype.
    """
    in_place = scale is None and out.dtype == dlogits.dtype
    wide = out if in_place else _wide(dlogits, hidden)
    _mm(dlogits.t(), hidden, wide)
    add(wide)
    if in_place:
        return
    if scale is None:
        out.copy_(wide)
    elif out.is_cuda:
        torch.mul(wide, scale, out=out)  # scaled and cast in one pass
    else:  # a CPU would need a temporary as large as `wide` for that
        out.copy_(wide.mul_(scale))


def _wide(dlogits: Tensor, hidden: Tensor) -> Tensor:
    """[P, D] in the compute dtype."""
    shape = dlogits.shape[1], hidden.shape[1]
    return dlogits.new_empty(shape, dtype=compute_dtype(dlogits.dtype))
