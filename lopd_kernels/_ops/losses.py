"""torch.library operators `lopd::*`: schema, shapes under tracing, gradients.

`fused_loss` computes value and gradients in one go and keeps the gradients for its
backward, which only scales and casts them, out of place. `kept_loss` keeps dz instead, and
its backward runs the two gradient GEMMs over all rows. `row_losses` returns one loss
per row and what its backward needs, a few numbers a row: the upstream gradient of each
row is not known in the forward, or the memory for the gradients is not there.
`row_grads_into_` adds dW into a caller's buffer and has no autograd of its own;
`into_buffer` calls it.

An operator cannot return None: what was not asked for comes back with no elements.
All of them can be differentiated once.
"""

from typing import Any

import torch
from torch import Tensor

from lopd_kernels._core import chunks, listed, panels
from lopd_kernels._core.gemm import compute_dtype, operand_dtype, without_autocast
from lopd_kernels._core.linear import make_linear
from lopd_kernels._core.rules import row_rule
from lopd_kernels._core.scaling import weigh
from lopd_kernels._core.types import STATS, Reduction
from lopd_kernels._core.workspace import Needs, padded


def _is_listed(rule: str) -> bool:
    """Whether a rule looks at the list alone and needs no LM head."""
    return rule.endswith(":renormalize")


def stats_width(rule: str) -> int:
    return len(STATS) + len(row_rule(rule, [1.0, 1.0, 1.0]).extras)


def differentiated_once(name: str) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} can be differentiated once: its backward was called with "
            "create_graph=True; use lopd_kernels.reference for second derivatives"
        )


def _scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """factor * grad in `dtype`, rounded once and out of place.

    A factor without dimensions would be rounded to the dtype of a 16-bit grad first.
    """
    out = torch.empty_like(grad, dtype=dtype)
    return torch.mul(grad, factor.reshape(1), out=out)


def asked(ctx: Any, grads: tuple[Tensor, ...]) -> list[Tensor | None]:
    """Gradients for (hidden, weight, bias), None where autograd did not ask."""
    wanted = ctx.needs_input_grad[:3]
    return [
        grad.to(dtype) if want else None
        for grad, dtype, want in zip(grads, ctx.dtypes, wanted, strict=True)
    ]


@torch.library.custom_op("lopd::fused_loss", mutates_args=())
@without_autocast
def fused_loss(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    ids: Tensor,  # [N, K]
    target: Tensor,  # [N, M]
    row_weights: Tensor | None,  # [N]
    rule: str,
    options: list[float],
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    want_entropy: bool,
    workspace_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(sum_n w_n L_n, stats, dhidden, dweight, dbias, scale); gradients short of `scale`."""
    result = chunks.fused_loss(
        make_linear(hidden, weight, bias, logit_scale, softcap, temperature),
        ids,
        target,
        row_weights,
        row_rule(rule, options),
        Needs(need_hidden, need_weight, need_bias),
        want_entropy,
        workspace_bytes,
    )
    grads = result.grads
    return result.loss, result.stats, grads.hidden, grads.weight, grads.bias, grads.scale


@fused_loss.register_fake
def _(
    hidden, weight, bias, ids, target, row_weights, rule, options, logit_scale, softcap,
    temperature, need_hidden, need_weight, need_bias, want_entropy, workspace_bytes,
):  # fmt: skip
    dtype = compute_dtype(hidden.dtype)
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty((hidden.shape[0], stats_width(rule)), dtype=dtype),
        hidden.new_empty(hidden.shape if need_hidden else (0,), dtype=dtype),
        hidden.new_empty(weight.shape if need_weight else (0,), dtype=dtype),
        hidden.new_empty((weight.shape[0],) if need_bias else (0,), dtype=dtype),
        hidden.new_empty((), dtype=dtype),
    )


def _fused_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[2:])
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
    for x, needed in zip(inputs[:3], inputs[11:14], strict=True):
        assert needed or x is None or not x.requires_grad, "a gradient that need_* left out"


def _fused_loss_backward(ctx: Any, upstream: Tensor | None, *rest: None) -> tuple[Any, ...]:
    differentiated_once("lopd::fused_loss")
    if upstream is None:
        return (None,) * 16
    *grads, scale = ctx.saved_tensors
    factor = (upstream * scale).to(scale.dtype)
    wanted = ctx.needs_input_grad[:3]
    scaled = [
        _scaled(grad, factor, dtype) if want else None
        for grad, dtype, want in zip(grads, ctx.dtypes, wanted, strict=True)
    ]
    return (*scaled, *(None,) * 13)


fused_loss.register_autograd(_fused_loss_backward, setup_context=_fused_loss_setup)


@torch.library.custom_op("lopd::kept_loss", mutates_args=())
@without_autocast
def kept_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    target: Tensor,
    row_weights: Tensor | None,
    rule: str,
    options: list[float],
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    want_entropy: bool,
    workspace_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(sum_n w_n L_n, stats, dz [N, V and padding], scale); need_* as in `row_losses`."""
    found = chunks.kept_loss(
        make_linear(hidden, weight, bias, logit_scale, softcap, temperature),
        ids,
        target,
        row_weights,
        row_rule(rule, options),
        Needs(need_hidden, need_weight, need_bias),
        want_entropy,
        workspace_bytes,
    )
    return found.loss, found.stats, found.dz, found.scale


@kept_loss.register_fake
def _(
    hidden, weight, bias, ids, target, row_weights, rule, options, logit_scale, softcap,
    temperature, need_hidden, need_weight, need_bias, want_entropy, workspace_bytes,
):  # fmt: skip
    n, dtype = hidden.shape[0], compute_dtype(hidden.dtype)
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty((n, stats_width(rule)), dtype=dtype),
        hidden.new_empty((n, padded(weight.shape[0])), dtype=operand_dtype(hidden)),
        hidden.new_empty((), dtype=dtype),
    )


