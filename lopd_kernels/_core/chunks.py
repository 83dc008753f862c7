"""The two schedules: what happens between a head's inputs and its gradients.

Row chunks, gradient in the forward (`fused_loss`):

    per chunk of rows    u = H_c W^T      GEMM 1, fp32
                         dz               the row pass, in place of u
                         dH_c = dz W      GEMM 2
                         dW += dz^T H_c   GEMM 3, accumulated in fp32

dz carries w_n / max|w| only; max|w|, the constant slope of the head and the upstream
gradient multiply once, in the last pass over the finished gradients (`Grads.scale`).

The same with dz of all rows kept in 16 bits, GEMMs 2 and 3 over all rows in the backward
(`kept_loss`, `kept_grads`): no accumulator, and every gradient is rounded once.

Panels of the vocabulary, gradient in the backward (`reduce_rows`, `row_grads`):

    forward, per panel   u = H W_p^T      GEMM 1, fp32
                         state            running log-sum-exp of each row, support taken out
    backward, per panel  u = H W_p^T      GEMM 2
                         dz               the gradient, in place of u
                         dW_p = dz^T H    GEMM 3, the panel's rows of dW, once
                         dH += dz W_p     GEMM 4, accumulated in fp32

Chunks and panels are visited in order and nothing is summed out of order: equal inputs
give equal bits. A gradient that nobody asked for costs no GEMM.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from lopd_kernels._core import gemm
from lopd_kernels._core.linear import Linear
from lopd_kernels._core.rules import RowRule
from lopd_kernels._core.scaling import largest_dz, normalised, weighted_sum
from lopd_kernels._core.types import STATS, Support
from lopd_kernels._core.workspace import (
    Needs,
    chunk_rows,
    kept_columns,
    padded,
)


@dataclass
class Grads:
    """Gradients in the compute dtype, short of a factor `scale`; empty where not needed."""

    hidden: Tensor  # [N, D] or [0]
    weight: Tensor  # [V, D] or [0]
    bias: Tensor  # [V] or [0]
    scale: Tensor  # []


class Result(NamedTuple):
    loss: Tensor  # [] sum_n w_n L_n
    stats: Tensor  # [N, 4 + extras]
    grads: Grads


def row_chunks(
    linear: Linear,
    rows: int,
    hidden: Tensor,  # [N, D] operand
    panels: gemm.Panels,
    visit: Callable[[Tensor, slice], None],
) -> None:
    """Call `visit` with the logits u [R, V] of `rows` rows at a time."""
    n, vocab = linear.hidden.shape[0], linear.weight.shape[0]
    buffer = hidden.new_empty((min(rows, n), padded(vocab)), dtype=linear.dtype)
    for start in range(0, n, rows):
        part = slice(start, min(start + rows, n))
        u = buffer[: part.stop - start, :vocab]
        gemm.project(hidden[part], panels, 0, u)
        visit(u, part)


def loss_by_chunks(
    linear: Linear,
    ids: Tensor,  # [N, K]
    target: Tensor,  # [N, M]
    row_weights: Tensor | None,  # [N]
    rule: RowRule,
    wants_grad: bool,
    want_entropy: bool,
    rows: int,
    room: Callable[[Tensor, slice], Tensor],  # (u, rows) -> where their dz goes
    use: Callable[[Tensor, Tensor, slice, gemm.Panels], None],  # (dz, hidden, rows, panels)
) -> tuple[Tensor, Tensor, Tensor, Support]:
    """(sum_n w_n L_n, stats, scale of dz, support), with dz handed to `use` chunk by chunk."""
    n, vocab = linear.hidden.shape[0], linear.weight.shape[0]
    functions, target = linear.functions, target.to(linear.dtype)
    weights, scale = normalised(linear, row_weights, largest_dz(target))
    support = functions.locate(ids, row_weights, vocab)
    stats = linear.hidden.new_zeros((n, len(STATS) + len(rule.extras)), dtype=linear.dtype)
    hidden, panels = linear.operand(support.active), gemm.Panels(linear.weight)

    def visit(u: Tensor, part: slice) -> None:
        dz = room(u, part)
        functions.row_pass(
            u, support.rows(part), target[part], weights[part] if wants_grad else None, rule,
            linear.head, want_entropy, stats[part], dz,
        )  # fmt: skip
        use(dz, hidden[part], part, panels)

    row_chunks(linear, rows, hidden, panels, visit)
    return weighted_sum(stats[:, 0], row_weights), stats, scale, support


def fused_loss(
    linear: Linear,
    ids: Tensor,
    target: Tensor,
    row_weights: Tensor | None,
    rule: RowRule,
    needs: Needs,
    want_entropy: bool,
    workspace_bytes: int | None,
) -> Result:
    """Value, row statistics and the gradients that `needs` names, in one sweep of row chunks."""
    like, vocab = linear.hidden, linear.weight.shape[0]
    dz_dtype = gemm.operand_dtype(like)
    shapes = like.shape, linear.weight.shape, (vocab,)
    dhidden, dweight, dbias = (
        like.new_zeros(shape if need else (0,), dtype=linear.dtype)
        for shape, need in zip(shapes, needs, strict=True)
    )

    def use(dz: Tensor, hidden: Tensor, part: slice, panels: gemm.Panels) -> None:
        if needs.bias:
            dbias.add_(dz.sum(0, dtype=linear.dtype))
        if needs.hidden:
            gemm.hidden_grad(dz, panels, 0, dhidden[part], fresh=True)
        if needs.weight:
            gemm.weight_grad(dz, hidden, dweight)

    loss, stats, scale, support = loss_by_chunks(
        linear, ids, target, row_weights, rule, any(needs), want_entropy,
        chunk_rows(linear.sizes(ids.shape[1]), needs, False, workspace_bytes),
        lambda u, part: gemm.in_place(u, dz_dtype), use,
    )  # fmt: skip
    if needs.hidden:
        dhidden.masked_fill_(~support.active.unsqueeze(1), 0.0)
    return Result(loss, stats, Grads(dhidden, dweight, dbias, scale))


class Kept(NamedTuple):
    loss: Tensor  # []
    stats: Tensor  # [N, 4 + extras]
    dz: Tensor  # [N, V and padding] as GEMMs take it, short of `scale`
    scale: Tensor  # []


def kept_loss(
    linear: Linear,
    ids: Tensor,
    target: Tensor,
    row_weights: Tensor | None,
    rule: RowRule,
    needs: Needs,
    want_entropy: bool,
    workspace_bytes: int | None,
) -> Kept:
    """The forward that leaves both gradient GEMMs, of all rows at once, to the backward."""
    n, vocab = linear.hidden.shape[0], linear.weight.shape[0]
    dz = linear.hidden.new_empty((n, padded(vocab)), dtype=gemm.operand_dtype(linear.hidden))
    dz[:, vocab:] = 0.0
    loss, stats, scale, _ = loss_by_chunks(
        linear, ids, target, row_weights, rule, True, want_entropy,
        chunk_rows(linear.sizes(ids.shape[1]), needs, True, workspace_bytes),
        lambda u, part: dz[part, :vocab], lambda *given: None,
    )  # fmt: skip
    return Kept(loss, stats, dz, scale)


def kept_grads(
    linear: Linear,
    active: Tensor,  # [N]
    dz: Tensor,  # [N, V and padding]
    factor: Tensor,  # []
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden, dweight, dbias), complete; a panel of dW at a time passes through fp32."""
    like, weight = linear.hidden, linear.weight
    dz, hidden = dz[:, : weight.shape[0]], linear.operand(active)
    dhidden, dbias = like.new_empty(0), like.new_empty(0, dtype=linear.dtype)
    if needs.hidden:
        wide = like.new_empty(like.shape, dtype=linear.dtype)
        gemm.hidden_grad(dz, gemm.Panels(weight), 0, wide, fresh=True)
        dhidden = wide.mul_(factor).masked_fill_(~active.unsqueeze(1), 0.0).to(like.dtype)
        del wide
    dweight = weight.new_empty(weight.shape if needs.weight else (0,))
    columns = kept_columns(weight.shape[1], linear.dtype.itemsize)
    for first in range(0, len(dweight), columns):
        part = slice(first, first + columns)
        gemm.new_weight_grad(dz[:, part], hidden, dweight[part], factor)
    if needs.bias:
        dbias = dz.sum(0, dtype=linear.dtype).mul_(factor)
    return dhidden, dweight, dbias
