"""Which schedule a call takes, and what it allocates.

    row chunks   logits of some rows and the whole vocabulary at a time, and their gradient with
                 them, in the forward. Three GEMMs. dW accumulates in the compute dtype or, with
                 `keeps_dz`, the 16-bit dz of all rows is kept and the backward makes dH and dW of
                 it in one GEMM each.
    panels       logits of all rows and some of the vocabulary at a time: the forward keeps row
                 statistics, the backward computes each panel again and writes that panel's
                 rows of dW once. Four GEMMs, no accumulator for dW.

Sizes are in bytes and count what a call allocates beyond inputs and outputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lopd_kernels._core.gemm import compute_dtype, is_mixed, panel_rows, widened_rows

ALIGNMENT = 16  # columns: keeps rows of logits on vector boundaries
CHUNK_BYTES = {"cuda": 1 << 30, "cpu": 256 << 20}
PANEL_BYTES = {"cuda": 512 << 20, "cpu": 256 << 20}
KEPT_BYTES = 64 << 20
BLOCK_BYTES = 8 << 20  # of a block of rows on a CPU
WIDE = 4
FEWEST_ROWS = 128  # below this, chunks of rows keep the GEMMs busy with reading the weight
# words per row and bucket for ids, targets, statistics and, in torch, the rule; measured on a CPU
BOOKKEEPING = {"torch": 14, "fused": 6}


def padded(columns: int) -> int:
    return -(-columns // ALIGNMENT) * ALIGNMENT


class Needs(NamedTuple):
    hidden: bool = False
    weight: bool = False
    bias: bool = False


class Sizes(NamedTuple):
    """What the memory of a call depends on."""

    n: int
    v: int
    d: int
    width: int  # of the support
    element: int  # bytes of a parameter
    compute: int  # bytes of a logit
    widened: int  # rows of the weight that are widened at a time
    mixed: bool
    device: str
    logits: int = 1  # buffers of [rows, columns] logits

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, width: int) -> Sizes:
        device = "cuda" if hidden.is_cuda else "cpu"
        (n, d), v = hidden.shape, weight.shape[0]
        sizes = cls.of_shapes(n, v, d, width, hidden.dtype, device)
        return sizes._replace(mixed=is_mixed(hidden), widened=panel_rows(weight))

    @classmethod
    def of_shapes(
        cls, n: int, v: int, d: int, width: int, dtype: torch.dtype, device: str
    ) -> Sizes:
        mixed = device == "cuda" and dtype in (torch.bfloat16, torch.float16)
        compute = compute_dtype(dtype).itemsize
        widened = 0 if mixed or dtype.itemsize == compute else min(v, widened_rows(d))
        return cls(n, v, d, width, dtype.itemsize, compute, widened, mixed, device)

    def held(self, rows: int, columns: int, rule: str) -> int:
        """What any schedule holds: logits, blocks of the row functions, widened operands."""
        operand = self.element if self.mixed else self.compute
        blocks = 0
        if self.device == "cpu":
            blocks = min(rows * columns * self.compute, BLOCK_BYTES + columns * self.compute) * 2
        return (
            rows * padded(columns) * self.compute * self.logits
            + blocks
            + self.n * self.d * operand
            + self.widened * self.d * self.compute
            + 2 * self.v * self.compute
            + BOOKKEEPING[rule] * self.n * (self.width + 2) * self.compute
        )

    def chunked(self, rows: int, needs: Needs, keeps_dz: bool) -> int:
        """Row chunks; the backward scales the gradients, or makes them of the dz that was kept."""
        held = self.held(rows, self.v, "fused" if self.device == "cuda" else "torch")
        if not keeps_dz:
            grads = self.n * self.d * needs.hidden + self.v * self.d * needs.weight
            return held + (grads + self.v * needs.bias) * self.compute
        kept = self.n * padded(self.v) * self.element
        panel = min(self.v, kept_columns(self.d, self.compute)) * self.d * self.compute
        return kept + max(held, self.held(0, 0, "fused") + max(self.widening(needs), panel))

    def widening(self, needs: Needs) -> int:
        """What dH in the compute dtype takes beyond the dH that is returned."""
        return self.n * self.d * (self.compute - self.element) * needs.hidden

    def panelled(self, columns: int, needs: Needs) -> int:
        """Panels, gradient in the backward, or none."""
        hidden = self.widening(needs)
        narrow = self.element < self.compute
        weight = columns * self.d * self.compute * (self.mixed or (narrow and needs.weight))
        return hidden + weight + self.held(self.n, columns, "torch")


def kept_columns(d: int, compute: int) -> int:
    """Rows of dW [V, D] that are made in the compute dtype at a time where dz was kept."""
    return max(1, KEPT_BYTES // (d * compute))


def keeps_dz(sizes: Sizes, needs: Needs, workspace_bytes: int | None) -> bool:
    """Whether dz of all rows is kept: where that is less than an fp32 accumulator for dW."""
    if not (sizes.mixed and needs.weight) or sizes.n * sizes.element > sizes.d * sizes.compute:
        return False
    least = sizes.chunked(min(sizes.n, FEWEST_ROWS), needs, True)
    return workspace_bytes is None or least <= workspace_bytes


def in_forward(sizes: Sizes, needs: Needs, workspace_bytes: int | None) -> bool:
    """Whether row chunks fit, with enough rows to be worth it; panels otherwise.

    Raises ValueError where neither fits.
    """
    if workspace_bytes is None:
        return True
    keeps = keeps_dz(sizes, needs, workspace_bytes)
    rows = min(max(sizes.n, 1), FEWEST_ROWS)
    if sizes.chunked(rows, needs, keeps) <= workspace_bytes:
        return True
    panels, chunks = sizes.panelled(1, needs), sizes.chunked(1, needs, keeps)
    if min(panels, chunks) > workspace_bytes:
        raise _refuse(workspace_bytes, min(panels, chunks), sizes)
    return panels > workspace_bytes


def logits_rows(logits: Tensor) -> int:
    """Rows of given logits [N, V] that are copied to the compute dtype at a time."""
    width = padded(max(1, logits.shape[1])) * compute_dtype(logits.dtype).itemsize
    return max(1, (CHUNK_BYTES["cuda"] if logits.is_cuda else BLOCK_BYTES) // width)


def _largest(bound: int, high: int, size) -> int:
    """The largest count up to `high` whose size is within the bound; 0 if there is none."""
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size(middle) <= bound else (low, middle - 1)
    return low


def _refuse(workspace_bytes: int, smallest: int, sizes: Sizes) -> ValueError:
    return ValueError(
        f"workspace_bytes is {workspace_bytes}, but hidden [{sizes.n}, {sizes.d}] and weight "
        f"[{sizes.v}, {sizes.d}] need at least {smallest}; pass workspace_bytes={smallest} or more"
    )


def chunk_rows(sizes: Sizes, needs: Needs, keeps: bool, workspace_bytes: int | None) -> int:
    """Rows of a chunk: as many as the bound admits, or about CHUNK_BYTES of logits."""
    n = max(1, sizes.n)
    if workspace_bytes is None:
        rows = max(1, CHUNK_BYTES[sizes.device] // (padded(sizes.v) * sizes.compute))
    else:
        rows = _largest(workspace_bytes, n, lambda rows: sizes.chunked(rows, needs, keeps))
    if not rows:
        raise _refuse(workspace_bytes or 0, sizes.chunked(1, needs, keeps), sizes)
    whole = -(-n // min(rows, n))  # chunks of equal size
    even = -(-n // whole)
    return min(rows, n, -(-even // FEWEST_ROWS) * FEWEST_ROWS)


def panel_columns(sizes: Sizes, needs: Needs, workspace_bytes: int | None) -> int:
    """Columns of a panel: as many as the bound admits, or about PANEL_BYTES of logits."""
    if workspace_bytes is None:
        columns = PANEL_BYTES[sizes.device] // (max(1, sizes.n) * sizes.compute)
        columns = max(1, min(columns, sizes.v))
    else:
        columns = _largest(workspace_bytes, sizes.v, lambda columns: sizes.panelled(columns, needs))
    if not columns:
        raise _refuse(workspace_bytes or 0, sizes.panelled(1, needs), sizes)
    if columns == sizes.v:
        return columns
    return max(1, columns // 128 * 128) if columns >= 128 else columns


def allocated(sizes: Sizes, needs: Needs, workspace_bytes: int | None) -> int:
    """What a loss summed over its rows allocates, by the schedule that it takes.

    Raises ValueError where none fits.
    """
    if in_forward(sizes, needs, workspace_bytes):
        keeps = keeps_dz(sizes, needs, workspace_bytes)
        return sizes.chunked(chunk_rows(sizes, needs, keeps, workspace_bytes), needs, keeps)
    return sizes.panelled(panel_columns(sizes, needs, workspace_bytes), needs)
