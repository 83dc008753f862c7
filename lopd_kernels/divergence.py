"""Divergences to a sparse teacher: its top-k log-probs and one bucket for all other ids."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from lopd_kernels import _checks, _values
from lopd_kernels._calls import Reduction, checked_head, in_shape, mean_weights, reduced_loss
from lopd_kernels._core.gemm import compute_dtype
from lopd_kernels._core.rules import DivergenceRule, RowLoss, teacher_buckets
from lopd_kernels._ops.logits import logits_losses
from lopd_kernels._ops.schema import LossArgs

Divergence = Literal["reverse_kl", "forward_kl", "jsd"]
Tail = Literal["bucket", "renormalize", "truncate"]


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


def _rule(divergence: str, tail: str, beta: float | None) -> DivergenceRule:
    _checks.check_divergence(divergence, tail, beta)
    return DivergenceRule(divergence, tail, 0.5 if beta is None else beta)


def _checked_loss(
    like: Tensor,  # hidden or logits, of any leading dimensions
    vocab: int,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    tail_logprobs: Tensor | None,
    rule: DivergenceRule,
    row_weights: Tensor | None,
    reduction: str,
    validate: bool | None,
) -> tuple[RowLoss, Tensor]:
    """The loss of the flat rows, and which of them [N] have a floored tail."""
    _checks.check_choice("reduction", reduction, _checks.REDUCTIONS)
    leading, columns = like.shape[:-1], ("K",)
    ids = _checks.id_rows("topk_ids", topk_ids, leading, like, columns)
    _checks.check_list_length("topk_ids", ids, vocab)
    logprobs = _checks.constant_rows("topk_logprobs", topk_logprobs, leading, like, columns)
    assert logprobs is not None
    _checks.check_list_shape("topk_logprobs", logprobs, ids)
    tail = _checks.constant_rows("tail_logprobs", tail_logprobs, leading, like)
    weights = _checks.weight_rows(row_weights, leading, like)
    if _values.checks_values(validate, like):
        checks = _values.ValueChecks(weights)
        checks.ids("topk_ids", ids, vocab)
        uses_tail = rule.tail == "bucket"
        checks.teacher(
            ids, logprobs, tail if uses_tail else None, vocab,
            derives_tail=tail is None and rule.tail != "renormalize",
        )  # fmt: skip
        checks.weights(reduction)
        checks.finish()
    dtype = compute_dtype(like.dtype)
    tail = None if tail is None else tail.to(dtype)
    teacher = teacher_buckets(ids, logprobs.to(dtype), tail, vocab)
    return RowLoss(ids, teacher.logprobs, weights, rule), teacher.floored


def _sparse_stats(
    leading: torch.Size, stats: Tensor, loss: RowLoss, floored: Tensor
) -> SparseStats:
    losses, lse, tail, entropy = (in_shape(leading, x) for x in stats.unbind(1))
    active = (loss.ids != -1).any(1)
    if loss.row_weights is not None:
        active = active & (loss.row_weights != 0)
    teacher_tail = in_shape(leading, torch.where(active, loss.target[:, -1], 0.0))
    floored = in_shape(leading, floored & active)
    if loss.rule.ignores_unlisted:
        return SparseStats(losses, None, None, teacher_tail, None, floored)
    return SparseStats(losses, lse, tail, teacher_tail, entropy, floored)


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
    row_weights: Tensor | None = ...,
    reduction: Reduction = ...,
    bias: Tensor | None = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    temperature: float = ...,
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
    row_weights: Tensor | None = ...,
    reduction: Reduction = ...,
    bias: Tensor | None = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    temperature: float = ...,
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
    row_weights: Tensor | None = None,
    reduction: Reduction = "mean",
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
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
        tail: "bucket" is minimal exactly where the student has the teacher's buckets. "truncate"
            leaves the tail out of the sum, and has a gradient there. "renormalize" rescales both
            distributions to the list, so it ignores the mass outside, and needs no LM-head GEMM.
            The last two do not use `tail_logprobs`.
        beta: of jsd only, strictly between 0 and 1; None is 0.5.
        row_weights: [N] float w_n, or a bool mask. A row of weight 0 or without ids has loss and
            gradient 0, whatever it holds.
        reduction: "mean" is sum_n w_n L_n / sum_n w_n (0 where that is 0), "sum" leaves the
            divisor out, "none" is w_n L_n [N].
        bias: [V], added before the scale.
        logit_scale, softcap, temperature: of the student's logits, as above. There is no factor
            temperature^2.
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

    Source: GKD, arXiv:2306.13649, for the divergences. The gradient by buckets is derived in
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
    loss, floored = _checked_loss(
        hidden, weight.shape[0], topk_ids, topk_logprobs, tail_logprobs,
        _rule(divergence, tail, beta), row_weights, reduction, validate,
    )  # fmt: skip
    value, stats = reduced_loss(head, loss, reduction, return_stats, weight_grad_buffer)
    leading = hidden.shape[:-1]
    value = in_shape(leading, value) if reduction == "none" else value
    return (value, _sparse_stats(leading, stats, loss, floored)) if return_stats else value


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
            id without mass.

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
    loss, floored = _checked_loss(
        logits, logits.shape[-1], topk_ids, topk_logprobs, tail_logprobs,
        _rule(divergence, tail, beta), row_weights, reduction, validate,
    )  # fmt: skip
    leading, rows = logits.shape[:-1], logits
    if logits.dim() > 2:
        rows = logits.flatten(0, -2)
    if reduction == "mean":
        loss = loss._replace(row_weights=mean_weights(loss.row_weights, rows))
    losses, stats = logits_losses(rows, temperature, *LossArgs.of(loss), return_stats)
    value = in_shape(leading, losses) if reduction == "none" else losses.sum()
    return (value, _sparse_stats(leading, stats, loss, floored)) if return_stats else value
