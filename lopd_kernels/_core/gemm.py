"""The three GEMMs; sums are in the compute dtype, whatever the operands are.

On CUDA, 16-bit operands go in as they are and fp32 comes out. On a CPU, fp32 and fp64 weights
are used as they are; 16-bit weights are widened a few rows at a time into a buffer, so that
logits are never rounded to 16 bits. There a GEMM consists of pieces (`crew`), whose number depends
on its sizes only.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lopd_kernels._core.crew import FEWEST, hand_out

WIDEN_BYTES = 16 << 20  # by each thread
PIECES = 32  # of a GEMM on a CPU, at most
PIECE_OPERATIONS = 1 << 26  # at least, and at least as many columns or rows of the output:
PIECE_COLUMNS, PIECE_ROWS = 512, 128


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
    """The rows of a weight in the operands' dtype, by a buffer for each thread if need be."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.rows = widened_rows(weight)
        self.buffers = threading.local()

    def between(self, first: int, stop: int) -> Iterator[tuple[slice, Tensor]]:
        """(slice relative to `first`, rows of the weight) that together cover first to stop."""
        if not self.rows:
            yield slice(0, stop - first), self.weight[first:stop]
            return
        if not hasattr(self.buffers, "mine"):
            shape = (self.rows, self.weight.shape[1])
            self.buffers.mine = self.weight.new_empty(shape, dtype=operand_dtype(self.weight))
        for start in range(first, stop, self.rows):
            end = min(start + self.rows, stop)
            rows = self.buffers.mine[: end - start]
            rows.copy_(self.weight[start:end])
            yield slice(start - first, end - first), rows


def _mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def _addmm(a: Tensor, b: Tensor, total: Tensor) -> None:
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def _pieces(like: Tensor, length: int, operations: float) -> list[slice]:
    """Columns or rows 0 to `length` of an output in pieces."""
    return _split(length, _enough(like, length // PIECE_COLUMNS, operations))


def _enough(like: Tensor, count: int, operations: float) -> int:
    """How many pieces, at most `count`: one on a GPU, or if there is little to do."""
    count = min(PIECES, count, int(operations) // PIECE_OPERATIONS)
    return 1 if like.is_cuda or count < FEWEST else count


def _split(length: int, count: int) -> list[slice]:
    size = max(1, -(-length // max(1, count)))
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _operations(a: Tensor, columns: int) -> float:
    return 2.0 * a.numel() * columns


def project(hidden: Tensor, weight: WeightRows, first: int, out: Tensor) -> None:
    """out [R, P] = hidden [R, D] W^T, for rows first to first + P of W [V, D]."""
    width = out.shape[1]

    def columns(piece: slice) -> None:
        for part, rows in weight.between(first + piece.start, first + piece.stop):
            _mm(hidden, rows.t(), out[:, piece][:, part])

    hand_out(columns, _pieces(out, width, _operations(hidden, width)))


def hidden_grad(
    dlogits: Tensor, weight: WeightRows, first: int, total: Tensor, accumulate: bool
) -> None:
    """total [R, D] (+)= dlogits [R, P] W, for rows first to first + P of W."""
    (rows, width), d = dlogits.shape, total.shape[1]
    terms = partial_sums(width, d)
    count = _enough(dlogits, terms * max(1, rows // PIECE_ROWS), _operations(dlogits, d))
    spans = _split(width, min(terms, count))
    parts = _split(rows, count // len(spans))
    sums = total.unsqueeze(0) if len(spans) == 1 else total.new_empty((len(spans), *total.shape))

    def add(piece: tuple[int, slice]) -> None:
        index, part = piece
        term, out = spans[index], sums[index, part]
        begun = accumulate and len(spans) == 1
        for here, w in weight.between(first + term.start, first + term.stop):
            if begun:
                _addmm(dlogits[part, term][:, here], w, out)
            else:
                _mm(dlogits[part, term][:, here], w, out)
            begun = True

    hand_out(add, [(index, part) for index in range(len(spans)) for part in parts])
    if len(spans) > 1:
        if accumulate:
            sums[0].add_(total)
        torch.sum(sums, 0, out=total)


def partial_sums(width: int, d: int) -> int:
    """Over how many parts of the vocabulary dH is summed on a CPU, each with a sum of its own.

    They take at most a quarter of the memory of the logits.
    """
    return max(1, min(PIECES, width // (4 * d), width // PIECE_COLUMNS))


def _by_rows(
    apply: Callable[[Tensor, Tensor, Tensor], None], dlogits: Tensor, hidden: Tensor, out: Tensor
) -> None:
    """`apply(dlogits^T, hidden, out)` for some rows of the output at a time."""
    operations = _operations(dlogits, hidden.shape[1])

    def rows(piece: slice) -> None:
        apply(dlogits[:, piece].t(), hidden, out[piece])

    hand_out(rows, _pieces(out, len(out), operations))


def weight_grad(
    dlogits: Tensor, hidden: Tensor, total: Tensor, scale: Tensor | None = None
) -> None:
    """total [P, D] += scale dlogits^T [P, R] hidden [R, D]."""
    if scale is None:
        _by_rows(_addmm, dlogits, hidden, total)
    else:
        wide = _wide(dlogits, hidden)
        _by_rows(_mm, dlogits, hidden, wide)
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
    _by_rows(_mm, dlogits, hidden, wide)
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
