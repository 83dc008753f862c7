"""Losses on one id per row: the policy gradient of sampled tokens, and cross-entropy."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lopd_kernels import _checks
from lopd_kernels._calls import Reduction, checked_head, reduced_loss
from lopd_kernels._core.gemm import compute_dtype
from lopd_kernels._core.rules import CrossEntropyRule, PolicyGradientRule, RowLoss
from lopd_kernels._ops.schema import HeadArgs


class PolicyStats(NamedTuple):
    """Per-row statistics, [N] each; 0 in rows of weight 0."""

    loss: Tensor  # L_n, not weighted
    logprobs: Tensor  # the student's log-prob of the sampled id
    advantages: Tensor  # as used in the loss; derived ones after the clip
    importance: Tensor  # the ratio as used in the loss; 1 without importance sampling
    student_lse: Tensor
    student_entropy: Tensor  # nat


def _check_rows(
    name: str,
    head: HeadArgs,
    ids: Tensor,  # [N]
    row_weights: Tensor | None,
    reduction: str,
    validate: bool | None,
    **constants: Tensor | None,  # [N]
) -> None:
    n, like = head.rows, head.hidden
    _checks.check_choice("reduction", reduction, _checks.REDUCTIONS)
    _checks.check_ids(name, ids, n, like, dims=1)
    for key, tensor in {"row_weights": row_weights, **constants}.items():
        _checks.check_constant(key, tensor, (n,), like)
    if _checks.checks_values(validate, like):
        weighted = _checks.mask_unweighted(ids, row_weights, 0)
        _checks.check_id_values(name, weighted, head.weight.shape[0], pads=False)
        _checks.check_weight_values(row_weights, reduction)
        for key, tensor in constants.items():
            if tensor is not None:
                _checks.check_finite(key, tensor, row_weights)


def _score(
    teacher_logprobs: Tensor | None, advantages: Tensor | None, advantage_clip: float | None
) -> Tensor:
    """The advantages, or the teacher's log-probs that they are derived from."""
    _checks.check_positive("advantage_clip", advantage_clip)
    if advantages is not None:
        if advantage_clip is not None:
            raise ValueError(
                f"advantage_clip is {advantage_clip}, but it applies to derived advantages only; "
                "clip yours before the call"
            )
        return advantages
    if teacher_logprobs is None:
        raise ValueError("teacher_logprobs and advantages are both None; pass one of them")
    return teacher_logprobs


def linear_policy_gradient(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    sampled_ids: Tensor,  # [N]
    teacher_logprobs: Tensor | None,  # [N]
    *,
    advantages: Tensor | None = None,  # [N]
    advantage_clip: float | None = None,
    rollout_logprobs: Tensor | None = None,  # [N]
    importance: Literal["none", "token", "token_truncated"] = "none",
    importance_cap: float | None = None,
    clip_range: float | None = None,
    row_weights: Tensor | None = None,  # [N]
    reduction: Reduction = "sum",
    bias: Tensor | None = None,  # [V]
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    workspace_bytes: int | None = None,
    weight_grad_buffer: Tensor | None = None,  # [V, D]
    validate: bool | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, PolicyStats]:
    """Sampled-token policy gradient with the teacher's log-ratio as the advantage.

        L_n = -rho_n A_n log p_n(y_n),   A_n = clip(log q_n(y_n) - log p_n(y_n), +-advantage_clip)

    A and rho carry no gradient. A is recomputed from the current student on every call, unless
    `advantages` are passed. With `clip_range` the loss is PPO's, with gradient through rho:

        L_n = -min(rho_n A_n, clip(rho_n, 1 +- clip_range) A_n)

    Without clip and importance the gradient is that of (log q - log p)^2 / 2. On stored tokens
    this is least squares on log-ratios, dominated by tokens with a large negative advantage.

    Args:
        hidden: [N, D] float, the student's last hidden states.
        weight: [V, D], the LM head's weight, in the dtype of `hidden`.
        sampled_ids: [N] int32 or int64, y_n; -1 is an error, not padding.
        teacher_logprobs: [N] float, nat, log q_n(y_n). May be None if `advantages` are passed.
        advantages: [N] float, used as A_n.
        advantage_clip: bound on |A_n|; only for derived advantages.
        rollout_logprobs: [N] float, nat, log-probs of the sampled ids under the policy that
            sampled them.
        importance: rho_n is 1 ("none"), p_n / p_rollout ("token"), or that capped at
            `importance_cap` ("token_truncated").
        clip_range: use PPO's loss, with rho_n = p_n / p_rollout and `importance="none"`.

    The other arguments are those of `linear_sparse_divergence`.

    Returns:
        The loss, [] or [N], in float32 (float64 for float64 inputs); with `return_stats` the pair
        (loss, stats).

    Raises:
        ValueError: an invalid argument; the message names it. For a wrong dtype the error is a
            TypeError as well.
        RuntimeError: the loss is differentiated twice.

    Source: Lightning OPD, arXiv:2604.13010; PPO, arXiv:1707.06347.

    >>> hidden, weight = torch.eye(2), torch.zeros(4, 2)
    >>> teacher_logprobs = torch.tensor([0.5, 0.125]).log()
    >>> loss, stats = linear_policy_gradient(
    ...     hidden, weight, torch.tensor([3, 0]), teacher_logprobs, return_stats=True
    ... )
    >>> [round(x, 4) for x in stats.advantages.tolist()]
    [0.6931, -0.6931]
    """
    head = checked_head(hidden, weight, bias, logit_scale, softcap, temperature, workspace_bytes)
    _checks.check_weight_grad_buffer(weight_grad_buffer, head.weight)
    _checks.check_importance(importance, importance_cap, clip_range, rollout_logprobs)
    score = _score(teacher_logprobs, advantages, advantage_clip)
    _check_rows(
        "sampled_ids", head, sampled_ids, row_weights, reduction, validate,
        teacher_logprobs=teacher_logprobs, advantages=advantages, rollout_logprobs=rollout_logprobs,
    )  # fmt: skip
    score = score.to(compute_dtype(hidden.dtype))
    rollout = torch.zeros_like(score) if rollout_logprobs is None else rollout_logprobs.to(score)
    rule = PolicyGradientRule(
        from_teacher=advantages is None,
        importance="clipped" if clip_range is not None else importance,
        advantage_clip=advantage_clip or math.inf,
        importance_cap=importance_cap or math.inf,
        clip_range=clip_range or 0.0,
    )
    ids = torch.where(sampled_ids < 0, -2, sampled_ids)  # -1 would be a pad, -2 is invalid
    loss = RowLoss(ids.unsqueeze(1), torch.stack([score, rollout], 1), row_weights, rule)
    value, stats = reduced_loss(head, loss, reduction, return_stats, weight_grad_buffer)
    if not return_stats:
        return value
    losses, lse, _, entropy, logprobs, used, ratio = stats.unbind(1)
    return value, PolicyStats(losses, logprobs, used, ratio, lse, entropy)


