"""Losses on logits that the caller has already."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lopd_kernels._core.backend import row_functions
from lopd_kernels._core.gemm import compute_dtype
from lopd_kernels._core.listed import renormalized_loss
from lopd_kernels._core.listed_ids import locate
from lopd_kernels._core.rules import RowLoss
from lopd_kernels._core.types import STATS, LogitOptions
from lopd_kernels._core.workspace import logits_rows, padded


def logits_loss(
    logits: Tensor,  # [N, V]
    temperature: float,
    loss: RowLoss,
    want_entropy: bool,
    want_grad: bool,
) -> tuple[Tensor, Tensor]:
    """(stats [N, 4 + extras], w_n dL_n/dlogits in the logits' dtype or [0]).

    A block of rows at a time.
    """
    n, vocab = logits.shape
    dtype, functions = compute_dtype(logits.dtype), row_functions(logits)
    loss = loss._replace(target=loss.target.to(dtype))
    logit_options = LogitOptions(temperature=temperature)
    stats = logits.new_zeros((n, len(STATS) + len(loss.rule.extras)), dtype=dtype)
    grad = logits.new_empty((n, vocab) if want_grad else 0)
    weights = logits.new_ones(n, dtype=dtype)
    if loss.row_weights is not None:
        weights = loss.row_weights.to(dtype)
    weights = weights * logit_options.slope
    if loss.rule.ignores_unlisted:
        return _listed_loss(logits, loss, weights, logit_options, stats, grad)
    listed_ids = functions.locate(loss.ids, loss.row_weights, vocab)
    rows = min(n, logits_rows(logits))
    buffer = logits.new_empty((rows, padded(vocab)), dtype=dtype)
    for start in range(0, n, max(1, rows)):
        part = slice(start, min(start + rows, n))
        u = buffer[: part.stop - start, :vocab]
        u.copy_(logits[part])
        functions.row_pass(
            u, listed_ids.rows(part), loss.target[part], weights[part] if want_grad else None,
            loss.rule, logit_options, want_entropy, stats[part], grad[part] if want_grad else None,
            inf_masks=True,
        )  # fmt: skip
    no_mass = stats[:, 1:2].isneginf()  # every id masked: no distribution
    stats.masked_fill_(no_mass, math.nan)
    if want_grad:  # one entry is enough to be seen, and costs no pass over the gradient
        grad[:, :1].masked_fill_(no_mass, math.nan)
    return stats, grad


def _listed_loss(
    logits: Tensor,
    loss: RowLoss,
    weights: Tensor,  # [N] factor of the gradient
    logit_options: LogitOptions,
    stats: Tensor,
    grad: Tensor,  # [N, V] output, or [0]
) -> tuple[Tensor, Tensor]:
    """`logits_loss` of a rule that ignores unlisted ids."""
    listed_ids = locate(loss.ids, weights, logits.shape[1])
    z = logits.gather(1, listed_ids.ids).to(loss.target.dtype) * logit_options.gain
    stats[:, 0], dz = renormalized_loss(z, listed_ids, loss.target, loss.rule)
    if grad.numel():
        dz = torch.where(listed_ids.active.unsqueeze(1), dz * weights.unsqueeze(1), 0.0)
        dz = torch.where(listed_ids.listed, dz, dz.gather(1, listed_ids.anchor))
        grad.zero_().scatter_(1, listed_ids.ids, dz.to(grad.dtype))
    return stats, grad
