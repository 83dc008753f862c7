"""Reading log-probs off the LM head, and losses on logits that exist already."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lopd_kernels.divergence import row_rule
from lopd_kernels.engine import Grads, Linear, Needs, chunk_rows, sweep
from lopd_kernels.matmul import compute_dtype
from lopd_kernels.rowpass import STATS, Head, block_rows, locate, row_pass, support_pass

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


def logprobs(
    linear: Linear, ids: Tensor, want_entropy: bool, workspace_bytes: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(log p at ids [N, K], entropy [N] or [0], lse [N]); -inf at ids of -1."""
    n, vocab = linear.hidden.shape[0], linear.weight.shape[0]
    index, pads, broken = _safe(ids, vocab)
    out = linear.hidden.new_empty(ids.shape, dtype=linear.dtype)
    lse = linear.hidden.new_empty(n, dtype=linear.dtype)
    entropy = linear.hidden.new_empty(n if want_entropy else 0, dtype=linear.dtype)

    def visit(chunk: Tensor, part: slice) -> None:
        for block in _blocks(chunk):
            z = chunk[block]
            linear.head.finish(z, want_slope=False)
            picked = z.gather(1, index[part][block])
            top = z.amax(1, keepdim=True)
            e = z.sub_(top).exp_()
            total = e.sum(1)
            norm = top[:, 0] + total.log()
            lse[part][block] = norm
            out[part][block] = picked - norm.unsqueeze(1)
            if want_entropy:
                entropy[part][block] = torch.special.entr(e).sum(1) / total + total.log()

    rows = chunk_rows(linear, Needs(), ids.shape[1] + WIDE, workspace_bytes)
    sweep(linear, rows, None, visit, None)
    out = out.masked_fill(pads, -math.inf).masked_fill(broken, math.nan)
    return out, entropy, lse


def logprobs_grads(
    linear: Linear,
    ids: Tensor,  # [N, K]
    lse: Tensor,  # [N]
    entropy: Tensor,  # [N] or [0]
    grad_logprobs: Tensor,  # [N, K]
    grad_entropy: Tensor,  # [N] or [0]
    needs: Needs,
    workspace_bytes: int | None,
) -> Grads:
    """dz_j = sum_k g_k ([j = id_k] - p_j) - g_H p_j (log p_j + H); repeated ids add up."""
    index, pads, _ = _safe(ids, linear.weight.shape[0])
    grads = Grads.zeros(linear, needs)
    grads.scale = grads.scale * linear.head.slope
    g_on = grad_logprobs.to(linear.dtype).masked_fill(pads, 0.0)

    def visit(chunk: Tensor, part: slice) -> None:
        for block in _blocks(chunk):
            z, on = chunk[block], g_on[part][block]
            slope = linear.head.finish(z, want_slope=True)
            z.sub_(lse[part][block].unsqueeze(1))
            off = -on.sum(1, keepdim=True)
            if grad_entropy.numel():
                pull = grad_entropy[part][block].to(z.dtype).unsqueeze(1)
                p = z.exp()
                z.masked_fill_(p == 0.0, 0.0)
                off = off - pull * entropy[part][block].unsqueeze(1)
                z.mul_(-pull).add_(off).mul_(p)
            else:
                z.exp_().mul_(off)
            _add_at(z, index[part][block], on)
            if slope is not None:
                z.mul_(slope)

    rows = chunk_rows(linear, needs, ids.shape[1] + WIDE, workspace_bytes)
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
            values, ids = z.topk(k, 1)
            z.scatter_(1, ids, -math.inf)
            rest = z.amax(1, keepdim=True)
            rest = rest.masked_fill(rest == -math.inf, 0.0)
            e = z.sub_(rest).exp_()
            lse_off = rest + e.sum(1, keepdim=True).log()
            lse = torch.logaddexp(lse_off, values.logsumexp(1, keepdim=True))
            kept, tail = values - lse, (lse_off - lse)[:, 0]
            found.ids[part][block] = ids
            found.logprobs[part][block] = kept
            found.tail_logprobs[part][block] = tail
            found.extra_logprobs[part][block] = extra - lse
            off = (rest - lse).exp()[:, 0] * torch.special.entr(e).sum(1)
            listed = torch.special.entr(kept.exp()).sum(1)
            weight = torch.where(tail == -math.inf, 0.0, tail.exp() * (rest - lse)[:, 0])
            found.entropy[part][block] = listed + off - weight

    rows = chunk_rows(linear, Needs(), 2 * k + extra_ids.shape[1] + WIDE, workspace_bytes)
    sweep(linear, rows, None, visit, None)
    extra = found.extra_logprobs.masked_fill_(pads, -math.inf).masked_fill_(broken, math.nan)
    return found._replace(extra_logprobs=extra)


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
                grad[part].scatter_(1, here.ids, on.gather(1, here.anchor).where(~here.listed, on))
            continue
        z = logits[part].to(dtype).mul(head.gain)
        z.masked_fill_(~here.active.unsqueeze(1), 0.0)
        row_pass(z, here, target[part], factor, rule, head, want_entropy, stats[part])
        if want_grad:
            grad[part] = z
    return stats, grad
