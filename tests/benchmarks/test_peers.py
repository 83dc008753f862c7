"""The peers' kernels, called as in the benchmarks: correct loss, correct gradients.

Skipped if the peers are not installed. Without a GPU, interpret their kernels:

    TRITON_INTERPRET=1 PYTHONPATH=SITE python -m pytest tests/benchmarks/test_peers.py
"""

import importlib.util
import os

import pytest
import torch

from benchmarks import variants
from benchmarks.harness import gate
from benchmarks.problems import Shape, make_problem, oracle

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
MODULES = {"Liger": "liger_kernel", "Cut": "cut_cross_entropy"}
PEERS = {each.name: each for each in variants.peer_variants()}


@pytest.fixture
def runnable(request, monkeypatch):
    """The variant, if its kernels can run here."""
    module = MODULES.get(request.param.split()[0])
    if module is not None:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
        if DEVICE == "cpu" and not INTERPRETED:
            pytest.skip("its kernels need a GPU, or TRITON_INTERPRET=1")
    if module == "cut_cross_entropy" and INTERPRETED:
        import triton
        import triton.language as tl
        from cut_cross_entropy import tl_utils

        # The interpreter has no libdevice.
        monkeypatch.setattr(tl_utils, "tl_log1p", triton.jit(log1p))
        log1p.__globals__["tl"] = tl
    return PEERS[request.param]


def log1p(x):
    return tl.log(1.0 + x)  # noqa: F821


@pytest.mark.parametrize("runnable", PEERS, indirect=True)
def test_a_peer_computes_the_loss_that_its_row_names(runnable):
    """In fp16 if the peer does not support fp32. A wrong loss has a much larger error."""
    narrow = runnable.name.startswith("Cut")
    dtype, bound = (torch.float16, 2e-3) if narrow else (torch.float32, 1e-4)
    problem = make_problem(Shape(rows=128, hidden=64, vocab=512, topk=5), dtype, DEVICE)
    if not INTERPRETED and (reason := runnable.missing(problem)):
        pytest.skip(reason)
    errors = gate(runnable, problem, oracle(problem, runnable.loss))
    assert errors["dhidden_error"] < bound and errors["dweight_error"] < bound
    assert errors["loss_error"] < 1e-4
