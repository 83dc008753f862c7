"""Overlap of the student's top-k with the teacher's list, on a sample of positions."""

import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lopd_kernels import linear_topk

STRIDE = 64  # one in this many positions of an answer is measured


def is_overlap_position(name: str, positions: np.ndarray) -> np.ndarray:  # [T] bool
    """Whether each position [T] of an answer is measured; `name` is that of the sequence."""
    return (positions + zlib.crc32(name.encode())) % STRIDE == 0


@torch.no_grad()
def topk_overlap(
    rows: Tensor,  # [P, D]
    weight: Tensor,  # [V, D]
    topk_ids: Tensor,  # [P, K] int, padded with -1
    row_weights: Tensor,  # [P]
    options: dict[str, Any],
) -> Tensor:  # [2]
    """Weighted sum of the overlaps of rows, and sum of the weights, over rows with a list.

    The overlap of a row with a list of n ids is the share of them among the student's n most
    likely ids.

    Args:
        rows: the student's hidden states at the measured positions.
        weight: of its LM head.
        topk_ids: the teacher's lists.
        row_weights: weights of the rows.
        options: keyword arguments of `linear_topk`.
    """
    if not topk_ids.numel():
        return row_weights.new_zeros(2)
    listed = topk_ids >= 0
    lengths = listed.sum(1)
    top = linear_topk(rows, weight, min(topk_ids.shape[1], weight.shape[0]), **options)
    ranks = torch.arange(top.ids.shape[1], device=rows.device)
    student_ids = torch.where(ranks < lengths[:, None], top.ids.to(topk_ids.dtype), -2)
    shared = (topk_ids[:, :, None] == student_ids[:, None, :]).any(2) & listed
    overlap = shared.sum(1) / lengths.clamp(min=1)
    weights = torch.where(lengths > 0, row_weights, 0.0)
    return torch.stack([(weights * overlap).sum(), weights.sum()])
