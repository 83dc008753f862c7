"""The two schedules: what happens between a head's inputs and its gradients.

Row chunks, gradient in the forward (`fused_loss`):

    per chunk of rows    u = H_c W^T      GEMM 1, fp32
                         dz               the row pass, in place of u
                         dH_c = dz W      GEMM 2
                         dW += dz^T H_c   GEMM 3, accumulated in fp32

dz carries w_n / max|w| only; max|w|, the constant slope of the head and the upstream
gradient multiply once, in the last pass over the finished gradients (`Grads.scale`).

The same with dz of all rows kept in 16 bits, GEMMs 2 and 3 over all rows in the backward
(`kept_loss`, `kept_grads`): no accumulator, and every gradient is rounded once.

Panels of the vocabulary, gradient in the backward (`reduce_rows`, `row_grads`):

    forward, per panel   u = H W_p^T      GEMM 1, fp32
                         state            running log-sum-exp of each row, support taken out
    backward, per panel  u = H W_p^T      GEMM 2
                         dz               the gradient, in place of u
                         dW_p = dz^T H    GEMM 3, the panel's rows of dW, once
                         dH += dz W_p     GEMM 4, accumulated in fp32

Chunks and panels are visited in order and nothing is summed out of order: equal inputs
give equal bits. A gradient that nobody asked for costs no GEMM.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lopd_kernels.divergence import RowRule
from lopd_kernels.matmul import (
    Panels,
    compute_dtype,
    hidden_grad,
    is_mixed,
    new_weight_grad,
    operand_dtype,
    project,
    weight_grad,
)
from lopd_kernels.rowpass import (
    STATS,
    Coefficients,
    Head,
    Reduction,
    RowFunctions,
    Settled,
    Support,
    coefficients,
    row_functions,
    settle,
)
from lopd_kernels.schedule import (
    Needs,
    Sizes,
    chunk_rows,
    kept_columns,
    padded,
    panel_columns,
)

FP16_ROOM = 2.0**15  # half of fp16's range, for the largest entry of dz


class Linear(NamedTuple):
    """The LM head: u = hidden weight^T, then `head`."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    head: Head

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.hidden.dtype)

    @property
    def functions(self) -> RowFunctions:
        return row_functions(self.hidden)

    def sizes(self, width: int) -> Sizes:
        return Sizes.of(self.hidden, self.weight, width)

    def operand(self, active: Tensor | None) -> Tensor:
        """hidden [N, D] as the GEMMs take it: zeros in inactive rows, NaN in spoilt ones."""
        spoilt = self.functions.spoilt(self.hidden, self.weight, self.head)
        if spoilt is None and active is None:
            return self.hidden.to(operand_dtype(self.hidden))
        hidden = self.hidden.to(operand_dtype(self.hidden), copy=True)
        if spoilt is not None:
            hidden.masked_fill_(spoilt.unsqueeze(1), math.nan)
        if active is not None:
            hidden.masked_fill_(~active.unsqueeze(1), 0.0)
        return hidden


def make_linear(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
) -> Linear:
    bias = None if bias is None else bias.to(compute_dtype(hidden.dtype)).contiguous()
    return Linear(hidden, weight, Head(logit_scale, softcap, temperature, bias))


@dataclass
class Grads:
    """Gradients in the compute dtype, short of a factor `scale`; empty where not needed."""

    hidden: Tensor  # [N, D] or [0]
    weight: Tensor  # [V, D] or [0]
    bias: Tensor  # [V] or [0]
    scale: Tensor  # []


class Result(NamedTuple):
    loss: Tensor  # [] sum_n w_n L_n
    stats: Tensor  # [N, 4 + extras]
    grads: Grads


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


