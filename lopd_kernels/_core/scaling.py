"""Row weights, and the scale that dL/dz leaves out where it is rounded to 16 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from lopd_kernels._core.gemm import is_mixed
from lopd_kernels._core.linear import Linear

FP16_ROOM = 2.0**15  # half of fp16's range, for the largest entry of dL/dz


def weigh(losses: Tensor, row_weights: Tensor | None) -> Tensor:
    """w_n L_n [N]; 0 in a row of weight 0, whatever its loss."""
    if row_weights is None:
        return losses.clone()
    return torch.where(row_weights == 0, 0.0, losses * row_weights.to(losses.dtype))


def dlogits_bound(target: Tensor) -> Tensor:
    """A bound on |dL/dz| at weights of one: |p (log p - log q)| and |A| for usual log-probs.

    An importance ratio may exceed it; entries beyond the range of fp16 come out as inf.
    """
    finite = torch.where(target.isfinite(), target, 0.0).abs()
    return 128.0 + 2.0 * (finite.amax() if finite.numel() else finite.sum())


def normalized_weights(
    linear: Linear, row_weights: Tensor | None, bound: Tensor
) -> tuple[Tensor, Tensor]:
    """(weights [N] that dL/dz carries, the scale [] that its gradients are short of).

    The weights are w / max|w|, so equal weights cost no rounding in 16 bits. In fp16, where small
    entries of dL/dz would be subnormal, a power of two leaves room for `bound`, the largest entry
    at weights of one.
    """
    n = linear.hidden.shape[0]
    weights = linear.hidden.new_ones(n, dtype=linear.dtype)
    largest = linear.hidden.new_ones((), dtype=linear.dtype)
    if row_weights is not None and n > 0:
        wide = row_weights.to(torch.promote_types(row_weights.dtype, linear.dtype))
        finite = torch.where(wide.isfinite(), wide, 0.0).abs().amax()
        wide_largest = torch.where(finite == 0.0, 1.0, finite)
        weights = (wide / wide_largest).to(linear.dtype)
        largest = wide_largest.to(linear.dtype)
    scale = largest * linear.logit_options.slope
    if is_mixed(linear.hidden) and linear.hidden.dtype == torch.float16:
        room = FP16_ROOM / bound
        power = room / torch.frexp(room).mantissa / 2.0
        weights, scale = weights * power, scale / power
    return weights, scale


def panel_weights(
    linear: Linear, row_weights: Tensor | None, bound: Tensor
) -> tuple[Tensor, Tensor | None]:
    """`normalized_weights`, with the scale folded in where dL/dz is not rounded."""
    weights, scale = normalized_weights(linear, row_weights, bound)
    return (weights, scale) if is_mixed(linear.hidden) else (weights * scale, None)
