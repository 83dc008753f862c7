"""The listed ids of each row, validated and made safe to index with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SafeListedIds(NamedTuple):
    """A `types.ListedIds` for PyTorch's gather and scatter."""

    ids: Tensor  # [N, K] int64 in [0, V); a pad repeats the row's largest id
    listed: Tensor  # [N, K] bool, False at pads
    anchor: Tensor  # [N, 1] column of the row's largest id
    active: Tensor  # [N] bool: has an id and a weight other than 0
    invalid: Tensor  # [N] bool: an id is out of range or repeated; the row's results are NaN

    def rows(self, part: slice) -> SafeListedIds:
        return SafeListedIds(*(field[part] for field in self))

    def in_panel(self, first: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """(columns [N, K], inside [N, K], anchor [N, 1]) for columns first to first + width.

        An id outside the panel repeats the column of `anchor`, which is inside if any id is.
        """
        inside = self.listed & (self.ids >= first) & (self.ids < first + width)
        anchor = inside.int().argmax(1, keepdim=True)
        columns = (self.ids - first).clamp(0, width - 1)
        return torch.where(inside, columns, columns.gather(1, anchor)), inside, anchor


def locate(ids: Tensor, row_weights: Tensor | None, vocab: int) -> SafeListedIds:
    ids = ids.long()
    listed = ids >= 0
    ordered = ids.sort(1).values
    repeated = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(1)
    invalid = repeated | ((ids >= vocab) | (ids < -1)).any(1)
    anchor = ids.argmax(1, keepdim=True)
    safe = torch.where(listed, ids, ids.gather(1, anchor))
    safe = torch.where(invalid.unsqueeze(1), 0, safe).clamp(min=0)
    active = listed.any(1) | invalid
    if row_weights is not None:
        active = active & (row_weights != 0)
    return SafeListedIds(safe, listed, anchor, active, invalid)


class Entries(NamedTuple):
    """The gradients at listed ids, to be added up by id."""

    grad: Tensor  # [N, K]
    ids: Tensor  # [E = N K] in ascending order; V where the gradient is 0
    order: Tensor  # [E] int64, which entry of `grad` it is, in order of the rows within an id
    starts: Tensor  # [V + 1] int64, where each id begins


def sort_entries(grad: Tensor, ids: Tensor, vocab: int) -> Entries:
    used = ids.masked_fill(grad == 0.0, vocab)
    ordered, order = used.flatten().sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(vocab + 1, device=ids.device))
    return Entries(grad.contiguous(), ordered, order, starts)


def distinct(ids: Tensor) -> tuple[Tensor, Tensor]:
    """(ids with repetitions replaced by -1, the column that holds each id), [N, K] each.

    A row of pads gets id 0, so that the row is active.
    """
    ids = ids.long()
    ordered, order = ids.sort(dim=1, stable=True)
    is_new = torch.ones_like(ordered, dtype=torch.bool)
    is_new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    columns = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    begin = torch.where(is_new, columns, 0).cummax(1).values
    first = torch.empty_like(order).scatter_(1, order, order.gather(1, begin))
    once = ids.masked_fill(first != columns, -1)
    once[:, 0] = torch.where((once == -1).all(1), 0, once[:, 0])
    return once, first


def add_at(total: Tensor, index: Tensor, values: Tensor) -> None:
    """total[index[i]] += values[i] in order of i, by each device's deterministic kernel."""
    if total.is_cuda:
        total.index_put_((index,), values, accumulate=True)
    else:
        total.index_add_(0, index, values)