def in_place(u: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for the gradient of u [R, V] in `dtype`, in the first part of each row of u."""
    return u if dtype == u.dtype else u.view(dtype)[:, : u.shape[1]]


def row_chunks(
    linear: Linear,
    rows: int,
    hidden: Tensor,  # [N, D] operand
    panels: Panels,
    visit: Callable[[Tensor, slice], None],
) -> None:
    """Call `visit` with the logits u [R, V] of `rows` rows at a time."""
    n, vocab = linear.hidden.shape[0], linear.weight.shape[0]
    buffer = hidden.new_empty((min(rows, n), padded(vocab)), dtype=linear.dtype)
    for start in range(0, n, rows):
        part = slice(start, min(start + rows, n))
        u = buffer[: part.stop - start, :vocab]
        project(hidden[part], panels, 0, u)
        visit(u, part)


def loss_by_chunks(
    linear: Linear,
    ids: Tensor,  # [N, K]
    target: Tensor,  # [N, M]
    row_weights: Tensor | None,  # [N]
    rule: RowRule,
    wants_grad: bool,
    want_entropy: bool,
    rows: int,
    room: Callable[[Tensor, slice], Tensor],  # (u, rows) -> where their dz goes
    use: Callable[[Tensor, Tensor, slice, Panels], None],  # (dz, hidden, rows, panels)
) -> tuple[Tensor, Tensor, Tensor, Support]:
    """(sum_n w_n L_n, stats, scale of dz, support), with dz handed to `use` chunk by chunk."""
    n, vocab = linear.hidden.shape[0], linear.weight.shape[0]
    functions, target = linear.functions, target.to(linear.dtype)
    weights, scale = normalised(linear, row_weights, largest_dz(target))
    support = functions.locate(ids, row_weights, vocab)
    stats = linear.hidden.new_zeros((n, len(STATS) + len(rule.extras)), dtype=linear.dtype)
    hidden, panels = linear.operand(support.active), Panels(linear.weight)

    def visit(u: Tensor, part: slice) -> None:
        dz = room(u, part)
        functions.row_pass(
            u, support.rows(part), target[part], weights[part] if wants_grad else None, rule,
            linear.head, want_entropy, stats[part], dz,
        )  # fmt: skip
        use(dz, hidden[part], part, panels)

    row_chunks(linear, rows, hidden, panels, visit)
    return weighted_sum(stats[:, 0], row_weights), stats, scale, support


def fused_loss(
    linear: Linear,
    ids: Tensor,
    target: Tensor,
    row_weights: Tensor | None,
    rule: RowRule,
    needs: Needs,
    want_entropy: bool,
    workspace_bytes: int | None,
) -> Result:
    """Value, row statistics and the gradients that `needs` names, in one sweep of row chunks."""
    like, vocab = linear.hidden, linear.weight.shape[0]
    dz_dtype = operand_dtype(like)
    shapes = like.shape, linear.weight.shape, (vocab,)
    dhidden, dweight, dbias = (
        like.new_zeros(shape if need else (0,), dtype=linear.dtype)
        for shape, need in zip(shapes, needs, strict=True)
    )

    def use(dz: Tensor, hidden: Tensor, part: slice, panels: Panels) -> None:
        if needs.bias:
            dbias.add_(dz.sum(0, dtype=linear.dtype))
        if needs.hidden:
            hidden_grad(dz, panels, 0, dhidden[part], fresh=True)
        if needs.weight:
            weight_grad(dz, hidden, dweight)

    loss, stats, scale, support = loss_by_chunks(
        linear, ids, target, row_weights, rule, any(needs), want_entropy,
        chunk_rows(linear.sizes(ids.shape[1]), needs, False, workspace_bytes),
        lambda u, part: in_place(u, dz_dtype), use,
    )  # fmt: skip
    if needs.hidden:
        dhidden.masked_fill_(~support.active.unsqueeze(1), 0.0)
    return Result(loss, stats, Grads(dhidden, dweight, dbias, scale))


class Kept(NamedTuple):
    loss: Tensor  # []
    stats: Tensor  # [N, 4 + extras]
    dz: Tensor  # [N, V and padding] as GEMMs take it, short of `scale`
    scale: Tensor  # []


def kept_loss(
    linear: Linear,
    ids: Tensor,
    target: Tensor,
    row_weights: Tensor | None,
    rule: RowRule,
    needs: Needs,
    want_entropy: bool,
    workspace_bytes: int | None,
) -> Kept:
    """The forward that leaves both gradient GEMMs, of all rows at once, to the backward."""
    n, vocab = linear.hidden.shape[0], linear.weight.shape[0]
    dz = linear.hidden.new_empty((n, padded(vocab)), dtype=operand_dtype(linear.hidden))
    dz[:, vocab:] = 0.0
    loss, stats, scale, _ = loss_by_chunks(
        linear, ids, target, row_weights, rule, True, want_entropy,
        chunk_rows(linear.sizes(ids.shape[1]), needs, True, workspace_bytes),
        lambda u, part: dz[part, :vocab], lambda *given: None,
    )  # fmt: skip
    return Kept(loss, stats, dz, scale)


def kept_grads(
    linear: Linear,
    active: Tensor,  # [N]
    dz: Tensor,  # [N, V and padding]
    factor: Tensor,  # []
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden, dweight, dbias), complete; a panel of dW at a time passes through fp32."""
    like, weight = linear.hidden, linear.weight
    dz, hidden = dz[:, : weight.shape[0]], linear.operand(active)
    dhidden, dbias = like.new_empty(0), like.new_empty(0, dtype=linear.dtype)
    if needs.hidden:
        wide = like.new_empty(like.shape, dtype=linear.dtype)
        hidden_grad(dz, Panels(weight), 0, wide, fresh=True)
        dhidden = wide.mul_(factor).masked_fill_(~active.unsqueeze(1), 0.0).to(like.dtype)
        del wide
    dweight = weight.new_empty(weight.shape if needs.weight else (0,))
    columns = kept_columns(weight.shape[1], linear.dtype.itemsize)
    for first in range(0, len(dweight), columns):
        part = slice(first, first + columns)
        new_weight_grad(dz[:, part], hidden, dweight[part], factor)
    if needs.bias:
        dbias = dz.sum(0, dtype=linear.dtype).mul_(factor)
    return dhidden, dweight, dbias


def reduce_rows(
    linear: Linear, support: Support, width: int, want_spread: bool, columns: int
) -> Reduction:
    """All rows reduced to the `width` ids of `support` and the rest, panel by panel."""
    n, vocab = linear.hidden.shape[0], linear.weight.shape[0]
    functions, panels = linear.functions, Panels(linear.weight)
    reduction = Reduction.start(linear.hidden, n, width, linear.dtype)
    hidden = linear.operand(support.active)
    buffer = hidden.new_empty((n, padded(columns)), dtype=linear.dtype)
    for first in range(0, vocab, columns):
        u = buffer[:, : min(columns, vocab - first)]
        project(hidden, panels, first, u)
        functions.reduce(u, first, support, linear.head, want_spread, reduction)
    return reduction


def panel_grads(
    linear: Linear,
    support: Support,
    on: Tensor,  # [N, K] z at the ids
    slopes: Coefficients,
    scale: Tensor | None,  # [] of dz, to be made up for
    needs: Needs,
    columns: int,
    accumulator: Tensor | None = None,  # [V, D] compute dtype; dW is added to it
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden, dweight, dbias), complete and in the inputs' dtypes; empty where not needed."""
    n, vocab = linear.hidden.shape[0], linear.weight.shape[0]
    like, weight = linear.hidden, linear.weight
    functions, panels = linear.functions, Panels(weight)
    hidden = linear.operand(support.active)
    dhidden = like.new_zeros(like.shape if needs.hidden else (0,), dtype=linear.dtype)
    own = needs.weight and accumulator is None
    dweight = weight.new_empty(weight.shape if own else (0,))
    dbias = like.new_empty(vocab if needs.bias else 0, dtype=linear.dtype)
    buffer = hidden.new_empty((n, padded(columns)), dtype=linear.dtype)
    for first in range(0, vocab, columns):
        part = slice(first, min(first + columns, vocab))
        u = buffer[:, : part.stop - first]
        project(hidden, panels, first, u)
        dz = in_place(u, hidden.dtype)
        functions.write(u, first, support, linear.head, slopes, on, dz)
        if needs.bias:
            torch.sum(dz, 0, dtype=linear.dtype, out=dbias[part])
        if own:
            new_weight_grad(dz, hidden, dweight[part], scale)
        elif accumulator is not None:
            weight_grad(dz, hidden, accumulator[part], scale)
        if needs.hidden:
            hidden_grad(dz, panels, first, dhidden, fresh=False)
    if needs.hidden:
        dhidden.masked_fill_(~support.active.unsqueeze(1), 0.0)
    if scale is not None:
        dhidden.mul_(scale)
        dbias.mul_(scale)
    del buffer, u, dz, hidden
    return dhidden.to(like.dtype), dweight, dbias


def complete(
    linear: Linear, row_weights: Tensor | None, largest_dz: Tensor
) -> tuple[Tensor, Tensor | None]:
    """(weights of dz, scale) for `panel_grads`: where dz is rounded it leaves the scale out."""
    weights, scale = normalised(linear, row_weights, largest_dz)
    return (weights, scale) if is_mixed(linear.hidden) else (weights * scale, None)


class RowLosses(NamedTuple):
    stats: Tensor  # [N, 4 + extras]
    reduction: Reduction


def row_losses(
    linear: Linear,
    ids: Tensor,
    target: Tensor,
    row_weights: Tensor | None,
    rule: RowRule,
    needs: Needs,  # of the backward, whose workspace is checked here
    want_entropy: bool,
    workspace_bytes: int | None,
) -> RowLosses:
    sizes, vocab = linear.sizes(ids.shape[1]), linear.weight.shape[0]
    panel_columns(sizes, needs, workspace_bytes)
    columns = panel_columns(sizes, Needs(), workspace_bytes)
    support = linear.functions.locate(ids, row_weights, vocab)
    reduction = reduce_rows(linear, support, ids.shape[1], want_entropy, columns)
    seen = settle(reduction)
    loss, _, extras = rule.apply(seen.buckets, target.to(linear.dtype))
    rows = torch.stack([loss, *statistics(seen, want_entropy), *extras], 1)
    stats = torch.where(support.active.unsqueeze(1), rows, 0.0)
    return RowLosses(stats, reduction)


def statistics(seen: Settled, want_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(lse, log of the mass off the support, entropy), [N] each."""
    entropy = seen.entropy if want_entropy else torch.zeros_like(seen.entropy)
    return (seen.top + seen.lse)[:, 0], seen.buckets[:, -1], entropy


def row_grads(
    linear: Linear,
    ids: Tensor,
    target: Tensor,
    weights: Tensor | None,  # [N] upstream gradient times the row's weight
    reduction: Reduction,
    rule: RowRule,
    needs: Needs,
    workspace_bytes: int | None,
    accumulator: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `row_losses`, see `panel_grads`."""
    support = linear.functions.locate(ids, weights, linear.weight.shape[0])
    buckets = settle(reduction).buckets
    target = target.to(linear.dtype)
    _, g, _ = rule.apply(buckets, target)
    factors, scale = complete(linear, weights, largest_dz(target))
    slopes = coefficients(reduction, g, buckets.exp(), factors)
    counted = needs._replace(weight=needs.weight and accumulator is None)
    columns = panel_columns(linear.sizes(ids.shape[1]), counted, workspace_bytes)
    return panel_grads(linear, support, reduction.on, slopes, scale, needs, columns, accumulator)
