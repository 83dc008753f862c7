"""The compiled kernels, executed: every kernel on three architectures, in two schedules.

`LOPD_PTX=90 python -m pytest tests/kernels/test_triton.py` runs all of that file this way.
"""

import pytest
import torch
from kernel_cases import INTERPRETED, relative_error
from ptx_launch import emulate
from row_cases import (
    RULES,
    make_head,
    make_target,
    oracle_pass,
    padded_rows,
    ragged_ids,
)

from lopd_kernels._core.buckets import student_buckets
from lopd_kernels._core.listed_ids import sort_entries
from lopd_kernels._core.rules import DivergenceRule
from lopd_kernels._core.types import LogitGrads, LogitOptions, RowState
from lopd_kernels._torch import listed as torch_listed
from lopd_kernels._torch import rows as torch_rows

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(INTERPRETED, reason="compiles the kernels"),
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]
CAPABILITIES = [80, 90, 100]


def on_each(cases):
    """All cases on all architectures; each is on one of them in the quick run of the tests."""
    parameters = []
    for number, case in enumerate(cases):
        for index, capability in enumerate(CAPABILITIES):
            marks = () if index == number % len(CAPABILITIES) else pytest.mark.slow
            parts = [
                str(x).removeprefix("torch.")
                for x in case
                if isinstance(x, (str, int, torch.dtype))
            ]
            label = "-".join([*parts, str(capability)])
            parameters.append(pytest.param(*case, capability, marks=marks, id=label))
    return parameters


SCHEDULES = ["block", "random"]
BOUNDS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}

# rule, head, vocabulary, K, dtype of the gradient, warps and blocks if not the table's
ROWS = [
    ("reverse_kl:bucket", "plain", 4100, 8, torch.bfloat16, None),
    ("reverse_kl:bucket", "capped+biased", 1000, 65, torch.float32, None),
    ("forward_kl:truncate", "scaled", 211, 31, torch.float16, None),
    ("reverse_kl:unbiased", "plain", 1000, 33, torch.bfloat16, None),
    ("forward_kl:generalized", "scaled", 700, 9, torch.float32, None),
    ("jsd:bucket", "biased", 33, 33, torch.float32, None),
    ("jsd:truncate", "plain", 700, 130, torch.bfloat16, {"BLOCK": 256, "KBLOCK": 64, "warps": 4}),
    ("reverse_kl:bucket", "capped", 700, 64, torch.float32,
     {"BLOCK": 128, "KBLOCK": 16, "warps": 1}),
    ("forward_kl:bucket", "plain", 4100, 200, torch.bfloat16,
     {"BLOCK": 2048, "KBLOCK": 256, "warps": 16}),
    ("policy_gradient:advantage:clipped", "capped+biased", 1000, 1, torch.bfloat16, None),
    ("cross_entropy", "plain", 50257, 1, torch.bfloat16, None),
]  # fmt: skip


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    torch.manual_seed(0)
    return request.param


@pytest.mark.parametrize("name, head_name, vocab, k, dtype, launch, capability", on_each(ROWS))
def test_the_row_kernel(
    name, head_name, vocab, k, dtype, launch, capability, schedule, monkeypatch
):
    from lopd_kernels._triton import rows as triton_rows

    emulate(monkeypatch, capability, schedule=schedule, seed=1)
    if launch is not None:
        options = {**launch}
        options["num_warps"] = options.pop("warps")
        monkeypatch.setattr(triton_rows, "launch", lambda *_: options)
    rule, head = RULES[name], make_head(head_name, vocab, torch.bfloat16)
    rows = 4
    u, ids = padded_rows(rows, vocab), ragged_ids(rows, vocab, k)
    weights = torch.tensor([128.0, -256.0, 0.0, 64.0])  # large enough for 16-bit gradients
    target = make_target(rule, ids, u)
    stats, exact = oracle_pass(u, ids, target, weights, rule, head)
    # a 16-bit gradient lies in the first half of its row of logits
    out = u if dtype == torch.float32 else u.view(dtype)[:, :vocab]
    ours = torch.zeros(rows, 4 + len(rule.extras))
    listed_ids = triton_rows.locate(ids, weights, vocab)
    triton_rows.row_pass(u, listed_ids, target, weights, rule, head, True, ours, out)
    assert (out[2] == 0.0).all()
    assert relative_error(out, exact) < BOUNDS[dtype]
    error = (ours.double() - stats).abs()
    assert (error <= 1e-5 * (1.0 + stats.abs()))[stats.isfinite()].all()


