"""The harness: oracle, gate, clock, memory and formulas."""

import itertools
import math
import time
from dataclasses import replace

import pytest
import torch

from benchmarks import clock, components, harness, problems, projects, roofline, variants
from benchmarks.clock import Outcome, Prepared, take_turns
from benchmarks.harness import Variant, gate, measure
from benchmarks.problems import (
    CROSS_ENTROPY,
    DENSE_KL,
    FORWARD_KL,
    FORWARD_TRUNCATED,
    POLICY_GRADIENT,
    RENORMALIZED,
    REVERSE_KL,
    Shape,
    make_problem,
    oracle,
    relative_error,
)
from benchmarks.recorder import Recorder
from lopd_kernels import reference

SMALL = Shape(rows=12, hidden=16, vocab=97, topk=5)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def problem():
    return make_problem(SMALL, torch.bfloat16)


@pytest.fixture
def recorder(tmp_path):
    return Recorder(tmp_path / "rows.jsonl", CPU, "again {part}")


def defined(loss, some):
    """The loss as defined in `lopd_kernels.reference`."""

    def value(hidden, weight):
        if loss == CROSS_ENTROPY:
            return reference.linear_cross_entropy(hidden, weight, some.labels)
        if loss == POLICY_GRADIENT:
            return reference.linear_policy_gradient(
                hidden, weight, some.labels, some.label_logprobs, reduction="mean"
            )
        if loss == DENSE_KL:
            student, teacher = (
                (h @ weight.t()).log_softmax(1) for h in (hidden, some.teacher_hidden.double())
            )
            return reference.kl(student, teacher.detach()).mean()
        return reference.linear_sparse_divergence(
            hidden, weight, some.ids, some.logprobs, tail_logprobs=some.tail,
            reduction="mean", **variants.FORMS[loss],
        )  # fmt: skip

    return value


LOSSES = [
    REVERSE_KL, RENORMALIZED, FORWARD_KL, FORWARD_TRUNCATED, DENSE_KL, CROSS_ENTROPY,
    POLICY_GRADIENT,
]  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES)
def test_the_oracle_equals_the_definition(loss, problem, monkeypatch):
    monkeypatch.setattr(problems, "CHUNK_BYTES", 8 * SMALL.vocab * 5)
    exact = oracle(problem, loss)
    hidden, weight = (x.double().requires_grad_() for x in (problem.hidden, problem.weight))
    value = defined(loss, problem)(hidden, weight)
    value.backward()
    assert float(exact.losses.mean()) == pytest.approx(value.item(), rel=1e-12)
    assert relative_error(exact.dhidden, hidden.grad) < 1e-12
    assert relative_error(exact.dweight, weight.grad) < 1e-12
    assert 1e-4 < max(exact.rounding) < 4e-3  # bf16 rounds dz by up to 2^-9


