"""Divergences to a sparse teacher, and what every loss shares: call an operator, reduce."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lopd_kernels import _checks as checks
from lopd_kernels._core.gemm import compute_dtype
from lopd_kernels._core.rules import teacher_buckets
from lopd_kernels._core.workspace import Needs, Sizes, in_forward, keeps_dz
from lopd_kernels._ops import losses as ops
from lopd_kernels._ops import queries as query_ops

Reduction = Literal["sum", "mean", "none"]
Head = tuple[float, float | None, float]


class SparseStats(NamedTuple):
    """What the row pass knows of each row, [N] each; 0 in rows without weight or ids.

    A renormalised loss never looks outside the support: it has no lse, tail or entropy.
    """

    loss: Tensor  # L_n, not weighted
    student_lse: Tensor | None  # log sum_j exp z_j, z after the head options
    student_tail_logprobs: Tensor | None  # log of the student's mass outside the row's list
    teacher_tail_logprobs: Tensor  # as the loss used it; -inf in rows that list every id
    student_entropy: Tensor | None  # nat
    tail_floored: Tensor  # bool: derived tails that were raised to log 2^-23


class Rows(NamedTuple):
    """A loss as the operators take it."""

    ids: Tensor  # [N, K]
    target: Tensor  # [N, M]
    row_weights: Tensor | None  # [N]
    rule: str
    options: list[float]


def run(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Rows,
    head: Head,
    reduction: str,
    want_entropy: bool,
    workspace_bytes: int | None,
    buffer: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(reduced loss, stats)"""
    if reduction == "mean":
        weights = mean_weights(rows.row_weights, hidden.shape[0], hidden)
        rows = rows._replace(row_weights=weights)
    needs = tracked(hidden, weight, bias)
    sizes = Sizes.of(hidden, weight, rows.ids.shape[1])
    listed = rows.rule.endswith(":renormalize")
    if buffer is not None and torch.is_grad_enabled():
        losses, stats = ops.into_buffer(
            hidden, weight, bias, *rows[:3], buffer, (*rows[3:], *head), needs, want_entropy,
            workspace_bytes,
        )  # fmt: skip
    elif listed or reduction == "none" or not in_forward(sizes, needs, workspace_bytes):
        losses, stats, *_ = ops.row_losses(
            hidden, weight, bias, *rows, *head, *needs, want_entropy, workspace_bytes
        )
    else:
        keeps = keeps_dz(sizes, needs, workspace_bytes)
        operator = ops.kept_loss if keeps else ops.fused_loss
        losses, stats, *_ = operator(
            hidden, weight, bias, *rows, *head, *needs, want_entropy, workspace_bytes
        )
    return losses if reduction == "none" else losses.sum(), stats