@torch.library.custom_op("lopd::kept_grads", mutates_args=())
@without_autocast
def kept_grads(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    row_weights: Tensor | None,
    dz: Tensor,
    factor: Tensor,  # []
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden, dweight, dbias) of `kept_loss`, complete; dbias in the compute dtype."""
    linear = make_linear(hidden, weight, bias, 1.0, None, 1.0)
    active = linear.functions.locate(ids, row_weights, weight.shape[0]).active
    needs = Needs(need_hidden, need_weight, need_bias)
    return chunks.kept_grads(linear, active, dz, factor, needs)


@kept_grads.register_fake
def _(hidden, weight, bias, ids, row_weights, dz, factor, need_hidden, need_weight, need_bias):
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        hidden.new_empty(
            (weight.shape[0],) if need_bias else (0,), dtype=compute_dtype(hidden.dtype)
        ),
    )


def _kept_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:4], inputs[5], *output[2:])
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]


def _kept_loss_backward(ctx: Any, upstream: Tensor | None, *rest: None) -> tuple[Any, ...]:
    differentiated_once("lopd::kept_loss")
    if upstream is None:
        return (None,) * 16
    *saved, scale = ctx.saved_tensors
    factor = (upstream * scale).to(scale.dtype)
    grads = kept_grads(*saved, factor, *ctx.needs_input_grad[:3])
    return (*asked(ctx, grads), *(None,) * 13)


kept_loss.register_autograd(_kept_loss_backward, setup_context=_kept_loss_setup)


@torch.library.custom_op("lopd::row_losses", mutates_args=())
@without_autocast
def row_losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    target: Tensor,
    row_weights: Tensor | None,
    rule: str,
    options: list[float],
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    want_entropy: bool,
    workspace_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(w_n L_n [N], stats, state, on): the last two are `rowpass.Reduction`.

    need_* tells what the backward will hold, for the workspace's check.
    """
    linear = make_linear(hidden, weight, bias, logit_scale, softcap, temperature)
    needs = Needs(need_hidden, need_weight, need_bias)
    if _is_listed(rule):
        found = listed.support_losses(
            linear, ids, target, row_weights, row_rule(rule, options), needs, workspace_bytes
        )
    else:
        found = panels.row_losses(
            linear, ids, target, row_weights, row_rule(rule, options), needs, want_entropy,
            workspace_bytes,
        )  # fmt: skip
    return weigh(found.stats[:, 0], row_weights), found.stats, *found.reduction


@row_losses.register_fake
def _(
    hidden, weight, bias, ids, target, row_weights, rule, options, logit_scale, softcap,
    temperature, need_hidden, need_weight, need_bias, want_entropy, workspace_bytes,
):  # fmt: skip
    n, dtype = hidden.shape[0], compute_dtype(hidden.dtype)
    return (
        hidden.new_empty((n,), dtype=dtype),
        hidden.new_empty((n, stats_width(rule)), dtype=dtype),
        hidden.new_empty((0 if _is_listed(rule) else n, 4), dtype=dtype),
        hidden.new_empty(ids.shape, dtype=dtype),
    )


