"""Losses on the listed ids only: K gathered rows of the weight instead of the LM head.

Both distributions are renormalised over the listed ids, so nothing else enters the value or the
gradient. `u_k = h . W[id_k]` takes N K D multiplications where the LM head takes N V D. dW is a
sum over equal ids in row order, so equal inputs give equal bits. The forward stores u; the
backward computes the gradients, complete.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lopd_kernels._core.backend import listed_functions, uses_triton
from lopd_kernels._core.buckets import center
from lopd_kernels._core.linear import Linear
from lopd_kernels._core.listed_ids import (
    Entries,
    SafeListedIds,
    add_at,
    locate,
    sort_entries,
)
from lopd_kernels._core.rules import RowLoss, Rule
from lopd_kernels._core.types import STATS, LogitOptions, Needs, RowState
from lopd_kernels._core.workspace import BOOKKEEPING, SORT_WORDS, WorkspaceError, gather_rows


def gathered_rows(linear: Linear, needs: Needs, width: int, workspace_bytes: int | None) -> int:
    """Rows of hidden whose K gathered rows of the weight are in memory at a time.

    The kernels gather nothing; beside the bookkeeping they need memory to sort the entries.
    """
    (n, d), v = linear.hidden.shape, linear.weight.shape[0]
    size = linear.dtype.itemsize
    gathers = not uses_triton(linear.hidden)
    per_row = size * width * (3 * d + 16) * gathers + 1
    if workspace_bytes is None:
        return gather_rows(n, width, d)
    narrow = gathers and linear.hidden.dtype != linear.dtype
    fixed = size * (
        narrow * (n * d * needs.hidden + v * d * needs.weight)
        + 6 * v
        + (BOOKKEEPING["torch"] + SORT_WORDS) * n * (width + 2)
    )
    smallest = fixed + per_row
    if workspace_bytes < smallest:
        raise WorkspaceError(
            f"workspace_bytes is {workspace_bytes}, but the gather of {width} rows of a weight "
            f"with {d} columns needs at least {smallest}; pass workspace_bytes={smallest} or more"
        )
    return (workspace_bytes - fixed) // per_row


def apply_logit_options(
    u: Tensor, ids: Tensor, logit_options: LogitOptions
) -> tuple[Tensor, Tensor | None]:
    """(z, 1 - tanh^2) of u [N, K] at `ids`; an infinite u or softcapped bias gives NaN."""
    x = u.masked_fill(u.isinf(), math.nan)
    if logit_options.bias is not None:
        x = x + logit_options.bias[ids]
    x = x * logit_options.gain
    if logit_options.softcap is None:
        return x, None
    x = x.masked_fill(x.isinf(), math.nan).tanh()
    return x * logit_options.cap, 1.0 - x * x


def renormalized_loss(
    z: Tensor, listed_ids: SafeListedIds, target: Tensor, rule: Rule
) -> tuple[Tensor, Tensor]:
    """(loss [N], dL/dz [N, K], 0 at pads) of a rule renormalised over the listed ids."""
    logprobs = z.masked_fill(~listed_ids.listed, -math.inf).log_softmax(1)
    no_tail = torch.full_like(logprobs[:, :1], -math.inf)
    buckets = torch.cat([logprobs, no_tail], 1)
    loss, g, _ = rule.apply(buckets, torch.cat([target[:, :-1], no_tail], 1))
    grad = center(g, buckets.exp())[:, :-1]
    loss = loss.masked_fill(listed_ids.invalid, math.nan)
    grad = grad.masked_fill(listed_ids.invalid.unsqueeze(1), math.nan)
    active = listed_ids.active
    grad = torch.where(active.unsqueeze(1) & listed_ids.listed, grad, 0.0)
    return torch.where(active, loss, 0.0), grad


def listed_losses(
    linear: Linear, loss: RowLoss, needs: Needs, workspace_bytes: int | None
) -> tuple[Tensor, RowState]:
    """`panels.row_losses` of a rule that ignores unlisted ids; the stats hold only the loss."""
    width = loss.ids.shape[1]
    gathered_rows(linear, needs, width, workspace_bytes)
    rows = gathered_rows(linear, Needs(), width, workspace_bytes)
    listed_ids = locate(loss.ids, loss.row_weights, linear.weight.shape[0])
    hidden = linear.hidden
    u = listed_functions(hidden).dots(hidden, linear.weight, listed_ids.ids, rows)
    z, _ = apply_logit_options(u, listed_ids.ids, linear.logit_options)
    stats = hidden.new_zeros((hidden.shape[0], len(STATS)), dtype=linear.dtype)
    stats[:, 0], _ = renormalized_loss(z, listed_ids, loss.target.to(linear.dtype), loss.rule)
    return stats, RowState(u.new_empty((0, 4)), u)


def listed_grads(
    linear: Linear,
    loss: RowLoss,  # row_weights: upstream gradient times the row's weight
    state: RowState,  # `listed` is u, before the logit options
    needs: Needs,
    workspace_bytes: int | None,
    accumulator: Tensor | None = None,  # [V, D] compute dtype; dW is added to it
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden, dweight, dbias) of `listed_losses`, complete; [0] if not needed."""
    hidden, weight = linear.hidden, linear.weight
    rows = gathered_rows(linear, needs, loss.ids.shape[1], workspace_bytes)
    listed_ids, functions = (
        locate(loss.ids, loss.row_weights, len(weight)),
        listed_functions(hidden),
    )
    z, slope = apply_logit_options(state.listed, listed_ids.ids, linear.logit_options)
    _, grad = renormalized_loss(z, listed_ids, loss.target.to(linear.dtype), loss.rule)
    grad = grad * linear.logit_options.slope
    if loss.row_weights is not None:
        weighted = grad * loss.row_weights.unsqueeze(1)
        grad = torch.where(listed_ids.active.unsqueeze(1), weighted, 0.0)
    grad = (grad if slope is None else grad * slope).to(linear.dtype)
    grad = torch.where(listed_ids.active.unsqueeze(1) & listed_ids.listed, grad, 0.0)
    dhidden, dweight = hidden.new_empty(0), weight.new_empty(0)
    dbias = hidden.new_zeros(weight.shape[0] if needs.bias else 0, dtype=linear.dtype)
    if needs.hidden:
        dhidden = functions.hidden_grad(grad, weight, listed_ids.ids, rows, weight.dtype)
        dhidden.masked_fill_(~listed_ids.active.unsqueeze(1), 0.0)
    if needs.weight or accumulator is not None:
        entries = sort_entries(grad, listed_ids.ids, weight.shape[0])
    if needs.weight:
        dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
        functions.weight_grad(entries, hidden, rows, 0, dweight, add=False)
    if accumulator is not None:
        functions.weight_grad(entries, hidden, rows, 0, accumulator, add=True)
    if needs.bias:
        add_at(dbias, listed_ids.ids.flatten(), grad.flatten())
    return dhidden, dweight, dbias


