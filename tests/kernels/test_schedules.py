"""The schedules: equal results, equal bits, and no GEMM for a gradient that is not needed."""

import math

import pytest
import torch
from kernel_cases import make_case, relative_error
from kernel_memory import Allocations

from lopd_kernels import linear_sparse_divergence, linear_topk
from lopd_kernels._core import chunks, gemm, logprobs, panels, topk, workspace
from lopd_kernels._core.linear import make_linear
from lopd_kernels._core.rules import (
    CrossEntropyRule,
    DivergenceRule,
    RowLoss,
    encode,
    teacher_buckets,
)
from lopd_kernels._core.types import Needs
from lopd_kernels._ops import losses as ops

ALL = Needs(True, True, True)
HEAD = (1.3, 4.0, 0.7)
RULES = [
    DivergenceRule("reverse_kl", "bucket", 0.3),
    DivergenceRule("jsd", "truncate", 0.3),
    CrossEntropyRule(),
]


def problem(dtype=torch.float32, bias=True, head=HEAD, rule=RULES[0], **sizes):
    """(linear, loss)"""
    case = make_case("near", dtype, **sizes)
    linear = make_linear(case.hidden, case.weight, case.bias if bias else None, *head)
    if isinstance(rule, CrossEntropyRule):
        target = torch.zeros(len(case.ids), 1)
        return linear, RowLoss(case.ids[:, :1], target, None, rule)
    target = teacher_buckets(case.ids, case.logprobs, case.tail, len(case.weight)).logprobs
    weights = torch.linspace(0.5, 1.5, len(case.ids))
    return linear, RowLoss(case.ids, target, weights, rule)


def stored(inputs, needs=ALL, entropy=True):
    linear, loss = inputs
    _, stats, dlogits, scale = chunks.stored_loss(*inputs, needs, entropy, None)
    active = linear.functions.locate(loss.ids, loss.row_weights, len(linear.weight)).active
    grads = chunks.stored_grads(linear, active, dlogits, scale, needs)
    return stats, *(grad.double() for grad in grads)


def chunked(inputs, needs=ALL, entropy=True):
    _, stats, *grads, scale = chunks.fused_loss(*inputs, needs, entropy, None)
    return stats, *(grad.double() * scale for grad in grads)


def panelled(inputs, needs=ALL, entropy=True):
    linear, loss = inputs
    stats, state = panels.row_losses(*inputs, needs, entropy, None)
    grads = panels.row_grads(linear, loss, state, needs, None)
    return stats, *(grad.double() for grad in grads)


