"""Log-probs of given ids and the entropy of each row, with their gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lopd_kernels._core.buckets import StudentBuckets, logit_grads, student_buckets
from lopd_kernels._core.linear import Linear
from lopd_kernels._core.listed_ids import add_at, distinct
from lopd_kernels._core.panels import panel_grads, reduce_rows
from lopd_kernels._core.scaling import panel_weights
from lopd_kernels._core.types import LogitGrads, Needs, RowState
from lopd_kernels._core.workspace import READ_WORDS, panel_columns


def logprobs(
    linear: Linear, ids: Tensor, needs: Needs, want_entropy: bool, workspace_bytes: int | None
) -> tuple[Tensor, Tensor, RowState]:
    """(log p at ids [N, K], -inf at pads; entropy [N] or [0]; what the backward needs).

    Raises ValueError if the backward's `needs` exceed the workspace.
    """
    once, first = distinct(ids)
    sizes, vocab = linear.sizes(2 * ids.shape[1] + READ_WORDS), linear.weight.shape[0]
    panel_columns(sizes, needs, workspace_bytes)
    columns = panel_columns(sizes, Needs(), workspace_bytes)
    listed_ids = linear.functions.locate(once, None, vocab)
    state = reduce_rows(linear, listed_ids, ids.shape[1], want_entropy, columns)
    student = student_buckets(state)
    out = student.logprobs[:, :-1].gather(1, first).masked_fill(ids == -1, -math.inf)
    out = out.masked_fill(student.lse.isnan(), math.nan)
    return out, student.entropy if want_entropy else student.entropy[:0].clone(), state


def logprobs_grads(
    linear: Linear,
    ids: Tensor,  # [N, K]
    state: RowState,
    grad_logprobs: Tensor,  # [N, K]
    grad_entropy: Tensor,  # [N] or [0]
    needs: Needs,
    workspace_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `logprobs`, see `panel_grads`.

    dL/dz_j = sum_k g_k ([j = id_k] - p_j) - g_H p_j (log p_j + H); repeated ids add up.
    """
    once, first = distinct(ids)
    listed_ids = linear.functions.locate(once, None, linear.weight.shape[0])
    n, k = ids.shape
    g = grad_logprobs.new_zeros((n, k + 1), dtype=linear.dtype)
    offsets = (k + 1) * torch.arange(n, device=ids.device).unsqueeze(1)
    values = grad_logprobs.to(linear.dtype).masked_fill(ids == -1, 0.0)
    add_at(g.view(-1), (first + offsets).flatten(), values.flatten())
    student = student_buckets(state)
    reach = 2.0 * g.abs().sum(1)
    if grad_entropy.numel():
        reach = reach + 16.0 * grad_entropy.abs().to(linear.dtype)
    reach = torch.where(reach.isfinite() & (reach > 0.0), reach, 1.0)
    weights, scale = panel_weights(linear, None, reach.amax() if n else reach.new_ones(()))
    grads = logit_grads(state, g, student.logprobs.exp(), weights)
    if grad_entropy.numel():
        grads = _add_entropy(grads, student, grad_entropy.to(linear.dtype) * weights)
    columns = panel_columns(linear.sizes(2 * k + READ_WORDS), needs, workspace_bytes)
    return panel_grads(linear, listed_ids, state.listed, grads, scale, needs, columns)


def _add_entropy(grads: LogitGrads, student: StudentBuckets, upstream: Tensor) -> LogitGrads:
    """Add -upstream p (log p + H); an unlisted id has log p = d + unlisted_max."""
    shift, lp = student.unlisted_max[:, 0], student.logprobs[:, :-1]
    entropy_factor = upstream * shift.exp()
    constant = torch.where(entropy_factor == 0.0, 0.0, entropy_factor * (shift + student.entropy))
    listed = upstream.unsqueeze(1) * lp.exp() * (lp + student.entropy.unsqueeze(1))
    return LogitGrads(
        grads.unlisted_max,
        grads.factor - constant,
        entropy_factor,
        grads.listed - listed.masked_fill(lp == -math.inf, 0.0),
    )
