"""Operators that read log-probs, and the one for logits that exist already."""

from typing import Any

import torch
from torch import Tensor

from lopd_kernels._core import given_logits
from lopd_kernels._core import logprobs as reads
from lopd_kernels._core import topk as top
from lopd_kernels._core.gemm import compute_dtype, without_autocast
from lopd_kernels._core.linear import make_linear
from lopd_kernels._core.rules import row_rule
from lopd_kernels._core.scaling import weigh
from lopd_kernels._core.types import Reduction
from lopd_kernels._core.workspace import Needs
from lopd_kernels._ops.losses import asked, differentiated_once, stats_width


@torch.library.custom_op("lopd::logprobs", mutates_args=())
@without_autocast
def logprobs(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    ids: Tensor,  # [N, K]
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    want_entropy: bool,
    workspace_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log p at ids [N, K], entropy [N] or [0], state, on); the rest as in `lopd::row_losses`."""
    linear = make_linear(hidden, weight, bias, logit_scale, softcap, temperature)
    needs = Needs(need_hidden, need_weight, need_bias)
    out, entropy, reduction = reads.logprobs(linear, ids, want_entropy, needs, workspace_bytes)
    return out, entropy, *reduction


@logprobs.register_fake
def _(
    hidden, weight, bias, ids, logit_scale, softcap, temperature, need_hidden, need_weight,
    need_bias, want_entropy, workspace_bytes,
):  # fmt: skip
    n, dtype = hidden.shape[0], compute_dtype(hidden.dtype)
    return (
        hidden.new_empty(ids.shape, dtype=dtype),
        hidden.new_empty((n if want_entropy else 0,), dtype=dtype),
        hidden.new_empty((n, 4), dtype=dtype),
        hidden.new_empty(ids.shape, dtype=dtype),
    )


@torch.library.custom_op("lopd::logprobs_grads", mutates_args=())
@without_autocast
def logprobs_grads(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    state: Tensor,
    on: Tensor,
    grad_logprobs: Tensor,  # [N, K]
    grad_entropy: Tensor,  # [N] or [0]
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    workspace_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden, dweight, dbias), complete; dbias in the compute dtype."""
    linear = make_linear(hidden, weight, bias, logit_scale, softcap, temperature)
    needs = Needs(need_hidden, need_weight, need_bias)
    return reads.logprobs_grads(
        linear, ids, Reduction(state, on), grad_logprobs, grad_entropy, needs, workspace_bytes
    )


@logprobs_grads.register_fake
def _(
    hidden, weight, bias, ids, state, on, grad_logprobs, grad_entropy, logit_scale, softcap,
    temperature, need_hidden, need_weight, need_bias, workspace_bytes,
):  # fmt: skip
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        hidden.new_empty(
            (weight.shape[0],) if need_bias else (0,), dtype=compute_dtype(hidden.dtype)
        ),
    )


def _logprobs_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*inputs[:4], *output[2:])
    ctx.head = inputs[4:7]
    ctx.workspace_bytes = inputs[11]
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]


def _logprobs_backward(ctx: Any, grad: Any, grad_entropy: Any, *rest: None) -> tuple[Any, ...]:
    differentiated_once("lopd::logprobs")
    hidden, weight, bias, ids, state, on = ctx.saved_tensors
    if grad is None:
        grad = on.new_zeros(ids.shape)
    if grad_entropy is None:
        grad_entropy = on.new_zeros(0)
    grads = logprobs_grads(
        hidden, weight, bias, ids, state, on, grad, grad_entropy, *ctx.head,
        *ctx.needs_input_grad[:3], ctx.workspace_bytes,
    )  # fmt: skip
    return (*asked(ctx, grads), *(None,) * 9)


logprobs.register_autograd(_logprobs_backward, setup_context=_logprobs_setup)


@torch.library.custom_op("lopd::topk", mutates_args=())
@without_autocast
def topk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    extra_ids: Tensor | None,  # [N, E]
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    workspace_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(ids [N, k], logprobs [N, k], tail_logprobs [N], entropy [N], extra_logprobs [N, E])."""
    linear = make_linear(hidden, weight, bias, logit_scale, softcap, temperature)
    return tuple(top.topk(linear, k, extra_ids, workspace_bytes))  # type: ignore[return-value]


@topk.register_fake
def _(hidden, weight, bias, k, extra_ids, logit_scale, softcap, temperature, workspace_bytes):
    n, dtype = hidden.shape[0], compute_dtype(hidden.dtype)
    extra = 0 if extra_ids is None else extra_ids.shape[1]
    return (
        hidden.new_empty((n, k), dtype=torch.int64),
        hidden.new_empty((n, k), dtype=dtype),
        hidden.new_empty((n,), dtype=dtype),
        hidden.new_empty((n,), dtype=dtype),
        hidden.new_empty((n, extra), dtype=dtype),
    )


@torch.library.custom_op("lopd::logits_losses", mutates_args=())
@without_autocast
def logits_losses(
    logits: Tensor,  # [N, V]
    ids: Tensor,
    target: Tensor,
    row_weights: Tensor | None,
    rule: str,
    options: list[float],
    temperature: float,
    want_entropy: bool,
) -> tuple[Tensor, Tensor]:
    """(w_n L_n [N], stats)."""
    stats, _ = given_logits.logits_loss(
        logits, ids, target, row_weights, row_rule(rule, options), temperature, want_entropy, False
    )
    return weigh(stats[:, 0], row_weights), stats


@logits_losses.register_fake
def _(logits, ids, target, row_weights, rule, options, temperature, want_entropy):
    n, dtype = logits.shape[0], compute_dtype(logits.dtype)
    return (
        logits.new_empty((n,), dtype=dtype),
        logits.new_empty((n, stats_width(rule)), dtype=dtype),
    )


@torch.library.custom_op("lopd::logits_grad", mutates_args=())
@without_autocast
def logits_grad(
    logits: Tensor,
    ids: Tensor,
    target: Tensor,
    row_weights: Tensor,
    rule: str,
    options: list[float],
    temperature: float,
) -> Tensor:
    """w_n dL_n/dlogits [N, V] in the logits' dtype."""
    return given_logits.logits_loss(
        logits, ids, target, row_weights, row_rule(rule, options), temperature, False, True
    )[1]


@logits_grad.register_fake
def _(logits, ids, target, row_weights, rule, options, temperature):
    return logits.new_empty(logits.shape)


def _logits_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:4])
    ctx.constants = inputs[4:7]


def _logits_backward(ctx: Any, upstream: Any, _: None) -> tuple[Any, ...]:
    differentiated_once("lopd::logits_losses")
    if upstream is None:
        return (None,) * 8
    logits, ids, target, row_weights = ctx.saved_tensors
    weights = upstream if row_weights is None else weigh(upstream, row_weights)
    return (logits_grad(logits, ids, target, weights, *ctx.constants), *(None,) * 7)


logits_losses.register_autograd(_logits_backward, setup_context=_logits_setup)
