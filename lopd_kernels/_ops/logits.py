"""The operators of the losses on logits that the caller has already."""

from typing import Any

from torch import Tensor

from lopd_kernels._core.dense_logits import logits_loss
from lopd_kernels._core.gemm import compute_dtype
from lopd_kernels._core.scaling import weigh
from lopd_kernels._ops.schema import (
    LossArgs,
    check_differentiated_once,
    input_grads,
    operator,
    restore,
    save,
    upstream_args,
)


def _logits_losses_fake(
    logits: Tensor, temperature: float, args: LossArgs, want_entropy: bool
) -> Any:
    n, dtype = logits.shape[0], compute_dtype(logits.dtype)
    losses = logits.new_empty((n,), dtype=dtype)
    return losses, logits.new_empty((n, args.stats_width), dtype=dtype)


@operator("logits_losses", _logits_losses_fake)
def logits_losses(
    logits: Tensor, temperature: float, args: LossArgs, want_entropy: bool
) -> tuple[Tensor, Tensor]:
    """(w_n L_n [N], stats)."""
    stats, _ = logits_loss(logits, temperature, args.loss, want_entropy, False)
    return weigh(stats[:, 0], args.row_weights), stats


def _logits_grad_fake(logits: Tensor, temperature: float, args: LossArgs) -> Any:
    return logits.new_empty(logits.shape)


@operator("logits_grad", _logits_grad_fake)
def logits_grad(logits: Tensor, temperature: float, args: LossArgs) -> Tensor:
    """w_n dL_n/dlogits [N, V] in the logits' dtype."""
    return logits_loss(logits, temperature, args.loss, False, True)[1]


def _logits_backward(ctx: Any, upstream: Tensor | None, _: None) -> Any:
    check_differentiated_once("lopd::logits_losses")
    if upstream is None:
        return input_grads(ctx)
    (logits, temperature, *inputs), _results = restore(ctx)
    args = upstream_args(inputs, upstream)
    return input_grads(ctx, logits_grad(logits, temperature, *args))


logits_losses.register_autograd(_logits_backward, setup_context=save)
