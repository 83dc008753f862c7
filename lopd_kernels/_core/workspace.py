"""The memory model of a call, and the choice of its schedule.

    row chunks   Logits of some rows over the whole vocabulary at a time, and their gradient in
                 the forward. Three GEMMs. dW accumulates in the compute dtype; or the 16-bit
                 dlogits of all rows are stored (`stores_dlogits`), and the backward computes dH
                 and dW from them in one GEMM each.
    panels       Logits of all rows over some of the vocabulary at a time. The forward stores row
                 statistics; the backward computes each panel again and writes that panel's rows
                 of dW once. Four GEMMs, no accumulator for dW.

Sizes are in bytes and count what a call allocates beyond inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lopd_kernels._core import crew
from lopd_kernels._core.gemm import (
    buffer_rows,
    compute_dtype,
    is_mixed,
    partial_sums,
    widened_rows,
)
from lopd_kernels._core.types import Needs, Skip
from lopd_kernels._core.waves import Gpu, Work, best_rows

ALIGNMENT = 16  # columns: keeps rows of logits on vector boundaries
CHUNK_BYTES = {"cuda": 1 << 30, "cpu": 256 << 20}  # of logits in a chunk without a bound
WAVES_BYTES = 5 << 28  # the same where a GPU's waves decide
PANEL_BYTES = {"cuda": 512 << 20, "cpu": 256 << 20}
WEIGHT_GRAD_BYTES = 64 << 20  # of dW in the compute dtype, where dlogits are stored
BLOCK_BYTES = 8 << 20  # of the rows that a thread of the row functions in torch has at a time
FEWEST_ROWS = 128  # with fewer rows to a chunk, the GEMMs are bound by reading the weight
MOST_CANDIDATES = 64  # numbers of rows that are compared: each takes the host some microseconds
GATHER_BYTES = 2 << 20  # of listed rows of the weight that are gathered at a time, on a CPU
SORT_WORDS = 12  # words per listed id that sorting by id takes
READ_WORDS = 4  # words per row that reading log-probs takes in addition
# Words per row and bucket: ids, targets, statistics and, in torch, the rule. Measured on a CPU.
BOOKKEEPING = {"torch": 14, "fused": 6}


def padded(columns: int) -> int:
    return -(-columns // ALIGNMENT) * ALIGNMENT


class Sizes(NamedTuple):
    """What the memory of a call depends on."""

    n: int
    v: int
    d: int
    width: int  # of the list
    element: int  # bytes of a parameter
    compute: int  # bytes of a logit
    widened: int  # rows of the weight that are widened at a time
    mixed: bool
    device: str
    logits: int = 1  # buffers of [rows, columns] logits
    kept: int | None = None  # rows whose gradient outside the list is formed; None: all, exactly
    threads: int = 1  # of a CPU, that work on different rows or columns

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, width: int) -> Sizes:
        device = "cuda" if hidden.is_cuda else "cpu"
        (n, d), v = hidden.shape, weight.shape[0]
        sizes = cls.of_shapes(n, v, d, width, hidden.dtype, device)
        return sizes._replace(mixed=is_mixed(hidden), widened=widened_rows(weight))

    @classmethod
    def of_shapes(
        cls, n: int, v: int, d: int, width: int, dtype: torch.dtype, device: str
    ) -> Sizes:
        mixed = device == "cuda" and dtype in (torch.bfloat16, torch.float16)
        compute = compute_dtype(dtype).itemsize
        widened = 0 if mixed or dtype.itemsize == compute else buffer_rows(v, d)
        threads = crew.size() if device == "cpu" else 1
        return cls(n, v, d, width, dtype.itemsize, compute, widened, mixed, device, threads=threads)

    def keeping(self, skip: Skip | None) -> Sizes:
        return self if skip is None else self._replace(kept=skip.capacity(self.n))

    def common(self, rows: int, columns: int, rule: str) -> int:
        """What every schedule needs: logits, blocks of rows, operands, bookkeeping."""
        operand = self.element if self.mixed else self.compute
        blocks, sums = 0, 0
        if self.device == "cpu":
            largest = self.threads * (BLOCK_BYTES + columns * self.compute)
            blocks = min(rows * columns * self.compute, largest) * 2
            sums = partial_sums(columns, self.d) * rows * self.d * self.compute
        return (
            rows * padded(columns) * self.compute * self.logits
            + blocks
            + sums
            + self.n * self.d * operand
            + self.widened * self.d * self.compute * self.threads
            + 2 * self.v * self.compute
            + BOOKKEEPING[rule] * self.n * (self.width + 2) * self.compute
        )

    def chunked(self, rows: int, needs: Needs, stored: bool) -> int:
        """Row chunks, with accumulated gradients or with stored dlogits."""
        forward = self.common(rows, self.v, "fused" if self.device == "cuda" else "torch")
        if not stored:
            grads = self.n * self.d * needs.hidden + self.v * self.d * needs.weight
            grads = (grads + self.v * needs.bias) * self.compute
            return forward + grads + self.kept_bytes(rows, needs)
        dlogits = self.n * padded(self.v) * self.element
        dweight = min(self.v, weight_grad_rows(self.d, self.compute)) * self.d * self.compute
        backward = self.common(0, 0, "fused") + max(self.wide_hidden_grad(needs), dweight)
        return dlogits + max(forward, backward)

    def places(self, rows: int) -> int:
        """Rows of the buffer for dlogits of kept rows, with chunks of `rows` rows."""
        fills = -(-(self.kept or 0) // max(1, rows))
        return -(-(self.kept or 0) // max(1, fills))  # equally full

    def kept_bytes(self, rows: int, needs: Needs) -> int:
        """What row chunks need in addition, if only some rows are kept."""
        if self.kept is None or not any(needs):
            return 0
        operand = self.element if self.mixed else self.compute
        each = padded(self.v) * operand + self.d * (operand + self.compute)
        dhidden = self.n * self.d * self.compute * needs.hidden
        return self.places(rows) * each + dhidden + self.listed_bytes()

    def wide_hidden_grad(self, needs: Needs) -> int:
        """What dH in the compute dtype takes beyond the dH that is returned."""
        return self.n * self.d * (self.compute - self.element) * needs.hidden

    def panelled(self, columns: int, needs: Needs) -> int:
        """Panels, with the gradients that `needs` names in the backward."""
        narrow = self.element < self.compute
        dweight = columns * self.d * self.compute * (self.mixed or (narrow and needs.weight))
        if self.kept is None or not any(needs):
            return self.wide_hidden_grad(needs) + dweight + self.common(self.n, columns, "torch")
        kept = self.kept * self.d * (2 * self.compute + self.element)  # hidden, its operand, dH
        wide = self.n * self.d * self.compute * needs.hidden
        common = self.common(self.kept, columns, "torch")
        return self.listed_bytes() + kept + wide + dweight + common

    def listed_bytes(self) -> int:
        """What the gradients at the listed ids take: sorted entries, and gathered rows on a CPU."""
        entries = self.n * (self.width + 2)
        sort = SORT_WORDS * self.compute * entries + 8 * self.v
        gathered = 0
        if self.device == "cpu":
            rows = gather_rows(self.n, self.width, self.d)
            gathered = self.compute * self.width * 3 * self.d * rows
        return sort + gathered


def gather_rows(n: int, width: int, d: int) -> int:
    """Rows whose K rows of the weight are gathered at a time, if no bound says otherwise."""
    return max(1, min(n, GATHER_BYTES // (4 * width * d)))


def weight_grad_rows(d: int, compute: int) -> int:
    """Rows of dW [V, D] that are computed in the compute dtype at a time from stored dlogits."""
    return max(1, WEIGHT_GRAD_BYTES // (d * compute))


def stores_dlogits(sizes: Sizes, needs: Needs, workspace_bytes: int | None) -> bool:
    """Whether dlogits of all rows are stored: if they are smaller than an fp32 dW."""
    if sizes.kept is not None:
        return False
    if not (sizes.mixed and needs.weight) or sizes.n * sizes.element > sizes.d * sizes.compute:
        return False
    least = sizes.chunked(min(sizes.n, FEWEST_ROWS), needs, True)
    return workspace_bytes is None or least <= workspace_bytes


def in_forward(sizes: Sizes, needs: Needs, workspace_bytes: int | None) -> bool:
    """Whether row chunks fit, with enough rows to be efficient; panels otherwise.

    Raises:
        ValueError: neither fits.
    """
    if workspace_bytes is None:
        return True
    stored = stores_dlogits(sizes, needs, workspace_bytes)
    rows = min(max(sizes.n, 1), FEWEST_ROWS)
    if sizes.chunked(rows, needs, stored) <= workspace_bytes:
        return True
    panels, chunks = sizes.panelled(1, needs), sizes.chunked(1, needs, stored)
    if min(panels, chunks) > workspace_bytes:
        raise _too_small(workspace_bytes, min(panels, chunks), sizes)
    return panels > workspace_bytes


def logits_rows(logits: Tensor) -> int:
    """Rows of logits [N, V] that are copied to the compute dtype at a time."""
    width = padded(max(1, logits.shape[1])) * compute_dtype(logits.dtype).itemsize
    return max(1, (CHUNK_BYTES["cuda"] if logits.is_cuda else BLOCK_BYTES) // width)


def _largest(bound: int, high: int, size: Callable[[int], int]) -> int:
    """The largest count up to `high` with size(count) <= bound; 0 if there is none."""
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size(middle) <= bound else (low, middle - 1)
    return low


class WorkspaceError(ValueError):
    """Raised when a call does not fit in its `workspace_bytes`; it names the smallest bound."""


def _too_small(workspace_bytes: int, smallest: int, sizes: Sizes) -> WorkspaceError:
    return WorkspaceError(
        f"workspace_bytes is {workspace_bytes}, but hidden [{sizes.n}, {sizes.d}] and weight "
        f"[{sizes.v}, {sizes.d}] need at least {smallest}; pass workspace_bytes={smallest} or more"
    )


def fills_waves(sizes: Sizes) -> bool:
    """Whether a GPU may choose the rows of a chunk: not where a sample of rows depends on them."""
    return sizes.device == "cuda" and sizes.mixed and sizes.kept is None


def most_rows(
    sizes: Sizes, needs: Needs, stored: bool, workspace_bytes: int | None, waves: bool
) -> int:
    """The most rows that a chunk may have: what the bound admits, or a default size of logits.

    Args:
        waves: whether the rows will be those that fill a GPU's waves.
    """
    n = max(1, sizes.n)
    if workspace_bytes is None:
        size = WAVES_BYTES if waves else CHUNK_BYTES[sizes.device]
        return min(n, max(1, size // (padded(sizes.v) * sizes.compute)))
    rows = _largest(workspace_bytes, n, lambda rows: sizes.chunked(rows, needs, stored))
    if not rows:
        raise _too_small(workspace_bytes, sizes.chunked(1, needs, stored), sizes)
    return rows


def chunk_rows(
    sizes: Sizes,
    needs: Needs,
    stored: bool,
    workspace_bytes: int | None,
    gpu: Gpu | None = None,
) -> int:
    """Rows of a chunk: of at most `most_rows`, those that keep a known GPU busy, or equal ones."""
    waves = gpu is not None and fills_waves(sizes)
    n, most = max(1, sizes.n), most_rows(sizes, needs, stored, workspace_bytes, waves)
    if gpu is not None and waves and FEWEST_ROWS <= most < n:
        grads = needs if not stored else Needs()
        work = Work(n, sizes.v, sizes.d, grads.hidden, grads.weight)
        stride = -(-most // (MOST_CANDIDATES * FEWEST_ROWS)) * FEWEST_ROWS
        return best_rows(work, gpu, range(stride, most + 1, stride))
    even = -(-n // -(-n // most))
    return min(most, -(-even // FEWEST_ROWS) * FEWEST_ROWS)


def panel_columns(sizes: Sizes, needs: Needs, workspace_bytes: int | None) -> int:
    """Columns of a panel: as many as the bound admits, or about PANEL_BYTES of logits."""
    if workspace_bytes is None:
        rows = sizes.n if sizes.kept is None or not any(needs) else sizes.kept
        columns = PANEL_BYTES[sizes.device] // (max(1, rows) * sizes.compute)
        columns = max(1, min(columns, sizes.v))
    else:
        columns = _largest(workspace_bytes, sizes.v, lambda columns: sizes.panelled(columns, needs))
    if not columns:
        raise _too_small(workspace_bytes or 0, sizes.panelled(1, needs), sizes)
    if columns == sizes.v:
        return columns
    return max(1, columns // 128 * 128) if columns >= 128 else columns


def allocated(sizes: Sizes, needs: Needs, workspace_bytes: int | None) -> int:
    """What a loss summed over its rows allocates under the schedule that it gets.

    On a GPU, which may be any, with the largest chunks.

    Raises:
        ValueError: no schedule fits.
    """
    if in_forward(sizes, needs, workspace_bytes):
        stored = stores_dlogits(sizes, needs, workspace_bytes)
        if fills_waves(sizes):
            rows = most_rows(sizes, needs, stored, workspace_bytes, waves=True)
        else:
            rows = chunk_rows(sizes, needs, stored, workspace_bytes)
        return sizes.chunked(rows, needs, stored)
    passes = Needs(), needs  # the forward, the backward
    return max(sizes.panelled(panel_columns(sizes, x, workspace_bytes), x) for x in passes)
