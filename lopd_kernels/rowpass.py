"""The row pass: a chunk of logits becomes losses and, in place, gradients.

One row is gathered, reduced and overwritten by one block of work. The K support logits
are gathered and overwritten by -inf, the log-sum-exp of what is left is the student's
tail, taken directly: `lse = logaddexp(lse_on, lse_off)`, `log p_tail = lse_off - lse`
keeps six digits at any tail where `1 - sum_k p_k` has none. The exponentials of that
reduction, scaled by one number per row, are the gradient off the support; the K entries
on it are overwritten. Rows go through in blocks that stay in the processor's cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lopd_kernels.divergence import RowRule

BLOCK_BYTES = 8 << 20
STATS = ("loss", "lse", "tail_logprobs", "entropy")


@dataclass(frozen=True)
class Head:
    """z = softcap(logit_scale * u) / temperature, with u = H W^T + b."""

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def gain(self) -> float:
        """Factor that the GEMM applies to u: z itself, or tanh's argument under a softcap."""
        return self.logit_scale / (self.temperature if self.softcap is None else self.softcap)

    @property
    def slope(self) -> float:
        """The constant part of dz/du; a softcap multiplies it by 1 - tanh^2."""
        return self.logit_scale / self.temperature

    def finish(self, x: Tensor, want_slope: bool) -> Tensor | None:
        """Turn gain * u into z in place; returns 1 - tanh^2 under a softcap."""
        if self.softcap is None:
            return None
        x.tanh_()
        slope = torch.addcmul(x.new_ones(()), x, x, value=-1.0) if want_slope else None
        x.mul_(self.softcap / self.temperature)
        return slope


class Support(NamedTuple):
    """Where the buckets of each row are, made safe to index with."""

    ids: Tensor  # [N, K] int64 in [0, V); a pad repeats the row's largest id
    listed: Tensor  # [N, K] bool, False on pads
    anchor: Tensor  # [N, 1] column of the row's largest id
    active: Tensor  # [N] bool: has an id and a weight other than 0
    broken: Tensor  # [N] bool: an id out of range or twice: the row comes out NaN

    def rows(self, part: slice) -> Support:
        return Support(*(field[part] for field in self))


def locate(ids: Tensor, row_weights: Tensor | None, vocab: int) -> Support:
    ids = ids.long()
    listed = ids >= 0
    ordered = ids.sort(1).values
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(1)
    broken = twice | ((ids >= vocab) | (ids < -1)).any(1)
    anchor = ids.argmax(1, keepdim=True)
    safe = torch.where(listed, ids, ids.gather(1, anchor))
    safe = torch.where(broken.unsqueeze(1), 0, safe).clamp(min=0)
    active = listed.any(1) | broken
    if row_weights is not None:
        active = active & (row_weights != 0)
    return Support(safe, listed, anchor, active, broken)


