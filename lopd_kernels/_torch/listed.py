"""`backend.ListedFunctions` in torch: the listed rows of the weight are gathered."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from lopd_kernels._core.gemm import compute_dtype
from lopd_kernels._core.listed_ids import Entries, add_at


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


def hidden_grad(grad: Tensor, weight: Tensor, ids: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    if weight.dtype == grad.dtype == dtype and len(ids):
        return embedding_bag(ids, weight, mode="sum", per_sample_weights=grad.contiguous())
    out = weight.new_empty((len(ids), weight.shape[1]), dtype=dtype)
    for part in _blocks(len(ids), rows):
        gathered = weight[ids[part]].to(grad.dtype)
        out[part] = torch.bmm(grad[part].unsqueeze(1), gathered)[:, 0]
    return out


def weight_grad(
    entries: Entries, hidden: Tensor, rows: int, first: int, out: Tensor, add: bool
) -> None:
    grad, k = entries.grad.flatten(), entries.grad.shape[1]
    total = out if add or out.dtype == grad.dtype else out.new_empty(out.shape, dtype=grad.dtype)
    if not add:
        total.zero_()
    begin, end = entries.starts[[first, first + len(out)]].tolist()
    for start in range(begin, end, rows * k):
        part = slice(start, min(start + rows * k, end))
        at = entries.order[part]
        outer = hidden[at // k].to(grad.dtype).mul_(grad[at].unsqueeze(1))
        add_at(total, entries.ids[part] - first, outer)
    if total is not out:
        out.copy_(total)
