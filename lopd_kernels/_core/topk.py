"""The most probable ids of each row, their tail, and log-probs of further ids."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lopd_kernels._core.buckets import student_buckets
from lopd_kernels._core.chunks import visit_chunks
from lopd_kernels._core.gemm import WeightRows
from lopd_kernels._core.linear import Linear
from lopd_kernels._core.listed import apply_logit_options
from lopd_kernels._core.listed_ids import distinct
from lopd_kernels._core.types import Needs, RowState
from lopd_kernels._core.workspace import READ_WORDS, chunk_rows, padded


class TopRows(NamedTuple):
    ids: Tensor  # [N, k] int64
    logprobs: Tensor  # [N, k]
    tail_logprobs: Tensor  # [N] mass outside the top k
    entropy: Tensor  # [N]
    extra_logprobs: Tensor  # [N, E]
    extra_tail_logprobs: Tensor  # [N] mass outside the top k and the extra ids
    sampled_logprobs: Tensor  # [N, S]


def _invalid(ids: Tensor, lowest: int, vocab: int) -> Tensor:
    return ((ids < lowest) | (ids >= vocab)).any(1, keepdim=True)


def topk(
    linear: Linear,
    k: int,
    extra_ids: Tensor,  # [N, E], -1 pads
    sampled_ids: Tensor,  # [N, S], -1 pads
    workspace_bytes: int | None,
) -> TopRows:
    """One reduction, with the top k and the extra ids listed, gives both tails.

    The tail of the top k is the extra tail plus the extra ids that are not among the top k: a
    sum, never a difference.
    """
    like, functions, bias = linear.hidden, linear.functions, linear.logit_options.bias
    n, vocab, e = like.shape[0], linear.weight.shape[0], extra_ids.shape[1]
    extra_ids, sampled_ids = extra_ids.long(), sampled_ids.long()
    invalid_extra = _invalid(extra_ids, -1, vocab)
    invalid_sampled, pads = _invalid(sampled_ids, -1, vocab), sampled_ids == -1
    extra_ids = extra_ids.masked_fill(invalid_extra, -1)
    sampled_ids = sampled_ids.clamp(0, vocab - 1)
    shapes = (n, k), n, n, (n, e), n, sampled_ids.shape
    out = TopRows(
        like.new_empty((n, k), dtype=torch.int64),
        *(like.new_empty(shape, dtype=linear.dtype) for shape in shapes),
    )

    def visit(u: Tensor, part: slice) -> None:
        ids = (u if bias is None else u + bias).topk(k, 1).indices
        z_sampled, _ = apply_logit_options(
            u.gather(1, sampled_ids[part]), sampled_ids[part], linear.logit_options
        )
        listed, first = distinct(torch.cat([ids, extra_ids[part]], 1))
        state = RowState.start(u, len(u), k + e, linear.dtype)
        listed_ids = functions.locate(listed, None, vocab)
        functions.reduce(u, 0, listed_ids, linear.logit_options, True, state)
        student = student_buckets(state)
        logprobs = student.logprobs
        rows = TopRows(
            ids,
            logprobs[:, :k],
            logprobs[:, k:].logsumexp(1),
            student.entropy,
            logprobs.gather(1, first[:, k:]),
            logprobs[:, -1],
            z_sampled - student.max_logit - student.lse,
        )
        for field, value in zip(out, rows, strict=True):
            field[part] = value

    copies = bias is not None or (like.is_cuda and vocab != padded(vocab))
    sizes = linear.sizes(k + e + READ_WORDS)._replace(logits=2 if copies else 1)
    rows = chunk_rows(sizes, Needs(), False, workspace_bytes)
    visit_chunks(linear, rows, linear.operand(None), WeightRows(linear.weight), visit)
    out.extra_logprobs.masked_fill_(invalid_extra, math.nan)
    out.extra_tail_logprobs.masked_fill_(invalid_extra[:, 0], math.nan)
    out.sampled_logprobs.masked_fill_(pads & ~out.sampled_logprobs.isnan(), -math.inf)
    out.sampled_logprobs.masked_fill_(invalid_sampled, math.nan)
    return out
