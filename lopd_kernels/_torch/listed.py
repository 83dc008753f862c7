"""`sparse.SparseFunctions` in torch: the listed rows of the weight are gathered."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lopd_kernels._core.gemm import compute_dtype


def _blocks(n: int, rows: int) -> Iterator[slice]:
    for start in range(0, n, rows):
        yield slice(start, min(start + rows, n))


def dots(hidden: Tensor, weight: Tensor, ids: Tensor, rows: int) -> Tensor:
    dtype = compute_dtype(hidden.dtype)
    out = hidden.new_empty(ids.shape, dtype=dtype)
    for part in _blocks(len(hidden), rows):
        picked = weight[ids[part]].to(dtype)
        out[part] = torch.bmm(picked, hidden[part].to(dtype).unsqueeze(2))[:, :, 0]
    return out


def hidden_grad(grad: Tensor, weight: Tensor, ids: Tensor, rows: int) -> Tensor:
    out = weight.new_empty((len(ids), weight.shape[1]))
    idle = (grad == 0.0).unsqueeze(2)
    for part in _blocks(len(ids), rows):
        picked = weight[ids[part]].to(grad.dtype).masked_fill(idle[part], 0.0)
        out[part] = torch.bmm(grad[part].unsqueeze(1), picked)[:, 0]
    return out


def weight_grad(
    grad: Tensor, hidden: Tensor, ids: Tensor, rows: int, out: Tensor, add: bool
) -> None:
    """Entries are added in row order, on every device by its deterministic kernel."""
    total = out if add or out.dtype == grad.dtype else out.new_empty(out.shape, dtype=grad.dtype)
    if not add:
        total.zero_()
    idle = (grad == 0.0).unsqueeze(2)
    for part in _blocks(len(ids), rows):
        wide = hidden[part].to(grad.dtype).unsqueeze(1)
        outer = (grad[part].unsqueeze(2) * wide).masked_fill_(idle[part], 0.0).flatten(0, 1)
        if total.is_cuda:
            total.index_put_((ids[part].flatten(),), outer, accumulate=True)
        else:
            total.index_add_(0, ids[part].flatten(), outer)
    if total is not out:
        out.copy_(total)
