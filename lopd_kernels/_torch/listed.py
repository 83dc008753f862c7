"""`backend.ListedFunctions` in torch: the listed rows of the weight are gathered."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lopd_kernels._core.gemm import compute_dtype
from lopd_kernels._core.listed_ids import add_at


def _blocks(n: int, rows: int) -> Iterator[slice]:
    for start in range(0, n, rows):
        yield slice(start, min(start + rows, n))


def dots(hidden: Tensor, weight: Tensor, ids: Tensor, rows: int) -> Tensor:
    dtype = compute_dtype(hidden.dtype)
    out = hidden.new_empty(ids.shape, dtype=dtype)
    for part in _blocks(len(hidden), rows):
        gathered = weight[ids[part]].to(dtype)
        out[part] = torch.bmm(gathered, hidden[part].to(dtype).unsqueeze(2))[:, :, 0]
    return out


def hidden_grad(grad: Tensor, weight: Tensor, ids: Tensor, rows: int) -> Tensor:
    out = weight.new_empty((len(ids), weight.shape[1]))
    unused = (grad == 0.0).unsqueeze(2)
    for part in _blocks(len(ids), rows):
        gathered = weight[ids[part]].to(grad.dtype).masked_fill(unused[part], 0.0)
        out[part] = torch.bmm(grad[part].unsqueeze(1), gathered)[:, 0]
    return out


def weight_grad(
    grad: Tensor, hidden: Tensor, ids: Tensor, rows: int, out: Tensor, add: bool
) -> None:
    total = out if add or out.dtype == grad.dtype else out.new_empty(out.shape, dtype=grad.dtype)
    if not add:
        total.zero_()
    unused = (grad == 0.0).unsqueeze(2)
    for part in _blocks(len(ids), rows):
        wide = hidden[part].to(grad.dtype).unsqueeze(1)
        outer = (grad[part].unsqueeze(2) * wide).masked_fill_(unused[part], 0.0)
        add_at(total, ids[part].flatten(), outer.flatten(0, 1))
    if total is not out:
        out.copy_(total)
