"""Log-probs, entropies and top-k lists from hidden states, without the [N, V] logits."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from lopd_kernels import _checks, _values
from lopd_kernels._calls import checked_head, in_shape
from lopd_kernels._ops import logprobs as ops


class TopK(NamedTuple):
    """Result of `linear_topk`; log-probs in float32 (float64 for float64 inputs), nat."""

    ids: Tensor  # [N, k] int64, by decreasing log-prob
    logprobs: Tensor  # [N, k]
    tail_logprobs: Tensor  # [N] log of the mass outside the k ids; -inf at k = V
    entropy: Tensor  # [N] nat
    extra_logprobs: Tensor | None  # [N, E] at extra_ids, -inf at pads
    extra_tail_logprobs: Tensor | None  # [N] log of the mass outside the k ids and extra_ids
    sampled_logprobs: Tensor | None  # [N] at sampled_ids, -inf at -1


@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    temperature: float = ...,
    workspace_bytes: int | None = ...,
    validate: bool | None = ...,
    return_entropy: Literal[False] = False,
) -> Tensor: ...


@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    temperature: float = ...,
    workspace_bytes: int | None = ...,
    validate: bool | None = ...,
    return_entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    workspace_bytes: int | None = None,
    validate: bool | None = None,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probs of given ids, and the entropy of each row; differentiable once.

        log p_n(id) = z_n,id - log sum_j exp z_nj,   H_n = -sum_j p_nj log p_nj

    The backward computes the logits a second time.

    Args:
        hidden: [N, D] float, last hidden states. Or [B, T, D]; then every [N] is [B, T].
        weight: [V, D], the LM head's weight, in the dtype of `hidden`.
        ids: [N, K] int32 or int64. An id may be repeated in a row, and gradients then add up. -1
            pads; pads give -inf and carry no gradient.
        return_entropy: also return H.
        bias, logit_scale, softcap, temperature: of the logits z, as in
            `linear_sparse_divergence`.
        workspace_bytes: bound on what the call allocates beyond inputs and outputs.
        validate: whether to check values. None checks them except while compiling or capturing a
            CUDA graph. An unchecked invalid id makes its row NaN.

    Returns:
        Log-probs [N, K] in float32 (float64 for float64 inputs), nat; with `return_entropy` the
        pair (log-probs, entropy [N]).

    Raises:
        ValueError: an invalid argument; the message names it. For a wrong dtype the error is a
            TypeError as well.
        RuntimeError: the result is differentiated twice.

    >>> hidden, weight = torch.zeros(1, 2), torch.randn(4, 2)
    >>> logprobs, entropy = linear_logprobs(
    ...     hidden, weight, torch.tensor([[3, -1]]), return_entropy=True
    ... )
    >>> [[round(x, 4) for x in row] for row in logprobs.tolist()], round(entropy.item(), 4)
    ([[-1.3863, -inf]], 1.3863)
    """
    head = checked_head(hidden, weight, bias, logit_scale, softcap, temperature, workspace_bytes)
    leading = hidden.shape[:-1]
    ids = _checks.id_rows("ids", ids, leading, hidden, ("K",))
    if _values.checks_values(validate, hidden):
        checks = _values.ValueChecks()
        checks.ids("ids", ids, weight.shape[0], distinct=False)
        checks.finish()
    logprobs, entropy, *_ = ops.logprobs(*head, ids, return_entropy)
    logprobs = in_shape(leading, logprobs)
    return (logprobs, in_shape(leading, entropy)) if return_entropy else logprobs


@torch.no_grad()
def linear_topk(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    extra_ids: Tensor | None = None,
    sampled_ids: Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    workspace_bytes: int | None = None,
    validate: bool | None = None,
) -> TopK:
    """The k most probable ids of each row, and the log of the mass outside them. No gradient.

        tail_n = log sum_{j not in top k} p_nj
        extra_tail_n = log sum_{j not in top k, not in extra_ids} p_nj

    Tails are log-sum-exps of the remaining logits, never differences from 1, so they have full
    precision at any size.

    Args:
        hidden: [N, D] float, last hidden states. Or [B, T, D]; then every [N] is [B, T].
        weight: [V, D], the LM head's weight, in the dtype of `hidden`.
        k: length of the list, 1 to V.
        extra_ids: [N, E] int32 or int64, -1 pads: ids whose log-probs are returned, and that
            `extra_tail_logprobs` excludes. They may be repeated or among the top k.
        sampled_ids: [N] int32 or int64: ids whose log-probs are returned, and that no tail
            excludes. -1 marks rows without one, such as padding: their log-prob is -inf, and a
            loss with weight 0 in these rows ignores it.
        bias, logit_scale, softcap, temperature: of the logits, as in `linear_sparse_divergence`.
        workspace_bytes: bound on what the call allocates beyond inputs and outputs.
        validate: whether to check values. None checks them except while compiling or capturing a
            CUDA graph. An unchecked invalid id makes its results NaN.

    Returns:
        `TopK`. Fields of arguments that are None are None.

    Raises:
        ValueError: an invalid argument; the message names it. For a wrong dtype the error is a
            TypeError as well.

    >>> weight = torch.tensor([0.5, 0.25, 0.125, 0.125]).log().unsqueeze(1)
    >>> top = linear_topk(torch.ones(1, 1), weight, 1, extra_ids=torch.tensor([[1]]))
    >>> top.ids.tolist(), round(top.tail_logprobs.exp().item(), 4)
    ([[0]], 0.5)
    >>> round(top.extra_tail_logprobs.exp().item(), 4)
    0.25
    """
    head = checked_head(hidden, weight, bias, logit_scale, softcap, temperature, workspace_bytes)
    vocab = weight.shape[0]
    _checks.check_count("k", k, 1, vocab, f"1 to the vocabulary size {vocab}")
    leading = hidden.shape[:-1]
    extra = sampled = head.hidden.new_empty((head.rows, 0), dtype=torch.int64)
    if extra_ids is not None:
        extra = _checks.id_rows("extra_ids", extra_ids, leading, hidden, ("E",))
    if sampled_ids is not None:
        sampled = _checks.id_rows("sampled_ids", sampled_ids, leading, hidden).unsqueeze(1)
    if _values.checks_values(validate, hidden):
        checks = _values.ValueChecks()
        checks.ids("extra_ids", extra, vocab, distinct=False)
        checks.ids("sampled_ids", sampled, vocab, distinct=False)
        checks.finish()
    results = ops.topk(*head, k, extra, sampled)
    ids, logprobs, tail, entropy, at_extra, extra_tail, at_sampled = (
        in_shape(leading, x) for x in results
    )
    return TopK(
        ids,
        logprobs,
        tail,
        entropy,
        None if extra_ids is None else at_extra,
        None if extra_ids is None else extra_tail,
        None if sampled_ids is None else at_sampled[..., 0],
    )
