"""Panels of the vocabulary, with the gradient in the backward.

    forward, per panel   u = H W_p^T            GEMM 1, fp32
                         row state              running log-sum-exp, listed logits excluded
    backward, per panel  u = H W_p^T            GEMM 2
                         dlogits                in place of u
                         dW_p = dlogits^T H     GEMM 3, the panel's rows of dW, once
                         dH += dlogits W_p      GEMM 4, accumulated in fp32

Panels are visited in order and every sum has a fixed order, so equal inputs give equal bits. A
gradient that is not needed costs no GEMM.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lopd_kernels._core import gemm, skipping
from lopd_kernels._core.buckets import logit_grads, student_buckets
from lopd_kernels._core.linear import Linear
from lopd_kernels._core.listed import ListedGrads
from lopd_kernels._core.rules import RowLoss
from lopd_kernels._core.scaling import dlogits_bound, panel_weights
from lopd_kernels._core.types import ListedIds, LogitGrads, Needs, RowState
from lopd_kernels._core.workspace import padded, panel_columns


def reduce_rows(
    linear: Linear, listed_ids: ListedIds, width: int, want_entropy: bool, columns: int
) -> RowState:
    """The state of all rows with lists of `width` ids, panel by panel."""
    n, vocab = linear.hidden.shape[0], linear.weight.shape[0]
    functions, weight = linear.functions, gemm.WeightRows(linear.weight)
    state = RowState.start(linear.hidden, n, width, linear.dtype)
    hidden = linear.operand(listed_ids.active)
    buffer = hidden.new_empty((n, padded(columns)), dtype=linear.dtype)
    for first in range(0, vocab, columns):
        u = buffer[:, : min(columns, vocab - first)]
        gemm.project(hidden, weight, first, u)
        functions.reduce(u, first, listed_ids, linear.logit_options, want_entropy, state)
    return state


def panel_grads(
    linear: Linear,
    listed_ids: ListedIds,
    listed: Tensor,  # [N, K] z at the ids
    grads: LogitGrads,
    scale: Tensor | None,  # [] that `grads` is short of
    needs: Needs,
    columns: int,
    accumulator: Tensor | None = None,  # [V, D] compute dtype; dW is added to it
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden, dweight, dbias), complete; [0] if not needed; dbias in the compute dtype."""
    dhidden, dweight, dbias = panel_sums(
        linear, listed_ids, listed, grads, scale, needs, columns, accumulator
    )
    if scale is not None:
        dhidden.mul_(scale)
        dbias.mul_(scale)
    return dhidden.to(linear.hidden.dtype), dweight, dbias


