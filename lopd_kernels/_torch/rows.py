"""`backend.RowFunctions` in torch. Rows are processed in blocks that fit in a CPU's cache.

Threads take the blocks as they become free (`_core.crew`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lopd_kernels._core import crew
from lopd_kernels._core.buckets import center, student_buckets
from lopd_kernels._core.listed_ids import SafeListedIds
from lopd_kernels._core.listed_ids import locate as locate
from lopd_kernels._core.rules import Rule
from lopd_kernels._core.types import LogitGrads, LogitOptions, RowState, SplitGrads
from lopd_kernels._core.workspace import BLOCK_BYTES


def nonfinite_rows(hidden: Tensor, weight: Tensor, logit_options: LogitOptions) -> Tensor | None:
    """A softcap maps +-inf to +-cap, and an infinite weight may give a logit of -inf, which
    marks an id without mass. Without a softcap, a bias of -inf marks one deliberately.
    """
    finite = torch.linalg.vector_norm(hidden, math.inf, 1).isfinite()
    low, high = weight.aminmax()
    finite = finite & low.isfinite() & high.isfinite()
    if logit_options.bias is not None and logit_options.softcap is not None:
        finite = finite & logit_options.bias.isfinite().all()
    return ~finite


def gpu(like: Tensor, width: int, buckets: int, rule: Rule, logit_options: LogitOptions) -> None:
    """Operators of torch have no programs to count."""


def _blocks(u: Tensor) -> list[slice]:
    size = max(1, BLOCK_BYTES // (u.shape[1] * u.element_size()))
    return [slice(start, start + size) for start in range(0, u.shape[0], size)]


def _apply_logit_options(
    u: Tensor, logit_options: LogitOptions, first: int, want_slope: bool
) -> Tensor | None:
    """Turn u into z in place. Returns 1 - tanh^2 under a softcap."""
    if logit_options.bias is not None:
        u.add_(logit_options.bias[first : first + u.shape[1]])
    if logit_options.gain != 1.0:
        u.mul_(logit_options.gain)
    if logit_options.softcap is None:
        return None
    u.tanh_()
    slope = torch.addcmul(u.new_ones(()), u, u, value=-1.0) if want_slope else None
    u.mul_(logit_options.cap)
    return slope


def row_pass(
    u: Tensor,
    listed_ids: SafeListedIds,
    target: Tensor,
    weights: Tensor | None,
    rule: Rule,
    logit_options: LogitOptions,
    want_entropy: bool,
    stats: Tensor,
    out: Tensor | None,
    inf_masks: bool = False,
    split: SplitGrads | None = None,
) -> None:
    def visit(part: slice) -> None:
        block, here = u[part], listed_ids.rows(part)
        if inf_masks:
            block.masked_fill_(~here.active.unsqueeze(1), 0.0)
        factor = None if weights is None else weights[part]
        _row_block(
            block, here, target[part], factor, rule, logit_options, want_entropy, stats[part],
            None if split is None else split.rows(part),
        )  # fmt: skip
        if out is not None and out.data_ptr() != u.data_ptr():
            out[part].copy_(block)

    crew.hand_out(visit, _blocks(u))


def _row_block(
    x: Tensor,  # u, then z, then the exponentials, then the gradient
    listed_ids: SafeListedIds,
    target: Tensor,
    weights: Tensor | None,
    rule: Rule,
    logit_options: LogitOptions,
    want_entropy: bool,
    stats: Tensor,
    split: SplitGrads | None,
) -> None:
    """The exponentials of the reduction are reused as the unscaled softmax of the gradient."""
    writes = weights is not None and split is None
    slope = _apply_logit_options(x, logit_options, 0, want_slope=writes)
    listed = x.gather(1, listed_ids.ids).masked_fill(~listed_ids.listed, -math.inf)
    x.scatter_(1, listed_ids.ids, -math.inf)
    top, total, spread = _exponentials(x, want_entropy)
    unlisted = torch.stack([top, total, spread, listed_ids.invalid.to(x.dtype)], 1)
    student = student_buckets(RowState(unlisted, listed))
    loss, g, extras = rule.apply(student.logprobs, target)
    entropy = student.entropy if want_entropy else torch.zeros_like(loss)
    lse = (student.max_logit + student.lse)[:, 0]
    rows = torch.stack([loss, lse, student.logprobs[:, -1], entropy, *extras], 1)
    stats.copy_(torch.where(listed_ids.active.unsqueeze(1), rows, 0.0))
    if weights is None:
        return
    grad = center(g, student.logprobs.exp()) * weights.unsqueeze(1)
    grad = torch.where(listed_ids.active.unsqueeze(1), grad, 0.0)
    factor = torch.where(total == 0.0, 0.0, grad[:, -1] / total)
    listed_grad = grad[:, :-1]
    if split is not None:
        norms = listed_grad.abs().sum(1), factor.abs() * total
        split.unlisted.copy_(torch.stack([top, factor, *norms], 1))
        if logit_options.softcap is not None:
            slopes = 1.0 - (listed / logit_options.cap).square()
            listed_grad = torch.where(listed_ids.listed, listed_grad * slopes, 0.0)
        split.listed.copy_(listed_grad)
        return
    x.mul_(factor.unsqueeze(1))
    if slope is not None:
        x.mul_(slope)
        listed_grad = listed_grad * slope.gather(1, listed_ids.ids)
    at_anchor = listed_grad.gather(1, listed_ids.anchor)
    x.scatter_(1, listed_ids.ids, torch.where(listed_ids.listed, listed_grad, at_anchor))


def write_unlisted(
    u: Tensor,  # exp(z - unlisted_max)
    rows: Tensor,
    unlisted_max: Tensor,
    factor: Tensor,
    logit_options: LogitOptions,
    out: Tensor,
) -> None:
    def visit(part: slice) -> None:
        e = u[rows[part]]
        torch.mul(e, factor[part].unsqueeze(1), out=out[part])
        if logit_options.softcap is not None:  # tanh from z = log e + unlisted_max
            t = e.log_().add_(unlisted_max[part].unsqueeze(1)).div_(logit_options.cap)
            out[part].mul_(t.clamp_(-1.0, 1.0).square_().neg_().add_(1.0))

    crew.hand_out(visit, _blocks(out))


def _exponentials(z: Tensor, want_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(max, sum of e, sum of e log e) of z [R, V]; z is overwritten by e = exp(z - max)."""
    top = z.amax(1, keepdim=True)
    top = top.masked_fill(top == -math.inf, torch.finfo(z.dtype).min)
    e = z.sub_(top).exp_()
    spread = -torch.special.entr(e).sum(1) if want_entropy else torch.zeros_like(top[:, 0])
    return top[:, 0], e.sum(1), spread


