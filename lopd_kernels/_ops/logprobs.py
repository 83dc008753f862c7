"""The operators that read log-probs from an LM head."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lopd_kernels._core import logprobs as core
from lopd_kernels._core import topk as top
from lopd_kernels._core.types import RowState
from lopd_kernels._ops.schema import (
    HeadArgs,
    check_differentiated_once,
    grads_fake,
    input_grads,
    operator,
    restore_head,
    save,
)


def _logprobs_fake(head: HeadArgs, ids: Tensor, want_entropy: bool) -> Any:
    n = head.rows
    rows = head.empty(n if want_entropy else 0)
    return head.empty(*ids.shape), rows, head.empty(n, 4), head.empty(*ids.shape)


@operator("logprobs", _logprobs_fake)
def logprobs(
    head: HeadArgs, ids: Tensor, want_entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log p at ids [N, K], entropy [N] or [0], *RowState)."""
    out, entropy, state = core.logprobs(
        head.linear, ids, head.needs, want_entropy, head.workspace_bytes
    )
    return out, entropy, *state


@operator("logprobs_grads", grads_fake)
def logprobs_grads(
    head: HeadArgs,
    ids: Tensor,
    unlisted: Tensor,
    listed_logits: Tensor,
    grad_logprobs: Tensor,  # [N, K]
    grad_entropy: Tensor,  # [N] or [0]
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden, dweight, dbias), complete; dbias in the compute dtype."""
    state = RowState(unlisted, listed_logits)
    return core.logprobs_grads(
        head.linear, ids, state, grad_logprobs, grad_entropy, head.needs, head.workspace_bytes
    )


def _logprobs_backward(
    ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, *_: None
) -> Any:
    check_differentiated_once("lopd::logprobs")
    head, (ids, _), state = restore_head(ctx)
    if grad_logprobs is None:
        grad_logprobs = head.empty(*ids.shape).zero_()
    if grad_entropy is None:
        grad_entropy = head.empty(0)
    grads = logprobs_grads(*head, ids, *state, grad_logprobs, grad_entropy)
    return input_grads(ctx, *grads)


logprobs.register_autograd(_logprobs_backward, setup_context=partial(save, values=2))


def _topk_fake(head: HeadArgs, k: int, extra_ids: Tensor, sampled_ids: Tensor) -> Any:
    n = head.rows
    return (
        head.hidden.new_empty((n, k), dtype=torch.int64),
        head.empty(n, k),
        head.empty(n),
        head.empty(n),
        head.empty(*extra_ids.shape),
        head.empty(n),
        head.empty(*sampled_ids.shape),
    )


@operator("topk", _topk_fake)
def topk(
    head: HeadArgs, k: int, extra_ids: Tensor, sampled_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `_core.topk.TopRows`."""
    return tuple(  # type: ignore[return-value]
        top.topk(head.linear, k, extra_ids, sampled_ids, head.workspace_bytes)
    )
