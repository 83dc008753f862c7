"""Definitions of the losses on dense logits, which the fused functions must equal.

Each function takes the arguments of the public function of the same name, apart from those that
concern memory, checks and statistics. Any floating dtype works (use float64 for an oracle).
Gradients come from autograd and can be differentiated again. Arguments are not checked.

>>> hidden, weight = torch.randn(5, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
>>> labels = torch.tensor([1, 8, -100, 0, 3])
>>> exact = linear_cross_entropy(hidden, weight, labels)
>>> torch.allclose(exact, torch.nn.functional.cross_entropy(hidden @ weight.t(), labels))
True
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
    """z = softcap tanh(logit_scale (H W^T + bias) / softcap) / temperature, [N, V].

    Without a softcap, z = logit_scale (H W^T + bias) / temperature.

    Args:
        hidden: [N, D] float.
        weight: [V, D], in the dtype of `hidden`.
        bias: [V].
        logit_scale, softcap, temperature: numbers above 0.

    >>> linear_logits(torch.eye(2), 3.0 * torch.eye(2), temperature=1.5).tolist()
    [[2.0, 0.0], [0.0, 2.0]]
    """
    z = hidden @ weight.t()
    if bias is not None:
        z = z + bias
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def kl(p_log: Tensor, q_log: Tensor) -> Tensor:
    """KL(p || q) = sum_b p_b (log p_b - log q_b) over the last dimension, nat.

    Buckets with p_b = 0 add nothing.

    Args:
        p_log, q_log: [..., B] log-probs; -inf for an empty bucket.

    Returns:
        [...].

    >>> p_log, q_log = torch.tensor([0.5, 0.5, 0.0]).log(), torch.tensor([0.25, 0.5, 0.25]).log()
    >>> round(kl(p_log, q_log).item(), 4)
    0.3466
    """
    empty = p_log == -math.inf
    ratio = p_log.masked_fill(empty, 0.0) - q_log.masked_fill(empty, 0.0)
    return torch.where(empty, 0.0, p_log.exp() * ratio).sum(-1)


def _divergence(p_log: Tensor, q_log: Tensor, divergence: str, beta: float | None) -> Tensor:
    beta = 0.5 if beta is None else beta
    if divergence == "reverse_kl":
        return kl(p_log, q_log)
    if divergence == "forward_kl":
        return kl(q_log, p_log)
    mix = torch.log(beta * q_log.exp() + (1.0 - beta) * p_log.exp())
    return beta * kl(q_log, mix) + (1.0 - beta) * kl(p_log, mix)


def reduce(losses: Tensor, row_weights: Tensor | None, reduction: str) -> Tensor:
    """sum_n w_n L_n ("sum"), that over sum_n w_n ("mean"), or w_n L_n [N] ("none").

    Args:
        losses: [N]; may be anything, also NaN, in rows of weight 0.
        row_weights: [N] w_n; None: 1.

    >>> losses, weights = torch.tensor([1.0, 4.0]), torch.tensor([3.0, 1.0])
    >>> [reduce(losses, weights, reduction).tolist() for reduction in ("sum", "mean", "none")]
    [7.0, 1.75, [3.0, 4.0]]
    """
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
    beta: float | None = None,
    sampled_ids: Tensor | None = None,  # [N]
    sampled_logprobs: Tensor | None = None,  # [N]
    rollout_logprobs: Tensor | None = None,  # [N]
    importance_cap: float | None = None,
    row_weights: Tensor | None = None,
    reduction: str = "mean",
    temperature: float = 1.0,
) -> Tensor:
    """`lopd_kernels.sparse_divergence`, row by row, with both distributions written out.

    Args:
        logits: [N, V] float.
        topk_ids: [N, K] int, -1 pads.
        topk_logprobs: [N, K] float, nat.
        tail_logprobs: [N] float, nat; None: log(1 - sum_k q_k), at least log 2^-23.
        sampled_ids, sampled_logprobs, rollout_logprobs, importance_cap: of tail "unbiased".

    Returns:
        [] or [N], in the dtype of `logits`.

    >>> logits = torch.zeros(1, 4)
    >>> topk_logprobs = torch.tensor([[0.5]]).log()
    >>> round(sparse_divergence(logits, torch.tensor([[2]]), topk_logprobs).item(), 4)
    0.1308
    """
    logprobs = (logits / temperature).log_softmax(1)
    losses = []
    for n in range(logits.shape[0]):
        listed = topk_ids[n][topk_ids[n] >= 0].long()
        p, q = logprobs[n, listed], topk_logprobs[n][topk_ids[n] >= 0].to(logits.dtype)
        rest = torch.ones_like(logits[n], dtype=torch.bool).index_fill(0, listed, False)
        if not len(listed):
            losses.append(logits[n].sum() * 0.0)
        elif tail == "renormalize":
            losses.append(_divergence(p.log_softmax(0), q.log_softmax(0), divergence, beta))
        elif tail == "truncate":
            losses.append(_divergence(p, q, divergence, beta))
        elif tail == "generalized":
            excess = {"reverse_kl": 1.0, "forward_kl": -1.0, "jsd": 0.0}[divergence]
            terms = _divergence(p, q, divergence, beta)
            losses.append(terms + excess * (q.exp() - p.exp()).sum())
        elif not rest.any():
            losses.append(_divergence(p, q, divergence, beta))
        else:
            if tail_logprobs is None:
                missing = torch.log((1.0 - q.exp().sum()).clamp(min=math.exp(FLOOR)))
            else:
                missing = tail_logprobs[n].to(logits.dtype)
            student_tail = logprobs[n, rest].logsumexp(0)
            p, q = torch.cat([p, student_tail[None]]), torch.cat([q, missing[None]])
            losses.append(_divergence(p, q, divergence, beta))
            if tail != "unbiased":
                continue
            assert sampled_ids is not None and sampled_logprobs is not None
            assert rollout_logprobs is not None
            if rest[sampled_ids[n]]:
                at_sampled = logprobs[n, sampled_ids[n]]
                ratio = torch.exp(at_sampled - rollout_logprobs[n])
                ratio = ratio.clamp(max=math.inf if importance_cap is None else importance_cap)
                excess_at_sampled = at_sampled - sampled_logprobs[n]
                constant = (ratio * (excess_at_sampled - (student_tail - missing))).detach()
                losses[-1] = losses[-1] + constant * (1.0 + at_sampled - at_sampled.detach())
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
    beta: float | None = None,
    sampled_ids: Tensor | None = None,
    sampled_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    importance_cap: float | None = None,
    row_weights: Tensor | None = None,
    reduction: str = "mean",
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """`sparse_divergence` of `linear_logits`: the definition of the fused function.

    >>> hidden, weight = torch.eye(2), torch.randn(6, 2)
    >>> logprobs, ids = linear_logits(hidden, weight).log_softmax(1).topk(3, 1)
    >>> linear_sparse_divergence(hidden, weight, ids, logprobs).item() < 1e-6
    True
    """
    return sparse_divergence(
        linear_logits(hidden, weight, bias, logit_scale, softcap, temperature),
        topk_ids,
        topk_logprobs,
        tail_logprobs=tail_logprobs,
        divergence=divergence,
        tail=tail,
        beta=beta,
        sampled_ids=sampled_ids,
        sampled_logprobs=sampled_logprobs,
        rollout_logprobs=rollout_logprobs,
        importance_cap=importance_cap,
        row_weights=row_weights,
        reduction=reduction,
    )


def linear_policy_gradient(
    hidden: Tensor,
    weight: Tensor,
    sampled_ids: Tensor,  # [N]
    teacher_logprobs: Tensor | None = None,  # [N]
    *,
    advantages: Tensor | None = None,
    advantage_clip: float | None = None,
    rollout_logprobs: Tensor | None = None,
    importance: str = "none",
    importance_cap: float | None = None,
    clip_range: float | None = None,
    ignore_index: int = -100,
    row_weights: Tensor | None = None,
    reduction: str = "mean",
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """L_n = -rho_n A_n log p_n(y_n), or PPO's loss with `clip_range`.

    Args:
        sampled_ids: [N] int, y_n.
        teacher_logprobs: [N] float, nat; A_n is the teacher's minus the student's log-prob.
        advantages: [N] float, used as A_n.
        rollout_logprobs: [N] float, nat; rho_n = exp(log p_n(y_n) - rollout_logprobs).
        ignore_index: a sampled id; its rows have weight 0.

    Returns:
        [] or [N], in the dtype of `hidden`.

    >>> hidden, weight = torch.eye(2), torch.zeros(4, 2)
    >>> advantages = torch.tensor([1.0, -2.0])
    >>> loss = linear_policy_gradient(
    ...     hidden, weight, torch.tensor([0, 1]), None, advantages=advantages, reduction="none"
    ... )
    >>> [round(x, 4) for x in loss.tolist()]
    [1.3863, -2.7726]
    """
    logits = linear_logits(hidden, weight, bias, logit_scale, softcap, temperature)
    index, row_weights = _used(sampled_ids, ignore_index, row_weights, logits.dtype)
    logprobs = logits.log_softmax(1).gather(1, index)[:, 0]
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
    """L_n = -log p_n(y_n); rows whose label is `ignore_index` have weight 0.

    Args:
        labels: [N] int, y_n.

    Returns:
        [] or [N], in the dtype of `hidden`.

    >>> loss = linear_cross_entropy(torch.ones(1, 1), torch.zeros(8, 1), torch.tensor([5]))
    >>> round(loss.item(), 4)
    2.0794
    """
    logits = linear_logits(hidden, weight, bias, logit_scale, softcap, temperature)
    index, row_weights = _used(labels, ignore_index, row_weights, logits.dtype)
    losses = -logits.log_softmax(1).gather(1, index)[:, 0]
    return reduce(losses, row_weights, reduction)


def _used(
    ids: Tensor, ignore_index: int, row_weights: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Ids to gather at [N, 1], and row weights [N] that are 0 where an id is `ignore_index`."""
    used = ids != ignore_index
    weights = used.to(dtype) if row_weights is None else used * row_weights.to(dtype)
    return torch.where(used, ids, 0).long().unsqueeze(1), weights


