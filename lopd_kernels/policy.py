"""Losses on one id per row: the policy gradient of sampled tokens and cross-entropy."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lopd_kernels import _checks as checks
from lopd_kernels._core.gemm import compute_dtype
from lopd_kernels.divergence import Reduction, Rows, run


class PolicyStats(NamedTuple):
    """What the row pass knows of each row, [N] each; 0 in rows without weight."""

    loss: Tensor  # L_n, not weighted
    logprobs: Tensor  # the student's log-prob of the sampled id
    advantages: Tensor  # as used: derived ones after the clip
    importance: Tensor  # the ratio as used: 1 without importance sampling
    student_lse: Tensor
    student_entropy: Tensor  # nat


def _check_sampled(
    name: str,
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,  # [N]
    row_weights: Tensor | None,
    reduction: str,
    validate: bool | None,
    **constants: Tensor | None,  # [N]
) -> None:
    n = hidden.shape[0]
    checks.check_choice("reduction", reduction, checks.REDUCTIONS)
    checks.check_ids(name, ids, n, hidden, dims=1)
    checks.check_weights(row_weights, n, hidden)
    given = {key: tensor for key, tensor in constants.items() if tensor is not None}
    for key, tensor in given.items():
        checks.check_rows(key, tensor, (n,), hidden)
        checks.check_constant(key, tensor)
    if checks.checks_values(validate, hidden):
        checked = checks.where_weighted(ids, row_weights, 0)
        checks.check_ids_values(name, checked, weight.shape[0], pads=False)
        checks.check_weights_values(row_weights, reduction)
        for key, tensor in given.items():
            checks.check_finite(key, tensor, row_weights)


def _score(
    teacher_logprobs: Tensor | None, advantages: Tensor | None, advantage_clip: float | None
) -> tuple[Tensor, bool]:
    """(what the advantage is made of, whether it is derived from the teacher)"""
    checks.check_positive("advantage_clip", advantage_clip)
    if advantages is not None:
        if advantage_clip is not None:
            raise ValueError(
                f"advantage_clip is {advantage_clip} and advantages are given; the clip applies to "
                "the derived ones, clip yours before the call"
            )
        return advantages, False
    if teacher_logprobs is None:
        raise ValueError("teacher_logprobs and advantages are both None; pass one of them")
    return teacher_logprobs, True


def linear_policy_gradient(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    sampled_ids: Tensor,  # [N] int
    teacher_logprobs: Tensor | None,  # [N] teacher's log-prob of the sampled id
    *,
    advantages: Tensor | None = None,  # [N]
    advantage_clip: float | None = None,
    rollout_logprobs: Tensor | None = None,  # [N] under the policy that sampled
    importance: Literal["none", "token", "token_truncated"] = "none",
    importance_cap: float | None = None,
    clip_range: float | None = None,
    row_weights: Tensor | None = None,  # [N]
    reduction: Reduction = "sum",
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    workspace_bytes: int | None = None,
    weight_grad_buffer: Tensor | None = None,
    validate: bool | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, PolicyStats]:
    """Sampled-token policy gradient with the teacher's log-ratio as the advantage.

        L_n = -rho_n A_n log p_n(y_n),   A_n = clip(log q_n(y_n) - log p_n(y_n), +-advantage_clip)

    A and rho carry no gradient. A is recomputed from the current student on every call,
    unless `advantages` gives it, in which case `teacher_logprobs` may be None. rho is 1,
    p / p_rollout ("token"), or that capped ("token_truncated"). With `clip_range` the loss
    is PPO's -min(rho A, clip(rho, 1 +- clip_range) A), with gradient through rho.

    Without clip and importance the gradient is that of (log q - log p)^2 / 2: on stored
    tokens this is least squares on log-ratios, and tokens with a large negative advantage
    dominate it.

    Source: Lightning OPD, arXiv:2604.13010; PPO, arXiv:1707.06347.
    """
    hidden, weight, bias = checks.in_one_dtype(hidden, weight, bias)
    checks.check_linear(hidden, weight, bias)
    checks.check_head(logit_scale, softcap, temperature)
    checks.check_schedule(0.0, workspace_bytes, weight_grad_buffer, weight)
    checks.check_importance(importance, importance_cap, clip_range, rollout_logprobs)
    score, derived = _score(teacher_logprobs, advantages, advantage_clip)
    _check_sampled(
        "sampled_ids", hidden, weight, sampled_ids, row_weights, reduction, validate,
        teacher_logprobs=teacher_logprobs, advantages=advantages, rollout_logprobs=rollout_logprobs,
    )  # fmt: skip
    score = score.to(compute_dtype(hidden.dtype))
    rollout = torch.zeros_like(score) if rollout_logprobs is None else rollout_logprobs.to(score)
    mode = "clipped" if clip_range is not None else importance
    rows = Rows(
        torch.where(sampled_ids < 0, -2, sampled_ids).unsqueeze(1),
        torch.stack([score, rollout], 1),
        row_weights,
        f"policy_gradient:{'log_ratio' if derived else 'given'}:{mode}",
        [advantage_clip or math.inf, importance_cap or math.inf, clip_range or 0.0],
    )
    head = (logit_scale, softcap, temperature)
    loss, stats = run(
        hidden, weight, bias, rows, head, reduction, return_stats, workspace_bytes,
        weight_grad_buffer,
    )  # fmt: skip
    if not return_stats:
        return loss
    row_loss, lse, _, entropy, logprobs, used, ratio = stats.unbind(1)
    return loss, PolicyStats(row_loss, logprobs, used, ratio, lse, entropy)


def linear_cross_entropy(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [N] int
    *,
    ignore_index: int = -100,
    row_weights: Tensor | None = None,  # [N]
    reduction: Reduction = "mean",
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    workspace_bytes: int | None = None,
    weight_grad_buffer: Tensor | None = None,
    validate: bool | None = None,
) -> Tensor:
    """Cross-entropy L_n = -log p_n(y_n) from hidden states; rows at `ignore_index` weigh 0.

    "mean" divides by the sum of the weights of the other rows.
    """
    hidden, weight, bias = checks.in_one_dtype(hidden, weight, bias)
    checks.check_linear(hidden, weight, bias)
    checks.check_head(logit_scale, softcap, temperature)
    checks.check_schedule(0.0, workspace_bytes, weight_grad_buffer, weight)
    ignored = labels == ignore_index
    known = labels.masked_fill(ignored, 0)
    _check_sampled("labels", hidden, weight, known, row_weights, reduction, validate)
    if row_weights is None:
        row_weights = torch.ones_like(labels, dtype=torch.float32)
    kept = row_weights.masked_fill(ignored, 0.0)
    ids = torch.where(known < 0, -2, known).masked_fill(ignored, -1).unsqueeze(1)
    rows = Rows(ids, hidden.new_zeros((hidden.shape[0], 1)), kept, "cross_entropy", [])
    head = (logit_scale, softcap, temperature)
    loss, _ = run(
        hidden, weight, bias, rows, head, reduction, False, workspace_bytes, weight_grad_buffer
    )
    return loss