def block_rows(vocab: int, itemsize: int) -> int:
    return max(1, BLOCK_BYTES // (vocab * itemsize))


def row_pass(
    logits: Tensor,  # [R, V], gain * u; becomes dL/dz * (1 - tanh^2) when `weights` is given
    support: Support,
    target: Tensor,  # [R, M] what the rule compares with
    weights: Tensor | None,  # [R] factor of the gradient; None leaves garbage in logits
    rule: RowRule,
    head: Head,
    want_entropy: bool,
    stats: Tensor,  # [R, 4 + extras] output, see STATS; zeros in inactive rows
) -> None:
    """Everything that happens between the first GEMM and the other two."""
    size = block_rows(logits.shape[1], logits.element_size())
    for start in range(0, logits.shape[0], size):
        part = slice(start, start + size)
        _row_block(
            logits[part],
            support.rows(part),
            target[part],
            None if weights is None else weights[part],
            rule,
            head,
            want_entropy,
            stats[part],
        )


def _row_block(
    x: Tensor,
    support: Support,
    target: Tensor,
    weights: Tensor | None,
    rule: RowRule,
    head: Head,
    want_entropy: bool,
    stats: Tensor,
) -> None:
    slope = head.finish(x, want_slope=weights is not None)
    seen = reduce_rows(x, support.ids, support.listed)
    loss, g, extras = rule.apply(seen.buckets, target)
    loss = loss.masked_fill(support.broken, math.nan)
    entropy = seen.entropy() if want_entropy else torch.zeros_like(loss)
    lse = (seen.top + seen.lse)[:, 0]
    rows = torch.stack([loss, lse, seen.buckets[:, -1], entropy, *extras], 1)
    stats.copy_(torch.where(support.active.unsqueeze(1), rows, 0.0))
    if weights is None:
        return

    grad = centred(g, seen.buckets.exp()) * weights.unsqueeze(1)
    grad = grad.masked_fill(support.broken.unsqueeze(1), math.nan)
    grad = torch.where(support.active.unsqueeze(1), grad, 0.0)
    seen.off.mul_(torch.where(seen.total == 0.0, 0.0, grad[:, -1:] / seen.total))
    overwrite(seen.off, grad[:, :-1], support, slope)


class Reduced(NamedTuple):
    """A block of logits [R, V] reduced to buckets. `own` and `lse` are less `top`.

    An offset that all logits of a row share would cost the log-probs digits; it stays in `top`.
    """

    off: Tensor  # [R, V] exp(z - top - own), 0 on the support; lies where the logits lay
    total: Tensor  # [R, 1] sum of `off`
    own: Tensor  # [R, 1] largest logit off the support
    lse: Tensor  # [R, 1]
    top: Tensor  # [R, 1] largest logit of the row
    buckets: Tensor  # [R, K+1] log-probs, -inf on pads

    def entropy(self) -> Tensor:
        """-sum_j p_j log p_j [R]"""
        shift, on = (self.own - self.lse)[:, 0], self.buckets[:, :-1]
        spread = shift.exp() * torch.special.entr(self.off).sum(1)
        listed = (on.exp() * on).masked_fill(on == -math.inf, 0.0).sum(1)
        return spread - self.buckets[:, -1].exp() * shift - listed


def reduce_rows(z: Tensor, ids: Tensor, listed: Tensor) -> Reduced:
    """Buckets of z [R, V] at ids [R, K] and off them; z is overwritten."""
    z_on = z.gather(1, ids).masked_fill(~listed, -math.inf)
    z.scatter_(1, ids, -math.inf)
    own = z.amax(1, keepdim=True)
    top = torch.maximum(own, z_on.amax(1, keepdim=True))
    top = top.masked_fill(top == -math.inf, 0.0)
    own = torch.where(own == -math.inf, top, own)
    off = z.sub_(own).exp_()
    total = off.sum(1, keepdim=True)
    own, z_on = own - top, z_on - top
    lse_off = own + total.log()
    lse = torch.logaddexp(lse_off, z_on.logsumexp(1, keepdim=True))
    return Reduced(off, total, own, lse, top, torch.cat([z_on, lse_off], 1) - lse)


def overwrite(off: Tensor, on: Tensor, support: Support, slope: Tensor | None) -> None:
    """Put the gradient `on` [R, K] of the support into that of the other ids, `off` [R, V]."""
    if slope is not None:
        off.mul_(slope)
        on = on * slope.gather(1, support.ids)
    on = torch.where(support.listed, on, on.gather(1, support.anchor))
    off.scatter_(1, support.ids, on)


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


def support_pass(
    logits: Tensor,  # [R, K], z at support.ids
    support: Support,
    target: Tensor,  # [R, K+1]
    weights: Tensor | None,  # [R] factor of the gradient
    rule: RowRule,
    stats: Tensor,  # [R, 4] output: the loss, the rest is left at zero
) -> Tensor | None:
    """The row pass of a loss renormalised over the support; returns dL/dz [R, K], 0 on pads."""
    logprobs = logits.masked_fill(~support.listed, -math.inf).log_softmax(1)
    nothing = torch.full_like(logprobs[:, :1], -math.inf)
    buckets = torch.cat([logprobs, nothing], 1)
    loss, g, _ = rule.apply(buckets, torch.cat([target[:, :-1], nothing], 1))
    loss = loss.masked_fill(support.broken, math.nan)
    stats[:, 0] = torch.where(support.active, loss, 0.0)
    if weights is None:
        return None
    grad = centred(g, buckets.exp())[:, :-1] * weights.unsqueeze(1)
    grad = grad.masked_fill(support.broken.unsqueeze(1), math.nan)
    return torch.where(support.active.unsqueeze(1) & support.listed, grad, 0.0)
