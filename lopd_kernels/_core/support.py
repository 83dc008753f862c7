"""The ids of each row, checked and made safe to index with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Support(NamedTuple):
    """The ids of each row, made safe to index with."""

    ids: Tensor  # [N, K] int64 in [0, V); a pad repeats the row's largest id
    listed: Tensor  # [N, K] bool, False on pads
    anchor: Tensor  # [N, 1] column of the row's largest id
    active: Tensor  # [N] bool: has an id and a weight other than 0
    broken: Tensor  # [N] bool: an id out of range or twice: the row comes out NaN

    def rows(self, part: slice) -> Support:
        return Support(*(field[part] for field in self))

    def in_panel(self, first: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """(columns, inside, anchor): where the ids stand in a panel, each [N, K] but the anchor.

        An id outside repeats the column of `anchor` [N, 1], one that is inside if any is.
        """
        inside = self.listed & (self.ids >= first) & (self.ids < first + width)
        anchor = inside.int().argmax(1, keepdim=True)
        columns = (self.ids - first).clamp(0, width - 1)
        return torch.where(inside, columns, columns.gather(1, anchor)), inside, anchor


def locate(ids: Tensor, row_weights: Tensor | None, vocab: int) -> Support:
    ids = ids.long()
    listed = ids >= 0
    ordered = ids.sort(1).values
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(1)
    broken = twice | ((ids >= vocab) | (ids < -1)).any(1)
    anchor = ids.argmax(1, keepdim=True)
    safe = torch.where(listed, ids, ids.gather(1, anchor))
    safe = torch.where(broken.unsqueeze(1), 0, safe).clamp(min=0)
    active = listed.any(1) | broken
    if row_weights is not None:
        active = active & (row_weights != 0)
    return Support(safe, listed, anchor, active, broken)
