"""The benchmark on a real model, with a tiny random model in its place; tables from rows."""

import json

import pytest
import torch

from benchmarks import prunings, real_demo, real_model
from benchmarks.training import FP32_BOUNDS


@pytest.fixture(scope="module")
def bench():
    return real_model.Bench(real_model.TINY)


def test_fused_and_plain_losses_agree(bench):
    errors = bench.errors()
    assert all(errors[key] <= bound for key, bound in FP32_BOUNDS.items())


def test_the_gate_sees_a_wrong_loss(bench, monkeypatch):
    right = real_model.plain_reverse_kl
    monkeypatch.setattr(real_model, "plain_reverse_kl", lambda *batch: 1.001 * right(*batch))
    assert bench.errors()["loss_error"] > FP32_BOUNDS["loss_error"]


def test_trl_computes_the_same_cross_entropy(bench):
    inputs = bench.model, bench.batch, bench.num_items
    plain = real_model.plain_cross_entropy(*inputs)
    trl = bench.loss("cross-entropy, TRL")(*inputs)
    assert torch.allclose(trl, plain, rtol=1e-5)


@pytest.mark.parametrize("variant", real_model.INFERENCE)
def test_every_engine_step_runs(bench, variant):
    prepared = bench.prepare(variant)
    prepared.restore()
    prepared.step()


def test_memory_is_measured_after_steps_with_several_threads(bench):
    """A fork that entered a parallel region would wait forever for threads that it lacks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.ones(1 << 18).exp()  # starts the second thread
        assert real_model.peak_mib(bench, "cross-entropy, fused") >= 0.0
    finally:
        torch.set_num_threads(threads)


def test_the_tables_are_those_of_the_newest_rows():
    rows = [
        {
            "variant": variant, "part": part, "time_ratio": ratio, "memory_ratio": 1.0,
            "median_ms": 4.0, "p10_ms": 2.0, "p90_ms": 6.0, "repetitions": 3,
            "threads": 1, "model": "tiny", "dtype": "float32", **vars(real_model.TINY),
        }
        for ratio in (0.5, 0.25)
        for variant, part in real_model.PARTS.items()
    ]  # fmt: skip
    text = real_model.table(json.loads(json.dumps(rows)))
    assert "| reverse KL, fused | 0.25 | 0.50 to 1.50 | 1.00 |" in text and "| 0.50 |" not in text
    assert "on a CPU, threads: 1; medians of at least 3 steps" in text
    row = {"variant": "a", "layers": 2, "kl": 1.0, "kl_interval": [0.5, 1.5], "sampled": 0.25}
    assert "| a | 2 | 1.000 [0.500, 1.500] | 0.250 |" in prunings.table([{**row, "steps": 3}])


def demo_rows(seed, *, quick=False, distilled=1.0):
    def row(stage, kl):
        interval = [kl - 0.3, kl + 0.3]
        values = {key: kl for key in ("kl", "held_out_kl", "sampled", "greedy")}
        intervals = {f"{key}_interval": interval for key in values}
        return {
            "stage": stage, "seed": seed, "quick": quick, "steps": 3, "eval_prompts": 4,
            "command": f"demo {seed}", "cpu_seconds": 1.0 + seed, "peak_mib": 512,
            **values, **intervals,
        }  # fmt: skip

    kls = dict.fromkeys(real_demo.MODELS, 2.0) | {real_demo.DISTILLED: distilled}
    return [row(stage, kl) for stage, kl in kls.items()]


def test_the_rows_of_a_seed_replace_its_own_and_the_quick_ones():
    quick, first = demo_rows(0, quick=True), demo_rows(1, distilled=1.5)
    rows = real_demo.merged(quick, first)
    assert rows == first
    rows = real_demo.merged(rows, demo_rows(0))
    assert [row["seed"] for row in rows] == [0] * 6 + [1] * 6
    again = real_demo.merged(rows, demo_rows(1))
    assert again == [*demo_rows(0), *demo_rows(1)]


def test_the_difference_to_the_control_has_the_interval_of_two_means():
    rows = [*demo_rows(0), *demo_rows(1, distilled=1.5)]
    text = real_demo.against_control(rows)
    # 0.3 * sqrt(2) = 0.42
    each = "-1.00 [-1.42, -0.58] | -0.50 [-0.92, -0.08]"
    assert f"| {real_demo.DISTILLED} | new | {each} |  |" in text
    assert f"| {real_demo.DISTILLED} | held-out | {each} |  |" in text
    three = real_demo.against_control([row for seed in (0, 1, 2) for row in demo_rows(seed)])
    assert f"{real_demo.DISTILLED} | new | " + 3 * "-1.00 [-1.42, -0.58] | " in three
    assert "-0.58] | -1.00 [-1.00, -1.00] |" in three
    assert "Seed 0, 4 held-out questions" in real_demo.table(rows)
    assert "Seed 1, 4 held-out questions" in real_demo.table(rows)


def test_the_short_table_compares_with_the_control_from_three_seeds_on():
    rows = [*demo_rows(0), *demo_rows(1, distilled=1.5)]
    each = "1.00 / 1.50"
    assert f"| {real_demo.DISTILLED} | {each} |  | {each} |" in real_demo.short_table(rows)
    three = real_demo.short_table([row for seed in (0, 1, 2) for row in demo_rows(seed)])
    assert f"| {real_demo.DISTILLED} | 1.00 / 1.00 / 1.00 | 0.50 [0.50, 0.50] |" in three
    assert f"| {real_demo.MORE_SFT} | 2.00 / 2.00 / 2.00 |  |" in three


def test_the_parts_are_those_of_the_last_demo():
    rows = [*demo_rows(0), *demo_rows(1)]
    rows[-1] |= {"cpu_seconds": None, "eval_cpu_seconds": 10.0}  # interrupted, then evaluated
    text = real_demo.parts(rows)
    assert text.count("| 10% | 0.5 |") == 5 and "| evaluations | 50% | |" in text
