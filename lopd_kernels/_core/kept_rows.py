"""Row chunks that form the gradient outside the lists for some of their rows only.

    per chunk of rows    u = H_c W^T              GEMM 1, fp32
                         dL/dz at the lists, and the L1 norms of each row
                         kept rows                chosen by `skipping.select`
                         dlogits of kept rows     into a buffer, one after the other
    buffer full, or end  dH_kept += dlogits W     GEMM 2
                         dW += dlogits^T H_kept   GEMM 3
    end                  dH, dW += listed ids     K rows of the weight per row

The buffer has as many rows as a chunk at most, so that GEMMs 2 and 3 are as large as those of
`chunks` however few rows of a chunk are kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lopd_kernels._core import gemm, skipping
from lopd_kernels._core.chunks import visit_chunks
from lopd_kernels._core.linear import Linear
from lopd_kernels._core.listed import ListedGrads
from lopd_kernels._core.rules import RowLoss
from lopd_kernels._core.scaling import dlogits_bound, normalized_weights, weigh
from lopd_kernels._core.types import SKIP_STATS, Needs, SplitGrads
from lopd_kernels._core.workspace import chunk_rows, padded


class _Sums:
    """The gradients of rows whose dlogits are collected in a buffer."""

    def __init__(self, linear: Linear, hidden: Tensor, needs: Needs, places: int) -> None:
        like, vocab = linear.hidden, linear.weight.shape[0]
        shapes = like.shape, linear.weight.shape, (vocab,)
        self.dhidden, self.dweight, self.dbias = (
            like.new_zeros(shape if need else (0,), dtype=linear.dtype)
            for shape, need in zip(shapes, needs, strict=True)
        )
        self.linear, self.hidden, self.needs = linear, hidden, needs
        self.weight = gemm.WeightRows(linear.weight)
        self.buffer = hidden.new_empty((places, padded(vocab)))
        self.held: list[Tensor] = []  # the rows in the buffer
        self.count = 0

    def add(self, u: Tensor, first: int, selection: skipping.Selection, split: SplitGrads) -> None:
        """Add the kept rows of a chunk that begins at row `first`."""
        rows, vocab = selection.rows, self.linear.weight.shape[0]
        factor = split.factor[rows] * selection.factor
        start = 0
        while start < len(rows):
            stop = min(len(rows), start + len(self.buffer) - self.count)
            part, here = slice(start, stop), slice(self.count, self.count + stop - start)
            self.linear.functions.write_unlisted(
                u, rows[part], split.unlisted_max[rows[part]], factor[part],
                self.linear.logit_options, self.buffer[here, :vocab],
            )  # fmt: skip
            self.held.append(rows[part] + first)
            start, self.count = stop, here.stop
            if self.count == len(self.buffer):
                self.flush()

    def flush(self) -> None:
        if not self.count:
            return
        dlogits, rows = (
            self.buffer[: self.count, : self.linear.weight.shape[0]],
            torch.cat(self.held),
        )
        if self.needs.bias:
            self.dbias.add_(dlogits.sum(0, dtype=self.linear.dtype))
        if self.needs.hidden:
            dense = self.dhidden.new_empty((len(rows), self.dhidden.shape[1]))
            gemm.hidden_grad(dlogits, self.weight, 0, dense, accumulate=False)
            self.dhidden.index_add_(0, rows, dense)
        if self.needs.weight:
            gemm.weight_grad(dlogits, self.hidden[rows], self.dweight)
        self.held, self.count = [], 0


def fused_loss(
    linear: Linear, loss: RowLoss, needs: Needs, want_entropy: bool, workspace_bytes: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`chunks.fused_loss` with the rows that `loss.skip` keeps."""
    assert loss.skip is not None
    (n, k), vocab = loss.ids.shape, linear.weight.shape[0]
    functions, target, skip = linear.functions, loss.target.to(linear.dtype), loss.skip
    weights, scale = normalized_weights(linear, loss.row_weights, dlogits_bound(target))
    unit = (scale / linear.logit_options.slope).abs()  # of the norms
    listed_ids = functions.locate(loss.ids, loss.row_weights, vocab)
    hidden = linear.operand(listed_ids.active)
    sizes = linear.sizes(k).keeping(skip)
    rows = chunk_rows(sizes, needs, False, workspace_bytes)
    sums = _Sums(linear, hidden, needs, sizes.places(rows) * any(needs))
    stats = hidden.new_zeros((n, loss.stats_width), dtype=linear.dtype)
    split = SplitGrads.zeros(hidden, n, k, linear.dtype)

    def visit(u: Tensor, part: slice) -> None:
        mine = split.rows(part)
        functions.row_pass(
            u, listed_ids.rows(part), target[part], weights[part], loss.rule,
            linear.logit_options, want_entropy, stats[part, : -len(SKIP_STATS)], None, split=mine,
        )  # fmt: skip
        norms = mine.listed_l1 * unit, mine.unlisted_l1 * unit
        selection = skipping.select(skip, *norms, stream=part.start // rows)
        stats[part, -len(SKIP_STATS) :] = skipping.skip_stats(*norms, selection)
        if any(needs):
            sums.add(u, part.start, selection, mine)

    visit_chunks(linear, rows, hidden, sums.weight, visit)
    sums.flush()
    at_lists = ListedGrads(linear, loss.ids, loss.row_weights, split.listed)
    if needs.hidden:
        sums.dhidden.add_(at_lists.hidden_grad())
        sums.dhidden.masked_fill_(~listed_ids.active.unsqueeze(1), 0.0)
    if needs.weight:
        at_lists.add_weight_grad(0, sums.dweight)
    if needs.bias:
        at_lists.add_bias_grad(sums.dbias)
    total = weigh(stats[:, 0], loss.row_weights).sum()
    return total, stats, sums.dhidden, sums.dweight, sums.dbias, scale
