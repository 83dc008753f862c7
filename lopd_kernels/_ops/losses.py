"""The operators of the losses on an LM head.

`fused_loss` computes value and gradients at once and stores the gradients for its backward, which
only scales and casts them, out of place. `stored_loss` stores the dlogits instead, and its
backward runs the two gradient GEMMs over all rows. `row_losses` returns one loss per row and
stores a few numbers per row, for when the upstream gradient of each row is unknown in the
forward or the memory for the gradients is not available. `row_grads_into_` adds dW to a buffer;
`losses_into_buffer` wraps it for autograd.

An operator cannot return None: a gradient that is not needed has shape [0]. Every operator can
be differentiated once.
"""

from typing import Any

import torch
from torch import Tensor

from lopd_kernels._core import chunks, kept_rows, listed, panels
from lopd_kernels._core.gemm import operand_dtype
from lopd_kernels._core.scaling import weigh
from lopd_kernels._core.types import RowState
from lopd_kernels._core.workspace import padded
from lopd_kernels._ops.schema import (
    HeadArgs,
    LossArgs,
    check_differentiated_once,
    grads_fake,
    input_grads,
    operator,
    restore,
    restore_head,
    save,
    upstream_args,
)

Grads = tuple[Tensor, Tensor, Tensor]


def _fused_loss_fake(head: HeadArgs, args: LossArgs, want_entropy: bool) -> Any:
    shapes = head.hidden.shape, head.weight.shape, head.weight.shape[:1]
    return (
        head.empty(),
        head.empty(head.rows, args.stats_width),
        *(head.empty(*(s if need else (0,))) for s, need in zip(shapes, head.needs, strict=True)),
        head.empty(),
    )


