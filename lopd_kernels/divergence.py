"""Divergences to a sparse teacher: its top-k log-probs and one bucket for all other ids."""

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
    mean_weights,
    reduced_loss,
    skipping_stats,
)
from lopd_kernels._core.gemm import compute_dtype
from lopd_kernels._core.rules import (
    DivergenceRule,
    RowLoss,
    TeacherBuckets,
    UnbiasedRule,
    teacher_buckets,
)
from lopd_kernels._core.types import STATS
from lopd_kernels._ops.logits import logits_losses
from lopd_kernels._ops.schema import LossArgs

Divergence = Literal["reverse_kl", "forward_kl", "jsd"]
Tail = Literal["bucket", "renormalize", "truncate", "generalized", "unbiased"]


class SparseStats(NamedTuple):
    """Per-row statistics, [N] or [B, T] each; 0 in rows of weight 0 or without ids.

    A renormalised loss does not look outside the list: it has no lse, tail or entropy.
    """

    loss: Tensor  # L_n, not weighted
    student_lse: Tensor | None  # log sum_j exp z_j, z after the head options
    student_tail_logprobs: Tensor | None  # log of the student's mass outside the row's list
    teacher_tail_logprobs: Tensor  # as used in the loss; -inf in rows that list every id
    student_entropy: Tensor | None  # nat
    tail_floored: Tensor  # bool: a derived tail was raised to log 2^-23
    # of tail "unbiased", 0 in rows whose list holds the sampled id; None otherwise
    correction: Tensor | None = None  # c_n, the part of the loss that was sampled
    importance: Tensor | None = None  # w_n = p_A / p_rollout(A), capped
    skipping: SkippingStats | None = None  # None where the gradient of every row is formed


SAMPLE = {  # the arguments of tail "unbiased", and what those that it requires are
    "sampled_ids": "the token that was sampled at each row; without it use tail='bucket'",
    "sampled_logprobs": "the teacher's log-probs of the sampled ids",
    "rollout_logprobs": (
        "the log-probs of the sampled ids under the policy that sampled them, at top_p 1 and the "
        "loss's temperature; for a student's own samples, linear_topk(sampled_ids=) gives them"
    ),
    "importance_cap": "",
}


class _Sample(NamedTuple):
    """The sampled token of each row, with its log-probs; the arguments of tail "unbiased"."""

    ids: Tensor | None
    teacher_logprobs: Tensor | None
    rollout_logprobs: Tensor | None
    importance_cap: float | None


def _rule(
    divergence: str, tail: str, beta: float | None, sample: _Sample
) -> DivergenceRule | UnbiasedRule:
    _checks.check_divergence(divergence, tail, beta)
    given = dict(zip(SAMPLE, sample, strict=True))
    _checks.check_sample(tail, given)
    if tail != "unbiased":
        return DivergenceRule(divergence, tail, 0.5 if beta is None else beta)
    for name, what in SAMPLE.items():
        if given[name] is None and what:
            raise ValueError(f"{name} is None, but tail='unbiased' needs {what}")
    _checks.check_optional_positive("importance_cap", sample.importance_cap)
    return UnbiasedRule(sample.importance_cap or math.inf)


