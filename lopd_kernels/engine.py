"""The row-chunk schedule: logits of a few rows at a time, gradient in the forward.

    per chunk of rows    z = H_c W^T      GEMM 1, compute dtype
                         dz               the row pass, in place in z
                         dH_c = dz W      GEMM 2
                         dW += dz^T H_c   GEMM 3, accumulated in the compute dtype

dz carries w_n / max|w| only; max|w|, the constant slope of the head and the upstream
gradient multiply once, in the last pass over the finished gradients (`Grads.scale`).
Whole chunks are visited in order and nothing is summed out of order: equal inputs give
equal bits. A gradient that nobody asked for costs no GEMM.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lopd_kernels.divergence import row_rule
from lopd_kernels.matmul import (
    Panels,
    compute_dtype,
    hidden_grad,
    panel_rows,
    project,
    weight_grad,
)
from lopd_kernels.rowpass import STATS, Head, block_rows, locate, row_pass

CHUNK_BYTES = 256 << 20
BOOKKEEPING = 12  # words per row and bucket for sorted ids, targets and statistics; measured


class Linear(NamedTuple):
    """The LM head: u = hidden weight^T + bias, then `head`."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    head: Head

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.hidden.dtype)


class Needs(NamedTuple):
    hidden: bool = False
    weight: bool = False
    bias: bool = False


@dataclass
class Grads:
    """Gradients in the compute dtype, short of a factor `scale`; empty where not needed."""

    hidden: Tensor  # [N, D] or [0]
    weight: Tensor  # [V, D] or [0]
    bias: Tensor  # [V] or [0]
    scale: Tensor  # []

    @classmethod
    def zeros(cls, linear: Linear, needs: Needs) -> Grads:
        (n, d), (v, _) = linear.hidden.shape, linear.weight.shape
        like = linear.hidden
        return cls(
            hidden=like.new_zeros((n, d) if needs.hidden else 0, dtype=linear.dtype),
            weight=like.new_zeros((v, d) if needs.weight else 0, dtype=linear.dtype),
            bias=like.new_zeros(v if needs.bias else 0, dtype=linear.dtype),
            scale=like.new_ones((), dtype=linear.dtype),
        )


class Result(NamedTuple):
    loss: Tensor  # [] sum_n w_n L_n
    stats: Tensor  # [N, 4 + extras]
    grads: Grads


def workspace(linear: Linear, needs: Needs, width: int, rows: int) -> int:
    """Bytes that a call with chunks of `rows` rows holds beyond inputs and outputs.

    Counted: the accumulators, the logits chunk, the chunk's hidden states, the row pass's
    blocks and small per-bucket tensors, the panel of a weight that has to be widened.
    """
    (n, d), (v, _) = linear.hidden.shape, linear.weight.shape
    size = torch.empty((), dtype=linear.dtype).element_size()
    held = n * d * needs.hidden + v * d * needs.weight + v * needs.bias
    blocks = min(rows, block_rows(v, size)) * (2 * v + 24 * width)
    per_row = v + 2 * d + 4 * width
    fixed = held + blocks + panel_rows(linear.weight) * d + 2 * v + BOOKKEEPING * n * (width + 2)
    return size * (fixed + rows * per_row)


