"""The grid of `benchmarks.objectives`, and what its cells compute."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from benchmarks import objectives, readme
from benchmarks.evidence import objective_cells, objective_tables
from benchmarks.evidence.frame import Shared
from lopd.config.distill import DistillConfig
from lopd.stages import distill
from lopd.stages.demo.driver import DemoStage
from lopd.stages.demo.toy import OPD_SETTINGS


def test_the_grid_has_every_combination_once():
    names = [cell.name for cell in objective_cells.cells()]
    assert len(names) == len(set(names)) == 5 + 5 * 3 * 4 * 3 + 5 * 2 + 5 * 2
    assert {"unbiased/k2/lr0.5/seed4", "gradients/end/seed0", "start/seed3"} <= set(names)


def test_bias_and_noise_of_a_shifted_and_of_a_noisy_gradient():
    torch.manual_seed(0)
    whole = torch.ones(40, 4)
    assert objective_cells._compared(2.0 * whole, whole) == {
        "bias": pytest.approx(1.0),
        "error": 0.0,
        "noise": 0.0,
    }
    errors = [objective_cells._compared(whole + torch.randn(40, 4), whole) for _ in range(200)]
    squares = {key: sum(e[key] ** 2 for e in errors) / 200 for key in errors[0]}
    assert squares["bias"] == pytest.approx(squares["error"], rel=0.2)
    assert squares["noise"] == pytest.approx(1.0, rel=0.1)


def run(form, seed, kl, factor=1.0, k=8):
    cell = f"{form}/k{k}/lr{factor:g}/seed{seed}"
    setting = {"form": form, "k": k, "factor": factor, "seed": seed}
    return {"cell": cell, **setting, "kl": kl, "sampled": 1.0 - kl}


def test_a_form_is_compared_at_its_best_rate_on_the_same_seeds():
    kls = {0: 0.01, 1: 0.04, 2: 0.16}
    rows = [run("bucket", seed, kl) for seed, kl in kls.items()]
    rows += [run("unbiased", seed, 2.0 * kl) for seed, kl in kls.items()]
    rows += [run("unbiased", seed, 0.5 * kl, factor=2.0) for seed, kl in kls.items()]
    rows += [run("generalized", seed, 3.0 * kls[seed]) for seed in (0, 1)]
    runs = objective_tables.Runs(rows)
    found = runs.against_base("unbiased", 8)
    assert found["kl"] == pytest.approx((2.0, 2.0, 2.0))  # the bucket has not the other rate
    rows += [run("bucket", seed, 4.0 * kl, factor=2.0) for seed, kl in kls.items()]
    runs = objective_tables.Runs(rows)
    found = runs.against_base("unbiased", 8)
    assert found["kl"] == pytest.approx((0.5, 0.5, 0.5))
    assert found["points"][0] == pytest.approx(3.5)
    assert objective_tables.judgement(runs, "unbiased") == {8: "better"}
    assert runs.best("generalized", 8) is None  # a seed is missing
    assert "bucket stays the default" not in objective_tables.verdict(rows)
    assert "higher mean KL than the bucket at k = 8" in objective_tables.verdict(rows[:6])


def test_every_committed_run_has_the_steps_of_the_grid():
    rows = readme.read_rows(objectives.PART.file)
    assert rows and all(row["steps"] == objective_cells.STEPS for row in rows)


def test_a_run_distils_with_its_own_settings_and_is_evaluated(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(distill, "main", ran.append)
    config = DistillConfig(student="s", cache="c", out="o", max_steps=1)
    shared = SimpleNamespace(
        distillation=DemoStage("distilled", "distill", distill, config),
        cache=lambda k: f"cache-k{k}",
        demo=SimpleNamespace(
            path=lambda name: str(tmp_path / name), evaluate=lambda name: {"evaluated": name}
        ),
    )
    shared.train, shared.distil = (partial(each, shared) for each in (Shared.train, Shared.distil))
    row = objective_cells.Run("unbiased", 4, 0.5, 0).measure(shared)
    (used,) = ran
    assert (used.cache, used.out) == ("cache-k4", str(tmp_path / "unbiased-k4-lr0.5"))
    assert (used.tail, used.learning_rate) == ("unbiased", 0.5 * OPD_SETTINGS["learning_rate"])
    setting = {"form": "unbiased", "k": 4, "factor": 0.5, "steps": objective_cells.STEPS}
    assert row == {**setting, "evaluated": "unbiased-k4-lr0.5"}
