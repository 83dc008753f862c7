"""The row pass that reads the logits once: when it is used and refused, and its tests on a GPU.

`tests/ptx/test_ptx_one_pass.py` executes the compiled kernels without one.
"""

import aot
import pytest
import torch
from kernel_cases import INTERPRETED, relative_error
from row_cases import REVERSE_KL, RULES, make_head, make_target, oracle_pass, ragged_ids
from triton.runtime.interpreter import InterpretedFunction

from lopd_kernels import linear_sparse_divergence
from lopd_kernels._core.types import LogitOptions, SplitGrads
from lopd_kernels._core.workspace import padded
from lopd_kernels._triton import one_pass
from lopd_kernels._triton import rows as triton_rows
from lopd_kernels._triton.kernels import one_pass as one_pass_kernels
from lopd_kernels._triton.kernels import rows as row_kernels

VOCAB = 151936
needs_compiler = pytest.mark.skipif(INTERPRETED, reason="asks what is compiled")


@pytest.fixture
def enabled(monkeypatch):
    monkeypatch.setattr(one_pass, "ENABLED", True)


def row_pass(device="cpu", vocab=64, weights=True, split=None):
    u = torch.zeros(2, vocab, device=device)
    listed_ids = triton_rows.locate(
        torch.zeros(2, 1, dtype=torch.int64, device=device), None, vocab
    )
    triton_rows.row_pass(
        u, listed_ids, torch.zeros(2, 2, device=device),
        torch.ones(2, device=device) if weights else None, REVERSE_KL, LogitOptions(), False,
        torch.zeros(2, 4, device=device), None, split=split,
    )  # fmt: skip


def test_it_is_off_until_a_gpu_has_measured_it():
    assert one_pass.ENABLED is False


@needs_compiler
def test_another_device_is_refused(enabled):
    with pytest.raises(NotImplementedError, match="on cpu; it needs an NVIDIA GPU"):
        row_pass()


def test_the_interpreter_is_refused(enabled, monkeypatch):
    """Its programs run one after another, so the first would wait for ever."""
    kernel = one_pass_kernels.one_pass_kernel
    if not isinstance(kernel, InterpretedFunction):
        monkeypatch.setattr(one_pass_kernels, "one_pass_kernel", InterpretedFunction(kernel.fn))
    with pytest.raises(NotImplementedError, match="leave it False with TRITON_INTERPRET=1"):
        row_pass()


@needs_compiler
def test_a_triton_that_spills_is_refused(enabled, monkeypatch):
    monkeypatch.setattr(one_pass.triton, "__version__", "3.6.0")
    with pytest.raises(NotImplementedError, match=r"Triton is 3.6.0.*needs 3.7 or newer"):
        row_pass()


@needs_compiler
def test_every_call_that_wants_the_gradient_of_whole_rows_uses_it(enabled, monkeypatch):
    monkeypatch.setattr(one_pass, "multiprocessors", lambda device: 132)
    kernels = {}
    for module, name in (
        (row_kernels, "row_kernel"),
        (one_pass_kernels, "take_kernel"), (one_pass_kernels, "one_pass_kernel"),
    ):  # fmt: skip
        kernels[name] = aot.Recorder(getattr(module, name))
        monkeypatch.setattr(module, name, kernels[name])

    def launched():
        names = {name for name, kernel in kernels.items() if kernel.calls}
        for kernel in kernels.values():
            kernel.calls.clear()
        return names

    row_pass("meta")
    assert launched() == {"take_kernel", "one_pass_kernel"}
    row_pass("meta", weights=False)
    assert launched() == {"row_kernel"}
    like = torch.empty(0, device="meta")
    row_pass("meta", split=SplitGrads.zeros(like, 2, 1, torch.float32))
    assert launched() == {"row_kernel"}
    monkeypatch.setattr(one_pass, "ENABLED", False)
    row_pass("meta")
    assert launched() == {"row_kernel"}