class ListedGrads:
    """The part of the gradients that comes from dL/dz at the listed ids of every row."""

    def __init__(
        self,
        linear: Linear,
        ids: Tensor,  # [N, K]
        row_weights: Tensor | None,
        grad: Tensor,  # [N, K] times the slope of the logit options
    ) -> None:
        self.linear, self.functions = linear, listed_functions(linear.hidden)
        listed_ids = locate(ids, row_weights, linear.weight.shape[0])
        self.ids, self.active = listed_ids.ids, listed_ids.active.unsqueeze(1)
        self.grad = torch.where(self.active & listed_ids.listed, grad, 0.0)
        self.rows = gather_rows(len(ids), ids.shape[1], linear.weight.shape[1])
        self.entries: Entries | None = None

    def hidden_grad(self) -> Tensor:
        """[N, D] in the compute dtype."""
        dtype = self.linear.dtype
        grad = self.functions.hidden_grad(self.grad, self.linear.weight, self.ids, self.rows, dtype)
        return grad.masked_fill_(~self.active, 0.0)

    def add_weight_grad(self, first: int, out: Tensor, scale: Tensor | None = None) -> None:
        """Add to the rows of dW [P, D] from `first` on, in the compute dtype."""
        if self.entries is None:
            grad = self.grad if scale is None else self.grad * scale
            self.entries = sort_entries(grad, self.ids, self.linear.weight.shape[0])
        self.functions.weight_grad(self.entries, self.linear.hidden, self.rows, first, out, True)

    def add_bias_grad(self, out: Tensor) -> None:
        """Add to dbias [V] in the compute dtype."""
        add_at(out, self.ids.flatten(), self.grad.flatten())