def test_problems_depend_on_the_seed():
    first, second, other = (make_problem(SMALL, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.ids, second.ids) and not torch.equal(first.hidden, other.hidden)
    near, far = (
        oracle(make_problem(SMALL, torch.float32, regime=r), DENSE_KL) for r in ("near", "far")
    )
    assert near.losses.mean() < 0.1 < far.losses.mean()


def test_dlogits_equal_the_gradient_of_the_oracle(problem):
    z = problem.hidden.double() @ problem.weight.double().t()
    z.requires_grad_()
    losses = problems.row_losses(REVERSE_KL, z, problem, problem.weight)
    (exact,) = torch.autograd.grad(losses.sum(), z)
    assert relative_error(problem.dlogits, exact) < 3e-3


def sabotaged(change):
    """Our variant with a changed outcome."""

    def prepare(some):
        step = variants.ours("ours").prepare(some).step
        return Prepared(lambda: change(step()))

    return Variant("wrong", "ours", REVERSE_KL, prepare)


WRONG = {
    "zero dH": sabotaged(lambda o: o._replace(dhidden=0 * o.dhidden)),
    "zero dW": sabotaged(lambda o: o._replace(dweight=0 * o.dweight)),
    "NaN": sabotaged(lambda o: o._replace(dweight=o.dweight * math.nan)),
    "loss": sabotaged(lambda o: o._replace(loss=o.loss + 1e-4)),
    "direction": variants.ours("wrong", divergence="forward_kl"),
    "temperature": variants.ours("wrong", temperature=1.1),
    "tail": variants.ours("wrong", tail="truncate"),
    "sum for mean": variants.ours("wrong", reduction="sum"),
    "bf16 logits": Variant(
        "wrong", "ours", REVERSE_KL, variants.eager_variants()[0].prepare
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_the_gate_rejects(name, problem):
    assert gate(WRONG[name], problem, oracle(problem, REVERSE_KL))["red"]


def test_the_gate_accepts_our_variants(problem):
    exact = {loss: oracle(problem, loss) for loss in LOSSES}
    for variant in (*variants.our_variants(), *variants.curve([1 << 20])):
        assert gate(variant, problem, exact[variant.loss])["red"] == [], variant.name


def test_a_single_wrong_row_is_rejected(problem):
    def rows(some):
        losses = oracle(some, REVERSE_KL).losses.clone()
        losses[3] += 1e-3
        losses[4] -= 1e-3
        return losses

    good = variants.ours("ours")
    variant = Variant("wrong", "ours", REVERSE_KL, good.prepare, row_losses=rows)
    (red,) = gate(variant, problem, oracle(problem, REVERSE_KL))["red"]
    assert red.startswith("row_loss_error")


def test_losses_of_other_projects_compute_the_loss_in_their_name():
    """In fp32, where only the formula could differ from the oracle of the loss."""
    exactly = make_problem(SMALL, torch.float32, sharpest=6.0)
    compared = [*variants.eager_variants(), *variants.project_variants()]
    for variant in (each for each in compared if not each.missing(exactly)):
        row = gate(variant, exactly, oracle(exactly, variant.loss))
        assert max(row["dhidden_error"], row["dweight_error"]) < 1e-4, variant.name
    assert {variant.loss for variant in variants.project_variants()} == {
        RENORMALIZED, FORWARD_KL, FORWARD_TRUNCATED, POLICY_GRADIENT,
    }  # fmt: skip


def test_gradient_bounds():
    assert harness.gradient_bound(torch.bfloat16, 1e-3) == 3e-3
    assert harness.gradient_bound(torch.bfloat16, 4e-3) == 5e-3
    assert harness.gradient_bound(torch.float16, 1.0) == 1e-3
    assert harness.gradient_bound(torch.float32, 1.0) == 1e-5


def test_peers_may_be_inexact_but_better_than_zeros(problem):
    exact = oracle(problem, REVERSE_KL)
    peer = variants.peer("eager", REVERSE_KL, projects.eager)
    assert gate(peer, problem, exact)["red"] == []

    def prepare(some):
        step = peer.prepare(some).step
        return Prepared(lambda: Outcome(torch.ones(()), *(-x for x in step()[1:3])))

    worthless = Variant("eager", "peer", REVERSE_KL, prepare)
    assert gate(worthless, problem, exact)["red"]


def test_a_wrong_variant_is_not_timed(problem, recorder):
    rows = measure(recorder, "part", problem, [variants.ours("ours"), WRONG["tail"]], budget_s=0)
    by_name = {row["variant"]: row for row in rows}
    assert by_name["wrong"]["status"] == "red gate" and "median_ms" not in by_name["wrong"]
    assert "dweight_error" in by_name["wrong"]["reason"]
    assert by_name["ours"]["median_ms"] > 0
    assert [harness.is_red(row) for row in rows] == [True, False]


def test_rows_are_strict_json(recorder):
    row = recorder.emit("part", "x", "ok", bad=math.nan, more=[math.inf, 1.0])
    assert (row["bad"], row["more"]) == (None, [None, 1.0])
    text = recorder.path.read_text(encoding="utf-8")
    assert "NaN" not in text and "Infinity" not in text


def test_failures_give_rows(problem, recorder):
    def broken(some):
        raise RuntimeError("no such\nkernel")

    ours, theirs = (Variant("broken", kind, REVERSE_KL, broken) for kind in ("ours", "peer"))
    absent = variants.peer("absent", REVERSE_KL, projects.eager, missing=variants.needs("nothing"))
    refused = variants.ours("refused", workspace_bytes=10)
    rows = measure(recorder, "part", problem, [ours, theirs, absent, refused], budget_s=0)
    assert {row["status"] for row in rows} == {"failed", "unavailable", "refused"}
    assert [row["kind"] for row in rows if harness.is_red(row)] == ["ours"]
    reasons = " / ".join(row["reason"] for row in rows)
    assert "RuntimeError: no such kernel" in reasons and "nothing is not installed" in reasons


def test_variants_alternate():
    seen, ran = [], []

    def step(name, fail_at=None):
        def run():
            ran.append(name)
            if fail_at is not None and ran.count(name) > fail_at:
                raise RuntimeError(name)

        return Prepared(run, lambda: seen.append(name))

    ready = {"a": step("a"), "b": step("b"), "c": step("c", fail_at=4)}
    times, failures = take_turns(ready, CPU, budget_s=1e-9)
    assert list(failures) == ["c"] and set(times) == {"a", "b"}
    assert times["a"]["repetitions"] == clock.MIN_STEPS
    turns = [ran[at : at + 3] for at in range(0, 12, 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert ran.count("a") == clock.MIN_STEPS + 2
    assert seen == ran  # restored before each
    times, _ = take_turns({"a": step("a")}, CPU, budget_s=1e-9, min_steps=2)
    assert times["a"]["repetitions"] == 2
    times, _ = take_turns({"a": step("a")}, CPU, budget_s=1e3)
    assert times["a"]["repetitions"] == clock.MAX_STEPS
    times, _ = take_turns({"a": step("a")}, CPU, budget_s=1e3, deadline=0.0)
    assert times["a"]["repetitions"] == 1


def test_no_variant_always_follows_the_same_one():
    """Heat or cached memory from one variant must not always affect the same other variant."""
    ran = []
    ready = {name: Prepared(lambda name=name: ran.append(name)) for name in "abcd"}
    take_turns(ready, CPU, budget_s=1e3)
    before = {(a, b) for a, b in itertools.pairwise(ran) if a != b}
    assert len(before) == 12
    again, ran[:] = list(ran), []
    take_turns(ready, CPU, budget_s=1e3)
    assert ran == again


def test_drift_of_the_clock_is_reported():
    assert clock.drift([1.0, 1.0, 1.0, 1.0]) == 1.0
    assert clock.drift([1.0, 1.1, 1.0, 9.0, 1.5, 1.6, 1.5]) == 1.5
    assert clock.drift([1.0, 2.0, 3.0]) is None


def test_caches_are_flushed_and_disturbances_are_reported(monkeypatch):
    """On a GPU: each step follows a write larger than any L2 cache; only retries during the turns
    count."""
    events, retries = [], iter([3, 5])
    monkeypatch.setattr(clock, "allocator_retries", lambda device: next(retries))
    monkeypatch.setattr(clock, "query_gpu", lambda *fields: "1980 MHz")

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            events.append("record")

        def synchronize(self):
            events.append("synchronize")

        def elapsed_time(self, other):
            return 1.0

    class Flush:
        def zero_(self):
            events.append("flush")

    sizes = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", lambda size, **rest: sizes.append(size) or Flush())
    ready = {"a": Prepared(lambda: events.append("step"), lambda: events.append("restore"))}
    times, _ = take_turns(ready, torch.device("cuda"), budget_s=1e-9)
    assert sizes[0] >= 128 << 20
    once = ["restore", "flush", "record", "step", "record", "synchronize"]
    assert events == once * (clock.MIN_STEPS + 2)
    assert (times["a"]["allocator_retries"], times["a"]["clocks"]) == (2, "1980 MHz")


def test_a_step_retains_no_graph_and_no_gradient(problem):
    """Otherwise the memory of one variant would include that of another."""
    step = variants.ours("ours").prepare(problem).step
    outcome = step()
    assert all(x.grad_fn is None and not x.requires_grad for x in outcome[:3])
    assert problem.hidden.grad is None and problem.weight.grad is None
    assert torch.equal(step().dweight, outcome.dweight)  # fresh, not accumulated


def test_the_timed_step_is_checked_on_all_rows(problem, recorder):
    """A schedule that drops its last chunk passes a gate on the first rows only."""

    def prepare(some):
        step = variants.ours("ours").prepare(some).step

        def lossy():
            outcome = step()
            if some.shape.rows > 4:
                outcome.dhidden[8:] = 0.0
            return outcome

        return Prepared(lossy)

    lossy = Variant("lossy", "ours", REVERSE_KL, prepare)
    compared = [variants.ours("ours"), variants.ours("frozen", frozen=True), lossy]
    rows = measure(recorder, "part", problem, compared, budget_s=0, gate_rows=4)
    by_name = {row["variant"]: row for row in rows}
    assert by_name["lossy"]["status"] == "red gate" and "median_ms" not in by_name["lossy"]
    assert "full_dhidden_error" in by_name["lossy"]["reason"]
    assert by_name["ours"]["status"] == by_name["frozen"]["status"] == "ok"
    assert 0 < by_name["ours"]["full_dweight_error"] < 6e-3


def test_floor_ratios_compare_equal_work(problem, recorder):
    compared = [*variants.floors("three", "two"), *variants.our_variants()[:4]]
    rows = measure(recorder, "part", problem, compared, budget_s=0)
    by_name = {row["variant"]: row for row in rows}
    for name, count in (("ours", 3), ("ours, frozen weight", 2)):
        floors = [r["median_ms"] for r in rows if r["kind"] == "floor" and r["gemms"] == count]
        row = by_name[name]
        assert row["floor_ratio"] == pytest.approx(row["median_ms"] / min(floors))
    assert by_name["ours, frozen weight"]["dweight_error"] is None


def test_only_floors_are_floors(problem, recorder):
    slow = components.component("slow", lambda some: lambda: time.sleep(0.03))
    compared = [replace(slow, kind="floor"), variants.ours("ours")]
    rows = measure(recorder, "part", problem, compared, budget_s=0)
    assert {row["variant"]: row["floor_ratio"] < 1.0 for row in rows} == {
        "slow": False,
        "ours": True,
    }


def test_row_kernel_and_scoring_have_gates(problem, monkeypatch):
    assert components.row_kernel().check(problem)["red"] == []
    run = components.time_row_kernel

    def wrong(some, logits):
        step, stats = run(some, logits)
        return (lambda: (step(), stats.mul_(1.001))), stats

    monkeypatch.setattr(components, "time_row_kernel", wrong)
    assert components.row_kernel().check(problem)["red"]
    good = components.scorer("ours", "ours", components.scores_ours)
    assert good.check(problem)["red"] == []
    assert components.scorer("ours", "ours", components.scores_full).check(problem)["red"]


def test_roofline_formulas():
    """By hand: 2 x 8192 x 4096 x 151936 = 1.0196e13 operations; W has 6.223e8 elements."""
    target = roofline.TARGET
    assert roofline.gemm_ms(target, 790.0) == pytest.approx(12.907, abs=1e-3)
    assert roofline.row_bytes(target) == 10 * 8192 * 151936
    assert roofline.weight_bytes(target) == 1244659712
    assert roofline.accumulate_bytes(target, 2048) == 7 * 2 * 1244659712
    assert roofline.reread_bytes(target, 3000) == 6 * 1244659712
    assert roofline.move_ms(4.3e9, 4.3) == pytest.approx(1.0)


class Allocator:
    """A fake of torch.cuda's allocator."""

    def __init__(self, monkeypatch, **values):
        defaults = {"memory_allocated": 100, "memory_reserved": 200, "mem_get_info": (0, 0)}
        for name, value in {**defaults, **values}.items():
            monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
        for name in ("synchronize", "reset_peak_memory_stats"):
            monkeypatch.setattr(torch.cuda, name, lambda device: None)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


def test_extra_memory_is_the_peak_minus_the_gradients(monkeypatch):
    mib = 1 << 20
    Allocator(
        monkeypatch, max_memory_allocated=100 + 20 * mib, max_memory_reserved=200 + 32 * mib
    )  # fmt: skip
    dhidden, dweight = torch.empty(mib), torch.empty(2 * mib, dtype=torch.bfloat16)
    cuda, outcome = torch.device("cuda"), Outcome(torch.ones(()), dhidden, dweight)
    memory = harness.measure_memory(Prepared(lambda: outcome), cuda)
    assert memory == {
        "peak_mib": 20.0, "dhidden_mib": 4.0, "dweight_mib": 4.0, "extra_mib": 12.0,
        "reserved_mib": 32.0,
    }  # fmt: skip
    memory = harness.measure_memory(Prepared(lambda: outcome._replace(is_buffer=True)), cuda)
    assert (memory["dweight_mib"], memory["extra_mib"]) == (0.0, 16.0)


def test_a_baseline_that_does_not_fit_gets_fewer_rows(monkeypatch, problem):
    large = make_problem(Shape(rows=600, hidden=4, vocab=8, topk=2))
    monkeypatch.setattr(problems.Problem, "device", torch.device("cuda"))
    eager = variants.eager_variants()[0]
    for free, rows in ((1e9, 600), (8 * 26 * 599 / 0.85, 512), (0, 256)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        assert harness.fit_to_memory(eager, large).shape.rows == rows
        assert harness.fit_to_memory(variants.ours("ours"), large) is large
