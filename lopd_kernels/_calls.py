"""What the public functions on an LM head share: checks of the head, and a reduced loss."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lopd_kernels import _checks
from lopd_kernels._core.gemm import compute_dtype
from lopd_kernels._core.rules import RowLoss
from lopd_kernels._core.types import LARGEST_SHARE, SKIP_STATS, Skip
from lopd_kernels._core.workspace import Sizes, in_forward, stores_dlogits
from lopd_kernels._ops import losses as ops
from lopd_kernels._ops.schema import HeadArgs, LossArgs

Reduction = Literal["sum", "mean", "none"]


class SkippingStats(NamedTuple):
    """What `dense_share` or `tolerance` left out; L1 norms of dL/dz, with the rows' weights."""

    share: Tensor  # [] of the rows, whose gradient outside the list was formed
    variance_bound: Tensor  # [] sum_n m_n^2 (1 / pi_n - 1) of a sample; 0 with `tolerance`
    dropped_l1: Tensor  # [] outside the lists, of the other rows
    kept_l1: Tensor  # [] of the rest of the gradient, before the division by pi_n
    listed_l1: Tensor  # [N] on the list
    unlisted_l1: Tensor  # [N] m_n, outside it


def checked_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    workspace_bytes: int | None,
) -> HeadArgs:
    """The head on rows [N, D], with the gradients that its inputs require.

    Raises:
        ValueError: an invalid argument; the message names it.
    """
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        _checks.check_tensor(name, tensor)
    if bias is not None:
        _checks.check_tensor("bias", bias)
    hidden, weight, bias = _checks.cast_for_autocast(hidden, weight, bias)
    _checks.check_linear(hidden, weight, bias)
    if hidden.dim() > 2:
        hidden = hidden.flatten(0, -2)
    _checks.check_positive("logit_scale", logit_scale)
    _checks.check_optional_positive("softcap", softcap)
    _checks.check_positive("temperature", temperature)
    _checks.check_workspace(workspace_bytes)

    def needs_grad(x: Tensor | None) -> bool:
        return torch.is_grad_enabled() and x is not None and x.requires_grad

    return HeadArgs(
        hidden, weight, bias, logit_scale, softcap, temperature,
        needs_grad(hidden), needs_grad(weight), needs_grad(bias), workspace_bytes,
    )  # fmt: skip


def reduced_loss(
    head: HeadArgs,
    loss: RowLoss,
    reduction: Reduction,
    want_entropy: bool,
    weight_grad_buffer: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(loss [] or [N], stats [N, 4 + extras]), by the operator that fits the call."""
    if reduction == "mean":
        loss = loss._replace(row_weights=mean_weights(loss.row_weights, head.hidden))
    args, needs, bound = LossArgs.of(loss), head.needs, head.workspace_bytes
    sizes = Sizes.of(head.hidden, head.weight, loss.ids.shape[1]).keeping(loss.skip)
    if weight_grad_buffer is not None and torch.is_grad_enabled():
        losses, stats = ops.losses_into_buffer(head, args, want_entropy, weight_grad_buffer)
    elif loss.rule.ignores_unlisted or reduction == "none" or not in_forward(sizes, needs, bound):
        losses, stats, *_ = ops.row_losses(*head, *args, want_entropy)
    elif stores_dlogits(sizes, needs, bound):
        losses, stats, *_ = ops.stored_loss(*head, *args, want_entropy)
    else:
        losses, stats, *_ = ops.fused_loss(*head, *args, want_entropy)
    return losses if reduction == "none" else losses.sum(), stats


def make_skip(
    head: HeadArgs,
    dense_share: float | None,
    tolerance: float,
    seed: int | Tensor | None,
    reduction: str,
    tail: str | None = None,
) -> Skip | None:
    """Which rows form their gradient outside the list; None: all of them, exactly.

    Raises:
        ValueError: an invalid argument; the message names it.
    """
    _checks.check_skipping(dense_share, tolerance, reduction, tail)
    _checks.check_seed(seed, dense_share, head.hidden)
    if dense_share is None:
        return Skip(None, tolerance, None) if tolerance > 0.0 else None
    if dense_share > LARGEST_SHARE:
        return None
    if not isinstance(seed, Tensor):
        assert seed is not None
        seed = torch.full((), seed, dtype=torch.int64, device=head.hidden.device)
    return Skip(dense_share, 0.0, seed)


def skipping_stats(leading: torch.Size, loss: RowLoss, stats: Tensor) -> SkippingStats | None:
    """The sums of the last columns of the operators' stats."""
    if loss.skip is None:
        return None
    listed, unlisted, probability, kept = stats[:, -len(SKIP_STATS) :].unbind(1)
    wide, is_kept = unlisted.double(), kept > 0.0
    bound = torch.where(wide > 0.0, wide.square() * (1.0 / probability.double() - 1.0), 0.0).sum()
    dropped = torch.where(is_kept, 0.0, wide).sum()
    kept_l1 = listed.double().sum() + wide.sum() - dropped
    if loss.skip.dense_share is None:
        bound = torch.zeros_like(bound)
    share = kept.double().mean() if len(kept) else torch.zeros_like(bound)
    dtype = stats.dtype
    return SkippingStats(
        share.to(dtype), bound.to(dtype), dropped.to(dtype), kept_l1.to(dtype),
        in_shape(leading, listed), in_shape(leading, unlisted),
    )  # fmt: skip


def in_shape(leading: torch.Size, rows: Tensor) -> Tensor:
    """rows [N, ...] with the leading dimensions of the caller's hidden states."""
    return rows if len(leading) == 1 else rows.reshape(*leading, *rows.shape[1:])


def mean_weights(row_weights: Tensor | None, like: Tensor) -> Tensor:
    """[N] weights whose weighted sum is the weighted mean: w / sum(w), 0 where the sum is 0.

    Divided by the largest first, since neither the sum nor its inverse need be in range.
    """
    n, dtype = like.shape[0], compute_dtype(like.dtype)
    if row_weights is None or not n:
        return torch.full((n,), 1.0 / max(n, 1), dtype=dtype, device=like.device)
    weights = row_weights.to(torch.promote_types(row_weights.dtype, dtype))
    largest = weights.abs().amax()
    weights = weights / torch.where(largest == 0.0, 1.0, largest)
    mass = weights.sum()
    return torch.where(mass == 0.0, 0.0, weights / mass).to(dtype)