def reduce(
    u: Tensor,
    first: int,
    listed_ids: SafeListedIds,
    logit_options: LogitOptions,
    want_entropy: bool,
    state: RowState,
) -> None:
    def visit(part: slice) -> None:
        block, here, seen = u[part], listed_ids.rows(part), state.rows(part)
        _apply_logit_options(block, logit_options, first, want_slope=False)
        if seen.listed.shape[1]:
            columns, inside, anchor = here.in_panel(first, block.shape[1])
            z = block.gather(1, columns)
            seen.listed.copy_(torch.where(inside, z, seen.listed))
            block.scatter_(1, columns, torch.where(inside.gather(1, anchor), -math.inf, z))
        merged = _merge(seen.unlisted.unbind(1)[:3], _exponentials(block, want_entropy))
        seen.unlisted.copy_(torch.stack([*merged, here.invalid.to(u.dtype)], 1))

    crew.hand_out(visit, _blocks(u))


def _merge(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Two (max, sum of e, sum of e (z - max)) as one."""
    top = torch.maximum(left[0], right[0])
    total, spread = torch.zeros_like(top), torch.zeros_like(top)
    for part_max, part_total, part_spread in (left, right):
        shift = part_max - top
        scale = shift.exp()
        total = total + scale * part_total
        moved = scale * (part_spread + part_total * shift)
        spread = spread + torch.where(part_total == 0.0, 0.0, moved)
    return top, total, spread


def write(
    u: Tensor,
    first: int,
    listed_ids: SafeListedIds,
    logit_options: LogitOptions,
    grads: LogitGrads,
    listed: Tensor,
    out: Tensor,
) -> None:
    def visit(part: slice) -> None:
        z, here, inactive = u[part], listed_ids.rows(part), ~listed_ids.active[part].unsqueeze(1)
        unlisted_max, factor, entropy_factor, listed_grad = grads.rows(part)
        slope = _apply_logit_options(z, logit_options, first, want_slope=True)
        z.sub_(unlisted_max.unsqueeze(1))
        grad = z.exp()
        if entropy_factor is None:
            grad.mul_(factor.unsqueeze(1))
        else:
            no_mass = z == -math.inf
            grad.mul_(z.mul_(-entropy_factor.unsqueeze(1)).add_(factor.unsqueeze(1)))
            grad.masked_fill_(no_mass, 0.0)
        if listed_grad.shape[1]:
            columns, inside, anchor = here.in_panel(first, z.shape[1])
            inside_any = inside.gather(1, anchor)
            values = torch.where(inside, listed_grad, listed_grad.gather(1, anchor))
            values = torch.where(inside_any, values, grad.gather(1, columns))
            grad.scatter_(1, columns, values)
        if slope is not None:
            grad.mul_(slope)
        out[part].copy_(grad.masked_fill_(inactive, 0.0))

    crew.hand_out(visit, _blocks(u))