def chunk_rows(linear: Linear, needs: Needs, width: int, workspace_bytes: int | None) -> int:
    """Rows of a chunk: as many as the bound admits, or about CHUNK_BYTES of logits."""
    n, v = max(1, linear.hidden.shape[0]), linear.weight.shape[0]
    if workspace_bytes is None:
        size = torch.empty((), dtype=linear.dtype).element_size()
        return min(n, max(1, CHUNK_BYTES // (v * size)))
    smallest = workspace(linear, needs, width, 1)
    if workspace_bytes < smallest:
        raise ValueError(
            f"workspace_bytes is {workspace_bytes}, but hidden {list(linear.hidden.shape)} and "
            f"weight {list(linear.weight.shape)} need at least {smallest} with chunks of one row; "
            f"pass workspace_bytes={smallest} or more"
        )
    low, high = 1, n
    while low < high:
        middle = (low + high + 1) // 2
        fits = workspace(linear, needs, width, middle) <= workspace_bytes
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def spoilt_rows(linear: Linear) -> Tensor:
    """[N] rows that something not finite enters, which may leave their logits finite.

    A softcap maps +-inf to +-cap, and a weight of inf may give a logit of -inf, which reads
    as an id without mass. A bias of -inf does mean that, where there is no softcap.
    """
    finite = torch.linalg.vector_norm(linear.hidden, math.inf, 1).isfinite()
    low, high = linear.weight.aminmax()
    finite = finite & low.isfinite() & high.isfinite()
    if linear.bias is not None and linear.head.softcap is not None:
        finite = finite & linear.bias.isfinite().all()
    return ~finite


def sweep(
    linear: Linear,
    rows: int,
    active: Tensor | None,  # [N] bool; hidden states of the other rows are read as zeros
    visit: Callable[[Tensor, slice], None],  # logits chunk [R, V] -> gradient, in place
    grads: Grads | None,
) -> None:
    """Run `visit` over the logits, `rows` rows at a time, and GEMMs 2 and 3 after each."""
    n = linear.hidden.shape[0]
    panels = Panels(linear.weight)
    spoilt = spoilt_rows(linear).unsqueeze(1)
    bias = None if linear.bias is None else linear.bias.to(linear.dtype)
    buffer = linear.hidden.new_empty((min(rows, n), linear.weight.shape[0]), dtype=linear.dtype)
    for start in range(0, n, rows):
        part = slice(start, min(start + rows, n))
        hidden = linear.hidden[part].to(linear.dtype).masked_fill(spoilt[part], math.nan)
        idle = None if active is None else ~active[part].unsqueeze(1)
        if idle is not None:
            hidden.masked_fill_(idle, 0.0)
        logits = buffer[: part.stop - start]
        project(hidden, panels, bias, linear.head.gain, out=logits)
        visit(logits, part)
        if grads is None:
            continue
        if grads.hidden.numel():
            hidden_grad(logits, panels, out=grads.hidden[part])
            if idle is not None:
                grads.hidden[part].masked_fill_(idle, 0.0)
        if grads.weight.numel():
            weight_grad(logits, hidden, grads.weight)
        if grads.bias.numel():
            grads.bias.add_(logits.sum(0))


def start_grads(
    linear: Linear, needs: Needs, row_weights: Tensor | None, accumulator: Tensor | None
) -> tuple[Grads, Tensor]:
    """Gradients to add to, and the weight [N] of each row in them.

    The weights are w over the largest finite |w| and `scale` makes up for it; with an
    `accumulator`, which starts the sum of dW, they are complete and `scale` is one.
    """
    own = needs._replace(weight=needs.weight and accumulator is None)
    grads = Grads.zeros(linear, own)
    n = linear.hidden.shape[0]
    weights, largest = grads.scale.new_ones(n), grads.scale
    if row_weights is not None and n > 0:
        largest = torch.where(row_weights.isfinite(), row_weights, 0.0).abs().amax()
        largest = torch.where(largest == 0.0, 1.0, largest).to(linear.dtype)
        weights = row_weights.to(linear.dtype) / largest
    scale = largest * linear.head.slope
    if accumulator is None:
        grads.scale = scale
    else:
        grads.weight, weights = accumulator, weights * scale
    return grads, weights


def weighted_sum(losses: Tensor, row_weights: Tensor | None) -> Tensor:
    """sum_n w_n L_n; a row without weight adds nothing, whatever its loss."""
    return weigh(losses, row_weights).sum()


def weigh(losses: Tensor, row_weights: Tensor | None) -> Tensor:
    if row_weights is None:
        return losses.clone()
    return torch.where(row_weights == 0, 0.0, losses * row_weights.to(losses.dtype))


def fused_loss(
    linear: Linear,
    ids: Tensor,  # [N, K]
    target: Tensor,  # [N, M]
    row_weights: Tensor | None,  # [N]
    rule_name: str,
    options: list[float],
    needs: Needs,
    want_entropy: bool,
    workspace_bytes: int | None,
    accumulator: Tensor | None = None,  # [V, D] starts the sum of dW; then scale is folded in
) -> Result:
    """Value, row statistics and the gradients that `needs` names, in one sweep."""
    n, vocab = linear.hidden.shape[0], linear.weight.shape[0]
    rule = row_rule(rule_name, options)
    grads, weights = start_grads(linear, needs, row_weights, accumulator)
    support = locate(ids, row_weights, vocab)
    target = target.to(linear.dtype)
    stats = linear.hidden.new_zeros((n, len(STATS) + len(rule.extras)), dtype=linear.dtype)
    wanted = grads if any(needs) else None

    def visit(logits: Tensor, part: slice) -> None:
        row_pass(
            logits,
            support.rows(part),
            target[part],
            weights[part] if wanted is not None else None,
            rule,
            linear.head,
            want_entropy,
            stats[part],
        )

    counted = needs._replace(weight=needs.weight and accumulator is None)
    rows = chunk_rows(linear, counted, ids.shape[1], workspace_bytes)
    sweep(linear, rows, support.active, visit, wanted)
    return Result(weighted_sum(stats[:, 0], row_weights), stats, grads)
