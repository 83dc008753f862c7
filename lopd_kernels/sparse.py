"""Losses over the support alone: K gathered rows of the weight instead of the LM head.

Both distributions are renormalised over the listed ids, so nothing outside them enters
the value or the gradient. `z_k = h . W[id_k]` needs N K D multiplications where the LM
head needs N V D; dW is a sum over equal ids, taken in row order, so that equal inputs
give equal bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lopd_kernels.divergence import RowRule, row_rule
from lopd_kernels.engine import BOOKKEEPING, Grads, Linear, Needs, Result, start_grads, weighted_sum
from lopd_kernels.rowpass import STATS, Support, locate, support_pass

GATHER_BYTES = 32 << 20


def add_rows(total: Tensor, ids: Tensor, rows: Tensor) -> None:
    """total[ids[i]] += rows[i] in order of i: the deterministic kernel of each device."""
    if total.is_cuda:
        total.index_put_((ids,), rows, accumulate=True)
    else:
        total.index_add_(0, ids, rows)


def gathered_rows(linear: Linear, needs: Needs, width: int, workspace_bytes: int | None) -> int:
    """Rows of hidden whose K gathered rows of the weight are held at a time."""
    (n, d), v = linear.hidden.shape, linear.weight.shape[0]
    size = torch.empty((), dtype=linear.dtype).element_size()
    per_row = size * width * (3 * d + 16)
    if workspace_bytes is None:
        return max(1, GATHER_BYTES // per_row)
    held = size * (
        n * d * needs.hidden + v * d * needs.weight + 2 * v + BOOKKEEPING * n * (width + 2)
    )
    smallest = held + per_row
    if workspace_bytes < smallest:
        raise ValueError(
            f"workspace_bytes is {workspace_bytes}, but the gather of {width} rows of a weight "
            f"with {d} columns needs at least {smallest}; pass workspace_bytes={smallest} or more"
        )
    return (workspace_bytes - held) // per_row


def renormalized_loss(
    linear: Linear,
    ids: Tensor,
    target: Tensor,
    row_weights: Tensor | None,
    rule_name: str,
    options: list[float],
    needs: Needs,
    workspace_bytes: int | None,
    accumulator: Tensor | None = None,
) -> Result:
    """`engine.fused_loss` for rules named `<divergence>:renormalize`; stats hold the loss."""
    n, vocab = linear.hidden.shape[0], linear.weight.shape[0]
    rule = row_rule(rule_name, options)
    grads, weights = start_grads(linear, needs, row_weights, accumulator)
    support = locate(ids, row_weights, vocab)
    target = target.to(linear.dtype)
    stats = linear.hidden.new_zeros((n, len(STATS)), dtype=linear.dtype)
    counted = needs._replace(weight=needs.weight and accumulator is None)
    rows = gathered_rows(linear, counted, ids.shape[1], workspace_bytes)
    for start in range(0, n, rows):
        part = slice(start, min(start + rows, n))
        _block(
            linear,
            support.rows(part),
            linear.hidden[part],
            target[part],
            weights[part] if any(needs) else None,
            rule,
            stats[part],
            Grads(grads.hidden[part], grads.weight, grads.bias, grads.scale),
        )
    return Result(weighted_sum(stats[:, 0], row_weights), stats, grads)


def _block(
    linear: Linear,
    support: Support,
    hidden: Tensor,  # [R, D]
    target: Tensor,  # [R, K+1]
    weights: Tensor | None,  # [R], None without gradient
    rule: RowRule,
    stats: Tensor,  # [R, 4] output
    grads: Grads,  # hidden: rows of this block; weight and bias: whole
) -> None:
    active = support.active.unsqueeze(1)
    hidden = hidden.to(linear.dtype).masked_fill(~active, 0.0)
    picked = linear.weight[support.ids].to(linear.dtype)
    x = torch.bmm(picked, hidden.unsqueeze(2))[:, :, 0]
    x = x.masked_fill(x.isinf(), math.nan)
    if linear.bias is not None:
        x = x + linear.bias[support.ids].to(linear.dtype)
    x = x * linear.head.gain
    if linear.head.softcap is not None:
        x = x.masked_fill(x.isinf(), math.nan)
    slope = linear.head.finish(x, want_slope=weights is not None)
    grad = support_pass(x, support, target, weights, rule, stats)
    if grad is None:
        return
    if slope is not None:
        grad = grad * slope
    if grads.hidden.numel():
        torch.bmm(grad.unsqueeze(1), picked, out=grads.hidden.unsqueeze(1))
        grads.hidden.masked_fill_(~active, 0.0)
    del picked
    if grads.weight.numel():
        outer = (grad.unsqueeze(2) * hidden.unsqueeze(1)).flatten(0, 1)
        add_rows(grads.weight, support.ids.flatten(), outer)
    if grads.bias.numel():
        add_rows(grads.bias, support.ids.flatten(), grad.flatten())
