"""Reading log-probs off the LM head, and losses on logits that exist already."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lopd_kernels._core.buckets import coefficients, settle
from lopd_kernels._core.linear import Linear
from lopd_kernels._core.panels import panel_grads, reduce_rows
from lopd_kernels._core.scaling import complete
from lopd_kernels._core.types import Coefficients, Reduction
from lopd_kernels._core.workspace import WIDE, Needs, panel_columns


def _add_at(z: Tensor, index: Tensor, values: Tensor) -> None:
    """z[n, index[n, k]] += values[n, k] in order of k: the deterministic kernel of each device."""
    if z.is_cuda:
        rows = torch.arange(z.shape[0], device=z.device).unsqueeze(1).expand_as(index)
        z.index_put_((rows, index), values, accumulate=True)
    else:
        z.scatter_add_(1, index, values)


def _first_columns(ids: Tensor) -> Tensor:
    """[N, K] the column at which each id stands first in its row."""
    ordered, order = ids.sort(dim=1, stable=True)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    columns = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    begin = torch.where(new, columns, 0).cummax(1).values
    return torch.empty_like(order).scatter_(1, order, order.gather(1, begin))


def _distinct(ids: Tensor) -> tuple[Tensor, Tensor]:
    """(each row's ids without repetition, the column that holds each one).

    A row of pads gets id 0, so that it counts as a row.
    """
    ids = ids.long()
    first = _first_columns(ids)
    columns = torch.arange(ids.shape[1], device=ids.device)
    once = ids.masked_fill(first != columns, -1)
    once[:, 0] = torch.where((once == -1).all(1), 0, once[:, 0])
    return once, first


def logprobs(
    linear: Linear,
    ids: Tensor,
    want_entropy: bool,
    needs: Needs,  # of the backward, whose workspace is checked here
    workspace_bytes: int | None,
) -> tuple[Tensor, Tensor, Reduction]:
    """(log p at ids [N, K], entropy [N] or [0], what the backward needs); -inf at ids of -1."""
    once, first = _distinct(ids)
    sizes, vocab = linear.sizes(2 * ids.shape[1] + WIDE), linear.weight.shape[0]
    panel_columns(sizes, needs, workspace_bytes)
    columns = panel_columns(sizes, Needs(), workspace_bytes)
    support = linear.functions.locate(once, None, vocab)
    reduction = reduce_rows(linear, support, ids.shape[1], want_entropy, columns)
    seen = settle(reduction)
    out = seen.buckets[:, :-1].gather(1, first).masked_fill(ids == -1, -math.inf)
    out = out.masked_fill(seen.lse.isnan(), math.nan)
    return out, seen.entropy if want_entropy else seen.entropy[:0].clone(), reduction


def logprobs_grads(
    linear: Linear,
    ids: Tensor,  # [N, K]
    reduction: Reduction,
    grad_logprobs: Tensor,  # [N, K]
    grad_entropy: Tensor,  # [N] or [0]
    needs: Needs,
    workspace_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dz_j = sum_k g_k ([j = id_k] - p_j) - g_H p_j (log p_j + H); repeated ids add up."""
    once, first = _distinct(ids)
    support = linear.functions.locate(once, None, linear.weight.shape[0])
    g = grad_logprobs.new_zeros((*ids.shape[:1], ids.shape[1] + 1), dtype=linear.dtype)
    _add_at(g, first, grad_logprobs.to(linear.dtype).masked_fill(ids == -1, 0.0))
    seen = settle(reduction)
    reach = 2.0 * g.abs().sum(1)
    if grad_entropy.numel():
        reach = reach + 16.0 * grad_entropy.abs().to(linear.dtype)
    reach = torch.where(reach.isfinite() & (reach > 0.0), reach, 1.0)
    weights, scale = complete(linear, None, reach.amax() if len(reach) else reach.sum() + 1.0)
    slopes = coefficients(reduction, g, seen.buckets.exp(), weights)
    if grad_entropy.numel():
        slopes = _with_entropy(slopes, seen.shift[:, 0], seen.buckets[:, :-1], seen.entropy,
                               grad_entropy.to(linear.dtype) * weights)  # fmt: skip
    columns = panel_columns(linear.sizes(2 * ids.shape[1] + WIDE), needs, workspace_bytes)
    return panel_grads(linear, support, reduction.on, slopes, scale, needs, columns)


def _with_entropy(
    slopes: Coefficients, shift: Tensor, lp: Tensor, entropy: Tensor, upstream: Tensor
) -> Coefficients:
    """Adds -upstream p (log p + entropy), with p = e exp(shift) off the support."""
    pull = upstream * shift.exp()
    pulled = pull * (shift + entropy)
    on = upstream.unsqueeze(1) * lp.exp() * (lp + entropy.unsqueeze(1))
    return Coefficients(
        slopes.own,
        slopes.factor - torch.where(pull == 0.0, 0.0, pulled),
        pull,
        slopes.on - on.masked_fill(lp == -math.inf, 0.0),
    )
