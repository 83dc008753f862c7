"""Which rows form their gradient outside the list: a sample of them, or all but the negligible.

The gradient dL/dz of a row is exact at its K listed ids and costs K rows of the weight there.
Outside the list it is one number times the softmax, with the L1 norm m_n = |w_n a_n| tau_n, tau_n
the student's mass outside, and costs the row two GEMMs over the vocabulary.

`sample` keeps C of R rows. Row n is kept with the probability pi_n = min(1, m_n / theta), theta
such that the pi_n add up to C, and its part is divided by pi_n. The expectation is exact, and the
squared Frobenius norm of the deviation of dL/dz is at most sum_n m_n^2 (1 / pi_n - 1) on average.
One uniform offset and steps of one through the running sum of pi_n (systematic sampling) pick
exactly C rows, so shapes do not depend on values.

`certify` drops the rows of the smallest m_n, as many as add up to at most `tolerance` times the L1
norm of all that is kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lopd_kernels._core.buckets import center
from lopd_kernels._core.types import RowState, Skip

WORD = 0xFFFFFFFF
ROUNDING = 1e-5  # of the norms in fp32; the certificate leaves room for it


class Selection(NamedTuple):
    rows: Tensor  # [C] int64, the rows that are kept, in order
    factor: Tensor  # [C] of their parts: 1 / pi, 0 in places that are not used
    probability: Tensor  # [R] pi
    kept: Tensor  # [R] bool


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words without visible patterns."""
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & WORD
    return x ^ (x >> 16)


def uniform(seed: Tensor, stream: int) -> Tensor:
    """A number in (0, 1), [] fp64, that depends on the seed [] int64 and the stream only."""
    x = _mix((seed + 0x9E3779B9) & WORD)
    x = _mix((x ^ (seed >> 32)) & WORD)
    return (_mix((x + stream) & WORD).double() + 0.5) / (WORD + 1.0)


def l1_norms(
    state: RowState, g: Tensor, p: Tensor, row_weights: Tensor | None, active: Tensor
) -> tuple[Tensor, Tensor]:
    """L1 norms [N] of dL/dz on the list and outside it, of a loss with dL/dlog p_b = g [N, K+1]."""
    grad = center(g, p).abs()
    listed, unlisted = grad[:, :-1].sum(1), grad[:, -1]
    unlisted = torch.where(state.unlisted[:, 1] == 0.0, 0.0, unlisted)
    if row_weights is not None:
        size = row_weights.abs().to(grad.dtype)
        listed, unlisted = listed * size, unlisted * size
    return torch.where(active, listed, 0.0), torch.where(active, unlisted, 0.0)


def select(skip: Skip, listed: Tensor, unlisted: Tensor, stream: int = 0) -> Selection:
    """Which rows are kept, from their L1 norms [R] on the list and outside it."""
    if skip.dense_share is None:
        return certify(listed, unlisted, skip.tolerance)
    assert skip.seed is not None
    return sample(unlisted, skip.capacity(len(unlisted)), uniform(skip.seed, stream))


def sample(unlisted: Tensor, count: int, offset: Tensor) -> Selection:
    """`count` rows, or all with a part if they are fewer; the offset is in (0, 1)."""
    n = len(unlisted)
    mass = unlisted.double()
    finite = torch.where(mass.isfinite(), mass, 0.0)
    mass = torch.where(mass.isfinite(), mass, 1.0 + finite.sum())  # NaN is to be seen
    ordered = mass.sort(descending=True).values
    remaining = ordered.flip(0).cumsum(0).flip(0)
    places = torch.arange(count, 0, -1, device=mass.device)
    thresholds = remaining[:count] / places
    theta = thresholds[(ordered[:count] <= thresholds).int().argmax()] if count else mass.sum()
    probability = torch.where(mass >= theta, 1.0, mass / theta).masked_fill(mass == 0.0, 0.0)
    reach = probability.cumsum(0)
    picked = torch.searchsorted(reach, offset + torch.arange(count, device=mass.device), right=True)
    used, rows = picked < n, picked.clamp(max=n - 1)
    factor = torch.where(used, 1.0 / probability[rows], 0.0).to(unlisted.dtype)
    kept = torch.zeros(n + 1, dtype=torch.bool, device=mass.device).scatter_(0, picked, True)[:n]
    return Selection(rows, factor, probability.to(unlisted.dtype), kept)


def certify(listed: Tensor, unlisted: Tensor, tolerance: float) -> Selection:
    """All rows but the smallest. The host reads how many; a CUDA graph keeps all."""
    listed, mass = listed.double(), unlisted.double()
    ordered, order = mass.sort(stable=True)
    total = listed.sum() + mass.sum()
    budget = (1.0 - ROUNDING) * tolerance / (1.0 + tolerance) * total
    dropped = ordered.cumsum(0) <= budget  # nothing, where a norm is not finite
    kept = torch.empty_like(dropped).scatter_(0, order, ~dropped)
    if mass.is_cuda and torch.cuda.is_current_stream_capturing():
        kept.fill_(True)  # a graph has fixed sizes
        rows = torch.arange(len(kept), device=mass.device)
    else:
        rows = kept.nonzero()[:, 0]
    return Selection(rows, unlisted.new_ones(len(rows)), kept.to(unlisted.dtype), kept)


def skip_stats(listed: Tensor, unlisted: Tensor, selection: Selection) -> Tensor:
    """The columns SKIP_STATS [N, 4]."""
    kept = selection.kept.to(listed.dtype)
    return torch.stack([listed, unlisted, selection.probability, kept], 1)
