"""Does the student's own top of the vocabulary still agree with the teacher's lists?

The overlap of a row is the share of the teacher's n listed ids that are among the student's n
most probable ones. Finding those takes the row's logits once more, so it is measured on one row in
`STRIDE`, chosen by sequence and position alone: however a step is cut, the rows are the same.
"""

import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lopd_kernels import linear_topk

STRIDE = 64


def is_probed(name: str, positions: np.ndarray) -> np.ndarray:  # [T] bool
    """Which positions of the answer of the sequence of this name are measured."""
    return (positions + zlib.crc32(name.encode())) % STRIDE == 0


@torch.no_grad()
def topk_overlap(
    rows: Tensor,  # [P, D]
    weight: Tensor,  # [V, D]
    topk_ids: Tensor,  # [P, K] int, -1 pads
    row_weights: Tensor,  # [P]
    options: dict[str, Any],
) -> Tensor:  # [2]
    """Weighted sum of the rows' overlaps, and of the weights of the rows that have a list.

    Args:
        options: of `linear_topk`.
    """
    listed = topk_ids >= 0
    lengths = listed.sum(1)
    if not len(rows):
        return row_weights.new_zeros(2)
    top = linear_topk(rows, weight, min(topk_ids.shape[1], weight.shape[0]), **options)
    ranks = torch.arange(top.ids.shape[1], device=rows.device)
    own = torch.where(ranks < lengths[:, None], top.ids.to(topk_ids.dtype), -2)
    found = (topk_ids[:, :, None] == own[:, None, :]).any(2) & listed
    overlap = found.sum(1) / lengths.clamp(min=1)
    weights = torch.where(lengths > 0, row_weights, 0.0)
    return torch.stack([(weights * overlap).sum(), weights.sum()])
