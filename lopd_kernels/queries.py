"""Reading log-probs off the LM head, and losses on logits that exist already."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lopd_kernels.divergence import RowRule
from lopd_kernels.engine import (
    Linear,
    complete,
    panel_grads,
    reduce_rows,
    row_chunks,
)
from lopd_kernels.matmul import Panels, compute_dtype
from lopd_kernels.rowpass import (
    STATS,
    Coefficients,
    Head,
    Reduction,
    coefficients,
    row_functions,
    settle,
)
from lopd_kernels.schedule import Needs, chunk_rows, logits_rows, padded, panel_columns
from lopd_kernels.sparse import finish, support_rule
from lopd_kernels.torch_rows import locate

WIDE = 4


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


class TopRows(NamedTuple):
    ids: Tensor  # [N, k] int64
    logprobs: Tensor  # [N, k]
    tail_logprobs: Tensor  # [N]
    entropy: Tensor  # [N]
    extra_logprobs: Tensor  # [N, E] or [N, 0]


def topk(linear: Linear, k: int, extra_ids: Tensor | None, workspace_bytes: int | None) -> TopRows:
    """The k most probable ids of each row; the tail is reduced with those ids removed."""
    n, vocab = linear.hidden.shape[0], linear.weight.shape[0]
    like, functions = linear.hidden, linear.functions
    if extra_ids is None:
        extra_ids = like.new_empty((n, 0), dtype=torch.int64)
    index = extra_ids.long()
    broken = ((index < -1) | (index >= vocab)).any(1, keepdim=True)
    index = index.clamp(0, vocab - 1)
    found = TopRows(
        like.new_empty((n, k), dtype=torch.int64),
        like.new_empty((n, k), dtype=linear.dtype),
        like.new_empty(n, dtype=linear.dtype),
        like.new_empty(n, dtype=linear.dtype),
        like.new_empty(extra_ids.shape, dtype=linear.dtype),
    )
    bias = linear.head.bias

    def visit(u: Tensor, part: slice) -> None:
        ids = (u if bias is None else u + bias).topk(k, 1).indices
        extra, _ = finish(u.gather(1, index[part]), index[part], linear.head)
        reduction = Reduction.start(u, len(u), k, linear.dtype)
        functions.reduce(u, 0, functions.locate(ids, None, vocab), linear.head, True, reduction)
        seen = settle(reduction)
        found.ids[part], found.logprobs[part] = ids, seen.buckets[:, :-1]
        found.tail_logprobs[part], found.entropy[part] = seen.buckets[:, -1], seen.entropy
        found.extra_logprobs[part] = extra - seen.top - seen.lse

    width = k + extra_ids.shape[1] + WIDE
    copies = bias is not None or (like.is_cuda and vocab != padded(vocab))
    sizes = linear.sizes(width)._replace(logits=2 if copies else 1)
    rows = chunk_rows(sizes, Needs(), False, workspace_bytes)
    row_chunks(linear, rows, linear.operand(None), Panels(linear.weight), visit)
    found.extra_logprobs.masked_fill_(extra_ids == -1, -math.inf).masked_fill_(broken, math.nan)
    return found


def logits_loss(
    logits: Tensor,  # [N, V]
    ids: Tensor,
    target: Tensor,
    row_weights: Tensor | None,
    rule: RowRule,
    temperature: float,
    want_entropy: bool,
    want_grad: bool,
) -> tuple[Tensor, Tensor]:
    """(stats [N, 4], w_n dL_n/dlogits in the logits' dtype or [0]), a block of rows at a time."""
    n, vocab = logits.shape
    dtype, functions = compute_dtype(logits.dtype), row_functions(logits)
    head, target = Head(temperature=temperature), target.to(dtype)
    stats = logits.new_zeros((n, len(STATS)), dtype=dtype)
    grad = logits.new_empty((n, vocab) if want_grad else 0)
    weights = logits.new_ones(n, dtype=dtype) if row_weights is None else row_weights.to(dtype)
    weights = weights * head.slope
    rows = min(n, logits_rows(logits))
    if rule.name.endswith(":renormalize"):
        return _listed_loss(logits, ids, target, weights, rule, head, stats, grad)
    support = functions.locate(ids, row_weights, vocab)
    buffer = logits.new_empty((rows, padded(vocab)), dtype=dtype)
    for start in range(0, n, max(1, rows)):
        part = slice(start, min(start + rows, n))
        u = buffer[: part.stop - start, :vocab]
        u.copy_(logits[part])
        functions.row_pass(
            u, support.rows(part), target[part], weights[part] if want_grad else None, rule, head,
            want_entropy, stats[part], grad[part] if want_grad else None, inf_masks=True,
        )  # fmt: skip
    return stats, grad


def _listed_loss(
    logits: Tensor,
    ids: Tensor,
    target: Tensor,
    weights: Tensor,  # [N] factor of the gradient
    rule: RowRule,
    head: Head,
    stats: Tensor,
    grad: Tensor,  # [N, V] output or [0]
) -> tuple[Tensor, Tensor]:
    """`logits_loss` of a rule that looks at the list alone."""
    support = locate(ids, weights, logits.shape[1])
    z = logits.gather(1, support.ids).to(target.dtype) * head.gain
    stats[:, 0], on = support_rule(z, support, target, rule)
    if grad.numel():
        on = torch.where(support.active.unsqueeze(1), on * weights.unsqueeze(1), 0.0)
        on = torch.where(support.listed, on, on.gather(1, support.anchor))
        grad.zero_().scatter_(1, support.ids, on.to(grad.dtype))
    return stats, grad
