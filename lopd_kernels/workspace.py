"""The memory that a loss needs beyond its inputs and outputs, computed from sizes only."""

from __future__ import annotations

import torch

from lopd_kernels import _checks
from lopd_kernels._core.types import LARGEST_SHARE, Skip
from lopd_kernels._core.workspace import Needs, Sizes, WorkspaceError, allocated

__all__ = ["WorkspaceError", "workspace_needed"]


def workspace_needed(
    rows: int,
    vocab: int,
    hidden_size: int,
    k: int,
    *,
    dtype: torch.dtype,
    device: str = "cuda",
    hidden_grad: bool = True,
    weight_grad: bool = True,
    bias_grad: bool = False,
    dense_share: float | None = None,
    tolerance: float = 0.0,
    workspace_bytes: int | None = None,
) -> int:
    """Bytes that a loss with reduction "sum" or "mean" allocates beyond inputs and outputs.

    This is the model by which the losses choose their schedule. Temporaries of single
    operators and what the allocator leaves unused are not counted. How many rows a chunk has
    depends on the GPU; the largest chunks are counted.

    Args:
        rows: loss-bearing rows N of hidden [N, D].
        vocab: rows V of the LM head's weight [V, D].
        hidden_size: D.
        k: ids in a row's list; 1 for the losses on one id per row.
        dtype: of hidden and weight.
        device: "cuda" or "cpu".
        hidden_grad, weight_grad, bias_grad: which gradients the backward computes.
        dense_share, tolerance: those that the call would get.
        workspace_bytes: the bound that the call would get.

    Returns:
        The number of bytes, forward and backward together at their peak.

    Raises:
        WorkspaceError: no schedule fits in `workspace_bytes`; the message names the smallest
            bound. The losses raise it too; it is a ValueError.
        ValueError: an invalid argument; the message names it.

    >>> workspace_needed(8192, 151936, 4096, 64, dtype=torch.bfloat16) >> 20
    3731
    """
    sizes = Sizes.of_shapes(rows, vocab, hidden_size, k, dtype, device)
    needs = Needs(hidden_grad, weight_grad, bias_grad)
    _checks.check_skipping(dense_share, tolerance, "sum", None)
    if tolerance > 0.0 or (dense_share is not None and dense_share <= LARGEST_SHARE):
        sizes = sizes.keeping(Skip(dense_share, tolerance, None))
    return allocated(sizes, needs, workspace_bytes)