def linear_cross_entropy(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [N]
    *,
    ignore_index: int = -100,
    row_weights: Tensor | None = None,  # [N]
    reduction: Reduction = "mean",
    bias: Tensor | None = None,  # [V]
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    workspace_bytes: int | None = None,
    weight_grad_buffer: Tensor | None = None,  # [V, D]
    validate: bool | None = None,
) -> Tensor:
    """Cross-entropy from hidden states, without the [N, V] logits.

        L_n = -log p_n(y_n)

    Args:
        hidden: [N, D] float, last hidden states.
        weight: [V, D], the LM head's weight, in the dtype of `hidden`.
        labels: [N] int32 or int64, y_n.
        ignore_index: a label; its rows have weight 0.
        row_weights: [N] float w_n.
        reduction: as in `linear_sparse_divergence`; "mean" divides by the sum of the weights of
            the rows that are not ignored.

    The other arguments are those of `linear_sparse_divergence`.

    Returns:
        The loss, [] or [N], in float32 (float64 for float64 inputs).

    Raises:
        ValueError: an invalid argument; the message names it. For a wrong dtype the error is a
            TypeError as well.
        RuntimeError: the loss is differentiated twice.

    Source: the memory-saving form of the fused loss is that of Cut Cross-Entropy,
    arXiv:2411.09009.

    >>> hidden, weight = torch.randn(3, 8), torch.randn(16, 8)
    >>> labels = torch.tensor([4, -100, 15])
    >>> loss = linear_cross_entropy(hidden, weight, labels)
    >>> exact = torch.nn.functional.cross_entropy(hidden @ weight.t(), labels)
    >>> torch.allclose(loss, exact, atol=1e-5)
    True
    """
    head = checked_head(hidden, weight, bias, logit_scale, softcap, temperature, workspace_bytes)
    _checks.check_weight_grad_buffer(weight_grad_buffer, head.weight)
    ignored = labels == ignore_index
    known = labels.masked_fill(ignored, 0)
    _check_rows("labels", head, known, row_weights, reduction, validate)
    if row_weights is None:
        row_weights = torch.ones_like(labels, dtype=torch.float32)
    weights = row_weights.masked_fill(ignored, 0.0)
    ids = torch.where(known < 0, -2, known).masked_fill(ignored, -1)  # -2 is invalid, -1 a pad
    target = hidden.new_zeros((head.rows, 1))
    loss = RowLoss(ids.unsqueeze(1), target, weights, CrossEntropyRule())
    return reduced_loss(head, loss, reduction, False, weight_grad_buffer)[0]
