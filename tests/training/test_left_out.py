"""`dense_share` and `tolerance` in training: the gradient, the log and the plan."""

import json

import pytest
import torch
from helpers_training import near_rollouts, tiny_model

from lopd.config.objective import Objective
from lopd.config.plan import PlanConfig
from lopd.errors import ConfigError
from lopd.provenance.manifest import MANIFEST_NAME
from lopd.stages import distill
from lopd.training.batch import Collator
from lopd.training.dry_run import meta_model
from lopd.training.memory import loss_bytes
from lopd.training.step import step

FORMS = {
    "reverse_kl": {},
    "jsd": {},
    "unbiased": {"name": "reverse_kl", "tail": "unbiased"},
    "policy_gradient": {},
    "gated": {"name": "reverse_kl", "token_weights": "entropy"},
}


def gradient(model, batch, objective):
    """(loss, gradient of all weights, statistics)."""
    model.zero_grad()
    loss, stats = step(model, batch, objective, float(len(batch["labels"])))
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()]), stats


@pytest.fixture(scope="module")
def case():
    model = tiny_model(spread=3.0)
    return model, Collator()(near_rollouts(model=model))


def objective(form, **changes):
    return Objective(**{"name": form, **FORMS[form], **changes})


@pytest.mark.parametrize("form", FORMS)
def test_a_tolerance_bounds_what_is_left_out(case, form):
    loss, exact, _ = gradient(*case, objective(form))
    same, found, stats = gradient(*case, objective(form, tolerance=0.2))
    assert same == pytest.approx(loss, rel=1e-6)
    assert 0.0 < float(stats["left_out"]) <= 0.2 and 0.0 < float(stats["share_dense"]) < 1.0
    error = float((found - exact).norm() / exact.norm())
    assert 1e-6 < error < 0.5


@pytest.mark.parametrize("form", FORMS)
def test_a_sample_is_unbiased(case, form):
    """The mean of n draws is sqrt(n) nearer to the exact gradient than one draw."""
    loss, exact, _ = gradient(*case, objective(form))
    torch.manual_seed(0)
    draws = []
    for _ in range(64):
        same, found, stats = gradient(*case, objective(form, dense_share=0.4))
        assert same == pytest.approx(loss, rel=1e-6)
        draws.append(found - exact)
    errors = torch.stack(draws)
    one, mean = errors.square().sum(1).mean().sqrt(), errors.mean(0).norm()
    assert one > 1e-3 * exact.norm() and mean < 3.0 * one / 8.0
    assert 0.0 < float(stats["share_dense"]) <= 0.5 and float(stats["left_out"]) > 0.0


def test_without_a_backward_nothing_is_left_out(case):
    with torch.no_grad():
        _, stats = step(*case, objective("reverse_kl", dense_share=0.4), 1.0)
    assert "share_dense" not in stats
    settings = {"dense_share": 0.4, "temperature": 0.5}
    assert Objective("reverse_kl", **settings).held_out == Objective("reverse_kl", temperature=0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "log_ratio", "tolerance": 0.1}, "tolerance: log_ratio forms every gradient"),
        ({"dense_share": 0.1, "tail": "renormalize"}, "has no gradient outside the lists"),
        ({"dense_share": 0.1, "tolerance": 0.1}, "set one of them"),
        ({"dense_share": 0.0}, r"dense_share: found 0.0; expected a number in \(0, 1\]"),
        ({"tolerance": 1.0}, r"tolerance: found 1.0; expected a number in \(0, 1\)"),
    ],
)
def test_contradicting_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        Objective(**{"name": "reverse_kl", **changes})


def run(pipeline, out, **changes):
    paths = {name: str(pipeline / name) for name in ("student", "cache")}
    settings = {"batch_size": 4, "device": "cpu", "log_every": 1, "learning_rate": 1e-2}
    config = distill.DistillConfig(**{**paths, "out": str(out), **settings, **changes})
    return distill.main(config)


@pytest.mark.parametrize("changes", [{"dense_share": 0.3}, {"tolerance": 1e-2}], ids=str)
def test_distill_logs_what_it_leaves_out(pipeline, tmp_path, changes):
    out = run(pipeline, tmp_path / "out", max_steps=2, **changes)
    assert changes.items() <= json.loads((out / MANIFEST_NAME).read_text())["objective"].items()
    for line in (out / "train_log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if "loss" in entry:
            assert 0.0 < entry["share_dense"] <= 1.0 and entry["left_out"] >= 0.0


def test_the_plan_counts_it(tmp_path):
    model = tiny_model()
    model.config.vocab_size = 50000
    model.config.save_pretrained(tmp_path)
    dry = meta_model(str(tmp_path), "bfloat16")
    common = {"model": str(tmp_path), "gpu_memory": "80GB", "dtype": "bfloat16", "k": 8}
    sizes = {"batch_size": 16, "sequence_length": 512}

    def needed(**changes):
        return loss_bytes(dry, PlanConfig(**common, **sizes, **changes))

    assert needed(dense_share=0.1) != needed() == needed(dense_share=0.95)
    assert needed(tolerance=1e-3) >= needed(dense_share=0.1)
    with pytest.raises(ConfigError, match="tolerance: log_ratio forms every gradient"):
        needed(objective="log_ratio", tolerance=0.1)
