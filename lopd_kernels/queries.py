"""Reading log-probs off the LM head, and losses on logits that exist already."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lopd_kernels.divergence import row_rule
from lopd_kernels.engine import Grads, Linear, Needs, chunk_rows, sweep
from lopd_kernels.matmul import compute_dtype
from lopd_kernels.rowpass import (
    STATS,
    Head,
    Support,
    block_rows,
    centred,
    locate,
    overwrite,
    reduce_rows,
    row_pass,
    support_pass,
)

WIDE = 4


def _safe(ids: Tensor, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """(index without pads, pads, out of range) of ids that may repeat in a row."""
    ids = ids.long()
    broken = (ids < -1) | (ids >= vocab)
    return torch.where(broken, 0, ids).clamp(min=0), ids == -1, broken


def _add_at(z: Tensor, index: Tensor, values: Tensor) -> None:
    """z[n, index[n, k]] += values[n, k] in order of k: the deterministic kernel of each device."""
    if z.is_cuda:
        rows = torch.arange(z.shape[0], device=z.device).unsqueeze(1).expand_as(index)
        z.index_put_((rows, index), values, accumulate=True)
    else:
        z.scatter_add_(1, index, values)


def _blocks(logits: Tensor) -> list[slice]:
    size = block_rows(logits.shape[1], logits.element_size())
    return [slice(i, i + size) for i in range(0, logits.shape[0], size)]


def _needed_rows(linear: Linear, needs: Needs, width: int, workspace_bytes: int | None) -> int:
    return chunk_rows(linear, needs, 2 * width + WIDE, workspace_bytes)


def logprobs(
    linear: Linear,
    ids: Tensor,
    want_entropy: bool,
    needs: Needs,  # of the backward, whose workspace is checked here
    workspace_bytes: int | None,
) -> tuple[Tensor, Tensor]:
    """(log p at ids [N, K], entropy [N] or [0]); -inf at ids of -1."""
    n, vocab = linear.hidden.shape[0], linear.weight.shape[0]
    index, pads, broken = _safe(ids, vocab)
    out = linear.hidden.new_empty(ids.shape, dtype=linear.dtype)
    entropy = linear.hidden.new_empty(n if want_entropy else 0, dtype=linear.dtype)

    def visit(chunk: Tensor, part: slice) -> None:
        for block in _blocks(chunk):
            z = chunk[block]
            linear.head.finish(z, want_slope=False)
            z.sub_(z.amax(1, keepdim=True))
            picked = z.gather(1, index[part][block])
            e = z.exp_()
            total = e.sum(1)
            out[part][block] = picked - total.log().unsqueeze(1)
            if want_entropy:
                entropy[part][block] = torch.special.entr(e).sum(1) / total + total.log()

    _needed_rows(linear, needs, ids.shape[1], workspace_bytes)
    rows = _needed_rows(linear, Needs(), ids.shape[1], workspace_bytes)
    sweep(linear, rows, None, visit, None)
    out = out.masked_fill(pads, -math.inf).masked_fill(broken.any(1, keepdim=True), math.nan)
    if want_entropy:
        entropy.masked_fill_(broken.any(1), math.nan)
    return out, entropy


def _first_columns(ids: Tensor) -> Tensor:
    """[N, K] the column at which each id stands first in its row."""
    ordered, order = ids.sort(dim=1, stable=True)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    columns = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    begin = torch.where(new, columns, 0).cummax(1).values
    return torch.empty_like(order).scatter_(1, order, order.gather(1, begin))


def _merged(ids: Tensor, upstream: Tensor, vocab: int) -> tuple[Support, Tensor]:
    """Each row's distinct ids and, in the column of each, the sum of its upstream gradients.

    A row of pads gets id 0 with no upstream gradient.
    """
    ids = ids.long()
    first = _first_columns(ids)
    total = torch.zeros_like(upstream)
    _add_at(total, first, upstream.masked_fill(ids == -1, 0.0))
    columns = torch.arange(ids.shape[1], device=ids.device)
    ids = ids.masked_fill(first != columns, -1)
    ids[:, 0] = torch.where((ids == -1).all(1), 0, ids[:, 0])
    return locate(ids, None, vocab), total


def logprobs_grads(
    linear: Linear,
    ids: Tensor,  # [N, K]
    entropy: Tensor,  # [N] or [0]
    grad_logprobs: Tensor,  # [N, K]
    grad_entropy: Tensor,  # [N] or [0]
    needs: Needs,
    workspace_bytes: int | None,
) -> Grads:
    """dz_j = sum_k g_k ([j = id_k] - p_j) - g_H p_j (log p_j + H); repeated ids add up."""
    support, g_on = _merged(ids, grad_logprobs.to(linear.dtype), linear.weight.shape[0])
    g_on = g_on.masked_fill(support.broken.unsqueeze(1), math.nan)
    g = torch.cat([g_on, torch.zeros_like(g_on[:, :1])], 1)
    grads = Grads.zeros(linear, needs)
    grads.scale = grads.scale * linear.head.slope

    def visit(chunk: Tensor, part: slice) -> None:
        for block in _blocks(chunk):
            z, here = chunk[block], support.rows(part).rows(block)
            slope = linear.head.finish(z, want_slope=True)
            seen = reduce_rows(z, here.ids, here.listed)
            grad = centred(g[part][block], seen.buckets.exp())
            on, factor = (
                grad[:, :-1],
                torch.where(seen.total == 0.0, 0.0, grad[:, -1:] / seen.total),
            )
            if grad_entropy.numel():
                pull = grad_entropy[part][block].to(z.dtype).unsqueeze(1)
                mean = entropy[part][block].unsqueeze(1)
                shift = seen.own - seen.lse
                spread = torch.special.entr(seen.off).mul_(pull * shift.exp())
                seen.off.mul_(factor - pull * shift.exp() * (shift + mean)).add_(spread)
                lp = seen.buckets[:, :-1]
                on = on - pull * (lp.exp() * (lp + mean)).masked_fill(lp == -math.inf, 0.0)
            else:
                seen.off.mul_(factor)
            overwrite(seen.off, on, here, slope)

    rows = _needed_rows(linear, needs, ids.shape[1], workspace_bytes)
    sweep(linear, rows, None, visit, grads)
    return grads


class TopRows(NamedTuple):
    ids: Tensor  # [N, k] int64
    logprobs: Tensor  # [N, k]
    tail_logprobs: Tensor  # [N]
    entropy: Tensor  # [N]
    extra_logprobs: Tensor  # [N, E] or [N, 0]


def topk(linear: Linear, k: int, extra_ids: Tensor | None, workspace_bytes: int | None) -> TopRows:
    """The k most probable ids of each row; the tail is reduced with those ids removed."""
    n, vocab = linear.hidden.shape[0], linear.weight.shape[0]
    like = linear.hidden
    if extra_ids is None:
        extra_ids = like.new_empty((n, 0), dtype=torch.int64)
    index, pads, broken = _safe(extra_ids, vocab)
    found = TopRows(
        like.new_empty((n, k), dtype=torch.int64),
        like.new_empty((n, k), dtype=linear.dtype),
        like.new_empty(n, dtype=linear.dtype),
        like.new_empty(n, dtype=linear.dtype),
        like.new_empty(extra_ids.shape, dtype=linear.dtype),
    )

    def visit(chunk: Tensor, part: slice) -> None:
        for block in _blocks(chunk):
            z = chunk[block]
            linear.head.finish(z, want_slope=False)
            extra = z.gather(1, index[part][block])
            ids = z.topk(k, 1).indices
            seen = reduce_rows(z, ids, torch.ones_like(ids, dtype=torch.bool))
            found.ids[part][block] = ids
            found.logprobs[part][block] = seen.buckets[:, :-1]
            found.tail_logprobs[part][block] = seen.buckets[:, -1]
            found.extra_logprobs[part][block] = extra - seen.top - seen.lse
            found.entropy[part][block] = seen.entropy()

    rows = chunk_rows(linear, Needs(), k + extra_ids.shape[1] + WIDE, workspace_bytes)
    sweep(linear, rows, None, visit, None)
    extra = found.extra_logprobs.masked_fill_(pads, -math.inf)
    extra.masked_fill_(broken.any(1, keepdim=True), math.nan)
    return found


def logits_loss(
    logits: Tensor,  # [N, V]
    ids: Tensor,
    target: Tensor,
    row_weights: Tensor | None,
    rule_name: str,
    options: list[float],
    temperature: float,
    want_entropy: bool,
    want_grad: bool,
) -> tuple[Tensor, Tensor]:
    """(stats [N, 4], w_n dL_n/dlogits in the logits' dtype or [0]), a block of rows at a time."""
    n, vocab = logits.shape
    dtype = compute_dtype(logits.dtype)
    rule, head = row_rule(rule_name, options), Head(temperature=temperature)
    support = locate(ids, row_weights, vocab)
    target = target.to(dtype)
    stats = logits.new_zeros((n, len(STATS)), dtype=dtype)
    grad = logits.new_empty((n, vocab) if want_grad else 0)
    weights = logits.new_ones(n, dtype=dtype) if row_weights is None else row_weights.to(dtype)
    size = block_rows(vocab, dtype.itemsize)
    sparse = rule_name.endswith(":renormalize")
    for start in range(0, n, size):
        part = slice(start, start + size)
        here = support.rows(part)
        factor = weights[part] * head.slope if want_grad else None
        if sparse:
            z = logits[part].gather(1, here.ids).to(dtype) * head.gain
            on = support_pass(z, here, target[part], factor, rule, stats[part])
            if on is not None:
                grad[part] = 0.0
                on = torch.where(here.listed, on, on.gather(1, here.anchor))
                grad[part].scatter_(1, here.ids, on.to(grad.dtype))
            continue
        z = logits[part].to(dtype).mul(head.gain)
        z.masked_fill_(~here.active.unsqueeze(1), 0.0)
        row_pass(z, here, target[part], factor, rule, head, want_entropy, stats[part])
        if want_grad:
            grad[part] = z
    return stats, grad
