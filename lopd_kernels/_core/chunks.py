"""Row chunks, with the gradient in the forward.

    per chunk of rows    u = H_c W^T          GEMM 1, fp32
                         dlogits              the row pass, in place of u
                         dH_c = dlogits W     GEMM 2
                         dW += dlogits^T H_c  GEMM 3, accumulated in fp32

`fused_loss` does all of it. `stored_loss` instead stores the dlogits of all rows in 16 bits, and
`stored_grads` runs GEMMs 2 and 3 over all rows in the backward: no accumulator, and every
gradient is rounded once.

dlogits carry w_n / max|w| only. max|w|, the constant slope of the logit options and the upstream
gradient are multiplied once, into the finished gradients.

Chunks are visited in order and every sum has a fixed order, so equal inputs give equal bits. A
gradient that is not needed costs no GEMM.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lopd_kernels._core import gemm
from lopd_kernels._core.linear import Linear
from lopd_kernels._core.rules import RowLoss
from lopd_kernels._core.scaling import dlogits_bound, normalized_weights, weigh
from lopd_kernels._core.types import STATS, ListedIds, Needs
from lopd_kernels._core.workspace import chunk_rows, padded, weight_grad_rows


def visit_chunks(
    linear: Linear,
    rows: int,
    hidden: Tensor,  # [N, D] operand
    weight: gemm.WeightRows,
    visit: Callable[[Tensor, slice], None],
) -> None:
    """Call `visit(u, part)` with the products u [R, V] of `rows` rows at a time."""
    n, vocab = linear.hidden.shape[0], linear.weight.shape[0]
    buffer = hidden.new_empty((min(rows, n), padded(vocab)), dtype=linear.dtype)
    for start in range(0, n, rows):
        part = slice(start, min(start + rows, n))
        u = buffer[: part.stop - start, :vocab]
        gemm.project(hidden[part], weight, 0, u)
        visit(u, part)


def loss_by_chunks(
    linear: Linear,
    loss: RowLoss,
    wants_grad: bool,
    want_entropy: bool,
    rows: int,
    out: Callable[[Tensor, slice], Tensor],  # (u, part) -> where the dlogits of the part go
    use: Callable[[Tensor, Tensor, slice, gemm.WeightRows], None],
) -> tuple[Tensor, Tensor, Tensor, ListedIds]:
    """Losses by chunks; `use(dlogits, hidden, part, weight)` consumes the gradient of each.

    Returns:
        (sum_n w_n L_n [], stats [N, 4 + extras], scale [] of dlogits, listed_ids)
    """
    n, vocab = linear.hidden.shape[0], linear.weight.shape[0]
    functions, target = linear.functions, loss.target.to(linear.dtype)
    weights, scale = normalized_weights(linear, loss.row_weights, dlogits_bound(target))
    listed_ids = functions.locate(loss.ids, loss.row_weights, vocab)
    stats = linear.hidden.new_zeros((n, len(STATS) + len(loss.rule.extras)), dtype=linear.dtype)
    hidden, weight = linear.operand(listed_ids.active), gemm.WeightRows(linear.weight)

    def visit(u: Tensor, part: slice) -> None:
        dlogits = out(u, part)
        functions.row_pass(
            u, listed_ids.rows(part), target[part], weights[part] if wants_grad else None,
            loss.rule, linear.logit_options, want_entropy, stats[part], dlogits,
        )  # fmt: skip
        use(dlogits, hidden[part], part, weight)

    visit_chunks(linear, rows, hidden, weight, visit)
    return weigh(stats[:, 0], loss.row_weights).sum(), stats, scale, listed_ids


def _rows(
    linear: Linear, loss: RowLoss, needs: Needs, stored: bool, workspace_bytes: int | None
) -> int:
    k, vocab = loss.ids.shape[1], linear.weight.shape[0]
    gpu = linear.functions.gpu(linear.hidden, vocab, k + 1, loss.rule, linear.logit_options)
    return chunk_rows(linear.sizes(k), needs, stored, workspace_bytes, gpu)


def fused_loss(
    linear: Linear, loss: RowLoss, needs: Needs, want_entropy: bool, workspace_bytes: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss and the gradients that `needs` names, in one sweep of row chunks.

    Returns:
        (sum_n w_n L_n [], stats [N, 4 + extras], dhidden, dweight, dbias, scale []). The gradients
        are in the compute dtype, short of the factor `scale`; [0] if not needed.
    """
    like, vocab = linear.hidden, linear.weight.shape[0]
    dlogits_dtype = gemm.operand_dtype(like)
    shapes = like.shape, linear.weight.shape, (vocab,)
    dhidden, dweight, dbias = (
        like.new_zeros(shape if need else (0,), dtype=linear.dtype)
        for shape, need in zip(shapes, needs, strict=True)
    )

    def use(dlogits: Tensor, hidden: Tensor, part: slice, weight: gemm.WeightRows) -> None:
        if needs.bias:
            dbias.add_(dlogits.sum(0, dtype=linear.dtype))
        if needs.hidden:
            gemm.hidden_grad(dlogits, weight, 0, dhidden[part], accumulate=False)
        if needs.weight:
            gemm.weight_grad(dlogits, hidden, dweight)

    total, stats, scale, listed_ids = loss_by_chunks(
        linear, loss, any(needs), want_entropy,
        _rows(linear, loss, needs, False, workspace_bytes),
        lambda u, part: gemm.in_place(u, dlogits_dtype), use,
    )  # fmt: skip
    if needs.hidden:
        dhidden.masked_fill_(~listed_ids.active.unsqueeze(1), 0.0)
    return total, stats, dhidden, dweight, dbias, scale


