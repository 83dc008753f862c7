"""Batches whose longest lists differ share compiled kernels: compiling stalls a run for seconds."""

import aot
import pytest
import torch
from kernel_cases import INTERPRETED
from triton.backends.compiler import GPUTarget

from lopd_kernels._core.listed_ids import sort_entries
from lopd_kernels._core.rules import DivergenceRule
from lopd_kernels._core.types import LogitGrads, LogitOptions, RowState
from lopd_kernels._triton import listed as triton_listed
from lopd_kernels._triton import rows as triton_rows
from lopd_kernels._triton.kernels import listed as listed_kernels
from lopd_kernels._triton.kernels import rows as row_kernels

pytestmark = pytest.mark.skipif(INTERPRETED, reason="asks for the keys of compiled kernels")
TARGET = GPUTarget("cuda", 90, 32)
VOCAB = 151936
# 1 and the multiples of 16 are those that Triton treats as special
WIDTHS = [*range(1, 47), 64, 127, 500, 1000]


@pytest.fixture
def variants(monkeypatch):
    """Name of a kernel -> keys under which Triton would have compiled what was launched."""
    recorders = {}
    for module in (row_kernels, listed_kernels):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            recorders[name] = aot.Recorder(getattr(module, name))
            monkeypatch.setattr(module, name, recorders[name])

    def keys():
        return {
            name: {
                (aot.specialise(recorder.kernel, arguments, TARGET)[1], str(options))
                for arguments, options in recorder.calls
            }
            for name, recorder in recorders.items()
        }

    return keys


def launch_all(k, first):
    """Every kernel once, on the rows from `first` on, as a chunk of rows has them."""
    chunk = slice(first, 64)
    ids = torch.zeros(64, k, dtype=torch.int64)
    listed_ids = triton_rows.locate(ids, None, VOCAB).rows(chunk)
    n = 64 - first
    u, state = aot.meta(n, VOCAB), RowState(torch.zeros(64, 4)[chunk], torch.zeros(64, k)[chunk])
    rule, head = DivergenceRule("jsd", "bucket"), LogitOptions()
    target, weights, stats = torch.zeros(64, k + 1), torch.ones(64), torch.zeros(64, 4)
    triton_rows.row_pass(
        u, listed_ids, target[chunk], weights[chunk], rule, head, True, stats[chunk], u
    )
    triton_rows.reduce(u, 0, listed_ids, head, True, state)
    grads = LogitGrads(*(torch.zeros(64)[chunk] for _ in range(3)), torch.zeros(64, k)[chunk])
    triton_rows.write(u, 0, listed_ids, head, grads, state.listed, u)
    hidden, weight = torch.zeros(n, 32), torch.zeros(100, 32)
    triton_listed.dots(hidden, weight, ids[chunk], 1)
    triton_listed.hidden_grad(torch.zeros(n, k), weight, ids[chunk], 1, torch.float32)
    entries = sort_entries(torch.zeros(n, k), ids[chunk], 100)
    triton_listed.weight_grad(entries, hidden, 1, first, weight, True)


def test_50_widths_of_lists_compile_one_variant_per_block(variants):
    assert len(WIDTHS) == 50
    for number, k in enumerate(WIDTHS):
        launch_all(k, number % 3)
    counts = {name: len(keys) for name, keys in variants().items()}
    blocks = len({triton_rows.list_block(k) for k in WIDTHS})
    assert counts == {
        "row_kernel": len({triton_rows.list_block(k + 1) for k in WIDTHS}),
        "reduce_kernel": blocks,
        "write_kernel": blocks,
        "gather_dot_kernel": 1,
        "gather_sum_kernel": 1,
        "segment_sum_kernel": 1,
    }


def test_rows_keep_the_alignment_that_wide_loads_need(variants):
    """Kernels that know nothing of their arguments would pass the test above too."""
    launch_all(8, 0)
    [key] = variants()["row_kernel"]
    with_odd_rows = {key}
    u = aot.meta(64, VOCAB + 1)
    listed_ids = triton_rows.locate(aot.meta(64, 8, dtype=torch.int64), None, VOCAB + 1)
    triton_rows.row_pass(
        u, listed_ids, aot.meta(64, 9), aot.meta(64), DivergenceRule("jsd", "bucket"),
        LogitOptions(), True, aot.meta(64, 4), u,
    )  # fmt: skip
    with_odd_rows |= variants()["row_kernel"]
    assert len(with_odd_rows) == 2