def _entropy(logprobs: Tensor) -> Tensor:
    """-sum_j p_j log p_j [N]; ids without mass add nothing."""
    empty = logprobs == -math.inf
    return -(logprobs.exp() * logprobs.masked_fill(empty, 0.0)).sum(1)


def _pick(logprobs: Tensor, ids: Tensor) -> Tensor:
    """Log-probs at ids [N, K], -inf at pads."""
    return logprobs.gather(1, ids.long().clamp(min=0)).masked_fill(ids < 0, -math.inf)


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
    """log p_n(id) [N, K], -inf at pads; with `return_entropy` also -sum_j p_nj log p_nj [N].

    >>> logprobs, entropy = linear_logprobs(
    ...     torch.ones(1, 1), torch.zeros(2, 1), torch.tensor([[1, -1]]), return_entropy=True
    ... )
    >>> [[round(x, 4) for x in row] for row in logprobs.tolist()], round(entropy.item(), 4)
    ([[-0.6931, -inf]], 0.6931)
    """
    logits = linear_logits(hidden, weight, bias, logit_scale, softcap, temperature)
    logprobs = logits.log_softmax(1)
    picked = _pick(logprobs, ids)
    return (picked, _entropy(logprobs)) if return_entropy else picked


def linear_topk(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    extra_ids: Tensor | None = None,  # [N, E]
    sampled_ids: Tensor | None = None,  # [N]
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor | None, ...]:
    """The fields of `lopd_kernels.TopK`, in its order.

    >>> weight = torch.tensor([0.5, 0.25, 0.25]).log().unsqueeze(1)
    >>> ids, logprobs, tail, *_ = linear_topk(torch.ones(1, 1), weight, 1)
    >>> ids.tolist(), round(tail.exp().item(), 4)
    ([[0]], 0.5)
    """
    logits = linear_logits(hidden, weight, bias, logit_scale, softcap, temperature)
    logprobs = logits.log_softmax(1)
    top, ids = logprobs.topk(k, 1)
    unlisted = logprobs.scatter(1, ids, -math.inf)
    extra = extra_tail = sampled = None
    if extra_ids is not None:
        extra = _pick(logprobs, extra_ids)
        is_extra = torch.zeros_like(logprobs).scatter_add(
            1, extra_ids.long().clamp(min=0), (extra_ids >= 0).to(logprobs.dtype)
        )
        extra_tail = unlisted.masked_fill(is_extra > 0, -math.inf).logsumexp(1)
    if sampled_ids is not None:
        sampled = _pick(logprobs, sampled_ids.unsqueeze(1))[:, 0]
    tail, entropy = unlisted.logsumexp(1), _entropy(logprobs)
    return ids, top, tail, entropy, extra, extra_tail, sampled
