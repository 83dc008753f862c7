"""Panels of the vocabulary, gradient in the backward (`reduce_rows`, `row_grads`):

    forward, per panel   u = H W_p^T      GEMM 1, fp32
                         state            running log-sum-exp of each row, support taken out
    backward, per panel  u = H W_p^T      GEMM 2
                         dz               the gradient, in place of u
                         dW_p = dz^T H    GEMM 3, the panel's rows of dW, once
                         dH += dz W_p     GEMM 4, accumulated in fp32

Panels are visited in order and nothing is summed out of order: equal inputs give equal
bits. A gradient that nobody asked for costs no GEMM.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lopd_kernels._core import gemm
from lopd_kernels._core.buckets import Settled, coefficients, settle
from lopd_kernels._core.linear import Linear
from lopd_kernels._core.rules import RowRule
from lopd_kernels._core.scaling import complete, largest_dz
from lopd_kernels._core.types import Coefficients, Reduction, Support
from lopd_kernels._core.workspace import Needs, padded, panel_columns


def reduce_rows(
    linear: Linear, support: Support, width: int, want_spread: bool, columns: int
) -> Reduction:
    """All rows reduced to the `width` ids of `support` and the rest, panel by panel."""
    n, vocab = linear.hidden.shape[0], linear.weight.shape[0]
    functions, panels = linear.functions, gemm.Panels(linear.weight)
    reduction = Reduction.start(linear.hidden, n, width, linear.dtype)
    hidden = linear.operand(support.active)
    buffer = hidden.new_empty((n, padded(columns)), dtype=linear.dtype)
    for first in range(0, vocab, columns):
        u = buffer[:, : min(columns, vocab - first)]
        gemm.project(hidden, panels, first, u)
        functions.reduce(u, first, support, linear.head, want_spread, reduction)
    return reduction


def panel_grads(
    linear: Linear,
    support: Support,
    on: Tensor,  # [N, K] z at the ids
    slopes: Coefficients,
    scale: Tensor | None,  # [] of dz, to be made up for
    needs: Needs,
    columns: int,
    accumulator: Tensor | None = None,  # [V, D] compute dtype; dW is added to it
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden, dweight, dbias), complete and in the inputs' dtypes; empty where not needed."""
    n, vocab = linear.hidden.shape[0], linear.weight.shape[0]
    like, weight = linear.hidden, linear.weight
    functions, panels = linear.functions, gemm.Panels(weight)
    hidden = linear.operand(support.active)
    dhidden = like.new_zeros(like.shape if needs.hidden else (0,), dtype=linear.dtype)
    own = needs.weight and accumulator is None
    dweight = weight.new_empty(weight.shape if own else (0,))
    dbias = like.new_empty(vocab if needs.bias else 0, dtype=linear.dtype)
    buffer = hidden.new_empty((n, padded(columns)), dtype=linear.dtype)
    for first in range(0, vocab, columns):
        part = slice(first, min(first + columns, vocab))
        u = buffer[:, : part.stop - first]
        gemm.project(hidden, panels, first, u)
        dz = gemm.in_place(u, hidden.dtype)
        functions.write(u, first, support, linear.head, slopes, on, dz)
        if needs.bias:
            torch.sum(dz, 0, dtype=linear.dtype, out=dbias[part])
        if own:
            gemm.new_weight_grad(dz, hidden, dweight[part], scale)
        elif accumulator is not None:
            gemm.weight_grad(dz, hidden, accumulator[part], scale)
        if needs.hidden:
            gemm.hidden_grad(dz, panels, first, dhidden, fresh=False)
    if needs.hidden:
        dhidden.masked_fill_(~support.active.unsqueeze(1), 0.0)
    if scale is not None:
        dhidden.mul_(scale)
        dbias.mul_(scale)
    del buffer, u, dz, hidden
    return dhidden.to(like.dtype), dweight, dbias


class RowLosses(NamedTuple):
    stats: Tensor  # [N, 4 + extras]
    reduction: Reduction


def row_losses(
    linear: Linear,
    ids: Tensor,
    target: Tensor,
    row_weights: Tensor | None,
    rule: RowRule,
    needs: Needs,  # of the backward, whose workspace is checked here
    want_entropy: bool,
    workspace_bytes: int | None,
) -> RowLosses:
    sizes, vocab = linear.sizes(ids.shape[1]), linear.weight.shape[0]
    panel_columns(sizes, needs, workspace_bytes)
    columns = panel_columns(sizes, Needs(), workspace_bytes)
    support = linear.functions.locate(ids, row_weights, vocab)
    reduction = reduce_rows(linear, support, ids.shape[1], want_entropy, columns)
    seen = settle(reduction)
    loss, _, extras = rule.apply(seen.buckets, target.to(linear.dtype))
    rows = torch.stack([loss, *statistics(seen, want_entropy), *extras], 1)
    stats = torch.where(support.active.unsqueeze(1), rows, 0.0)
    return RowLosses(stats, reduction)


def statistics(seen: Settled, want_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(lse, log of the mass off the support, entropy), [N] each."""
    entropy = seen.entropy if want_entropy else torch.zeros_like(seen.entropy)
    return (seen.top + seen.lse)[:, 0], seen.buckets[:, -1], entropy


def row_grads(
    linear: Linear,
    ids: Tensor,
    target: Tensor,
    weights: Tensor | None,  # [N] upstream gradient times the row's weight
    reduction: Reduction,
    rule: RowRule,
    needs: Needs,
    workspace_bytes: int | None,
    accumulator: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `row_losses`, see `panel_grads`."""
    support = linear.functions.locate(ids, weights, linear.weight.shape[0])
    buckets = settle(reduction).buckets
    target = target.to(linear.dtype)
    _, g, _ = rule.apply(buckets, target)
    factors, scale = complete(linear, weights, largest_dz(target))
    slopes = coefficients(reduction, g, buckets.exp(), factors)
    counted = needs._replace(weight=needs.weight and accumulator is None)
    columns = panel_columns(linear.sizes(ids.shape[1]), counted, workspace_bytes)
    return panel_grads(linear, support, reduction.on, slopes, scale, needs, columns, accumulator)