def _checked_loss(
    like: Tensor,  # hidden or logits, of any leading dimensions
    vocab: int,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    tail_logprobs: Tensor | None,
    rule: DivergenceRule | UnbiasedRule,
    sample: _Sample,
    row_weights: Tensor | None,
    reduction: str,
    validate: bool | None,
) -> tuple[RowLoss, TeacherBuckets]:
    """The loss of the flat rows, and the teacher's buckets."""
    _checks.check_choice("reduction", reduction, _checks.REDUCTIONS)
    leading, columns = like.shape[:-1], ("K",)
    ids = _checks.id_rows("topk_ids", topk_ids, leading, like, columns)
    _checks.check_list_length("topk_ids", ids, vocab)
    logprobs = _checks.constant_rows("topk_logprobs", topk_logprobs, leading, like, columns)
    assert logprobs is not None
    _checks.check_list_shape("topk_logprobs", logprobs, ids)
    tail = _checks.constant_rows("tail_logprobs", tail_logprobs, leading, like)
    weights = _checks.weight_rows(row_weights, leading, like)
    sample = _flat_sample(sample, leading, like)
    dtype = compute_dtype(like.dtype)
    wide_tail = None if tail is None else tail.to(dtype)
    teacher = teacher_buckets(ids, logprobs.to(dtype), wide_tail, vocab)
    if _values.checks_values(validate, like):
        checks = _values.ValueChecks(weights)
        checks.ids("topk_ids", ids, vocab)
        form = "unbiased" if isinstance(rule, UnbiasedRule) else rule.tail
        checks.teacher(
            ids, logprobs, tail if form in ("bucket", "unbiased") else None, vocab,
            derives_tail=tail is None and form != "renormalize",
        )  # fmt: skip
        if sample.ids is not None:
            assert sample.teacher_logprobs is not None and sample.rollout_logprobs is not None
            checks.sample(
                ids, teacher.logprobs[:, -1], logprobs if tail is None else tail, vocab,
                sample.ids, sample.teacher_logprobs, sample.rollout_logprobs,
            )  # fmt: skip
        checks.weights(reduction)
        checks.finish()
    if sample.ids is None:
        return RowLoss(ids, teacher.logprobs, weights, rule), teacher
    return _with_sample(ids, teacher, sample, weights, rule), teacher


def _flat_sample(sample: _Sample, leading: torch.Size, like: Tensor) -> _Sample:
    if sample.ids is None:
        return sample
    teacher, rollout = (
        _checks.constant_rows(name, tensor, leading, like)
        for name, tensor in (
            ("sampled_logprobs", sample.teacher_logprobs),
            ("rollout_logprobs", sample.rollout_logprobs),
        )
    )
    ids = _checks.id_rows("sampled_ids", sample.ids, leading, like)
    return sample._replace(ids=ids, teacher_logprobs=teacher, rollout_logprobs=rollout)


def _with_sample(
    ids: Tensor,
    teacher: TeacherBuckets,
    sample: _Sample,
    weights: Tensor | None,
    rule: DivergenceRule | UnbiasedRule,
) -> RowLoss:
    """The arguments of `UnbiasedRule`: the sampled id is the last of the list, unless listed."""
    assert sample.ids is not None
    assert sample.teacher_logprobs is not None and sample.rollout_logprobs is not None
    sampled = sample.ids.to(ids.dtype).unsqueeze(1)
    sampled = torch.where(sampled < 0, -2, sampled)  # invalid, and not the -1 of a pad
    unused = ((ids == sampled).any(1) | (ids == -1).all(1)).unsqueeze(1)
    sampled = sampled.masked_fill(unused, -1)
    listed, tail = teacher.logprobs[:, :-1], teacher.logprobs[:, -1:]
    at_sampled, rollout = (
        x.to(listed.dtype).unsqueeze(1) for x in (sample.teacher_logprobs, sample.rollout_logprobs)
    )
    target = torch.cat([listed, at_sampled, tail, rollout], 1)
    return RowLoss(torch.cat([ids, sampled], 1), target, weights, rule)


def _sparse_stats(
    leading: torch.Size, stats: Tensor, loss: RowLoss, teacher: TeacherBuckets
) -> SparseStats:
    skipping = skipping_stats(leading, loss, stats)
    width = len(STATS) + len(loss.rule.extras)
    losses, lse, tail, entropy, *extras = stats[:, :width].unbind(1)
    active = (loss.ids != -1).any(1)
    if loss.row_weights is not None:
        active = active & (loss.row_weights != 0)
    teacher_tail = torch.where(active, teacher.logprobs[:, -1], 0.0)
    floored = teacher.floored & active
    if loss.rule.ignores_unlisted:
        return SparseStats(
            in_shape(leading, losses), None, None, in_shape(leading, teacher_tail), None,
            in_shape(leading, floored),
        )  # fmt: skip
    correction = importance = None
    if extras:
        sampled, correction, importance = extras
        tail = torch.where(active, torch.logaddexp(tail, sampled), 0.0)
        correction, importance = in_shape(leading, correction), in_shape(leading, importance)
    return SparseStats(
        in_shape(leading, losses), in_shape(leading, lse), in_shape(leading, tail),
        in_shape(leading, teacher_tail), in_shape(leading, entropy), in_shape(leading, floored),
        correction, importance, skipping,
    )  # fmt: skip


