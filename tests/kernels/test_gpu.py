"""Tests that need a GPU: compiled kernels at real sizes, races, CUDA graphs, devices.

The oracle is the fp64 path of the same functions, which runs in torch on every device and which
the other tests compare with the definition.
"""

import pytest
import torch
from kernel_cases import relative_error, rounding_bounds
from pairwise import label, pairwise

from lopd_kernels import (
    linear_cross_entropy,
    linear_logprobs,
    linear_policy_gradient,
    linear_sparse_divergence,
    linear_topk,
)
from lopd_kernels._core.gemm import operand_dtype
from lopd_kernels._core.rules import DivergenceRule
from lopd_kernels._core.types import LogitOptions, RowState
from lopd_kernels._core.waves import occupancy
from lopd_kernels._core.workspace import padded

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
MOST_WORK = 4e12  # N V D; the fp64 oracle takes about a second of it
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def on_cuda():
    torch.manual_seed(0)
    with torch.device("cuda"):
        yield
    torch.cuda.empty_cache()


def problem(n, d, v, k, dtype=torch.bfloat16, regime="near"):
    """(hidden, weight, ids, logprobs, tail); see `kernel_cases.make_case` for the regimes."""
    hidden, weight = torch.randn(n, d).to(dtype), (torch.randn(v, d) * 2.0 * d**-0.5).to(dtype)
    ids = torch.empty(n, k, dtype=torch.int64)
    logprobs, tail = torch.empty(n, k), torch.empty(n)
    for part in torch.arange(n).split(max(1, (1 << 28) // v)):
        logits = hidden[part].float() @ weight.float().t()
        noise = torch.randn_like(logits)
        teacher = (logits + 0.25 * noise if regime == "near" else 3.0 * noise).log_softmax(1)
        logprobs[part], ids[part] = teacher.topk(k, 1)
        tail[part] = teacher.scatter(1, ids[part], -torch.inf).logsumexp(1)
    return hidden, weight, ids, logprobs, tail


LOSSES = {
    "reverse_kl": lambda h, w, ids, lp, tail, **o: linear_sparse_divergence(
        h, w, ids, lp, tail_logprobs=tail, **o
    ),
    "jsd, truncated": lambda h, w, ids, lp, tail, **o: linear_sparse_divergence(
        h, w, ids, lp, divergence="jsd", tail="truncate", beta=0.3, **o
    ),
    "forward_kl, renormalised": lambda h, w, ids, lp, tail, **o: linear_sparse_divergence(
        h, w, ids, lp, divergence="forward_kl", tail="renormalize", **o
    ),
    "forward_kl, generalized": lambda h, w, ids, lp, tail, **o: linear_sparse_divergence(
        h, w, ids, lp, divergence="forward_kl", tail="generalized", **o
    ),
    "reverse_kl, unbiased": lambda h, w, ids, lp, tail, **o: linear_sparse_divergence(
        h,
        w,
        ids,
        lp,
        tail_logprobs=tail,
        tail="unbiased",
        importance_cap=2.0,
        sampled_ids=(ids[:, 0] + 1) % len(w),
        sampled_logprobs=(tail - 1.0).clamp(min=-30.0),
        rollout_logprobs=(tail - 1.5).clamp(min=-30.0),
        **o,
    ),
    "policy_gradient": lambda h, w, ids, lp, tail, **o: linear_policy_gradient(
        h, w, ids[:, -1], lp[:, -1] + 0.1, advantage_clip=2.0, **o
    ),
    "cross_entropy": lambda h, w, ids, lp, tail, **o: linear_cross_entropy(h, w, ids[:, 0], **o),
}


def run(loss, hidden, weight, teacher, weights, **options):
    """(loss, dH, dW) of the row-weighted sum."""
    h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    options = {"reduction": "sum", **options}
    value = LOSSES[loss](h, w, *teacher, row_weights=weights, **options)
    value.sum().backward()
    return value.detach(), h.grad, w.grad


def exact(loss, hidden, weight, teacher, weights, **options):
    ids, *rest = teacher
    wide = (ids, *(x.double() for x in rest))
    return run(loss, hidden.double(), weight.double(), wide, weights.double(), **options)


def fits(row):
    k, v = row["k"], row["v"]
    return row["n"] * v * row["d"] <= MOST_WORK and (k != "V" or v <= 1000) and (k == "V" or k <= v)


MATRIX = pairwise(
    allowed=fits,
    n=[0, 1, 127, 128, 129, 4097, 14135, 65536],
    d=[64, 1000, 1024, 2560, 4096, 5120],
    v=[33, 1000, 50257, 128256, 151936, 262208],
    k=[1, 2, 8, 64, 256, "V"],
    dtype=DTYPES,
    loss=list(LOSSES),
    regime=["near", "far"],
    schedule=["sum", "none", "small"],
    size=[1.0, 1e-6],
)


@pytest.mark.parametrize("row", MATRIX, ids=label)
def test_the_gate_at_real_sizes(row):
    n, d, v, dtype = row["n"], row["d"], row["v"], row["dtype"]
    k = v if row["k"] == "V" else row["k"]
    hidden, weight, *teacher = problem(n, d, v, k, dtype, row["regime"])
    weights = torch.rand(n) + 0.5
    weights[3::7] = 0.0
    options = {"reduction": "none"} if row["schedule"] == "none" else {}
    small = options
    if row["schedule"] == "small":
        small = {"workspace_bytes": smallest(row["loss"], hidden, weight, teacher, weights)}
    size = 1.0 if dtype == torch.float16 else row["size"]  # 1e-6 is below fp16's own range
    ours = run(row["loss"], hidden, weight, teacher, size * weights, **small)
    expected = exact(row["loss"], hidden, weight, teacher, size * weights, **options)
    slack = 2e-5 * (1.0 + expected[0].abs() / size)
    if row["schedule"] != "none":
        slack = slack + 2e-5 * n
    assert ((ours[0].double() - expected[0]).abs() / size <= slack).all()
    wide = (teacher[0], *(x.double() for x in teacher[1:]))
    bounds = rounding_bounds(
        lambda h, w: LOSSES[row["loss"]](h, w, *wide, row_weights=weights.double()),
        hidden, weight, dtype,
    )  # fmt: skip
    for grad, exact_grad, bound in zip(ours[1:], expected[1:], bounds, strict=True):
        assert grad.dtype == dtype
        assert relative_error(grad, exact_grad) <= bound
    assert (ours[1][3::7] == 0.0).all()


def smallest(loss, hidden, weight, teacher, weights):
    with pytest.raises(ValueError, match="at least") as error:
        run(loss, hidden, weight, teacher, weights, workspace_bytes=1)
    least = int(str(error.value).split("workspace_bytes=")[1].split()[0])
    return max(least, 64 << 20)


@pytest.mark.parametrize("settings", [(1024, 4), (2048, 8), (4096, 8), (4096, 16), (8192, 16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_hundred_runs_of_the_row_kernel_give_the_same_bits(settings, dtype, monkeypatch):
    """In place, where without a barrier a store could overtake a load."""
    from lopd_kernels._triton import rows as triton_rows

    capability = torch.cuda.get_device_capability()
    entry = triton_rows.Launch(*settings, triton_rows.LAUNCHES[None].maxnreg)
    monkeypatch.setitem(triton_rows.LAUNCHES, capability, entry)
    hidden, weight, ids, logprobs, tail = problem(600, 256, 151936, 64)
    source = torch.zeros(600, padded(151936))[:, :151936]
    source.copy_(hidden.float() @ weight.float().t())
    listed_ids = triton_rows.locate(ids, None, 151936)
    target = torch.cat([logprobs, tail.unsqueeze(1)], 1)
    rule, weights = DivergenceRule("reverse_kl", "bucket"), torch.ones(600)
    runs = []
    for _ in range(100):
        u, stats = torch.empty_like(source), torch.zeros(600, 4)
        u.copy_(source)
        dz = u if dtype == u.dtype else u.view(dtype)[:, :151936]
        triton_rows.row_pass(u, listed_ids, target, weights, rule, LogitOptions(), True, stats, dz)
        first = runs[0] if runs else (dz.clone(), stats)
        runs[:1] = [first]
        assert torch.equal(dz, first[0]) and torch.equal(stats, first[1])
    apart = torch.empty(600, 151936, dtype=dtype)
    triton_rows.row_pass(
        source, listed_ids, target, weights, rule, LogitOptions(), True, stats, apart
    )
    assert torch.equal(apart, runs[0][0])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}], ids=str)
def test_a_hundred_calls_give_the_same_bits(loss, options):
    hidden, weight, *teacher = problem(700, 256, 50257, 64)
    weights = torch.rand(700)
    first = run(loss, hidden, weight, teacher, weights, **options)
    for _ in range(99):
        again = run(loss, hidden, weight, teacher, weights, **options)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


def test_a_hundred_runs_of_the_panel_kernels_give_the_same_bits():
    from lopd_kernels._triton import rows as triton_rows

    u, ids = torch.randn(900, 4096), torch.rand(900, 9000).topk(64, 1).indices
    listed_ids, first = triton_rows.locate(ids, None, 9000), None
    for _ in range(100):
        state = RowState.start(u, 900, 64, torch.float32)
        for start in (0, 4096):
            triton_rows.reduce(u.clone(), start, listed_ids, LogitOptions(), True, state)
        if first is None:
            first = state
        assert all(torch.equal(a, b) for a, b in zip(state, first, strict=True))


def test_a_captured_graph_follows_its_inputs():
    hidden, weight, ids, logprobs, tail = problem(256, 128, 5000, 16)
    h, w = hidden.requires_grad_(), weight.requires_grad_()

    def step():
        h.grad = w.grad = None
        linear_sparse_divergence(h, w, ids, logprobs, tail_logprobs=tail).backward()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    h.grad = w.grad = None
    with torch.cuda.graph(graph):
        linear_sparse_divergence(h, w, ids, logprobs, tail_logprobs=tail).backward()
    grads = h.grad, w.grad
    with torch.no_grad():
        h.copy_(torch.randn_like(h))
    graph.replay()
    replayed = [x.clone() for x in grads]
    step()
    assert torch.equal(replayed[0], h.grad) and torch.equal(replayed[1], w.grad)


@pytest.mark.parametrize("setting", ["dense_share", "tolerance"])
def test_a_captured_graph_draws_other_rows_with_another_seed(setting):
    hidden, weight, ids, logprobs, tail = problem(256, 128, 5000, 16)
    h, w, seed = hidden.requires_grad_(), weight.requires_grad_(), torch.tensor(3)
    options = {"dense_share": 0.2, "seed": seed} if setting == "dense_share" else {"tolerance": 0.1}

    def step():
        h.grad = w.grad = None
        linear_sparse_divergence(h, w, ids, logprobs, tail_logprobs=tail, **options).backward()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    captured = h.grad, w.grad
    seed.fill_(8)
    graph.replay()
    replayed = [x.clone() for x in captured]
    if setting == "tolerance":
        options["tolerance"] = 0.0  # a graph keeps every row
    step()
    for ours, expected in zip(replayed, (h.grad, w.grad), strict=True):
        assert relative_error(ours, expected) < (1e-6 if setting == "dense_share" else 3e-3)


@pytest.mark.parametrize("loss", LOSSES)
def test_full_graphs_compiled_by_inductor(loss):
    hidden, weight, *teacher = problem(64, 64, 1000, 8)
    torch._dynamo.reset()
    weights = torch.rand(64)
    plain = run(loss, hidden, weight, teacher, weights)
    compiled = torch.compile(LOSSES[loss], fullgraph=True)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    compiled(h, w, *teacher, row_weights=weights, reduction="sum").backward()
    assert relative_error(h.grad, plain[1]) < 3e-3 and relative_error(w.grad, plain[2]) < 3e-3


def test_logprobs_and_topk_at_a_full_vocabulary():
    hidden, weight, *_ = problem(500, 512, 151936, 4)
    ids = torch.randint(0, 151936, (500, 7))
    ids[:, 3] = ids[:, 0]
    lists = {"extra_ids": ids, "sampled_ids": ids[:, 1]}
    top = linear_topk(hidden, weight, 64, **lists)
    exact_top = linear_topk(hidden.double(), weight.double(), 64, **lists)
    for ours, expected in zip(top[1:], exact_top[1:], strict=True):
        assert ((ours.double() - expected).abs() <= 2e-5 * (1.0 + expected.abs())).all()
    assert (top.ids == exact_top.ids).float().mean() > 0.999
    logprobs, entropy = linear_logprobs(hidden, weight, ids, return_entropy=True)
    assert (logprobs.double() - exact_top.extra_logprobs).abs().max() < 1e-4
    assert (entropy.double() - exact_top.entropy).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [2048, 2500])
@pytest.mark.parametrize("loss", ["reverse_kl", "forward_kl, renormalised"])
def test_peak_memory_is_within_the_workspace(loss, n, dtype):
    """Stored dlogits (2048 rows in bf16), an fp32 accumulator, panels, listed rows."""
    d, v, k = 1024, 65536, 64
    hidden, weight, *teacher = problem(n, d, v, k, dtype)
    weights, outputs = torch.full((n,), 0.5), (n * d + v * d) * 2
    run(loss, hidden, weight, teacher, weights)  # cuBLAS allocates its own workspace
    for bound in (4 << 30, 1 << 30, 500 << 20, 200 << 20):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = run(loss, hidden, weight, teacher, weights, workspace_bytes=bound, validate=False)
        peak = torch.cuda.max_memory_allocated() - before
        assert peak <= bound + outputs + (8 << 20), bound
        del result


def test_large_advantages_stay_within_fp16():
    hidden, weight, ids, *_ = problem(40, 64, 5000, 2, torch.float16)
    advantages = torch.linspace(-3000.0, 3000.0, 40)
    sides = []
    for dtype in (torch.float16, torch.float64):
        h, w = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        linear_policy_gradient(h, w, ids[:, 0], None, advantages=advantages.to(dtype)).backward()
        sides.append((h.grad, w.grad))
    for grad, expected in zip(*sides, strict=True):
        assert relative_error(grad, expected) < 1e-3


def test_the_kernels_run_on_the_tensors_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    with torch.device("cuda:1"):
        hidden, weight, *teacher = problem(64, 64, 1000, 8)
        _, dhidden, _ = run("reverse_kl", hidden, weight, teacher, torch.ones(64))
    assert dhidden.device.index == 1 and dhidden.isfinite().all()


def test_16_bit_operands_stay_16_bit_in_the_gemms():
    hidden = torch.empty(1, 1, dtype=torch.bfloat16)
    assert operand_dtype(hidden) == torch.bfloat16


def test_the_assumed_programs_fit_on_a_multiprocessor(monkeypatch):
    """Chunks are chosen by the registers of the compiled kernel, without asking it."""
    from lopd_kernels._triton import rows as triton_rows

    launched = []
    kernel = triton_rows.rows.row_kernel

    class Spy:
        def __getitem__(self, grid):
            return lambda *args, **options: launched.append(kernel[grid](*args, **options))

    monkeypatch.setattr(triton_rows.rows, "row_kernel", Spy())
    hidden, weight, ids, logprobs, tail = problem(4, 64, 151936, 64)
    options = LogitOptions()
    rule = DivergenceRule("reverse_kl", "bucket")
    weight.requires_grad_()
    linear_sparse_divergence(hidden, weight, ids, logprobs, tail_logprobs=tail).backward()
    assumed = triton_rows.gpu(hidden, 151936, 65, rule, options)
    assert assumed.multiprocessors == torch.cuda.get_device_properties(0).multi_processor_count
    assert occupancy(launched[0].n_regs, 8) >= assumed.programs
