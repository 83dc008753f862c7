"""The row-chunk schedule: memory, chunking, GEMMs that are not run, equal bits."""

import math
import weakref

import pytest
import torch
from kernel_cases import make_case, relative_error
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lopd_kernels import (
    engine,
    linear_logprobs,
    linear_sparse_divergence,
    linear_topk,
    ops,
    queries,
    query_ops,
    sparse,
)
from lopd_kernels.divergence import teacher_buckets
from lopd_kernels.engine import Linear, Needs
from lopd_kernels.rowpass import Head

ALL = Needs(True, True, True)


class Allocations(TorchDispatchMode):
    """Bytes of the storages that the operators under it make, and GEMMs by output shape.

    It looks into this library's operators, which a dispatch mode otherwise sees as one call.
    """

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.largest = {}, 0, 0
        self.gemms = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "lopd":
            name = func.overloadpacket.__name__
            with self:
                operator = getattr(ops, name, None) or getattr(query_ops, name)
                return operator._init_fn(*args, **(kwargs or {}))
        given = {
            x.untyped_storage()._cdata
            for x in tree_leaves((args, kwargs))
            if isinstance(x, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in given and key not in self.live:
                continue
            if key not in self.live and storage.nbytes():
                self.live[key] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, key, None)
            self.largest = max(self.largest, storage.nbytes())
            if func.overloadpacket in (torch.ops.aten.addmm, torch.ops.aten.addmm_):
                self.gemms.append(tuple(tensor.shape))
        self.peak = max(self.peak, sum(self.live.values()))
        return out


def problem(dtype=torch.float32, bias=True, softcap=None, **sizes):
    case = make_case("near", dtype, **sizes)
    head = Head(1.3, softcap, 0.7)
    linear = Linear(case.hidden, case.weight, case.bias if bias else None, head)
    target = teacher_buckets(case.ids, case.logprobs, case.tail, len(case.weight)).logprobs
    return linear, case.ids, target


def run(
    linear, ids, target, needs=ALL, workspace_bytes=None, rule="reverse_kl:bucket", entropy=True
):
    weights = torch.linspace(0.5, 1.5, len(ids))
    if rule.endswith("renormalize"):
        return sparse.renormalized_loss(
            linear, ids, target, weights, rule, [0.5], needs, workspace_bytes
        )
    return engine.fused_loss(
        linear, ids, target, weights, rule, [0.5], needs, entropy, workspace_bytes
    )


@pytest.mark.parametrize("rule", ["reverse_kl:bucket", "jsd:renormalize"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_do_not_change_the_result_and_equal_inputs_give_equal_bits(dtype, rule):
    inputs = problem(dtype, rows=33, vocab=300)
    width = inputs[1].shape[1]
    whole, again = run(*inputs, rule=rule), run(*inputs, rule=rule)
    assert torch.equal(whole.stats, again.stats)
    assert torch.equal(whole.grads.weight, again.grads.weight)
    for rows in (1, 2, 7, 32):
        if rule.endswith("renormalize"):
            size = 2 * sparse_smallest(inputs)
        else:
            size = engine.workspace(inputs[0], ALL, width, rows)
        split = run(*inputs, workspace_bytes=size, rule=rule)
        for name in ("hidden", "weight", "bias"):
            found, expected = getattr(split.grads, name), getattr(whole.grads, name)
            assert relative_error(found, expected) < 1e-5
        torch.testing.assert_close(split.stats, whole.stats, rtol=1e-5, atol=1e-6)


def sparse_smallest(inputs):
    with pytest.raises(ValueError, match="at least") as error:
        run(*inputs, workspace_bytes=1, rule="jsd:renormalize")
    return int(str(error.value).split("workspace_bytes=")[1].split()[0])


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 8, 40])
def test_the_workspace_is_a_close_upper_bound(rows, dtype, softcap):
    linear, ids, target = problem(dtype, softcap=softcap, rows=60, vocab=5000, width=16)
    bound = engine.workspace(linear, ALL, ids.shape[1], rows)
    assert engine.chunk_rows(linear, ALL, ids.shape[1], bound) == rows
    with Allocations() as seen:
        run(linear, ids, target, workspace_bytes=bound)
    outputs = 4 * (60 * 5 + 2)
    assert bound / 2 < seen.peak <= bound + outputs


CALLS = ["sum", "none", "renormalize", "logprobs", "topk"]


def call(kind, case, workspace_bytes, buffer, reduction="none"):
    h, w, b = (x.clone().requires_grad_() for x in (case.hidden, case.weight, case.bias))
    options = dict(bias=b, workspace_bytes=workspace_bytes)
    if kind == "logprobs":
        scores, entropy = linear_logprobs(h, w, case.ids, return_entropy=True, **options)
        return scores.masked_fill(case.ids < 0, 0.0).sum() + entropy.sum()
    if kind == "topk":
        return linear_topk(h, w, 4, **options).entropy
    if kind == "renormalize":
        options["tail"] = "renormalize"
    if kind == "sum":
        reduction = "sum"
    if buffer is not None:
        options["weight_grad_buffer"] = buffer
    return linear_sparse_divergence(h, w, *case.teacher, reduction=reduction, **options).sum()


def smallest(function, *args):
    with pytest.raises(ValueError, match="at least") as error:
        function(*args)
    return int(str(error.value).split("workspace_bytes=")[1].split()[0])


@pytest.mark.parametrize(
    ("kind", "buffered"),
    [*((kind, False) for kind in CALLS), ("sum", True), ("renormalize", True)],
)
def test_the_smallest_workspace_lasts_through_the_backward(kind, buffered):
    case = make_case(rows=60, vocab=3000, width=16, k=6)
    buffer = torch.zeros_like(case.weight) if buffered else None
    bound = smallest(call, kind, case, 1, buffer)
    assert smallest(call, kind, case, bound - 1, buffer) == bound
    inputs = 4 * (60 * 16 + 3000 * 17)
    with Allocations() as seen:
        result = call(kind, case, bound, buffer)
    assert seen.peak <= bound + inputs + 4 * 60 * 16
    if kind == "topk":
        return
    with Allocations() as seen:
        result.backward()
    outputs = 4 * (60 * 16 + 3000 * (1 if buffered else 17))
    assert seen.peak <= bound + outputs + 4 * 60 * 6


@pytest.mark.parametrize("kind", CALLS[:-1])
def test_the_bookkeeping_of_many_rows_is_counted_closely(kind):
    case = make_case(rows=150, vocab=64, width=2, k=12)
    bound = smallest(call, kind, case, 1, None)
    with Allocations() as forward:
        result = call(kind, case, bound, None)
    with Allocations() as backward:
        result.backward()
    inputs = outputs = 4 * (150 * 2 + 64 * 3)
    assert forward.peak <= bound + inputs
    assert backward.peak <= bound + outputs
    assert max(forward.peak, backward.peak) > 0.4 * bound


def test_a_gather_within_its_workspace():
    case = make_case(rows=60, vocab=60, width=128, k=12)
    bound = 3 * smallest(call, "renormalize", case, 1, None)
    with Allocations() as seen:
        call("renormalize", case, bound, None, reduction="sum")
    assert bound / 2 < seen.peak <= bound + 4 * (60 * 128 + 60 * 129)


def test_nothing_of_size_rows_by_vocabulary_is_alive(monkeypatch):
    monkeypatch.setattr(engine, "CHUNK_BYTES", 1 << 18)
    linear, ids, target = problem(rows=512, vocab=4096, width=8)
    with Allocations() as seen:
        run(linear, ids, target)
        queries.topk(linear, 4, None, None)
        scores, entropy = queries.logprobs(linear, ids, True, ALL, None)
        queries.logprobs_grads(linear, ids, entropy, scores, entropy, ALL, None)
    assert seen.largest < 512 * 4096 * 4 // 8
    assert seen.peak < 512 * 4096 * 4 // 2


def test_a_frozen_tensor_costs_no_gemm():
    linear, ids, target = problem(bias=False, rows=10, vocab=300)
    shapes = {"logits": (10, 300), "hidden": (10, 24), "weight": (300, 24)}
    for needs in (Needs(), Needs(hidden=True), Needs(weight=True), Needs(True, True)):
        with Allocations() as seen:
            run(linear, ids, target, needs)
        wanted = [shapes["logits"]]
        wanted += [shapes["hidden"]] * needs.hidden + [shapes["weight"]] * needs.weight
        assert seen.gemms == wanted


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both", "no_grad"])
def test_the_public_function_derives_the_needs(frozen, monkeypatch):
    gemms = []
    for name in ("project", "hidden_grad", "weight_grad"):
        gemm = getattr(engine, name)

        def counted(*args, gemm=gemm, name=name, **kwargs):
            gemms.append(name)
            gemm(*args, **kwargs)

        monkeypatch.setattr(engine, name, counted)
    case = make_case(rows=10)
    hidden = case.hidden.requires_grad_(frozen not in ("hidden", "both"))
    weight = case.weight.requires_grad_(frozen not in ("weight", "both"))
    with torch.set_grad_enabled(frozen != "no_grad"):
        loss = linear_sparse_divergence(hidden, weight, *case.teacher)
    assert loss.requires_grad == (frozen in ("hidden", "weight"))
    wanted = {"hidden": ["weight_grad"], "weight": ["hidden_grad"]}.get(frozen, [])
    assert gemms == ["project", *wanted]
    if loss.requires_grad:
        loss.backward()
    assert (hidden.grad is not None) == (frozen == "weight")
    assert (weight.grad is not None) == (frozen == "hidden")


def test_renormalised_losses_run_no_gemm_over_the_vocabulary():
    linear, ids, target = problem(rows=10, vocab=4000)
    with Allocations() as seen:
        run(linear, ids, target, Needs(hidden=True), rule="reverse_kl:renormalize")
    assert seen.gemms == []
    assert seen.largest < 10 * 4000 * 4


def test_an_impossible_bound_names_the_smallest_that_works():
    case = make_case()
    with pytest.raises(ValueError, match="need at least") as error:
        linear_sparse_divergence(case.hidden, case.weight, *case.teacher, workspace_bytes=100)
    smallest = int(str(error.value).split("workspace_bytes=")[1].split()[0])
    options = {"workspace_bytes": smallest}
    found = linear_sparse_divergence(case.hidden, case.weight, *case.teacher, **options)
    torch.testing.assert_close(
        found, linear_sparse_divergence(case.hidden, case.weight, *case.teacher)
    )
    with pytest.raises(ValueError, match="need at least"):
        linear_sparse_divergence(
            case.hidden, case.weight, *case.teacher, workspace_bytes=smallest - 1
        )


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