def assert_same(actual, expected, bound=1e-5):
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=2e-6)
    for grad, exact in zip(actual[1:], expected[1:], strict=True):
        assert relative_error(grad, exact) < bound


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: encode(rule)[0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_and_panels_of_any_size_give_the_same_result(dtype, rule, monkeypatch):
    inputs = problem(dtype, rows=33, vocab=300, rule=rule)
    whole = chunked(inputs)
    bound = 1e-5 if dtype == torch.float32 else 3e-3
    for rows in (1, 2, 7, 32):
        monkeypatch.setitem(workspace.CHUNK_BYTES, "cpu", rows * 304 * 4)
        monkeypatch.setattr(workspace, "FEWEST_ROWS", 1)
        assert_same(chunked(inputs), whole)
        monkeypatch.setattr(workspace, "WEIGHT_GRAD_BYTES", 4 * 24 * 50 * rows)
        assert_same(stored(inputs), whole, bound)
    for columns in (1, 7, 128, 299):
        monkeypatch.setitem(workspace.PANEL_BYTES, "cpu", columns * 33 * 4)
        assert_same(panelled(inputs), whole, bound)


def test_equal_inputs_give_equal_bits():
    inputs = problem(rows=33, vocab=300)
    for schedule in (chunked, stored, panelled):
        first, second = schedule(inputs), schedule(inputs)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_tensor_of_size_rows_by_vocabulary_is_allocated(monkeypatch):
    monkeypatch.setitem(workspace.CHUNK_BYTES, "cpu", 1 << 18)
    monkeypatch.setitem(workspace.PANEL_BYTES, "cpu", 1 << 18)
    inputs = problem(rows=512, vocab=4096, width=8)
    linear, ids = inputs[0], inputs[1].ids
    with Allocations() as seen:
        chunked(inputs)
        panelled(inputs)
        topk.topk(linear, 4, ids, ids[:, :1].clamp(min=0), None)
        scores, entropy, state = logprobs.logprobs(linear, ids, ALL, True, None)
        logprobs.logprobs_grads(linear, ids, state, scores, entropy, ALL, None)
    assert seen.largest < 512 * 4096 * 4 // 8
    assert seen.peak < 512 * 4096 * 4 // 2


SUBSETS = [Needs(), Needs(hidden=True), Needs(weight=True), Needs(True, True)]


@pytest.mark.parametrize("needs", SUBSETS, ids=str)
def test_a_frozen_tensor_costs_no_gemm(needs):
    inputs = problem(bias=False, rows=10, vocab=300)
    logits, hidden, weight = (10, 300), (10, 24), (300, 24)
    with Allocations() as seen:
        chunked(inputs, needs)
    assert seen.gemms == [logits] + [hidden] * needs.hidden + [weight] * needs.weight
    with Allocations() as seen:
        stored(inputs, needs)
    assert seen.gemms == [logits] + [hidden] * needs.hidden + [weight] * needs.weight
    with Allocations() as seen:
        panelled(inputs, needs)
    assert seen.gemms == [logits] * 2 + [weight] * needs.weight + [hidden] * needs.hidden


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both", "no_grad"])
def test_the_public_function_computes_only_gradients_that_are_required(frozen, monkeypatch):
    gemms = []
    for name in ("project", "hidden_grad", "weight_grad"):
        function = getattr(gemm, name)

        def counted(*args, function=function, name=name, **kwargs):
            gemms.append(name)
            function(*args, **kwargs)

        monkeypatch.setattr(gemm, name, counted)
    case = make_case(rows=10)
    hidden = case.hidden.requires_grad_(frozen not in ("hidden", "both"))
    weight = case.weight.requires_grad_(frozen not in ("weight", "both"))
    with torch.set_grad_enabled(frozen != "no_grad"):
        loss = linear_sparse_divergence(hidden, weight, *case.teacher)
    assert loss.requires_grad == (frozen in ("hidden", "weight"))
    expected = {"hidden": ["weight_grad"], "weight": ["hidden_grad"]}.get(frozen, [])
    assert gemms == ["project", *expected]
    if loss.requires_grad:
        loss.backward()
    assert (hidden.grad is not None) == (frozen == "weight")
    assert (weight.grad is not None) == (frozen == "hidden")


def test_the_arguments_choose_the_schedule(monkeypatch):
    """The gradient is computed in the forward, unless it needs the upstream gradient first."""
    called = []
    for name in ("fused_loss", "row_losses", "row_grads"):
        operator = getattr(ops, name)

        def recorded(*args, operator=operator, name=name):
            called.append(name)
            return operator(*args)

        monkeypatch.setattr(ops, name, recorded)
    case = make_case(rows=200, vocab=300)
    room = case.weight.numel() * 4 + 200 * 300 * 4

    def calls(**options):
        called.clear()
        hidden, weight = (x.clone().requires_grad_() for x in (case.hidden, case.weight))
        linear_sparse_divergence(hidden, weight, *case.teacher, **options).sum().backward()
        return list(called)

    assert calls() == ["fused_loss"]
    assert calls(reduction="none") == ["row_losses", "row_grads"]
    assert calls(workspace_bytes=10 * room) == ["fused_loss"]
    assert calls(workspace_bytes=room) == ["row_losses", "row_grads"]
    assert calls(tail="renormalize") == ["row_losses", "row_grads"]


def test_renormalised_losses_run_no_gemm_over_the_vocabulary():
    case = make_case(rows=10, vocab=4000)
    hidden = case.hidden.requires_grad_()
    with Allocations() as seen:
        loss = linear_sparse_divergence(hidden, case.weight, *case.teacher, tail="renormalize")
        loss.backward()
    assert seen.gemms == []
    assert seen.largest < 10 * 4000 * 4


def test_huge_logits_stay_finite():
    hidden = torch.eye(4) * 1e4
    weight = torch.randn(60, 4)
    ids = torch.arange(5).repeat(4, 1)
    logprobs = torch.full((4, 5), math.log(0.1))
    loss, stats = linear_sparse_divergence(
        hidden, weight, ids, logprobs, reduction="none", return_stats=True
    )
    assert loss.isfinite().all()
    exact = (hidden.double() @ weight.double().t()).logsumexp(1)
    torch.testing.assert_close(stats.student_lse.double(), exact, rtol=1e-6, atol=0)
    assert linear_topk(hidden, weight, 3).entropy.isfinite().all()
