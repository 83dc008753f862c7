"""From a reduced row to the log-probs of its buckets, and from their gradient to dz.

The K support logits of a row are gathered and overwritten by -inf; the log-sum-exp of what
is left is the student's tail, taken directly: `lse = logaddexp(lse_on, lse_off)`,
`log p_tail = lse_off - lse` keeps six digits at any tail where `1 - sum_k p_k` has none.
Off the support the gradient is the softmax times one number per row; the K entries on it
are overwritten.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lopd_kernels._core.types import Coefficients, Reduction


class Settled(NamedTuple):
    """A reduction as log-probs. `lse` is less `top`: an offset that all logits share would
    cost the log-probs digits, so it stays there."""

    buckets: Tensor  # [N, K+1] log-probs of the support and the tail, -inf at pads
    top: Tensor  # [N, 1] largest logit of the row
    lse: Tensor  # [N, 1]
    shift: Tensor  # [N, 1] largest logit off the support, less top and lse
    entropy: Tensor  # [N], if the spread was asked for


def settle(reduction: Reduction) -> Settled:
    """Log-probs of the buckets; NaN in broken rows."""
    own, total, spread, broken = reduction.state.unsqueeze(2).unbind(1)
    on = reduction.on
    top = torch.maximum(own, on.amax(1, keepdim=True)) if on.shape[1] else own
    top = top.masked_fill(top == torch.finfo(top.dtype).min, 0.0)
    top = top.masked_fill(broken > 0, math.nan)
    z_on = on - top
    total_log = torch.where(total == 0.0, -math.inf, total.log())
    lse_off = (own - top) + total_log
    lse = torch.logaddexp(lse_off, z_on.logsumexp(1, keepdim=True)) if on.shape[1] else lse_off
    buckets = torch.cat([z_on, lse_off], 1) - lse
    empty = torch.isneginf(torch.cat([on, total_log], 1)) & (broken == 0.0)
    buckets = buckets.masked_fill(empty, -math.inf)
    shift = own - top - lse
    off = torch.where(total == 0.0, 0.0, shift.exp() * (spread + total * shift))[:, 0]
    listed = buckets[:, :-1]
    listed = (listed.exp() * listed).masked_fill(listed == -math.inf, 0.0).sum(1)
    return Settled(buckets, top, lse, shift, -off - listed)


def centred(g: Tensor, p: Tensor) -> Tensor:
    """g - p sum(g) over buckets whose p sum to one.

    In a bucket that holds nearly all the mass the two terms cancel, so the largest one is
    written as g (1 - p) - p (sum(g) - g) with both differences taken as sums of the others.
    """
    largest = p.argmax(1, keepdim=True)
    own_g, own_p = g.gather(1, largest), p.gather(1, largest)
    other_g = g.scatter(1, largest, 0.0).sum(1, keepdim=True)
    other_p = p.scatter(1, largest, 0.0).sum(1, keepdim=True)
    plain = g - p * (own_g + other_g)
    return plain.scatter(1, largest, own_g * other_p - own_p * other_g)


def coefficients(
    reduction: Reduction, g: Tensor, p: Tensor, weights: Tensor | None
) -> Coefficients:
    """The gradient of a loss with dL/dlog p_b = g [N, K+1], times the row's weight."""
    grad = centred(g, p)
    if weights is not None:
        grad = grad * weights.unsqueeze(1)
    own, total = reduction.state[:, 0], reduction.state[:, 1]
    factor = torch.where(total == 0.0, 0.0, grad[:, -1] / total)
    return Coefficients(own, factor, None, grad[:, :-1].contiguous())