def panel_sums(
    linear: Linear,
    listed_ids: ListedIds,
    listed: Tensor,
    grads: LogitGrads,
    scale: Tensor | None,
    needs: Needs,
    columns: int,
    accumulator: Tensor | None,
    add: Callable[[int, Tensor], None] = lambda first, wide: None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`panel_grads`, with dhidden and dbias in the compute dtype and short of `scale`.

    `add(first, wide)` adds to the rows of dW from `first` on, before they are scaled and rounded.
    """
    n, vocab = linear.hidden.shape[0], linear.weight.shape[0]
    like, functions, weight = linear.hidden, linear.functions, gemm.WeightRows(linear.weight)
    hidden = linear.operand(listed_ids.active)
    dhidden = like.new_zeros(like.shape if needs.hidden else (0,), dtype=linear.dtype)
    dweight = linear.weight.new_empty(linear.weight.shape if needs.weight else (0,))
    dbias = like.new_empty(vocab if needs.bias else 0, dtype=linear.dtype)
    buffer = hidden.new_empty((n, padded(columns)), dtype=linear.dtype)
    for first in range(0, vocab, columns):
        part = slice(first, min(first + columns, vocab))
        u = buffer[:, : part.stop - first]
        gemm.project(hidden, weight, first, u)
        dlogits = gemm.in_place(u, hidden.dtype)
        functions.write(u, first, listed_ids, linear.logit_options, grads, listed, dlogits)
        if needs.bias:
            torch.sum(dlogits, 0, dtype=linear.dtype, out=dbias[part])
        if needs.weight:
            gemm.new_weight_grad(dlogits, hidden, dweight[part], scale, partial(add, first))
        if accumulator is not None:
            gemm.weight_grad(dlogits, hidden, accumulator[part], scale)
        if needs.hidden:
            gemm.hidden_grad(dlogits, weight, first, dhidden, accumulate=True)
    if needs.hidden:
        dhidden.masked_fill_(~listed_ids.active.unsqueeze(1), 0.0)
    return dhidden, dweight, dbias


def row_losses(
    linear: Linear, loss: RowLoss, needs: Needs, want_entropy: bool, workspace_bytes: int | None
) -> tuple[Tensor, RowState]:
    """Stats [N, 4 + extras] and state of each row.

    Raises ValueError if the backward's `needs` exceed the workspace.
    """
    k, vocab = loss.ids.shape[1], linear.weight.shape[0]
    sizes = linear.sizes(k)
    panel_columns(sizes.keeping(loss.skip), needs, workspace_bytes)
    columns = panel_columns(sizes, Needs(), workspace_bytes)
    listed_ids = linear.functions.locate(loss.ids, loss.row_weights, vocab)
    state = reduce_rows(linear, listed_ids, k, want_entropy, columns)
    student = student_buckets(state)
    losses, g, extras = loss.rule.apply(student.logprobs, loss.target.to(linear.dtype))
    lse = (student.max_logit + student.lse)[:, 0]
    entropy = student.entropy if want_entropy else torch.zeros_like(losses)
    rows = torch.stack([losses, lse, student.logprobs[:, -1], entropy, *extras], 1)
    rows = torch.where(listed_ids.active.unsqueeze(1), rows, 0.0)
    if loss.skip is not None:
        p = student.logprobs.exp()
        norms = skipping.l1_norms(state, g, p, loss.row_weights, listed_ids.active)
        selection = skipping.select(loss.skip, *norms)
        rows = torch.cat([rows, skipping.skip_stats(*norms, selection)], 1)
    return rows, state


def row_grads(
    linear: Linear,
    loss: RowLoss,  # row_weights: upstream gradient times the row's weight
    state: RowState,
    needs: Needs,
    workspace_bytes: int | None,
    accumulator: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `row_losses`, see `panel_grads`."""
    if loss.skip is not None:
        return _kept_row_grads(linear, loss, state, needs, workspace_bytes, accumulator)
    listed_ids = linear.functions.locate(loss.ids, loss.row_weights, linear.weight.shape[0])
    logprobs, target = student_buckets(state).logprobs, loss.target.to(linear.dtype)
    _, g, _ = loss.rule.apply(logprobs, target)
    weights, scale = panel_weights(linear, loss.row_weights, dlogits_bound(target))
    grads = logit_grads(state, g, logprobs.exp(), weights)
    columns = panel_columns(linear.sizes(loss.ids.shape[1]), needs, workspace_bytes)
    return panel_grads(linear, listed_ids, state.listed, grads, scale, needs, columns, accumulator)


def _kept_row_grads(
    linear: Linear,
    loss: RowLoss,
    state: RowState,
    needs: Needs,
    workspace_bytes: int | None,
    accumulator: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`row_grads` with the GEMMs over the rows that `loss.skip` keeps.

    Every row's gradient at its listed ids comes from K rows of the weight.
    """
    assert loss.skip is not None
    vocab, k = linear.weight.shape[0], loss.ids.shape[1]
    logprobs, target = student_buckets(state).logprobs, loss.target.to(linear.dtype)
    active = linear.functions.locate(loss.ids, loss.row_weights, vocab).active
    _, g, _ = loss.rule.apply(logprobs, target)
    p = logprobs.exp()
    norms = skipping.l1_norms(state, g, p, loss.row_weights, active)
    rows, factor, *_ = skipping.select(loss.skip, *norms)
    weights, scale = panel_weights(linear, loss.row_weights, dlogits_bound(target))
    grads = logit_grads(state, g, p, weights)
    at_ids = grads.listed
    if linear.logit_options.softcap is not None:
        at_ids = at_ids * (1.0 - (state.listed / linear.logit_options.cap).square())
    at_lists = ListedGrads(linear, loss.ids, loss.row_weights, at_ids)
    kept = linear._replace(hidden=linear.hidden[rows])
    kept_weights = None if loss.row_weights is None else loss.row_weights[rows]
    kept_ids = linear.functions.locate(loss.ids[rows], kept_weights, vocab)
    elsewhere = LogitGrads(
        grads.unlisted_max[rows], grads.factor[rows] * factor, None,
        grads.listed.new_zeros((len(rows), k)),
    )  # fmt: skip
    columns = panel_columns(linear.sizes(k).keeping(loss.skip), needs, workspace_bytes)
    dense, dweight, dbias = panel_sums(
        kept, kept_ids, state.listed[rows], elsewhere, scale, needs, columns, accumulator,
        at_lists.add_weight_grad,
    )  # fmt: skip
    if accumulator is not None:
        at_lists.add_weight_grad(0, accumulator, scale)
    dhidden = dense
    if needs.hidden:
        dhidden = at_lists.hidden_grad().index_add_(0, rows, dense)
    if needs.bias:
        at_lists.add_bias_grad(dbias)
    if scale is not None:
        dhidden.mul_(scale)
        dbias.mul_(scale)
    return dhidden.to(linear.hidden.dtype), dweight, dbias
