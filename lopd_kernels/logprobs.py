"""Public functions that read log-probs off the LM head."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lopd_kernels import _checks as checks
from lopd_kernels._ops import queries as query_ops
from lopd_kernels.divergence import tracked


class TopK(NamedTuple):
    """Result of `linear_topk`."""

    ids: Tensor  # [N, k] int64, by falling log-prob
    logprobs: Tensor  # [N, k] fp32
    tail_logprobs: Tensor  # [N] fp32, log of the mass outside the k ids; -inf at k = V
    entropy: Tensor  # [N] fp32, nat
    extra_logprobs: Tensor | None  # [N, E] fp32 at extra_ids


def linear_logprobs(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    ids: Tensor,  # [N, K] int, -1 pads; an id may repeat in a row
    *,
    return_entropy: bool = False,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    workspace_bytes: int | None = None,
    validate: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """log p_n(id) [N, K] fp32, and with `return_entropy` also -sum_j p_j log p_j [N] in nat.

    Differentiable once; the backward computes the logits again. Pads give -inf and carry
    no gradient.
    """
    hidden, weight, bias = checks.in_one_dtype(hidden, weight, bias)
    checks.check_linear(hidden, weight, bias)
    checks.check_head(logit_scale, softcap, temperature)
    checks.check_schedule(0.0, workspace_bytes, None, weight)
    checks.check_ids("ids", ids, hidden.shape[0], hidden)
    if checks.checks_values(validate, hidden):
        checks.check_ids_values("ids", ids, weight.shape[0], distinct=False)
    logprobs, entropy, *_ = query_ops.logprobs(
        hidden, weight, bias, ids, logit_scale, softcap, temperature,
        *tracked(hidden, weight, bias), return_entropy, workspace_bytes,
    )  # fmt: skip
    return (logprobs, entropy) if return_entropy else logprobs


@torch.no_grad()
def linear_topk(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    k: int,
    *,
    extra_ids: Tensor | None = None,  # [N, E] int, -1 pads
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    workspace_bytes: int | None = None,
    validate: bool | None = None,
) -> TopK:
    """The k most probable ids of each row, with the log of the mass outside them.

    The tail is reduced with the k ids removed, never by subtraction: it keeps its digits
    however small it is. `extra_ids` asks for the log-probs of further ids (-inf at pads);
    they do not enter the list or its tail. No gradient.
    """
    hidden, weight, bias = checks.in_one_dtype(hidden, weight, bias)
    checks.check_linear(hidden, weight, bias)
    checks.check_head(logit_scale, softcap, temperature)
    checks.check_schedule(0.0, workspace_bytes, None, weight)
    if not 1 <= k <= weight.shape[0]:
        raise ValueError(f"k is {k}, expected 1 to the vocabulary size {weight.shape[0]}")
    if extra_ids is not None:
        checks.check_ids("extra_ids", extra_ids, hidden.shape[0], hidden)
        if checks.checks_values(validate, hidden):
            checks.check_ids_values("extra_ids", extra_ids, weight.shape[0], distinct=False)
    ids, logprobs, tail, entropy, extra = query_ops.topk(
        hidden, weight, bias, k, extra_ids, logit_scale, softcap, temperature, workspace_bytes
    )
    return TopK(ids, logprobs, tail, entropy, None if extra_ids is None else extra)