@overload
def linear_sparse_divergence(
    hidden: Tensor,
    weight: Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    *,
    tail_logprobs: Tensor | None = ...,
    divergence: Divergence = ...,
    tail: Tail = ...,
    beta: float | None = ...,
    sampled_ids: Tensor | None = ...,
    sampled_logprobs: Tensor | None = ...,
    rollout_logprobs: Tensor | None = ...,
    importance_cap: float | None = ...,
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
def linear_sparse_divergence(
    hidden: Tensor,
    weight: Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    *,
    tail_logprobs: Tensor | None = ...,
    divergence: Divergence = ...,
    tail: Tail = ...,
    beta: float | None = ...,
    sampled_ids: Tensor | None = ...,
    sampled_logprobs: Tensor | None = ...,
    rollout_logprobs: Tensor | None = ...,
    importance_cap: float | None = ...,
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
) -> tuple[Tensor, SparseStats]: ...


def linear_sparse_divergence(
    hidden: Tensor,
    weight: Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    *,
    tail_logprobs: Tensor | None = None,
    divergence: Divergence = "reverse_kl",
    tail: Tail = "bucket",
    beta: float | None = None,
    sampled_ids: Tensor | None = None,
    sampled_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    importance_cap: float | None = None,
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
) -> Tensor | tuple[Tensor, SparseStats]:
    """Divergence to a top-k teacher from hidden states, without the [N, V] logits.

    With p = softmax(z), z = softcap(logit_scale (H W^T + bias)) / temperature, q the teacher, and
    b over the K listed ids and one tail bucket of all other ids,

        reverse_kl  L_n = sum_b p_b (log p_b - log q_b)
        forward_kl  L_n = sum_b q_b (log q_b - log p_b)
        jsd         L_n = beta KL(q || m) + (1 - beta) KL(p || m),  m = beta q + (1 - beta) p

    Args:
        hidden: [N, D] float, the student's last hidden states at the loss-bearing positions. Or
            [B, T, D]; then every [N] below is [B, T]. Rows of weight 0 cost as much as others.
        weight: [V, D], the LM head's weight, in the dtype of `hidden`.
        topk_ids: [N, K] int32 or int64, distinct in each row, -1 where a row has fewer than K.
        topk_logprobs: [N, K] float, nat, the teacher's log-probs of the full softmax. Lists that
            were renormalised (mass 1 in every row, without the rest) are refused where the loss
            would need the mass outside.
        tail_logprobs: [N] float, nat, log of the teacher's mass outside the list. Without it the
            tail is log(1 - sum_k q_k), floored at log 2^-23 (see `SparseStats.tail_floored`).
        divergence: the formula above.
        tail: what stands for the mass outside the list. Where student and teacher agree, "bucket",
            "generalized" and "unbiased" have no gradient; "truncate" (but of jsd) has one.

            * "bucket": the sum above. It does not see how the student's mass is spread outside the
              list.
            * "generalized": no bucket; reverse_kl is sum_k p_k (log p_k - log q_k) - p_k + q_k,
              forward_kl has the same form with p and q exchanged, jsd is that of "truncate".
            * "truncate": the sum over the K ids only.
            * "renormalize": both distributions are rescaled to the list. It ignores the mass
              outside, and needs no LM-head GEMM.
            * "unbiased", of reverse_kl: "bucket" plus, where the sampled token A is not listed,
              c_n = w (r_A - r_tail) with r = log p - log q and w = p_A / p_rollout(A). The gradient
              is that of the bucket plus c_n grad log p_A. Over A ~ p_rollout the expectation of the
              loss and of its gradient are those of the full KL(p || q).

            "generalized", "truncate" and "renormalize" do not use `tail_logprobs`.
        beta: of jsd only, strictly between 0 and 1; None is 0.5.
        sampled_ids: [N] int32 or int64, the sampled token A of each row; this and the next three
            are of tail "unbiased" only.
        sampled_logprobs: [N] float, nat, the teacher's log-probs of A.
        rollout_logprobs: [N] float, nat, log-probs of A under the policy that sampled it, at top_p
            1 and the temperature of the loss.
        importance_cap: upper bound on w; None is no bound. A cap trades bias for variance.
        row_weights: [N] float w_n, or a bool mask. A row of weight 0 or without ids has loss and
            gradient 0, whatever it holds.
        reduction: "mean" is sum_n w_n L_n / sum_n w_n, "sum" leaves the divisor out, "none" is
            w_n L_n [N]. A mean over nothing (N = 0, or all weights 0) is 0 with gradients of 0, so
            that a process without tokens can take part in a step; only the caller can know that
            a whole step has none.
        bias: [V], added before the scale.
        logit_scale, softcap, temperature: of the student's logits, as above. There is no factor
            temperature^2.
        dense_share: form the gradient outside the lists for this share of the rows, above 0 and at
            most 1: a sample in proportion to the L1 norm m_n of that part, divided by the
            probability. The gradient at listed ids is exact; the expectation of all of it is
            exact. The loss is exact. A share above 0.85 forms every row's, which costs less.
        tolerance: leave out the gradient outside the lists of the rows where it is smallest, as
            many as add up to at most this share of the L1 norm of all other dL/dz. 0 is exact.
        seed: of `dense_share`, an integer or an int64 tensor []; equal seeds draw equally. Pass
            another one at every call. A CUDA graph reads it from a tensor.
        workspace_bytes: bound on what the call allocates beyond inputs and outputs.
        weight_grad_buffer: [V, D] float32. The backward adds dW to it and `weight` gets no
            gradient. The logits are then computed a second time in the backward, as for "none"
            and where `workspace_bytes` leaves no memory for gradients in the forward.
        validate: whether to check values. None checks them except while compiling or capturing a
            CUDA graph. An unchecked invalid or repeated id makes its row NaN.
        return_stats: also return `SparseStats`.

    Returns:
        The loss, [] or [N], in float32 (float64 for float64 inputs); with `return_stats` the pair
        (loss, stats).

    Raises:
        ValueError: an invalid argument; the message names it. For a wrong dtype the error is a
            TypeError as well.
        RuntimeError: the loss is differentiated twice.

    Source: GKD, arXiv:2306.13649, for the divergences; arXiv:2606.30406 for the generalised KL;
    ResOPD, arXiv:2610.04882, and TT-OPD, arXiv:2609.34447, for the correction by the sampled token,
    here with a control variate of less variance. The gradient by buckets is derived in
    `lopd_kernels/_core/rules.py`.

    >>> hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    >>> weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    >>> topk_ids = torch.tensor([[0, 2], [1, -1]])
    >>> topk_logprobs = torch.tensor([[0.5, 0.25], [0.5, 0.0]]).log()
    >>> loss = linear_sparse_divergence(hidden, weight, topk_ids, topk_logprobs)
    >>> loss.backward()
    >>> round(loss.item(), 4), tuple(hidden.grad.shape)
    (0.0403, (2, 2))
    """
    head = checked_head(hidden, weight, bias, logit_scale, softcap, temperature, workspace_bytes)
    _checks.check_weight_grad_buffer(weight_grad_buffer, head.weight)
    sample = _Sample(sampled_ids, sampled_logprobs, rollout_logprobs, importance_cap)
    loss, teacher = _checked_loss(
        hidden, weight.shape[0], topk_ids, topk_logprobs, tail_logprobs,
        _rule(divergence, tail, beta, sample), sample, row_weights, reduction, validate,
    )  # fmt: skip
    loss = loss._replace(skip=make_skip(head, dense_share, tolerance, seed, reduction, tail))
    value, stats = reduced_loss(head, loss, reduction, return_stats, weight_grad_buffer)
    leading = hidden.shape[:-1]
    value = in_shape(leading, value) if reduction == "none" else value
    return (value, _sparse_stats(leading, stats, loss, teacher)) if return_stats else value


@overload
def sparse_divergence(
    logits: Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    *,
    tail_logprobs: Tensor | None = ...,
    divergence: Divergence = ...,
    tail: Tail = ...,
    beta: float | None = ...,
    sampled_ids: Tensor | None = ...,
    sampled_logprobs: Tensor | None = ...,
    rollout_logprobs: Tensor | None = ...,
    importance_cap: float | None = ...,
    row_weights: Tensor | None = ...,
    reduction: Reduction = ...,
    temperature: float = ...,
    validate: bool | None = ...,
    return_stats: Literal[False] = False,
) -> Tensor: ...


@overload
def sparse_divergence(
    logits: Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    *,
    tail_logprobs: Tensor | None = ...,
    divergence: Divergence = ...,
    tail: Tail = ...,
    beta: float | None = ...,
    sampled_ids: Tensor | None = ...,
    sampled_logprobs: Tensor | None = ...,
    rollout_logprobs: Tensor | None = ...,
    importance_cap: float | None = ...,
    row_weights: Tensor | None = ...,
    reduction: Reduction = ...,
    temperature: float = ...,
    validate: bool | None = ...,
    return_stats: Literal[True],
) -> tuple[Tensor, SparseStats]: ...


def sparse_divergence(
    logits: Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    *,
    tail_logprobs: Tensor | None = None,
    divergence: Divergence = "reverse_kl",
    tail: Tail = "bucket",
    beta: float | None = None,
    sampled_ids: Tensor | None = None,
    sampled_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    importance_cap: float | None = None,
    row_weights: Tensor | None = None,
    reduction: Reduction = "mean",
    temperature: float = 1.0,
    validate: bool | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, SparseStats]:
    """`linear_sparse_divergence` on logits that exist already.

    The formulas are the same with z = logits / temperature. The forward allocates nothing of size
    [N, V]; the backward allocates the gradient.

    Args:
        logits: [N, V] or [B, T, V] float, the student's, after scale and softcap. -inf marks an
            id without mass; a row in which every id is marked has a loss of NaN.

    The other arguments are those of `linear_sparse_divergence`.

    Returns:
        The loss, [] or [N], in float32 (float64 for float64 logits); with `return_stats` the pair
        (loss, stats).

    Raises:
        ValueError: an invalid argument; the message names it. For a wrong dtype of a constant the
            error is a TypeError as well.
        RuntimeError: the loss is differentiated twice.

    Source: GKD, arXiv:2306.13649.

    >>> logits = torch.tensor([[2.0, 1.0, 0.0]])
    >>> teacher = logits.log_softmax(1)
    >>> sparse_divergence(logits, torch.tensor([[0, 1]]), teacher[:, :2]).item() < 1e-6
    True
    """
    _checks.check_tensor("logits", logits)
    if logits.dim() < 2 or logits.dtype not in _checks.FLOATS:
        raise _checks.DtypeError(
            f"logits are {logits.dtype} {list(logits.shape)}, expected floating point [N, V] or "
            "[B, T, V]"
        )
    _checks.check_positive("temperature", temperature)
    sample = _Sample(sampled_ids, sampled_logprobs, rollout_logprobs, importance_cap)
    loss, teacher = _checked_loss(
        logits, logits.shape[-1], topk_ids, topk_logprobs, tail_logprobs,
        _rule(divergence, tail, beta, sample), sample, row_weights, reduction, validate,
    )  # fmt: skip
    leading, rows = logits.shape[:-1], logits
    if logits.dim() > 2:
        rows = logits.flatten(0, -2)
    if reduction == "mean":
        loss = loss._replace(row_weights=mean_weights(loss.row_weights, rows))
    losses, stats = logits_losses(rows, temperature, *LossArgs.of(loss), return_stats)
    value = in_shape(leading, losses) if reduction == "none" else losses.sum()
    return (value, _sparse_stats(leading, stats, loss, teacher)) if return_stats else value
