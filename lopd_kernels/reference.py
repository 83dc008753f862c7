"""The definition of every loss on dense logits: what the fused functions must equal.

Any floating dtype, fp64 for an oracle; gradients by autograd; no checks, no workspace.
Arguments mean what they mean in the public functions of the same names.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOOR = -23 * math.log(2.0)


def linear_logits(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    z = hidden @ weight.t()
    if bias is not None:
        z = z + bias
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def kl(p_log: Tensor, q_log: Tensor) -> Tensor:
    """KL(p || q) over the last dimension; buckets that p leaves empty add nothing."""
    empty = p_log == -math.inf
    ratio = p_log.masked_fill(empty, 0.0) - q_log.masked_fill(empty, 0.0)
    return torch.where(empty, 0.0, p_log.exp() * ratio).sum(-1)


def _divergence(p_log: Tensor, q_log: Tensor, divergence: str, beta: float) -> Tensor:
    if divergence == "reverse_kl":
        return kl(p_log, q_log)
    if divergence == "forward_kl":
        return kl(q_log, p_log)
    mix = torch.log(beta * q_log.exp() + (1.0 - beta) * p_log.exp())
    return beta * kl(q_log, mix) + (1.0 - beta) * kl(p_log, mix)


def reduce(losses: Tensor, row_weights: Tensor | None, reduction: str) -> Tensor:
    weights = torch.ones_like(losses) if row_weights is None else row_weights.to(losses.dtype)
    weighted = torch.where(weights == 0.0, 0.0, losses) * weights
    if reduction == "none":
        return weighted
    if reduction == "sum" or weights.sum() == 0.0:
        return weighted.sum()
    return weighted.sum() / weights.sum()


def sparse_divergence(
    logits: Tensor,  # [N, V]
    topk_ids: Tensor,  # [N, K]
    topk_logprobs: Tensor,  # [N, K]
    *,
    tail_logprobs: Tensor | None = None,
    divergence: str = "reverse_kl",
    tail: str = "bucket",
    beta: float = 0.5,
    row_weights: Tensor | None = None,
    reduction: str = "sum",
    temperature: float = 1.0,
) -> Tensor:
    """Row by row: list, tail and both distributions spelt out."""
    logprobs = (logits / temperature).log_softmax(1)
    losses = []
    for n in range(logits.shape[0]):
        listed = topk_ids[n][topk_ids[n] >= 0].long()
        p, q = logprobs[n, listed], topk_logprobs[n][topk_ids[n] >= 0].to(logits.dtype)
        rest = torch.ones(logits.shape[1], dtype=torch.bool).index_fill(0, listed, False)
        if not len(listed):
            losses.append(logits[n].sum() * 0.0)
        elif tail == "renormalize":
            losses.append(_divergence(p.log_softmax(0), q.log_softmax(0), divergence, beta))
        elif tail == "truncate" or not rest.any():
            losses.append(_divergence(p, q, divergence, beta))
        else:
            if tail_logprobs is None:
                missing = torch.log((1.0 - q.exp().sum()).clamp(min=math.exp(FLOOR)))
            else:
                missing = tail_logprobs[n].to(logits.dtype)
            p = torch.cat([p, logprobs[n, rest].logsumexp(0, keepdim=True)])
            losses.append(_divergence(p, torch.cat([q, missing[None]]), divergence, beta))
    rows = torch.stack(losses) if losses else logits.sum(1)
    return reduce(rows, row_weights, reduction)


def linear_sparse_divergence(
    hidden: Tensor,
    weight: Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    *,
    tail_logprobs: Tensor | None = None,
    divergence: str = "reverse_kl",
    tail: str = "bucket",
    beta: float = 0.5,
    row_weights: Tensor | None = None,
    reduction: str = "sum",
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    return sparse_divergence(
        linear_logits(hidden, weight, bias, logit_scale, softcap, temperature),
        topk_ids,
        topk_logprobs,
        tail_logprobs=tail_logprobs,
        divergence=divergence,
        tail=tail,
        beta=beta,
        row_weights=row_weights,
        reduction=reduction,
    )


def linear_policy_gradient(
    hidden: Tensor,
    weight: Tensor,
    sampled_ids: Tensor,  # [N]
    teacher_logprobs: Tensor | None,  # [N]
    *,
    advantages: Tensor | None = None,
    advantage_clip: float | None = None,
    rollout_logprobs: Tensor | None = None,
    importance: str = "none",
    importance_cap: float | None = None,
    clip_range: float | None = None,
    row_weights: Tensor | None = None,
    reduction: str = "sum",
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    logits = linear_logits(hidden, weight, bias, logit_scale, softcap, temperature)
    logprobs = logits.log_softmax(1).gather(1, sampled_ids.long().unsqueeze(1))[:, 0]
    if advantages is None:
        assert teacher_logprobs is not None
        advantages = teacher_logprobs.to(logprobs.dtype) - logprobs.detach()
        if advantage_clip is not None:
            advantages = advantages.clamp(-advantage_clip, advantage_clip)
    if clip_range is None and importance == "none":
        return reduce(-advantages * logprobs, row_weights, reduction)
    assert rollout_logprobs is not None
    ratio = torch.exp(logprobs - rollout_logprobs)
    if clip_range is not None:
        bounded = ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
        losses = -torch.minimum(ratio * advantages, bounded * advantages)
    else:
        cap = math.inf if importance_cap is None else importance_cap
        losses = -ratio.detach().clamp(max=cap) * advantages * logprobs
    return reduce(losses, row_weights, reduction)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,  # [N]
    *,
    ignore_index: int = -100,
    row_weights: Tensor | None = None,
    reduction: str = "mean",
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    logits = linear_logits(hidden, weight, bias, logit_scale, softcap, temperature)
    kept = labels != ignore_index
    index = torch.where(kept, labels, 0).long().unsqueeze(1)
    losses = -logits.log_softmax(1).gather(1, index)[:, 0]
    weights = kept.to(losses.dtype)
    if row_weights is not None:
        weights = weights * row_weights
    return reduce(losses, weights, reduction)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,  # [N, K]
    *,
    return_entropy: bool = False,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor | tuple[Tensor, Tensor]:
    logits = linear_logits(hidden, weight, bias, logit_scale, softcap, temperature)
    logprobs = logits.log_softmax(1)
    picked = logprobs.gather(1, ids.long().clamp(min=0)).masked_fill(ids < 0, -math.inf)
    return (picked, -(logprobs.exp() * logprobs).sum(1)) if return_entropy else picked


def linear_topk(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    extra_ids: Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """(ids, logprobs, tail_logprobs, entropy, extra_logprobs)"""
    logits = linear_logits(hidden, weight, bias, logit_scale, softcap, temperature)
    logprobs = logits.log_softmax(1)
    kept, ids = logprobs.topk(k, 1)
    tail = logprobs.scatter(1, ids, -math.inf).logsumexp(1)
    entropy = -(logprobs.exp() * logprobs).sum(1)
    extra = None
    if extra_ids is not None:
        extra = logprobs.gather(1, extra_ids.long().clamp(min=0))
        extra = extra.masked_fill(extra_ids < 0, -math.inf)
    return ids, kept, tail, entropy, extra
