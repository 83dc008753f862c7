"""The tails `unbiased` and `generalized`, and log-ratios, in training: gradients, logs, caches."""

import json
from functools import partial

import pytest
import torch
from helpers_artefacts import SAMPLING, distill_config, write_cache, write_sequences
from helpers_training import near_rollouts, tiny_model

from lopd.config.objective import Objective
from lopd.errors import ConfigError, DataError
from lopd.provenance import MANIFEST_NAME
from lopd.stages import distill
from lopd.training.batch import Collator
from lopd.training.step import step
from lopd_kernels import reference

FORMS = {
    "unbiased": Objective("reverse_kl", tail="unbiased"),
    "capped": Objective("reverse_kl", tail="unbiased", importance_cap=0.9),
    "generalized": Objective("reverse_kl", tail="generalized"),
    "generalized forward": Objective("forward_kl", tail="generalized"),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_step_equals_the_dense_definition(name):
    model, objective = tiny_model(spread=3.0), FORMS[name]
    batch = Collator()(near_rollouts(model=model))
    n = float(len(batch["labels"]))
    loss, stats = step(model, batch, objective, n)
    loss.backward()
    found = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    logits = model(batch["input_ids"], batch["attention_mask"]).logits.flatten(0, 1)
    sample = {}
    if objective.tail == "unbiased":
        sample = {
            "sampled_ids": batch["labels"],
            "sampled_logprobs": batch["teacher_logprobs"],
            "rollout_logprobs": batch["rollout_logprobs"],
            "importance_cap": objective.importance_cap,
        }
    expected = reference.sparse_divergence(
        logits[batch["loss_index"]], batch["topk_ids"], batch["topk_logprobs"],
        tail_logprobs=batch["tail_logprobs"], divergence=objective.name, tail=objective.tail,
        **sample,
    )  # fmt: skip
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for key, parameter in model.named_parameters():
        error = (found[key] - parameter.grad).norm() / parameter.grad.norm().clamp(min=1e-6)
        assert error < 1e-4, key
    if objective.tail != "unbiased":
        assert "full_reverse_kl" not in stats
        return
    assert stats["full_reverse_kl"].item() == pytest.approx(loss.item(), rel=1e-5)
    _, bucket = step(model, batch, Objective("reverse_kl"), n)
    assert stats["reverse_kl"].item() == pytest.approx(bucket["reverse_kl"].item(), rel=1e-5)
    listed = (batch["topk_ids"] == batch["labels"][:, None]).any(1)
    share = 1.0 - listed.float().mean().item()
    assert 0.0 < stats["share_corrected"].item() == pytest.approx(share)
    assert ("share_capped" in stats) == (name == "capped")


@pytest.mark.parametrize("bonus", [0.0, 0.1])
@pytest.mark.parametrize("delta", [0.0, 1.5])
def test_the_log_ratio_equals_its_dense_definition(delta, bonus):
    model = tiny_model(spread=3.0)
    batch = Collator("sequence_mean")(near_rollouts(model=model))
    objective = Objective("log_ratio", delta=delta, entropy_bonus=bonus)
    loss, stats = step(model, batch, objective, 6.0)
    loss.backward()
    found = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    logits = model(batch["input_ids"], batch["attention_mask"]).logits.flatten(0, 1)
    log_p = logits[batch["loss_index"]].log_softmax(1)
    ratio = log_p.gather(1, batch["labels"][:, None])[:, 0] - batch["teacher_logprobs"]
    beyond = ratio.abs() > delta if delta else torch.zeros_like(ratio, dtype=torch.bool)
    rho = torch.where(beyond, delta * (2.0 * ratio.abs() - delta), ratio.square())
    entropy = -(log_p.exp() * log_p).sum(1)
    expected = (batch["row_weights"] * (rho - bonus * entropy)).sum() / 6.0
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for key, parameter in model.named_parameters():
        error = (found[key] - parameter.grad).norm() / parameter.grad.norm().clamp(min=1e-6)
        assert error < 1e-4, key
    assert beyond.any() == (delta > 0) == (stats["share_beyond_delta"].item() > 0)


def test_the_clipped_policy_gradient_is_half_the_robust_log_ratio():
    model, batch = tiny_model(spread=3.0), Collator()(near_rollouts())
    gradients = []
    for objective in (
        Objective("policy_gradient", advantage_clip=1.5),
        Objective("log_ratio", delta=1.5),
    ):
        model.zero_grad()
        step(model, batch, objective, 6.0)[0].backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for half, whole in zip(*gradients, strict=True):
        assert (2.0 * half - whole).norm() < 1e-4 * whole.norm().clamp(min=1e-6)


def test_held_out_sequences_are_evaluated_by_the_bucket():
    assert FORMS["capped"].held_out == Objective("reverse_kl")
    assert FORMS["generalized"].held_out == FORMS["generalized"]
    assert Objective("log_ratio").held_out == Objective("reverse_kl")
    assert Objective("log_ratio").delta == 5.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "forward_kl", "tail": "unbiased"}, "tail: unbiased is a form of reverse_kl"),
        ({"name": "policy_gradient", "tail": "generalized"}, "tail: policy_gradient has none"),
        ({"name": "reverse_kl", "importance_cap": 2.0}, "sequence and tail unbiased do"),
        ({"name": "reverse_kl", "delta": 2.0}, "delta: reverse_kl has none; use log_ratio"),
        ({"name": "log_ratio", "entropy_bonus": -0.1}, "entropy_bonus: found -0.1"),
        ({"name": "log_ratio", "tail": "unbiased"}, "tail: log_ratio has none"),
    ],
)
def test_contradicting_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        Objective(**changes)


