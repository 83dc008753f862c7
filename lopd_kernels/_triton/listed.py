"""`backend.ListedFunctions` by the kernels of `kernels/listed.py`; they do not use `rows`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from lopd_kernels._core.gemm import compute_dtype
from lopd_kernels._core.listed_ids import Entries
from lopd_kernels._triton.kernels import listed
from lopd_kernels._triton.rows import on_device

BLOCKS = {"DBLOCK": 256, "KBLOCK": 16}
WARPS = 4


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def dots(hidden: Tensor, weight: Tensor, ids: Tensor, rows: int) -> Tensor:
    (n, d), k = hidden.shape, ids.shape[1]
    out = hidden.new_empty(ids.shape, dtype=compute_dtype(hidden.dtype))
    hidden, weight = _rows_contiguous(hidden), _rows_contiguous(weight)
    if n:
        with on_device(hidden.device):
            listed.gather_dot_kernel[(n, triton.cdiv(k, BLOCKS["KBLOCK"]))](
                hidden, weight, ids.contiguous(), out, hidden.stride(0), weight.stride(0), d, k,
                **BLOCKS, num_warps=WARPS,
            )  # fmt: skip
    return out


def hidden_grad(grad: Tensor, weight: Tensor, ids: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    (n, k), d = ids.shape, weight.shape[1]
    out = weight.new_empty((n, d), dtype=dtype)
    weight = _rows_contiguous(weight)
    if n:
        with on_device(weight.device):
            listed.gather_sum_kernel[(n, triton.cdiv(d, BLOCKS["DBLOCK"]))](
                grad.contiguous(), weight, ids.contiguous(), out, weight.stride(0), d, k,
                **BLOCKS, num_warps=WARPS,
            )  # fmt: skip
    return out


def weight_grad(
    entries: Entries, hidden: Tensor, rows: int, first: int, out: Tensor, add: bool
) -> None:
    k, (v, d) = entries.grad.shape[1], out.shape
    hidden = _rows_contiguous(hidden)
    with on_device(hidden.device):
        listed.segment_sum_kernel[(v, triton.cdiv(d, BLOCKS["DBLOCK"]))](
            entries.grad, hidden, entries.order, entries.starts, out,
            hidden.stride(0), out.stride(0), first, d, k,
            ADD=add, DBLOCK=BLOCKS["DBLOCK"], EBLOCK=BLOCKS["KBLOCK"], num_warps=WARPS,
        )  # fmt: skip