def stored_loss(
    linear: Linear, loss: RowLoss, needs: Needs, want_entropy: bool, workspace_bytes: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss and its dlogits, for gradients over all rows at once in the backward.

    Returns:
        (sum_n w_n L_n [], stats [N, 4 + extras], dlogits [N, V and padding], scale []). The dlogits
        are in the operands' dtype, short of the factor `scale`.
    """
    n, vocab = linear.hidden.shape[0], linear.weight.shape[0]
    dlogits = linear.hidden.new_empty((n, padded(vocab)), dtype=gemm.operand_dtype(linear.hidden))
    dlogits[:, vocab:] = 0.0
    total, stats, scale, _ = loss_by_chunks(
        linear, loss, True, want_entropy,
        _rows(linear, loss, needs, True, workspace_bytes),
        lambda u, part: dlogits[part, :vocab], lambda *_: None,
    )  # fmt: skip
    return total, stats, dlogits, scale


def stored_grads(
    linear: Linear,
    active: Tensor,  # [N]
    dlogits: Tensor,  # [N, V and padding]
    factor: Tensor,  # [] of dlogits
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden, dweight, dbias) of `stored_loss`, complete; dbias in the compute dtype.

    A few rows of dW at a time pass through the compute dtype.
    """
    like, weight = linear.hidden, linear.weight
    dlogits, hidden = dlogits[:, : weight.shape[0]], linear.operand(active)
    dhidden, dbias = like.new_empty(0), like.new_empty(0, dtype=linear.dtype)
    if needs.hidden:
        wide = like.new_empty(like.shape, dtype=linear.dtype)
        gemm.hidden_grad(dlogits, gemm.WeightRows(weight), 0, wide, accumulate=False)
        dhidden = wide.mul_(factor).masked_fill_(~active.unsqueeze(1), 0.0).to(like.dtype)
        del wide
    dweight = weight.new_empty(weight.shape if needs.weight else (0,))
    rows = weight_grad_rows(weight.shape[1], linear.dtype.itemsize)
    for first in range(0, len(dweight), rows):
        part = slice(first, first + rows)
        gemm.new_weight_grad(dlogits[:, part], hidden, dweight[part], factor)
    if needs.bias:
        dbias = dlogits.sum(0, dtype=linear.dtype).mul_(factor)
    return dhidden, dweight, dbias