def _row_grads(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    target: Tensor,
    weights: Tensor,
    state: Tensor,
    on: Tensor,
    rule: str,
    options: list[float],
    head: tuple[float, float | None, float],
    needs: Needs,
    workspace_bytes: int | None,
    accumulator: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = listed.support_grads if _is_listed(rule) else panels.row_grads
    return grads(
        make_linear(hidden, weight, bias, *head), ids, target, weights, Reduction(state, on),
        row_rule(rule, options), needs, workspace_bytes, accumulator,
    )  # fmt: skip


@torch.library.custom_op("lopd::row_grads", mutates_args=())
@without_autocast
def row_grads(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    target: Tensor,
    weights: Tensor,  # [N] upstream gradient times the row's weight
    state: Tensor,
    on: Tensor,
    rule: str,
    options: list[float],
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    workspace_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden, dweight, dbias) of `row_losses`, complete; dbias in the compute dtype."""
    return _row_grads(
        hidden, weight, bias, ids, target, weights, state, on, rule, options,
        (logit_scale, softcap, temperature), Needs(need_hidden, need_weight, need_bias),
        workspace_bytes,
    )  # fmt: skip


@row_grads.register_fake
def _(
    hidden, weight, bias, ids, target, weights, state, on, rule, options, logit_scale, softcap,
    temperature, need_hidden, need_weight, need_bias, workspace_bytes,
):  # fmt: skip
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        hidden.new_empty(
            (weight.shape[0],) if need_bias else (0,), dtype=compute_dtype(hidden.dtype)
        ),
    )


def _row_losses_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:6], *output[2:])
    ctx.constants = inputs[6:11]
    ctx.workspace_bytes = inputs[15]
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]


def _row_losses_backward(ctx: Any, upstream: Tensor | None, *rest: None) -> tuple[Any, ...]:
    differentiated_once("lopd::row_losses")
    if upstream is None:
        return (None,) * 16
    *inputs, row_weights, state, on = ctx.saved_tensors
    weights = upstream if row_weights is None else weigh(upstream, row_weights)
    grads = row_grads(
        *inputs, weights, state, on, *ctx.constants, *ctx.needs_input_grad[:3],
        ctx.workspace_bytes,
    )  # fmt: skip
    return (*asked(ctx, grads), *(None,) * 13)


row_losses.register_autograd(_row_losses_backward, setup_context=_row_losses_setup)


@torch.library.custom_op("lopd::row_grads_into_", mutates_args=("weight_grad",))
@without_autocast
def row_grads_into_(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    target: Tensor,
    weights: Tensor,
    state: Tensor,
    on: Tensor,
    weight_grad: Tensor,  # [V, D] compute dtype; dW is added to it
    rule: str,
    options: list[float],
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    need_hidden: bool,
    need_bias: bool,
    workspace_bytes: int | None,
) -> tuple[Tensor, Tensor]:
    """(dhidden, dbias), see `row_grads`; weight_grad += dW."""
    dhidden, _, dbias = _row_grads(
        hidden, weight, bias, ids, target, weights, state, on, rule, options,
        (logit_scale, softcap, temperature), Needs(need_hidden, True, need_bias),
        workspace_bytes, weight_grad,
    )  # fmt: skip
    return dhidden, dbias


@row_grads_into_.register_fake
def _(
    hidden, weight, bias, ids, target, weights, state, on, weight_grad, rule, options,
    logit_scale, softcap, temperature, need_hidden, need_bias, workspace_bytes,
):  # fmt: skip
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        hidden.new_empty(
            (weight.shape[0],) if need_bias else (0,), dtype=compute_dtype(hidden.dtype)
        ),
    )


class _IntoBuffer(torch.autograd.Function):
    """`row_losses` whose backward leaves dW in a buffer instead of returning it."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, ids, target, row_weights, buffer, constants, needs,
                entropy, workspace_bytes):  # fmt: skip
        rows, stats, state, on = row_losses(
            hidden, weight, bias, ids, target, row_weights, *constants, needs[0], False, needs[2],
            entropy, workspace_bytes,
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(stats)
        ctx.save_for_backward(hidden, weight, bias, ids, target, row_weights, state, on)
        ctx.buffer, ctx.constants, ctx.workspace_bytes = buffer, constants, workspace_bytes
        return rows, stats

    @staticmethod
    def backward(ctx, upstream, stats_upstream):
        differentiated_once("the loss with weight_grad_buffer")
        if upstream is None:
            return (None,) * 11
        hidden, weight, bias, ids, target, row_weights, state, on = ctx.saved_tensors
        weights = upstream if row_weights is None else weigh(upstream, row_weights)
        need_hidden, _, need_bias = ctx.needs_input_grad[:3]
        dhidden, dbias = row_grads_into_(
            hidden, weight, bias, ids, target, weights, state, on, ctx.buffer, *ctx.constants,
            need_hidden, need_bias, ctx.workspace_bytes,
        )  # fmt: skip
        return (
            dhidden if need_hidden else None,
            None,
            dbias.to(bias.dtype) if need_bias else None,
            *(None,) * 8,
        )


def into_buffer(*args: Any) -> tuple[Tensor, Tensor]:
    """(w_n L_n [N], stats), with dW added to a buffer by the backward."""
    return _IntoBuffer.apply(*args)
