"""Losses on logits that exist already."""

from __future__ import annotations

import torch
from torch import Tensor

from lopd_kernels._core.backend import row_functions
from lopd_kernels._core.gemm import compute_dtype
from lopd_kernels._core.listed import support_rule
from lopd_kernels._core.rules import RowRule
from lopd_kernels._core.support import locate
from lopd_kernels._core.types import STATS, Head
from lopd_kernels._core.workspace import logits_rows, padded


def logits_loss(
    logits: Tensor,  # [N, V]
    ids: Tensor,
    target: Tensor,
    row_weights: Tensor | None,
    rule: RowRule,
    temperature: float,
    want_entropy: bool,
    want_grad: bool,
) -> tuple[Tensor, Tensor]:
    """(stats [N, 4], w_n dL_n/dlogits in the logits' dtype or [0]), a block of rows at a time."""
    n, vocab = logits.shape
    dtype, functions = compute_dtype(logits.dtype), row_functions(logits)
    head, target = Head(temperature=temperature), target.to(dtype)
    stats = logits.new_zeros((n, len(STATS)), dtype=dtype)
    grad = logits.new_empty((n, vocab) if want_grad else 0)
    weights = logits.new_ones(n, dtype=dtype) if row_weights is None else row_weights.to(dtype)
    weights = weights * head.slope
    rows = min(n, logits_rows(logits))
    if rule.name.endswith(":renormalize"):
        return _listed_loss(logits, ids, target, weights, rule, head, stats, grad)
    support = functions.locate(ids, row_weights, vocab)
    buffer = logits.new_empty((rows, padded(vocab)), dtype=dtype)
    for start in range(0, n, max(1, rows)):
        part = slice(start, min(start + rows, n))
        u = buffer[: part.stop - start, :vocab]
        u.copy_(logits[part])
        functions.row_pass(
            u, support.rows(part), target[part], weights[part] if want_grad else None, rule, head,
            want_entropy, stats[part], grad[part] if want_grad else None, inf_masks=True,
        )  # fmt: skip
    return stats, grad


def _listed_loss(
    logits: Tensor,
    ids: Tensor,
    target: Tensor,
    weights: Tensor,  # [N] factor of the gradient
    rule: RowRule,
    head: Head,
    stats: Tensor,
    grad: Tensor,  # [N, V] output or [0]
) -> tuple[Tensor, Tensor]:
    """`logits_loss` of a rule that looks at the list alone."""
    support = locate(ids, weights, logits.shape[1])
    z = logits.gather(1, support.ids).to(target.dtype) * head.gain
    stats[:, 0], on = support_rule(z, support, target, rule)
    if grad.numel():
        on = torch.where(support.active.unsqueeze(1), on * weights.unsqueeze(1), 0.0)
        on = torch.where(support.listed, on, on.gather(1, support.anchor))
        grad.zero_().scatter_(1, support.ids, on.to(grad.dtype))
    return stats, grad
