"""Losses over the support alone: K gathered rows of the weight instead of the LM head.

Both distributions are renormalised over the listed ids, so nothing outside them enters
the value or the gradient. `u_k = h . W[id_k]` needs N K D multiplications where the LM
head needs N V D; dW is a sum over equal ids, taken in row order, so that equal inputs
give equal bits. The forward keeps u; the backward forms the gradients, complete.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lopd_kernels._core.backend import listed_functions, uses_triton
from lopd_kernels._core.buckets import centred
from lopd_kernels._core.linear import Linear
from lopd_kernels._core.panels import RowLosses
from lopd_kernels._core.rules import RowRule
from lopd_kernels._core.support import Support, locate
from lopd_kernels._core.types import STATS, Head, Reduction
from lopd_kernels._core.workspace import BOOKKEEPING, Needs

GATHER_BYTES = 32 << 20
SORTED = 12  # words per entry that sorting by id takes


def gathered_rows(linear: Linear, needs: Needs, width: int, workspace_bytes: int | None) -> int:
    """Rows of hidden whose K gathered rows of the weight are held at a time.

    The kernels gather nothing; what they need beside the bookkeeping is a sort of the entries.
    """
    (n, d), v = linear.hidden.shape, linear.weight.shape[0]
    size = linear.dtype.itemsize
    gathers = not uses_triton(linear.hidden)
    per_row = size * width * (3 * d + 16) * gathers + 1
    if workspace_bytes is None:
        return max(1, GATHER_BYTES // per_row)
    narrow = gathers and linear.hidden.dtype != linear.dtype
    held = size * (
        narrow * (n * d * needs.hidden + v * d * needs.weight)
        + 2 * v
        + (BOOKKEEPING["torch"] + SORTED * (not gathers)) * n * (width + 2)
    )
    smallest = held + per_row
    if workspace_bytes < smallest:
        raise ValueError(
            f"workspace_bytes is {workspace_bytes}, but the gather of {width} rows of a weight "
            f"with {d} columns needs at least {smallest}; pass workspace_bytes={smallest} or more"
        )
    return (workspace_bytes - held) // per_row


def finish(u: Tensor, ids: Tensor, head: Head) -> tuple[Tensor, Tensor | None]:
    """(z, 1 - tanh^2) of u [N, K] at `ids`; an infinite u or softcapped bias gives NaN."""
    x = u.masked_fill(u.isinf(), math.nan)
    if head.bias is not None:
        x = x + head.bias[ids]
    x = x * head.gain
    if head.softcap is None:
        return x, None
    x = x.masked_fill(x.isinf(), math.nan).tanh()
    return x * head.cap, 1.0 - x * x


def support_rule(z: Tensor, support: Support, target: Tensor, rule: RowRule) -> tuple[Tensor, ...]:
    """(loss [N], dL/dz [N, K], 0 on pads) of a rule renormalised over the support."""
    logprobs = z.masked_fill(~support.listed, -math.inf).log_softmax(1)
    nothing = torch.full_like(logprobs[:, :1], -math.inf)
    buckets = torch.cat([logprobs, nothing], 1)
    loss, g, _ = rule.apply(buckets, torch.cat([target[:, :-1], nothing], 1))
    grad = centred(g, buckets.exp())[:, :-1]
    loss = loss.masked_fill(support.broken, math.nan)
    grad = grad.masked_fill(support.broken.unsqueeze(1), math.nan)
    active = support.active
    grad = torch.where(active.unsqueeze(1) & support.listed, grad, 0.0)
    return torch.where(active, loss, 0.0), grad


def support_losses(
    linear: Linear,
    ids: Tensor,
    target: Tensor,
    row_weights: Tensor | None,
    rule: RowRule,
    needs: Needs,  # of the backward, whose workspace is checked here
    workspace_bytes: int | None,
) -> RowLosses:
    """`engine.row_losses` for rules named `<divergence>:renormalize`; stats hold the loss."""
    gathered_rows(linear, needs, ids.shape[1], workspace_bytes)
    rows = gathered_rows(linear, Needs(), ids.shape[1], workspace_bytes)
    support = locate(ids, row_weights, linear.weight.shape[0])
    hidden = linear.hidden
    u = listed_functions(hidden).dots(hidden, linear.weight, support.ids, rows)
    z, _ = finish(u, support.ids, linear.head)
    stats = hidden.new_zeros((hidden.shape[0], len(STATS)), dtype=linear.dtype)
    stats[:, 0], _ = support_rule(z, support, target.to(linear.dtype), rule)
    return RowLosses(stats, Reduction(u.new_empty((0, 4)), u))


def support_grads(
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
    """(dhidden, dweight, dbias), complete and in the inputs' dtypes; empty where not needed."""
    hidden, weight = linear.hidden, linear.weight
    counted = needs._replace(weight=needs.weight and accumulator is None)
    rows = gathered_rows(linear, counted, ids.shape[1], workspace_bytes)
    support, functions = locate(ids, weights, weight.shape[0]), listed_functions(hidden)
    z, slope = finish(reduction.on, support.ids, linear.head)
    _, grad = support_rule(z, support, target.to(linear.dtype), rule)
    grad = grad * linear.head.slope
    if weights is not None:
        grad = torch.where(support.active.unsqueeze(1), grad * weights.unsqueeze(1), 0.0)
    grad = (grad if slope is None else grad * slope).to(linear.dtype)
    grad = torch.where(support.active.unsqueeze(1) & support.listed, grad, 0.0)
    dhidden, dweight = hidden.new_empty(0), weight.new_empty(0)
    dbias = hidden.new_zeros(weight.shape[0] if needs.bias else 0, dtype=linear.dtype)
    if needs.hidden:
        dhidden = functions.hidden_grad(grad, weight, support.ids, rows)
    if accumulator is None and needs.weight:
        dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
        functions.weight_grad(grad, hidden, support.ids, rows, dweight, add=False)
    elif accumulator is not None:
        functions.weight_grad(grad, hidden, support.ids, rows, accumulator, add=True)
    if needs.bias:
        add_at(dbias, support.ids.flatten(), grad.flatten())
    return dhidden, dweight, dbias


def add_at(total: Tensor, ids: Tensor, rows: Tensor) -> None:
    """total[ids[i]] += rows[i] in order of i: the deterministic kernel of each device."""
    if total.is_cuda:
        total.index_put_((ids,), rows, accumulate=True)
    else:
        total.index_add_(0, ids, rows)
