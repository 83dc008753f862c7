"""The most probable ids of each row."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lopd_kernels._core.buckets import settle
from lopd_kernels._core.chunks import row_chunks
from lopd_kernels._core.gemm import Panels
from lopd_kernels._core.linear import Linear
from lopd_kernels._core.listed import finish
from lopd_kernels._core.types import Reduction
from lopd_kernels._core.workspace import WIDE, Needs, chunk_rows, padded


class TopRows(NamedTuple):
    ids: Tensor  # [N, k] int64
    logprobs: Tensor  # [N, k]
    tail_logprobs: Tensor  # [N]
    entropy: Tensor  # [N]
    extra_logprobs: Tensor  # [N, E] or [N, 0]


def topk(linear: Linear, k: int, extra_ids: Tensor | None, workspace_bytes: int | None) -> TopRows:
    """The k most probable ids of each row; the tail is reduced with those ids removed."""
    n, vocab = linear.hidden.shape[0], linear.weight.shape[0]
    like, functions = linear.hidden, linear.functions
    if extra_ids is None:
        extra_ids = like.new_empty((n, 0), dtype=torch.int64)
    index = extra_ids.long()
    broken = ((index < -1) | (index >= vocab)).any(1, keepdim=True)
    index = index.clamp(0, vocab - 1)
    found = TopRows(
        like.new_empty((n, k), dtype=torch.int64),
        like.new_empty((n, k), dtype=linear.dtype),
        like.new_empty(n, dtype=linear.dtype),
        like.new_empty(n, dtype=linear.dtype),
        like.new_empty(extra_ids.shape, dtype=linear.dtype),
    )
    bias = linear.head.bias

    def visit(u: Tensor, part: slice) -> None:
        ids = (u if bias is None else u + bias).topk(k, 1).indices
        extra, _ = finish(u.gather(1, index[part]), index[part], linear.head)
        reduction = Reduction.start(u, len(u), k, linear.dtype)
        functions.reduce(u, 0, functions.locate(ids, None, vocab), linear.head, True, reduction)
        seen = settle(reduction)
        found.ids[part], found.logprobs[part] = ids, seen.buckets[:, :-1]
        found.tail_logprobs[part], found.entropy[part] = seen.buckets[:, -1], seen.entropy
        found.extra_logprobs[part] = extra - seen.top - seen.lse

    width = k + extra_ids.shape[1] + WIDE
    copies = bias is not None or (like.is_cuda and vocab != padded(vocab))
    sizes = linear.sizes(width)._replace(logits=2 if copies else 1)
    rows = chunk_rows(sizes, Needs(), False, workspace_bytes)
    row_chunks(linear, rows, linear.operand(None), Panels(linear.weight), visit)
    found.extra_logprobs.masked_fill_(extra_ids == -1, -math.inf).masked_fill_(broken, math.nan)
    return found
