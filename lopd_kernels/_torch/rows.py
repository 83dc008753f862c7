"""The row functions in torch. Rows go through in blocks that stay in the processor's cache."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lopd_kernels._core.buckets import centred, settle
from lopd_kernels._core.rules import RowRule
from lopd_kernels._core.support import Support
from lopd_kernels._core.support import locate as locate
from lopd_kernels._core.types import Coefficients, Head, Reduction
from lopd_kernels._core.workspace import BLOCK_BYTES


def spoilt(hidden: Tensor, weight: Tensor, head: Head) -> Tensor | None:
    """A softcap maps +-inf to +-cap, and a weight of inf may give a logit of -inf, which reads
    as an id without mass. A bias of -inf does mean that, where there is no softcap.
    """
    finite = torch.linalg.vector_norm(hidden, math.inf, 1).isfinite()
    low, high = weight.aminmax()
    finite = finite & low.isfinite() & high.isfinite()
    if head.bias is not None and head.softcap is not None:
        finite = finite & head.bias.isfinite().all()
    return ~finite


def block_rows(columns: int, itemsize: int) -> int:
    return max(1, BLOCK_BYTES // (columns * itemsize))


def _blocks(u: Tensor) -> Iterator[slice]:
    size = block_rows(u.shape[1], u.element_size())
    for start in range(0, u.shape[0], size):
        yield slice(start, start + size)


def _finish(u: Tensor, head: Head, first: int, want_slope: bool) -> Tensor | None:
    """Turn u into z in place; returns 1 - tanh^2 under a softcap."""
    if head.bias is not None:
        u.add_(head.bias[first : first + u.shape[1]])
    if head.gain != 1.0:
        u.mul_(head.gain)
    if head.softcap is None:
        return None
    u.tanh_()
    slope = torch.addcmul(u.new_ones(()), u, u, value=-1.0) if want_slope else None
    u.mul_(head.cap)
    return slope


def row_pass(
    u: Tensor,
    support: Support,
    target: Tensor,
    weights: Tensor | None,
    rule: RowRule,
    head: Head,
    want_entropy: bool,
    stats: Tensor,
    out: Tensor | None,
    inf_masks: bool = False,
) -> None:
    for part in _blocks(u):
        here = support.rows(part)
        if inf_masks:
            u[part].masked_fill_(~here.active.unsqueeze(1), 0.0)
        _row_block(
            u[part],
            here,
            target[part],
            None if weights is None else weights[part],
            rule,
            head,
            want_entropy,
            stats[part],
        )
        if out is not None and out.data_ptr() != u.data_ptr():
            out[part].copy_(u[part])


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
    """Leaves the gradient in x. The exponentials of the reduction are the softmax, unscaled."""
    slope = _finish(x, head, 0, want_slope=weights is not None)
    on = x.gather(1, support.ids).masked_fill(~support.listed, -math.inf)
    x.scatter_(1, support.ids, -math.inf)
    own, total, spread = _exponentials(x, want_entropy)
    state = torch.stack([own, total, spread, support.broken.to(x.dtype)], 1)
    seen = settle(Reduction(state, on))
    loss, g, extras = rule.apply(seen.buckets, target)
    entropy = seen.entropy if want_entropy else torch.zeros_like(loss)
    lse = (seen.top + seen.lse)[:, 0]
    rows = torch.stack([loss, lse, seen.buckets[:, -1], entropy, *extras], 1)
    stats.copy_(torch.where(support.active.unsqueeze(1), rows, 0.0))
    if weights is None:
        return
    grad = centred(g, seen.buckets.exp()) * weights.unsqueeze(1)
    grad = torch.where(support.active.unsqueeze(1), grad, 0.0)
    factor = torch.where(total == 0.0, 0.0, grad[:, -1] / total)
    x.mul_(factor.unsqueeze(1))
    if slope is not None:
        x.mul_(slope)
    _overwrite(x, grad[:, :-1], support, slope)


def _exponentials(z: Tensor, want_spread: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(max, sum of e, sum of e log e) of z [R, V], with e = exp(z - max) left in its place."""
    own = z.amax(1, keepdim=True)
    own = own.masked_fill(own == -math.inf, torch.finfo(z.dtype).min)
    e = z.sub_(own).exp_()
    spread = -torch.special.entr(e).sum(1) if want_spread else torch.zeros_like(own[:, 0])
    return own[:, 0], e.sum(1), spread


def _overwrite(off: Tensor, on: Tensor, support: Support, slope: Tensor | None) -> None:
    """Put the gradient `on` [R, K] of the support into that of the other ids, `off` [R, V]."""
    if slope is not None:
        on = on * slope.gather(1, support.ids)
    on = torch.where(support.listed, on, on.gather(1, support.anchor))
    off.scatter_(1, support.ids, on)


def reduce(
    u: Tensor, first: int, support: Support, head: Head, want_spread: bool, reduction: Reduction
) -> None:
    for part in _blocks(u):
        block, here, seen = u[part], support.rows(part), reduction.rows(part)
        _finish(block, head, first, want_slope=False)
        if seen.on.shape[1]:
            columns, inside, anchor = here.in_panel(first, block.shape[1])
            found = block.gather(1, columns)
            seen.on.copy_(torch.where(inside, found, seen.on))
            block.scatter_(1, columns, torch.where(inside.gather(1, anchor), -math.inf, found))
        merged = _merge(seen.state.unbind(1)[:3], _exponentials(block, want_spread))
        seen.state.copy_(torch.stack([*merged, here.broken.to(u.dtype)], 1))


def _merge(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Two (max, sum of e, sum of e (z - max)) as one."""
    top = torch.maximum(left[0], right[0])
    total, spread = torch.zeros_like(top), torch.zeros_like(top)
    for own, part, own_spread in (left, right):
        scale, down = (own - top).exp(), own - top
        total = total + scale * part
        spread = spread + torch.where(part == 0.0, 0.0, scale * (own_spread + part * down))
    return top, total, spread


def write(
    u: Tensor,
    first: int,
    support: Support,
    head: Head,
    coefficients: Coefficients,
    on: Tensor,
    out: Tensor,
) -> None:
    for part in _blocks(u):
        z, here, inactive = u[part], support.rows(part), ~support.active[part].unsqueeze(1)
        own, factor, pull, on_grad = coefficients.rows(part)
        slope = _finish(z, head, first, want_slope=True)
        z.sub_(own.unsqueeze(1))
        grad = z.exp()
        if pull is None:
            grad.mul_(factor.unsqueeze(1))
        else:
            empty = z == -math.inf
            grad.mul_(z.mul_(-pull.unsqueeze(1)).add_(factor.unsqueeze(1)))
            grad.masked_fill_(empty, 0.0)
        if on_grad.shape[1]:
            columns, inside, anchor = here.in_panel(first, z.shape[1])
            kept = torch.where(inside, on_grad, on_grad.gather(1, anchor))
            kept = torch.where(inside.gather(1, anchor), kept, grad.gather(1, columns))
            grad.scatter_(1, columns, kept)
        if slope is not None:
            grad.mul_(slope)
        out[part].copy_(grad.masked_fill_(inactive, 0.0))
