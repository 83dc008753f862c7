"""From reduced rows to the log-probs of their buckets, and from a loss's slopes to dL/dz.

The K listed logits of a row are gathered and overwritten by -inf. The log-sum-exp of the rest
is the student's tail, computed directly: with `lse = logaddexp(lse_listed, lse_unlisted)`,
`log p_tail = lse_unlisted - lse` has six digits at any tail, where `1 - sum_k p_k` has none
below 1e-7. At unlisted ids the gradient is the softmax times one number per row.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lopd_kernels._core.types import LogitGrads, RowState


class StudentBuckets(NamedTuple):
    """A row state as log-probs.

    `lse` is relative to `max_logit`: an offset common to all logits would cost digits.
    """

    logprobs: Tensor  # [N, K+1] of the listed ids and the tail, -inf at pads
    max_logit: Tensor  # [N, 1]
    lse: Tensor  # [N, 1] log sum_j exp(z_j - max_logit)
    unlisted_max: Tensor  # [N, 1] log-prob of the most probable unlisted id
    entropy: Tensor  # [N]; valid if the state holds the sums of e (z - m)


def student_buckets(state: RowState) -> StudentBuckets:
    """The buckets' log-probs; NaN in invalid rows."""
    unlisted_max, total, spread, invalid = state.unlisted.unsqueeze(2).unbind(1)
    listed = state.listed
    has_list = listed.shape[1] > 0
    top = torch.maximum(unlisted_max, listed.amax(1, keepdim=True)) if has_list else unlisted_max
    top = top.masked_fill(top == torch.finfo(top.dtype).min, 0.0)
    top = top.masked_fill(invalid > 0, math.nan)
    log_total = torch.where(total == 0.0, -math.inf, total.log())
    z_listed = listed - top
    z_tail = (unlisted_max - top) + log_total
    lse = torch.logaddexp(z_tail, z_listed.logsumexp(1, keepdim=True)) if has_list else z_tail
    logprobs = torch.cat([z_listed, z_tail], 1) - lse
    empty = torch.isneginf(torch.cat([listed, log_total], 1)) & (invalid == 0.0)
    logprobs = logprobs.masked_fill(empty, -math.inf)
    shift = unlisted_max - top - lse
    tail_term = torch.where(total == 0.0, 0.0, shift.exp() * (spread + total * shift))[:, 0]
    lp = logprobs[:, :-1]
    list_term = (lp.exp() * lp).masked_fill(lp == -math.inf, 0.0).sum(1)
    return StudentBuckets(logprobs, top, lse, shift, -tail_term - list_term)


def center(g: Tensor, p: Tensor) -> Tensor:
    """g - p sum(g) over buckets whose p sum to one.

    In a bucket that holds nearly all the mass the two terms cancel, so the entry of the largest
    p is computed as g (1 - p) - p (sum(g) - g), with both differences as sums of the others.
    """
    largest = p.argmax(1, keepdim=True)
    g_largest, p_largest = g.gather(1, largest), p.gather(1, largest)
    g_others = g.scatter(1, largest, 0.0).sum(1, keepdim=True)
    p_others = p.scatter(1, largest, 0.0).sum(1, keepdim=True)
    plain = g - p * (g_largest + g_others)
    return plain.scatter(1, largest, g_largest * p_others - p_largest * g_others)


def logit_grads(state: RowState, g: Tensor, p: Tensor, weights: Tensor | None) -> LogitGrads:
    """dL/dz of a loss with dL/dlog p_b = g [N, K+1], times the row's weight."""
    grad = center(g, p)
    if weights is not None:
        grad = grad * weights.unsqueeze(1)
    unlisted_max, total = state.unlisted[:, 0], state.unlisted[:, 1]
    factor = torch.where(total == 0.0, 0.0, grad[:, -1] / total)
    return LogitGrads(unlisted_max, factor, None, grad[:, :-1].contiguous())
