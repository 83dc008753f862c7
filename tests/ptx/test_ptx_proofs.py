"""The executor notices what is taken out of the kernels: barriers, masks, alignment.

The compiled PTX is changed before it runs; the kernels themselves stay as they are.
"""

from unittest import mock

import ptx_launch
import pytest
import torch
from kernel_cases import INTERPRETED
from ptx_launch import emulate
from ptx_memory import Fault, Race
from ptx_mutations import barrier_lines, unguarded, without_barriers
from row_cases import REVERSE_KL, make_target, padded_rows, ragged_ids

from lopd_kernels._core.types import LogitGrads, LogitOptions, RowState
from lopd_kernels._triton.kernels import rows

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(INTERPRETED, reason="compiles the kernels"),
]
CAPABILITIES = [90, *(pytest.param(c, marks=pytest.mark.slow) for c in (80, 100))]
HEAD = LogitOptions()


def launch(block, list_block, warps):
    return {"BLOCK": block, "KBLOCK": list_block, "num_warps": warps}


def problem(vocab, k):
    """Two rows of logits and lists of up to `k` ids, the first of them in the last column."""
    torch.manual_seed(0)
    u, ids = padded_rows(2, vocab), ragged_ids(2, vocab, k)
    ids[ids == vocab - 1] = -1
    ids[:, 0] = vocab - 1
    return u, ids


def run_row_kernel(vocab, k, options, dtype=torch.float32):
    from lopd_kernels._triton import rows as triton_rows

    u, ids = problem(vocab, k)
    target, weights = make_target(REVERSE_KL, ids, u), torch.ones(2)
    # 16-bit gradients lie in the first half of their row of logits
    out = u if dtype == torch.float32 else u.view(dtype)[:, :vocab]
    with mock.patch.object(triton_rows, "launch", lambda *_: options):
        listed_ids = triton_rows.locate(ids, None, vocab)
        triton_rows.row_pass(
            u, listed_ids, target, weights, REVERSE_KL, HEAD, True, torch.zeros(2, 4), out
        )


def run_panels(vocab, k, options):
    from lopd_kernels._triton import rows as triton_rows

    u, ids = problem(vocab, k)
    out = u.view(torch.bfloat16)[:, :vocab]
    grads = LogitGrads(*(torch.randn(2) for _ in range(3)), torch.randn(2, k))
    with mock.patch.object(triton_rows, "launch", lambda *_: options):
        listed_ids, state = triton_rows.locate(ids, None, vocab), RowState.start(u, 2, k, u.dtype)
        triton_rows.reduce(u, 0, listed_ids, HEAD, True, state)
        triton_rows.write(u, 0, listed_ids, HEAD, grads, state.listed, out)


# Lists that one warp holds, that several hold, and that need several blocks; 16-bit gradients in
# the storage of the logits, in rows of several blocks.
RUNS = {
    "short list": lambda: run_row_kernel(700, 8, launch(256, 16, 4), torch.bfloat16),
    "lists in blocks": lambda: run_row_kernel(700, 130, launch(256, 64, 4)),
    "K=31": lambda: run_row_kernel(700, 31, launch(256, 32, 8), torch.bfloat16),
    "K=65": lambda: run_row_kernel(700, 65, launch(256, 128, 8)),
    "panels": lambda: run_panels(700, 8, launch(256, 16, 4)),
    "panels K=65": lambda: run_panels(700, 65, launch(256, 128, 4)),
    "one warp": lambda: run_row_kernel(700, 130, launch(256, 64, 1)),
    "16 warps": lambda: run_row_kernel(1100, 200, launch(1024, 256, 16)),
}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("line", barrier_lines(rows))
def test_a_missing_barrier_is_a_race(line, capability, monkeypatch):
    removed = []

    def rewrite(text):
        text, count = without_barriers(text, "rows.py", line)
        removed.append(count)
        return text

    emulate(monkeypatch, capability, rewrite=rewrite)
    for run in RUNS.values():
        try:
            run()
        except Race:
            assert removed[-1] > 0
            return
    pytest.fail(f"the kernels run without the {sum(removed)} barriers of rows.py:{line}")


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", RUNS)
def test_the_kernels_as_they_are_have_no_race(name, capability, monkeypatch):
    kernels = emulate(monkeypatch, capability)
    RUNS[name]()
    assert sum(len(kernel.launched) for kernel in kernels.values())


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("opcode", ["ld.global.v4.b32", "ld.global.b64"])
def test_a_missing_mask_is_a_fault(opcode, capability, monkeypatch):
    """Of a load of logits, or of ids: both reach beyond what the tensors hold."""
    emulate(monkeypatch, capability, rewrite=lambda text: unguarded(text, opcode, -1))
    with pytest.raises(Fault, match="outside"):
        run_row_kernel(700, 8, launch(1024, 16, 4))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_an_id_of_minus_one_without_a_mask_is_a_fault(capability, monkeypatch):
    emulate(monkeypatch, capability, rewrite=lambda text: unguarded(text, "ld.global.b32", 0))
    with pytest.raises(Fault):
        run_row_kernel(700, 8, launch(1024, 16, 4))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_pointer_that_is_not_aligned_as_promised_is_a_fault(capability, monkeypatch):
    emulate(monkeypatch, capability)
    monkeypatch.setattr(ptx_launch, "BASE", ptx_launch.BASE + 8)
    with pytest.raises(Fault, match="aligned"):
        run_row_kernel(700, 8, launch(1024, 16, 4))
