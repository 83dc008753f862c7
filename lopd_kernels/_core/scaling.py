"""Weights of rows, and the factor that dz leaves out where it is rounded."""

from __future__ import annotations

import torch
from torch import Tensor

from lopd_kernels._core.gemm import is_mixed
from lopd_kernels._core.linear import Linear

FP16_ROOM = 2.0**15  # half of fp16's range, for the largest entry of dz


def weighted_sum(losses: Tensor, row_weights: Tensor | None) -> Tensor:
    """sum_n w_n L_n; a row without weight adds nothing, whatever its loss."""
    return weigh(losses, row_weights).sum()


def weigh(losses: Tensor, row_weights: Tensor | None) -> Tensor:
    if row_weights is None:
        return losses.clone()
    return torch.where(row_weights == 0, 0.0, losses * row_weights.to(losses.dtype))


def normalised(
    linear: Linear, row_weights: Tensor | None, largest_dz: Tensor
) -> tuple[Tensor, Tensor]:
    """(weights [N] that dz carries, the factor that makes up for them).

    They are w over the largest |w|: equal weights round nothing in 16 bits. In fp16 they leave
    room for `largest_dz`, what dz may reach with weights of one: its small entries would be
    subnormal.
    """
    n = linear.hidden.shape[0]
    weights = linear.hidden.new_ones(n, dtype=linear.dtype)
    largest = linear.hidden.new_ones((), dtype=linear.dtype)
    if row_weights is not None and n > 0:
        finite = torch.where(row_weights.isfinite(), row_weights, 0.0).abs().amax()
        largest = torch.where(finite == 0.0, 1.0, finite).to(linear.dtype)
        weights = row_weights.to(linear.dtype) / largest
    scale = largest * linear.head.slope
    if is_mixed(linear.hidden) and linear.hidden.dtype == torch.float16:
        room = FP16_ROOM / largest_dz
        power = room / torch.frexp(room).mantissa / 2.0
        weights, scale = weights * power, scale / power
    return weights, scale


def largest_dz(target: Tensor) -> Tensor:
    """A bound of |dL/dz| at weights of one: |p (log p - log q)| and |A| for usual log-probs.

    An importance ratio may pass it; what leaves the range of fp16 comes out as inf.
    """
    known = torch.where(target.isfinite(), target, 0.0).abs()
    return 128.0 + 2.0 * (known.amax() if known.numel() else known.sum())


def complete(
    linear: Linear, row_weights: Tensor | None, largest_dz: Tensor
) -> tuple[Tensor, Tensor | None]:
    """(weights of dz, scale) for `panel_grads`: where dz is rounded it leaves the scale out."""
    weights, scale = normalised(linear, row_weights, largest_dz)
    return (weights, scale) if is_mixed(linear.hidden) else (weights * scale, None)