def test_a_batch_without_rollout_logprobs_is_refused():
    items = near_rollouts(2)
    items[0].rollout.rollout_logprobs[:] = float("nan")
    with pytest.raises(DataError, match="rollout log-probs are not all known.*--tail bucket"):
        step(tiny_model(), Collator()(items), FORMS["unbiased"], 1.0)


config = partial(distill_config, max_steps=2, batch_size=4, device="cpu", save_every=0, log_every=1)


def test_distill_trains_on_log_ratios(pipeline, tmp_path):
    changes = {"objective": "log_ratio", "entropy_bonus": 0.1, "delta": 2.0}
    out = distill.main(config(pipeline, tmp_path / "out", **changes))
    manifest = json.loads((out / MANIFEST_NAME).read_text())
    assert manifest["objective"]["delta"] == 2.0
    entry = json.loads((out / "train_log.jsonl").read_text().splitlines()[0])
    assert 0.0 <= entry["share_beyond_delta"] <= 1.0


@pytest.mark.parametrize("tail", ["unbiased", "generalized"])
def test_distill_trains_and_logs(pipeline, tmp_path, tail):
    changes = {"importance_cap": 5.0} if tail == "unbiased" else {}
    out = distill.main(config(pipeline, tmp_path / "out", tail=tail, **changes))
    manifest = json.loads((out / MANIFEST_NAME).read_text())
    assert manifest["objective"]["tail"] == tail
    entry = json.loads((out / "train_log.jsonl").read_text().splitlines()[0])
    assert ("full_reverse_kl" in entry) == (tail == "unbiased")
    if tail == "unbiased":  # most sampled tokens of this random teacher are outside its lists
        assert entry["share_corrected"] > 0.5 and 0.0 <= entry["share_capped"] <= 1.0
        assert entry["full_reverse_kl"] != entry["reverse_kl"]


@pytest.mark.parametrize(
    ("why", "message"),
    [
        ("top_p", "temperature 1 and top_p 0.9; unbiased needs temperature 1.*top_p 1; use --tail"),
        ("temperature", "sampled at temperature 1 and top_p 1; unbiased needs temperature 0.7"),
        ("greedy", "its rollouts are greedy"),
        ("unknown", "its rollout log-probs are unknown.*leave --tail out"),
        ("unrecorded", "settings that it does not record"),
    ],
)
def test_other_caches_are_refused_before_a_model_is_built(
    pipeline, tmp_path, monkeypatch, why, message
):
    import transformers

    def explode(*args, **kwargs):
        raise AssertionError("a model was built")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", explode)
    sampling = {
        "top_p": {**SAMPLING, "top_p": 0.9},
        "greedy": {**SAMPLING, "temperature": 0.0},
        "unrecorded": None,
    }.get(why, SAMPLING)
    monkeypatch.setattr("helpers_artefacts.SAMPLING", sampling)
    rollouts = write_sequences(tmp_path / "rollouts", pipeline / "student")
    cache = write_cache(
        tmp_path / "cache", pipeline / "teacher", rollouts,
        temperature=0.7 if why == "temperature" else 1.0, has_logprobs=why != "unknown",
    )  # fmt: skip
    with pytest.raises(ConfigError, match=rf"^tail: .*{message}"):
        distill.main(config(pipeline, tmp_path / "out", cache=str(cache), tail="unbiased"))
    assert not (tmp_path / "out").exists()