@pytest.mark.parametrize("name, capability", on_each([("plain",), ("capped+biased",)]))
def test_panels(name, capability, schedule, monkeypatch):
    from lopd_kernels._triton import rows as triton_rows

    emulate(monkeypatch, capability, schedule=schedule, seed=1)
    rows, vocab, columns, k = 3, 311, 160, 12
    u, ids = padded_rows(rows, vocab), ragged_ids(rows, vocab, k)
    head = make_head(name, vocab)
    bias = None if head.bias is None else head.bias.double()
    wide = LogitOptions(head.logit_scale, head.softcap, head.temperature, bias)
    grads = LogitGrads(*(torch.randn(rows) for _ in range(3)), torch.randn(rows, k))
    sides = []
    for functions, dtype, used in (
        (triton_rows, torch.float32, head), (torch_rows, torch.float64, wide),
    ):  # fmt: skip
        listed_ids = functions.locate(ids, None, vocab)
        state = RowState.start(u, rows, k, dtype)
        out = torch.empty(rows, vocab, dtype=dtype)
        grads = LogitGrads(*(x.to(dtype) for x in grads))
        for call in ("reduce", "write"):
            for first in range(0, vocab, columns):
                panel = u[:, first : first + columns].to(dtype, copy=True)
                if call == "reduce":
                    functions.reduce(panel, first, listed_ids, used, True, state)
                else:
                    part = out[:, first : first + columns]
                    functions.write(panel, first, listed_ids, used, grads, state.listed, part)
        sides.append((student_buckets(state), out))
    (ours, ours_out), (exact, exact_out) = sides
    for field, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(field.double(), expected, rtol=1e-5, atol=1e-5)
    assert relative_error(ours_out, exact_out) < 1e-5


@pytest.mark.parametrize("dtype, capability", on_each([(torch.float32,), (torch.bfloat16,)]))
def test_products_with_listed_rows(dtype, capability, schedule, monkeypatch):
    from lopd_kernels._triton import listed as triton_listed

    emulate(monkeypatch, capability, schedule=schedule, seed=1)
    n, d, k, v = 5, 300, 40, 50
    hidden, weight = torch.randn(n, d, dtype=dtype), torch.randn(v, d, dtype=dtype)
    ids, grad = torch.randint(0, 20, (n, k)), torch.randn(n, k)
    wide = [x.double() for x in (hidden, weight, grad)]
    dots = triton_listed.dots(hidden, weight, ids, 1)
    assert relative_error(dots, torch_listed.dots(wide[0], wide[1], ids, 3)) < 1e-6
    bound = 1e-6 if dtype == torch.float32 else BOUNDS[dtype]
    dhidden = triton_listed.hidden_grad(grad, weight, ids, 1, dtype)
    exact = torch_listed.hidden_grad(wide[2], wide[1], ids, 3, torch.float64)
    assert relative_error(dhidden, exact) < bound
    entries, wide_entries = sort_entries(grad, ids, v), sort_entries(wide[2], ids, v)
    for first in (0, 7):
        out = torch.ones(v - first, d, dtype=dtype)
        expected = torch.ones(v - first, d, dtype=torch.float64)
        triton_listed.weight_grad(entries, hidden, 1, first, out, True)
        torch_listed.weight_grad(wide_entries, wide[0], 3, first, expected, True)
        assert relative_error(out, expected) < bound


@pytest.mark.parametrize("capability", [90])
def test_a_large_vocabulary(capability, monkeypatch):
    """Offsets beyond 2^31 bytes do not occur here, those of whole rows of 262208 logits do."""
    from lopd_kernels._triton import rows as triton_rows

    torch.manual_seed(0)
    emulate(monkeypatch, capability)
    vocab, rule, head = 262208, DivergenceRule("reverse_kl", "bucket"), make_head("plain", 1)
    u, ids = padded_rows(2, vocab), ragged_ids(2, vocab, 8)
    ids[:, 0] = torch.tensor([vocab - 1, 0])
    target, weights = make_target(rule, ids, u), torch.full((2,), 128.0)
    stats, exact = oracle_pass(u, ids, target, weights, rule, head)
    ours, out = torch.zeros(2, 4), u.view(torch.bfloat16)[:, :vocab]
    listed_ids = triton_rows.locate(ids, weights, vocab)
    triton_rows.row_pass(u, listed_ids, target, weights, rule, head, True, ours, out)
    assert relative_error(out, exact) < BOUNDS[torch.bfloat16]
    torch.testing.assert_close(ours.double(), stats, rtol=1e-5, atol=1e-5)


def test_results_bear_the_errors_of_approximate_instructions(monkeypatch):
    """A device's exp and division may err in their last bits; the gate has room for that."""
    from lopd_kernels._triton import rows as triton_rows

    torch.manual_seed(0)
    rule, head = DivergenceRule("jsd", "bucket", 0.3), make_head("capped+biased", 211)
    u, ids = padded_rows(3, 211), ragged_ids(3, 211, 8)
    target, weights = make_target(rule, ids, u), torch.ones(3)
    stats, exact = oracle_pass(u, ids, target, weights, rule, head)
    results = []
    for noise in (False, True):
        emulate(monkeypatch, 90, noise=noise)
        ours, out = torch.zeros(3, 4), padded_rows(3, 211)
        out.copy_(u)
        listed_ids = triton_rows.locate(ids, weights, 211)
        triton_rows.row_pass(out, listed_ids, target, weights, rule, head, True, ours, out)
        assert relative_error(out, exact) < 1e-5
        torch.testing.assert_close(ours.double(), stats, rtol=1e-5, atol=1e-5)
        results.append(out)
    assert not torch.equal(*results)