@pytest.mark.parametrize("block", [128, 4096, 8192])
def test_slices_cover_a_row_and_fit_into_a_program(block):
    for vocab in (1, 17, 127, 128, 129, 4096, 8193, 50257, 128256, VOCAB, 262208):
        programs, width = one_pass.slices(vocab, block)
        assert programs * width >= vocab and width % 16 == 0 and width <= block
        assert programs == -(-vocab // block)


def test_a_launch_has_whole_groups_that_the_device_holds_at_once():
    for rows, programs, resident in ((2048, 19, 528), (3, 19, 528), (5, 1, 4), (1, 7, 7)):
        size = one_pass.grid(rows, programs, resident)
        assert size % programs == 0 and size <= resident and size <= rows * programs
        assert size + programs > min(resident, rows * programs)
    with pytest.raises(NotImplementedError, match="19 programs at once and the device holds 16"):
        one_pass.grid(2048, 19, 16)


# -- on a GPU --


@pytest.fixture
def on_cuda(enabled):
    torch.manual_seed(0)
    with torch.device("cuda"):
        yield
    torch.cuda.empty_cache()


def rows_of(source, rule, head, ids, target, weights, dtype):
    """(gradient in the storage of the logits, statistics)."""
    u = torch.empty(len(source), padded(source.shape[1]))[:, : source.shape[1]]
    u.copy_(source)
    out = u if dtype == u.dtype else u.view(dtype)[:, : source.shape[1]]
    stats = torch.zeros(len(u), 4 + len(rule.extras))
    listed_ids = triton_rows.locate(ids, weights, u.shape[1])
    triton_rows.row_pass(u, listed_ids, target, weights, rule, head, True, stats, out)
    return out, stats


@pytest.mark.gpu
@pytest.mark.timeout(120)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_name", ["plain", "biased", "capped+biased"])
@pytest.mark.parametrize("vocab", [50257, VOCAB, 262208])
def test_both_forms_agree_and_repeat_their_bits(vocab, head_name, dtype, on_cuda, monkeypatch):
    head, rows = make_head(head_name, vocab), 300
    source, ids = 3.0 * torch.randn(rows, vocab), ragged_ids(rows, vocab, 64)
    target, weights = make_target(REVERSE_KL, ids, source), torch.rand(rows) + 0.5
    weights[::7] = 0.0
    problem = (source, REVERSE_KL, head, ids, target, weights, dtype)
    first = rows_of(*problem)
    for _ in range(50):
        again = rows_of(*problem)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
    monkeypatch.setattr(one_pass, "ENABLED", False)
    twice = rows_of(*problem)
    bound = 1e-5 if dtype == torch.float32 else 1e-3
    assert relative_error(first[0], twice[0]) < bound
    torch.testing.assert_close(first[1], twice[1], rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", RULES)
def test_every_rule_against_fp64(name, on_cuda):
    rule, vocab = RULES[name], 50257
    u = 3.0 * torch.randn(40, vocab)
    k = 64 if "kl" in name or "jsd" in name else 1
    ids, head = ragged_ids(40, vocab, k), make_head("plain", vocab)
    target, weights = make_target(rule, ids, u), torch.rand(40) + 0.5
    stats, exact = oracle_pass(u, ids, target, weights, rule, head)
    out, ours = rows_of(u, rule, head, ids, target, weights, torch.float32)
    assert relative_error(out, exact) < 1e-5
    error = (ours.double() - stats).abs()
    assert (error <= 1e-5 * (1.0 + stats.abs()))[stats.isfinite()].all()


@pytest.mark.gpu
@pytest.mark.timeout(120)
def test_two_streams_share_the_device(on_cuda):
    """Each launch alone would fill it."""
    source, ids = torch.randn(600, VOCAB), ragged_ids(600, VOCAB, 64)
    target, weights = make_target(REVERSE_KL, ids, source), torch.ones(600)
    problem = (source, REVERSE_KL, LogitOptions(), ids, target, weights, torch.bfloat16)
    first = rows_of(*problem)
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in range(3)], []
    for _ in range(5):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(rows_of(*problem))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for r in results for a, b in zip(r, first, strict=True))


@pytest.mark.gpu
@pytest.mark.timeout(120)
def test_a_captured_graph_counts_from_zero_again(on_cuda):
    hidden = torch.randn(256, 128).bfloat16().requires_grad_()
    weight = torch.randn(50257, 128).bfloat16().requires_grad_()
    ids = torch.rand(256, 50257).topk(16, 1).indices
    logprobs, tail = torch.full((256, 16), -4.0), torch.full((256,), -0.5)

    def step():
        hidden.grad = weight.grad = None
        linear_sparse_divergence(
            hidden, weight, ids, logprobs, tail_logprobs=tail, validate=False
        ).backward()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    captured = hidden.grad, weight.grad
    for _ in range(20):
        graph.replay()
    replayed = [x.clone() for x in captured]
    step()
    assert torch.equal(replayed[0], hidden.grad) and torch.equal(replayed[1], weight.grad)
