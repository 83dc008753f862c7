"""Training on a GPU, compared with the same on a CPU."""

import pytest
import torch
from helpers_artefacts import trained_weights
from helpers_training import (
    SAME_UPDATE,
    largest_difference,
    make_rollouts,
    make_scored,
    tiny_model,
    tiny_window,
    update_error,
)

from lopd.config.objective import Objective
from lopd.models.packing import check_packing, pack_attention
from lopd.stages import distill
from lopd.training.batch import Collator, to_device
from lopd.training.step import step

pytestmark = [pytest.mark.gpu, pytest.mark.slow]  # the suite has a limit; make test-gpu has none
SETTINGS = {"learning_rate": 1e-2, "max_steps": 5, "log_every": 1, "save_every": 2}


def distilled(pipeline, out, **changes):
    paths = {name: str(pipeline / name) for name in ("student", "cache")}
    return distill.main(distill.DistillConfig(**{**paths, "out": str(out), **SETTINGS, **changes}))


def gradients(model, batch):
    model.zero_grad()
    loss, _ = step(model, batch, Objective("reverse_kl"), batch["row_weights"].sum().item())
    loss.backward()
    return loss.item(), {n: p.grad.float() for n, p in model.named_parameters()}


def difference(found, expected, start):
    """Relative error of the whole update; with Adam, single elements near 0 may differ in sign."""
    off = sum((found[n] - expected[n]).square().sum() for n in expected)
    moved = sum((expected[n] - start[n]).square().sum() for n in expected)
    return (off / moved).sqrt().item()


@pytest.mark.parametrize("make", [tiny_model, tiny_window], ids=["whole", "window"])
def test_packs_with_varlen_have_the_gradients_of_exact_ones(make):
    items = make_scored(make_rollouts(7))
    exact = make()
    assert pack_attention(exact) == "sdpa"
    loss, expected = gradients(exact, Collator(packed=True)(items))
    model = make().to("cuda", torch.bfloat16)
    assert pack_attention(model, "varlen") == "varlen"
    check_packing(model, "varlen")
    found, grads = gradients(model, to_device(Collator(packed=True)(items), "cuda"))
    assert found == pytest.approx(loss, rel=2e-2)
    for name, value in expected.items():
        assert (grads[name].cpu() - value).norm() < 0.06 * value.norm(), name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_tokens_per_batch": 64},
        {"gradient_accumulation_steps": 2, "batch_size": 2, "gradient_checkpointing": True},
        {"objective": "policy_gradient", "importance": "sequence"},
        {"holdout": 3, "eval_steps": 2, "keep_best": True},
        {"lora_rank": 4, "lora_targets": "q_proj,down_proj"},
    ],
    ids=str,
)
def test_a_run_ends_with_the_weights_of_one_on_a_cpu(pipeline, tmp_path, changes):
    if "lora_rank" in changes:
        pytest.importorskip("peft")
    changes = {"batch_size": 4, **changes}
    expected = trained_weights(distilled(pipeline, tmp_path / "cpu", device="cpu", **changes))
    found = trained_weights(distilled(pipeline, tmp_path / "cuda", device="cuda", **changes))
    assert difference(found, expected, trained_weights(pipeline / "student")) < 1e-2


@pytest.mark.parametrize(
    "changes", [{"dtype": "bfloat16"}, {"mixed_precision": "bf16"}, {"optim": "adafactor"}], ids=str
)
def test_the_loss_falls_as_on_a_cpu(pipeline, tmp_path, changes):
    import json

    logs = []
    for device in ("cpu", "cuda"):
        out = distilled(pipeline, tmp_path / device, device=device, batch_size=4, **changes)
        lines = (out / "train_log.jsonl").read_text().splitlines()
        logs.append([json.loads(line) for line in lines])
    for entry, other in zip(*logs, strict=True):
        assert other["loss"] == pytest.approx(entry["loss"], rel=3e-2)
        assert other["peak_mib"] > 0 and "peak_mib" not in entry
        assert ("planned_mib" in other) == ("mixed_precision" not in changes)


def test_a_killed_run_continues(pipeline, tmp_path, monkeypatch):
    from lopd.training.trainer import LopdTrainer

    settings = {"device": "cuda", "batch_size": 4, "max_tokens_per_batch": 64}
    whole = trained_weights(distilled(pipeline, tmp_path / "whole", **settings))
    training_step = LopdTrainer.training_step

    def killed(self, *args):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return training_step(self, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LopdTrainer, "training_step", killed)
        distilled(pipeline, tmp_path / "cut", **settings)
    cut = trained_weights(distilled(pipeline, tmp_path / "cut", **settings))
    assert update_error(cut, whole, trained_weights(pipeline / "student")) < SAME_UPDATE


def test_refreshed_rollouts_are_sampled_and_scored_on_the_gpu(pipeline, tmp_path):
    live = {"refresh_every": 2, "teacher": str(pipeline / "teacher"), "batch_size": 4}
    out = distilled(pipeline, tmp_path / "out", device="cuda", **live)
    assert largest_difference(trained_weights(out), trained_weights(pipeline / "student")) > 1e-3
