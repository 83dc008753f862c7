"""The schedules with 16-bit operands, which CUDA tensors use, emulated on a CPU.

GEMMs of 16-bit operands run in fp32 on the same operands, and the row functions round dlogits to
16 bits: values are rounded where a GPU rounds them, by other kernels.
"""

import pytest
import torch
from kernel_cases import assert_close, gradients, make_case, relative_error, rounding_bounds

from lopd_kernels import (
    linear_cross_entropy,
    linear_logprobs,
    linear_policy_gradient,
    linear_sparse_divergence,
)
from lopd_kernels._core import gemm, scaling, topk, workspace
from lopd_kernels._core.linear import make_linear
from lopd_kernels._ops import losses as ops
from lopd_kernels._torch import rows as torch_rows

NARROW = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def mixed(monkeypatch):
    for module in (gemm, scaling, workspace):
        monkeypatch.setattr(module, "is_mixed", lambda like: like.dtype in NARROW)
    monkeypatch.setattr(gemm, "_mm", lambda a, b, out: out.copy_(a.to(out.dtype) @ b.to(out.dtype)))
    monkeypatch.setattr(
        gemm, "_addmm", lambda a, b, total: total.add_(a.to(total.dtype) @ b.to(total.dtype))
    )
    monkeypatch.setattr(
        torch, "mm", lambda a, b, out: out.copy_((a.float() @ b.float()).to(out.dtype))
    )
    row_pass, write = torch_rows.row_pass, torch_rows.write

    def narrow_row_pass(u, *args, out, **options):
        wide = u.clone()
        row_pass(wide, *args, wide, **options)
        if out is not None:
            out.copy_(wide)

    monkeypatch.setattr(
        torch_rows,
        "row_pass",
        lambda u, s, t, w, r, h, e, stats, out, **options: narrow_row_pass(
            u, s, t, w, r, h, e, stats, out=out if w is not None else None, **options
        ),
    )

    def narrow_write(u, first, listed_ids, logit_options, grads, listed, out):
        wide = torch.empty_like(u)
        write(u, first, listed_ids, logit_options, grads, listed, wide)
        out.copy_(wide)

    monkeypatch.setattr(torch_rows, "write", narrow_write)


LOSSES = {
    "reverse_kl": lambda h, w, case, **o: linear_sparse_divergence(h, w, *case.teacher, **o),
    "jsd": lambda h, w, case, **o: linear_sparse_divergence(
        h, w, *case.teacher, divergence="jsd", tail="truncate", **o
    ),
    "generalized": lambda h, w, case, **o: linear_sparse_divergence(
        h, w, *case.teacher, **case.form("forward_kl", "generalized"), **o
    ),
    "unbiased": lambda h, w, case, **o: linear_sparse_divergence(
        h, w, *case.teacher, **case.form("reverse_kl", "unbiased"), importance_cap=1.1, **o
    ),
    "policy_gradient": lambda h, w, case, **o: linear_policy_gradient(
        h, w, case.ids[:, 0], case.logprobs[:, 0], **o
    ),
    "cross_entropy": lambda h, w, case, **o: linear_cross_entropy(h, w, case.ids[:, 0], **o),
}
# (operator of the forward, options, rows): each way of computing gradients
SCHEDULES = {
    "stored": ("stored_loss", {"reduction": "mean"}, 120),
    "accumulated": ("fused_loss", {"reduction": "mean"}, 140),
    "panels": ("row_losses", {"reduction": "none"}, 120),
}


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("regime", ["far", "near"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_gate(loss, schedule, regime, dtype, monkeypatch):
    operator, options, rows = SCHEDULES[schedule]
    called, original = [], getattr(ops, operator)
    monkeypatch.setattr(
        ops, operator, lambda h, *args: called.append(h.dtype) or original(h, *args)
    )
    case = make_case(regime, dtype, rows=rows, vocab=700, width=64)
    weights = torch.linspace(0.3, 1.7, rows)
    weights[3] = 0.0
    upstream = 0.7 * rows

    def run(side, dtype):
        weighted = {**options, "row_weights": weights.to(dtype)}
        return gradients(
            lambda h, w: LOSSES[loss](h, w, side, **weighted),
            side.hidden, side.weight, upstream=upstream,
        )  # fmt: skip

    ours, exact = run(case, torch.float32), run(case.double(), torch.float64)
    assert dtype in called
    bounds = rounding_bounds(
        lambda h, w: LOSSES[loss](h, w, case.double(), row_weights=weights.double()),
        case.hidden, case.weight, dtype,
    )  # fmt: skip
    assert max(bounds) < 5e-3
    assert_close(ours, exact, dtype, bounds=bounds)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_a_gradient_buffer_and_log_probs(dtype):
    case = make_case("near", dtype, rows=30, vocab=400)
    hidden, weight = (x.clone().requires_grad_() for x in (case.hidden, case.weight))
    buffer = torch.ones(400, 24)
    loss = linear_sparse_divergence(hidden, weight, *case.teacher, weight_grad_buffer=buffer)
    (1.3 * loss).backward()
    wide = case.double()
    _, dhidden, dweight = gradients(
        lambda h, w: linear_sparse_divergence(h, w, *wide.teacher),
        wide.hidden, wide.weight, upstream=1.3,
    )  # fmt: skip
    assert relative_error(buffer - 1.0, dweight) < 3e-3
    assert relative_error(hidden.grad, dhidden) < 3e-3

    def total(h, w, side):
        logprobs, entropy = linear_logprobs(h, w, side.ids[:, :1], return_entropy=True)
        return logprobs.sum() + 0.5 * entropy.sum()

    ours = gradients(lambda h, w: total(h, w, case), case.hidden, case.weight)
    exact = gradients(lambda h, w: total(h, w, wide), wide.hidden, wide.weight)
    for grad, expected in zip(ours[1:], exact[1:], strict=True):
        assert relative_error(grad, expected) < 3e-3


def test_large_advantages_stay_within_fp16():
    case = make_case(dtype=torch.float16)
    advantages, ids = torch.linspace(-3000.0, 3000.0, 20), case.ids[:, 0]

    def run(side, dtype):
        return gradients(
            lambda h, w: linear_policy_gradient(h, w, ids, None, advantages=advantages.to(dtype)),
            side.hidden,
            side.weight,
        )

    sides = run(case, torch.float32), run(case.double(), torch.float64)
    for grad, expected in zip(sides[0][1:], sides[1][1:], strict=True):
        assert relative_error(grad, expected) < 1e-3


def test_topk_takes_16_bit_operands():
    case = make_case("near", torch.bfloat16, rows=10, vocab=300)
    linear = make_linear(case.hidden, case.weight, None, 1.0, None, 1.0)
    none = torch.empty(10, 0, dtype=torch.int64)
    top = topk.topk(linear, 5, none, none, None)
    exact = (case.hidden.double() @ case.weight.double().t()).log_softmax(1).topk(5, 1)
    assert torch.equal(top.ids, exact.indices)
    assert (top.logprobs - exact.values).abs().max() < 1e-5