@operator("fused_loss", _fused_loss_fake)
def fused_loss(
    head: HeadArgs, args: LossArgs, want_entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(sum_n w_n L_n, stats, dhidden, dweight, dbias, scale); the gradients lack `scale`."""
    loss = args.loss
    schedule = chunks if loss.skip is None else kept_rows
    return schedule.fused_loss(head.linear, loss, head.needs, want_entropy, head.workspace_bytes)


def _fused_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    save(ctx, inputs, output, store_inputs=False)
    needs = HeadArgs(*inputs[: len(HeadArgs._fields)]).needs
    for x, needed in zip(inputs[:3], needs, strict=True):
        assert needed or x is None or not x.requires_grad, "a gradient that need_* leaves out"


def _fused_loss_backward(ctx: Any, upstream: Tensor | None, *_: None) -> Any:
    check_differentiated_once("lopd::fused_loss")
    if upstream is None:
        return input_grads(ctx)
    *grads, scale = restore(ctx)[1]
    factor = (upstream * scale).to(scale.dtype)
    scaled = [
        _scaled(grad, factor, dtype) if need else None
        for grad, dtype, need in zip(grads, ctx.dtypes, ctx.needs_input_grad, strict=False)
    ]
    return input_grads(ctx, *scaled)


def _scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """factor * grad in `dtype`, rounded once and out of place.

    A 0-dimensional factor would first be rounded to the dtype of a 16-bit gradient.
    """
    out = torch.empty_like(grad, dtype=dtype)
    return torch.mul(grad, factor.reshape(1), out=out)


fused_loss.register_autograd(_fused_loss_backward, setup_context=_fused_loss_setup)


def _stored_loss_fake(head: HeadArgs, args: LossArgs, want_entropy: bool) -> Any:
    dlogits = head.rows, padded(head.weight.shape[0])
    return (
        head.empty(),
        head.empty(head.rows, args.stats_width),
        head.hidden.new_empty(dlogits, dtype=operand_dtype(head.hidden)),
        head.empty(),
    )


@operator("stored_loss", _stored_loss_fake)
def stored_loss(
    head: HeadArgs, args: LossArgs, want_entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(sum_n w_n L_n, stats, dlogits [N, V and padding], scale); the dlogits lack `scale`."""
    return chunks.stored_loss(
        head.linear, args.loss, head.needs, want_entropy, head.workspace_bytes
    )


@operator("stored_grads", grads_fake)
def stored_grads(
    head: HeadArgs, ids: Tensor, row_weights: Tensor | None, dlogits: Tensor, factor: Tensor
) -> Grads:
    """(dhidden, dweight, dbias) of `stored_loss`, complete; dbias in the compute dtype."""
    linear = head.linear
    active = linear.functions.locate(ids, row_weights, head.weight.shape[0]).active
    return chunks.stored_grads(linear, active, dlogits, factor, head.needs)


def _stored_loss_backward(ctx: Any, upstream: Tensor | None, *_: None) -> Any:
    check_differentiated_once("lopd::stored_loss")
    if upstream is None:
        return input_grads(ctx)
    head, (ids, _target, row_weights, *_rest), (dlogits, scale) = restore_head(ctx)
    factor = (upstream * scale).to(scale.dtype)
    return input_grads(ctx, *stored_grads(*head, ids, row_weights, dlogits, factor))


stored_loss.register_autograd(_stored_loss_backward, setup_context=save)


def _row_losses_fake(head: HeadArgs, args: LossArgs, want_entropy: bool) -> Any:
    n = head.rows
    return (
        head.empty(n),
        head.empty(n, args.stats_width),
        head.empty(0 if args.loss.rule.ignores_unlisted else n, 4),
        head.empty(*args.ids.shape),
    )


@operator("row_losses", _row_losses_fake)
def row_losses(
    head: HeadArgs, args: LossArgs, want_entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(w_n L_n [N], stats, *RowState)."""
    linear, loss, needs = head.linear, args.loss, head.needs
    if loss.rule.ignores_unlisted:
        stats, state = listed.listed_losses(linear, loss, needs, head.workspace_bytes)
    else:
        stats, state = panels.row_losses(linear, loss, needs, want_entropy, head.workspace_bytes)
    return weigh(stats[:, 0], loss.row_weights), stats, *state


def _row_grads(
    head: HeadArgs,
    args: LossArgs,
    unlisted: Tensor,
    listed_logits: Tensor,
    accumulator: Tensor | None = None,
) -> Grads:
    loss, state = args.loss, RowState(unlisted, listed_logits)
    grads = listed.listed_grads if loss.rule.ignores_unlisted else panels.row_grads
    return grads(head.linear, loss, state, head.needs, head.workspace_bytes, accumulator)


@operator("row_grads", grads_fake)
def row_grads(head: HeadArgs, args: LossArgs, unlisted: Tensor, listed_logits: Tensor) -> Grads:
    """(dhidden, dweight, dbias) of `row_losses`, complete; dbias in the compute dtype.

    `args.row_weights` are the upstream gradients times the row weights.
    """
    return _row_grads(head, args, unlisted, listed_logits)


def _row_losses_backward(ctx: Any, upstream: Tensor | None, *_: None) -> Any:
    check_differentiated_once("lopd::row_losses")
    if upstream is None:
        return input_grads(ctx)
    head, inputs, state = restore_head(ctx)
    return input_grads(ctx, *row_grads(*head, *upstream_args(inputs, upstream), *state))


row_losses.register_autograd(_row_losses_backward, setup_context=save)


def _row_grads_into_fake(head: HeadArgs, *_: Any) -> Any:
    dhidden, _dweight, dbias = head.empty_grads()
    return dhidden, dbias


@operator("row_grads_into_", _row_grads_into_fake, mutates=("weight_grad",))
def row_grads_into_(
    head: HeadArgs, args: LossArgs, unlisted: Tensor, listed_logits: Tensor, weight_grad: Tensor
) -> tuple[Tensor, Tensor]:
    """(dhidden, dbias) as in `row_grads`, and weight_grad [V, D] += dW; need_weight is False."""
    dhidden, _, dbias = _row_grads(head, args, unlisted, listed_logits, weight_grad)
    return dhidden, dbias


class _LossesIntoBuffer(torch.autograd.Function):
    """`row_losses`; the backward adds dW to a buffer instead of returning it."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = row_losses(*inputs[:-1])
        save(ctx, (*inputs[:-1], None), output)
        ctx.buffer = inputs[-1]
        return output

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> Any:
        check_differentiated_once("the loss with weight_grad_buffer")
        if upstream is None:
            return input_grads(ctx)
        head, inputs, state = restore_head(ctx)
        head = head._replace(need_weight=False)
        args = upstream_args(inputs, upstream)
        dhidden, dbias = row_grads_into_(*head, *args, *state, ctx.buffer)
        return input_grads(ctx, dhidden, None, dbias)


def losses_into_buffer(
    head: HeadArgs, args: LossArgs, want_entropy: bool, buffer: Tensor
) -> tuple[Tensor, Tensor]:
    """(w_n L_n [N], stats) of `row_losses`; the backward adds dW to `buffer` [V, D]."""
    head = head._replace(need_weight=False)
    return _LossesIntoBuffer.apply(*head, *args, want_entropy, buffer)[:2]
