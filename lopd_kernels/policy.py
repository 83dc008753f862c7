"""Losses on one id per row: the policy gradient of sampled tokens, and cross-entropy."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from lopd_kernels import _checks, _values
from lopd_kernels._calls import (
    Reduction,
    SkippingStats,
    checked_head,
    in_shape,
    make_skip,
    reduced_loss,
    skipping_stats,
)
from lopd_kernels._core.rules import CrossEntropyRule, PolicyGradientRule, RowLoss

Importance = Literal["none", "token", "token_truncated"]


class PolicyStats(NamedTuple):
    """Per-row statistics, [N] or [B, T] each; 0 in rows of weight 0."""

    loss: Tensor  # L_n, not weighted
    logprobs: Tensor  # the student's log-prob of the sampled id
    advantages: Tensor  # as used in the loss; derived ones after the clip
    importance: Tensor  # the ratio as used in the loss; 1 without importance sampling
    student_lse: Tensor
    student_entropy: Tensor  # nat
    skipping: SkippingStats | None = None  # None where the gradient of every row is formed


class _Rows(NamedTuple):
    """The flat arguments [N] of a loss on one id per row."""

    ids: Tensor  # [N, 1]; -1 in ignored rows, -2 where the id is negative and therefore invalid
    weights: Tensor | None  # 0 in ignored rows
    constants: dict[str, Tensor | None]


def _checked_rows(
    name: str,
    ids: Tensor,
    ignore_index: int,
    like: Tensor,  # hidden, of any leading dimensions
    vocab: int,
    row_weights: Tensor | None,
    reduction: str,
    validate: bool | None,
    **constants: Tensor | None,
) -> _Rows:
    """Flat rows; constants whose name ends in `logprobs` are checked to be such."""
    _checks.check_choice("reduction", reduction, _checks.REDUCTIONS)
    _checks.check_integer("ignore_index", ignore_index)
    leading = like.shape[:-1]
    ids = _checks.id_rows(name, ids, leading, like)
    weights = _checks.weight_rows(row_weights, leading, like)
    flat = {
        key: _checks.constant_rows(key, tensor, leading, like) for key, tensor in constants.items()
    }
    ignored = ids == ignore_index
    if weights is None:
        weights = torch.ones_like(ids, dtype=torch.float32)
    weights = weights.masked_fill(ignored, 0.0)
    known = ids.masked_fill(ignored, 0)
    if _values.checks_values(validate, like):
        checks = _values.ValueChecks(weights)
        checks.ids(name, known, vocab, pads=False)
        checks.weights(reduction)
        for key, tensor in flat.items():
            if tensor is not None:
                (checks.logprobs if key.endswith("logprobs") else checks.finite)(key, tensor)
        checks.finish()
    marked = torch.where(known < 0, -2, known).masked_fill(ignored, -1)
    return _Rows(marked.unsqueeze(1), weights, flat)


def _check_score(
    teacher_logprobs: Tensor | None, advantages: Tensor | None, advantage_clip: float | None
) -> None:
    _checks.check_optional_positive("advantage_clip", advantage_clip)
    if advantages is not None and advantage_clip is not None:
        raise ValueError(
            f"advantage_clip is {advantage_clip}, but it applies to derived advantages only; "
            "clip yours before the call"
        )
    if advantages is None and teacher_logprobs is None:
        raise ValueError("teacher_logprobs and advantages are both None; pass one of them")


@overload
def linear_policy_gradient(
    hidden: Tensor,
    weight: Tensor,
    sampled_ids: Tensor,
    teacher_logprobs: Tensor | None = ...,
    *,
    advantages: Tensor | None = ...,
    advantage_clip: float | None = ...,
    rollout_logprobs: Tensor | None = ...,
    importance: Importance = ...,
    importance_cap: float | None = ...,
    clip_range: float | None = ...,
    ignore_index: int = ...,
    row_weights: Tensor | None = ...,
    reduction: Reduction = ...,
    bias: Tensor | None = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    temperature: float = ...,
    dense_share: float | None = ...,
    tolerance: float = ...,
    seed: int | Tensor | None = ...,
    workspace_bytes: int | None = ...,
    weight_grad_buffer: Tensor | None = ...,
    validate: bool | None = ...,
    return_stats: Literal[False] = False,
) -> Tensor: ...


@overload
def linear_policy_gradient(
    hidden: Tensor,
    weight: Tensor,
    sampled_ids: Tensor,
    teacher_logprobs: Tensor | None = ...,
    *,
    advantages: Tensor | None = ...,
    advantage_clip: float | None = ...,
    rollout_logprobs: Tensor | None = ...,
    importance: Importance = ...,
    importance_cap: float | None = ...,
    clip_range: float | None = ...,
    ignore_index: int = ...,
    row_weights: Tensor | None = ...,
    reduction: Reduction = ...,
    bias: Tensor | None = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    temperature: float = ...,
    dense_share: float | None = ...,
    tolerance: float = ...,
    seed: int | Tensor | None = ...,
    workspace_bytes: int | None = ...,
    weight_grad_buffer: Tensor | None = ...,
    validate: bool | None = ...,
    return_stats: Literal[True],
) -> tuple[Tensor, PolicyStats]: ...


def linear_policy_gradient(
    hidden: Tensor,
    weight: Tensor,
    sampled_ids: Tensor,
    teacher_logprobs: Tensor | None = None,
    *,
    advantages: Tensor | None = None,
    advantage_clip: float | None = None,
    rollout_logprobs: Tensor | None = None,
    importance: Importance = "none",
    importance_cap: float | None = None,
    clip_range: float | None = None,
    ignore_index: int = -100,
    row_weights: Tensor | None = None,
    reduction: Reduction = "mean",
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    dense_share: float | None = None,
    tolerance: float = 0.0,
    seed: int | Tensor | None = None,
    workspace_bytes: int | None = None,
    weight_grad_buffer: Tensor | None = None,
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
        hidden: [N, D] float, the student's last hidden states. Or [B, T, D]; then every [N] below
            is [B, T].
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
        ignore_index: a sampled id; its rows have weight 0.

    The other arguments are those of `linear_sparse_divergence`; for `dense_share` and `tolerance`
    the sampled id is the list.

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
    _checks.check_importance(importance, importance_cap, clip_range)
    _checks.check_rollout(rollout_logprobs, clip_range is not None or importance != "none")
    _check_score(teacher_logprobs, advantages, advantage_clip)
    rows = _checked_rows(
        "sampled_ids", sampled_ids, ignore_index, hidden, weight.shape[0], row_weights, reduction,
        validate, teacher_logprobs=teacher_logprobs, advantages=advantages,
        rollout_logprobs=rollout_logprobs,
    )  # fmt: skip
    given = rows.constants["advantages"]
    score = rows.constants["teacher_logprobs"] if given is None else given
    assert score is not None
    score = score.to(head.dtype)
    rollout = rows.constants["rollout_logprobs"]
    rollout = torch.zeros_like(score) if rollout is None else rollout.to(score)
    rule = PolicyGradientRule(
        from_teacher=given is None,
        importance="clipped" if clip_range is not None else importance,
        advantage_clip=advantage_clip or math.inf,
        importance_cap=importance_cap or math.inf,
        clip_range=clip_range or 0.0,
    )
    skip = make_skip(head, dense_share, tolerance, seed, reduction)
    loss = RowLoss(rows.ids, torch.stack([score, rollout], 1), rows.weights, rule, skip)
    value, stats = reduced_loss(head, loss, reduction, return_stats, weight_grad_buffer)
    leading = hidden.shape[:-1]
    value = in_shape(leading, value) if reduction == "none" else value
    if not return_stats:
        return value
    fields = (in_shape(leading, x) for x in stats[:, :7].unbind(1))
    losses, lse, _, entropy, logprobs, used, ratio = fields
    skipping = skipping_stats(leading, loss, stats)
    return value, PolicyStats(losses, logprobs, used, ratio, lse, entropy, skipping)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    row_weights: Tensor | None = None,
    reduction: Reduction = "mean",
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    dense_share: float | None = None,
    tolerance: float = 0.0,
    seed: int | Tensor | None = None,
    workspace_bytes: int | None = None,
    weight_grad_buffer: Tensor | None = None,
    validate: bool | None = None,
) -> Tensor:
    """Cross-entropy from hidden states, without the [N, V] logits.

        L_n = -log p_n(y_n)

    Args:
        hidden: [N, D] float, last hidden states. Or [B, T, D]; then every [N] below is [B, T].
        weight: [V, D], the LM head's weight, in the dtype of `hidden`.
        labels: [N] int32 or int64, y_n.
        ignore_index: a label; its rows have weight 0.
        row_weights: [N] float w_n, or a bool mask.
        reduction: as in `linear_sparse_divergence`; "mean" divides by the sum of the weights of
            the rows that are not ignored. If all are ignored it is 0, where torch's is NaN.

    The other arguments are those of `linear_sparse_divergence`; for `dense_share` and `tolerance`
    the label is the list.

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
    rows = _checked_rows(
        "labels", labels, ignore_index, hidden, weight.shape[0], row_weights, reduction, validate
    )
    target = head.hidden.new_zeros((head.rows, 1))
    skip = make_skip(head, dense_share, tolerance, seed, reduction)
    loss = RowLoss(rows.ids, target, rows.weights, CrossEntropyRule(), skip)
    value = reduced_loss(head, loss, reduction, False, weight_grad_buffer)[0]
    return in_shape(hidden.shape[:-1], value) if reduction == "none" else value