def tracked(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Needs:
    """Which of them the backward will be asked for."""
    tracks = torch.is_grad_enabled()
    return Needs(
        tracks and hidden.requires_grad,
        tracks and weight.requires_grad,
        tracks and bias is not None and bias.requires_grad,
    )


def mean_weights(row_weights: Tensor | None, n: int, like: Tensor) -> Tensor:
    """[N] weights whose sum is the weighted mean: w over its sum, 0 where that is 0."""
    dtype = compute_dtype(like.dtype)
    if row_weights is None:
        return torch.full((n,), 1.0 / max(n, 1), dtype=dtype, device=like.device)
    weights = row_weights.to(dtype)
    mass = weights.sum()
    return weights * torch.where(mass == 0.0, 0.0, 1.0 / mass)


def _sparse_rows(
    like: Tensor,  # hidden or logits
    vocab: int,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    tail_logprobs: Tensor | None,
    divergence: str,
    tail: str,
    beta: float,
    row_weights: Tensor | None,
    reduction: str,
    validate: bool | None,
) -> tuple[Rows, Tensor]:
    """The checked loss and the rows whose tail was floored."""
    checks.check_divergence(divergence, tail, beta)
    checks.check_choice("reduction", reduction, checks.REDUCTIONS)
    n = like.shape[0]
    checks.check_ids("topk_ids", topk_ids, n, like)
    checks.check_width("topk_ids", topk_ids, vocab)
    checks.check_rows("topk_logprobs", topk_logprobs, tuple(topk_ids.shape), like)
    checks.check_constant("topk_logprobs", topk_logprobs)
    if tail_logprobs is not None:
        checks.check_rows("tail_logprobs", tail_logprobs, (n,), like)
        checks.check_constant("tail_logprobs", tail_logprobs)
    checks.check_weights(row_weights, n, like)
    if checks.checks_values(validate, like):
        ids = checks.where_weighted(topk_ids, row_weights, -1)
        checks.check_ids_values("topk_ids", ids, vocab)
        used = tail_logprobs if tail == "bucket" else None
        checks.check_teacher_values(ids, topk_logprobs, used, vocab)
        checks.check_weights_values(row_weights, reduction)
    dtype = compute_dtype(like.dtype)
    explicit = None if tail_logprobs is None else tail_logprobs.to(dtype)
    teacher = teacher_buckets(topk_ids, topk_logprobs.to(dtype), explicit, vocab)
    rule = f"{divergence}:{tail}"
    return Rows(topk_ids, teacher.logprobs, row_weights, rule, [beta]), teacher.floored


def _sparse_stats(stats: Tensor, rows: Rows, floored: Tensor) -> SparseStats:
    loss, lse, tail, entropy = stats.unbind(1)
    active = (rows.ids != -1).any(1)
    if rows.row_weights is not None:
        active = active & (rows.row_weights != 0)
    teacher_tail, floored = torch.where(active, rows.target[:, -1], 0.0), floored & active
    if rows.rule.endswith(":renormalize"):
        return SparseStats(loss, None, None, teacher_tail, None, floored)
    return SparseStats(loss, lse, tail, teacher_tail, entropy, floored)


def linear_sparse_divergence(
    hidden: Tensor,  # [N, D] student's last hidden states
    weight: Tensor,  # [V, D] lm_head weight
    topk_ids: Tensor,  # [N, K] int, distinct in a row, -1 where the row has fewer than K
    topk_logprobs: Tensor,  # [N, K] teacher's log-probs, not renormalised
    *,
    tail_logprobs: Tensor | None = None,  # [N] log of the teacher's mass outside the list
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl",
    tail: Literal["bucket", "renormalize", "truncate"] = "bucket",
    beta: float = 0.5,
    row_weights: Tensor | None = None,  # [N]
    reduction: Reduction = "sum",
    bias: Tensor | None = None,  # [V]
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    tolerance: float = 0.0,
    workspace_bytes: int | None = None,
    weight_grad_buffer: Tensor | None = None,  # [V, D] fp32
    validate: bool | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, SparseStats]:
    """Divergence to a top-k teacher from hidden states, without the [N, V] logits.

    With p = softmax(z), z = softcap(logit_scale (H W^T + b)) / temperature, q the teacher
    and b running over the K listed ids and one tail bucket of all the others,

        reverse_kl  L_n = sum_b p_b (log p_b - log q_b)
        forward_kl  L_n = sum_b q_b (log q_b - log p_b)
        jsd         L_n = beta KL(q || m) + (1 - beta) KL(p || m),  m = beta q + (1 - beta) p

    `tail="bucket"` is the only form whose fixed point is student = teacher; "truncate"
    leaves the tail bucket out of the sum; "renormalize" rescales both distributions to
    the list, ignores all mass outside it and needs no LM-head GEMM. Both disregard
    `tail_logprobs`, which without a value is log(1 - sum_k q_k), floored at log 2^-23
    and counted in `SparseStats.tail_floored`.

    Reductions: "sum" = sum_n w_n L_n, "mean" = that over sum_n w_n (0 when it is 0),
    "none" = w_n L_n. A row of weight 0 or without ids has loss and gradient 0 whatever is
    in it. `temperature` divides the student's logits only; there is no T^2 factor.

    Args:
        workspace_bytes: bound on what the call allocates beyond inputs and outputs.
        weight_grad_buffer: the backward adds dW to it and `weight` gets no gradient; the
            logits are then computed a second time, in the backward, as for "none" and where
            `workspace_bytes` leaves no room for gradients in the forward.
        validate: None checks values except while compiling or capturing a CUDA graph,
            False never, True always. Unchecked, a bad or repeated id makes its row NaN.
        tolerance: 0.0 only.

    Raises:
        ValueError: an argument that cannot be meant, by name (a wrong dtype is a TypeError too).
        RuntimeError: on differentiating twice.

    Source: GKD, arXiv:2306.13649, for the divergences; divergence.py for the buckets.
    """
    hidden, weight, bias = checks.in_one_dtype(hidden, weight, bias)
    checks.check_linear(hidden, weight, bias)
    checks.check_head(logit_scale, softcap, temperature)
    checks.check_schedule(tolerance, workspace_bytes, weight_grad_buffer, weight)
    rows, floored = _sparse_rows(
        hidden, weight.shape[0], topk_ids, topk_logprobs, tail_logprobs, divergence, tail, beta,
        row_weights, reduction, validate,
    )  # fmt: skip
    head = (logit_scale, softcap, temperature)
    loss, stats = run(
        hidden, weight, bias, rows, head, reduction, return_stats, workspace_bytes,
        weight_grad_buffer,
    )  # fmt: skip
    return (loss, _sparse_stats(stats, rows, floored)) if return_stats else loss


def sparse_divergence(
    logits: Tensor,  # [N, V] student's, after softcap and scale
    topk_ids: Tensor,  # [N, K]
    topk_logprobs: Tensor,  # [N, K]
    *,
    tail_logprobs: Tensor | None = None,  # [N]
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl",
    tail: Literal["bucket", "renormalize", "truncate"] = "bucket",
    beta: float = 0.5,
    row_weights: Tensor | None = None,  # [N]
    reduction: Reduction = "sum",
    temperature: float = 1.0,
    validate: bool | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, SparseStats]:
    """`linear_sparse_divergence` for callers who already have logits.

    The forward allocates nothing of size [N, V]; the backward one, the gradient.
    """
    checks.check_plain("logits", logits)
    if logits.dim() != 2 or logits.dtype not in checks.FLOATS:
        raise ValueError(
            f"logits are {logits.dtype} {list(logits.shape)}, expected floating point [N, V]"
        )
    checks.check_positive("temperature", temperature)
    rows, floored = _sparse_rows(
        logits, logits.shape[1], topk_ids, topk_logprobs, tail_logprobs, divergence, tail, beta,
        row_weights, reduction, validate,
    )  # fmt: skip
    if reduction == "mean":
        rows = rows._replace(row_weights=mean_weights(row_weights, logits.shape[0], logits))
    losses, stats = query_ops.logits_losses(logits, *rows, temperature, return_stats)
    loss = losses if reduction == "none" else losses.sum()
    return (loss, _sparse_stats(stats, rows, floored)) if return_stats else loss
