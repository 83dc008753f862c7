"""Importance correction of the policy gradient: ratios, their normaliser, and refusals."""

import copy
import json
from functools import partial

import pytest
import torch
from helpers_artefacts import distill_config, write_cache, write_sequences
from helpers_training import (
    SAME_UPDATE,
    largest_difference,
    near_rollouts,
    options,
    tiny_model,
    update_error,
    weights,
)

from lopd.config.objective import Objective
from lopd.errors import ConfigError, DataError
from lopd.provenance import MANIFEST_NAME
from lopd.stages import distill
from lopd.training.batch import Collator, SequenceDataset
from lopd.training.loop import train_loop
from lopd.training.step import step
from lopd.training.trainer import LopdTrainer

CORRECTED = {
    "token": {"importance": "token"},
    "token_truncated": {"importance": "token_truncated", "importance_cap": 0.4},
    "sequence": {"importance": "sequence"},
    "sequence_capped": {"importance": "sequence", "importance_cap": 1e-3},
    "clip_range": {"clip_range": 0.2},
}


def dense(model, batch, row_weight_of):
    """-sum_n w_n rho_n A_n log p_n from full logits, rho by `row_weight_of(log_ratio)`."""
    logits = model(batch["input_ids"], batch["attention_mask"]).logits.flatten(0, 1)
    log_p = torch.log_softmax(logits[batch["loss_index"]], -1)
    picked = log_p.gather(1, batch["labels"][:, None])[:, 0]
    constant = picked.detach()
    rho = row_weight_of(constant - batch["rollout_logprobs"])
    advantage = batch["teacher_logprobs"] - constant
    return -(batch["row_weights"] * rho * advantage * picked).sum()


def by_sequence(batch, cap=None):
    def ratios(log_ratio):
        names = batch["sequence_index"]
        totals = torch.stack([log_ratio[names == i].sum() for i in range(int(names.max()) + 1)])
        ratio = totals.exp()
        return (ratio if cap is None else ratio.clamp(max=cap))[names]

    return ratios


@pytest.mark.parametrize("name", ["token", "token_truncated", "sequence", "sequence_capped"])
def test_a_corrected_gradient_equals_that_of_the_dense_definition(name):
    model = tiny_model(spread=3.0)
    batch = Collator("sequence_mean")(near_rollouts(model=model))
    change = {**CORRECTED[name]}
    if name.endswith("capped"):
        change["importance_cap"] = 0.9
    loss, stats = step(model, batch, Objective("policy_gradient", **change), 6.0)
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters()}
    rules = {
        "token": torch.exp,
        "token_truncated": lambda log_ratio: log_ratio.exp().clamp(max=0.4),
        "sequence": by_sequence(batch),
        "sequence_capped": by_sequence(batch, 0.9),
    }
    model.zero_grad()
    expected = dense(model, batch, rules[name]) / 6.0
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for key, parameter in model.named_parameters():
        error = (found[key] - parameter.grad).norm() / parameter.grad.norm().clamp(min=1e-6)
        assert error < 1e-4, key
    assert not stats["importance"].requires_grad


def test_clip_range_is_that_of_ppo():
    model = tiny_model(spread=3.0)
    batch = Collator()(near_rollouts(model=model))
    n = float(len(batch["labels"]))
    loss, _ = step(model, batch, Objective("policy_gradient", clip_range=0.2), n)
    loss.backward()
    found = {k: p.grad.clone() for k, p in model.named_parameters()}
    model.zero_grad()
    logits = model(batch["input_ids"], batch["attention_mask"]).logits.flatten(0, 1)
    log_p = torch.log_softmax(logits[batch["loss_index"]], -1)
    picked = log_p.gather(1, batch["labels"][:, None])[:, 0]
    advantage = batch["teacher_logprobs"] - picked.detach()
    ratio = (picked - batch["rollout_logprobs"]).exp()
    assert ((ratio < 0.8) & (advantage < 0) | (ratio > 1.2) & (advantage > 0)).any()
    bounded = ratio.clamp(0.8, 1.2)
    expected = -torch.minimum(ratio * advantage, bounded * advantage).sum() / n
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for key, parameter in model.named_parameters():
        error = (found[key] - parameter.grad).norm() / parameter.grad.norm().clamp(min=1e-6)
        assert error < 1e-4, key


def test_rows_with_a_ratio_of_zero_stay_in_the_statistics():
    model, batch = tiny_model(), Collator()(near_rollouts())
    batch["rollout_logprobs"] += 40.0  # the ratio underflows in fp32
    n = float(len(batch["labels"]))
    loss, corrected = step(model, batch, Objective("policy_gradient", importance="sequence"), n)
    _, plain = step(model, batch, Objective("policy_gradient"), n)
    assert loss.item() == 0.0 and corrected["importance"].item() == 0.0
    for name in ("advantage", "student_entropy", "log_ratio_to_rollout"):
        assert corrected[name].item() == pytest.approx(plain[name].item(), rel=1e-5), name


def make_trainer(out, items, objective, **changes):
    args = options(**changes).training_arguments(out)
    return LopdTrainer(tiny_model(), args, objective, SequenceDataset(items), Collator())


@pytest.mark.parametrize("change", CORRECTED.values(), ids=CORRECTED)
def test_accumulation_changes_nothing_and_the_loop_agrees(tmp_path, change):
    objective, items = Objective("policy_gradient", **change), near_rollouts(8)
    results, logs, batches = [], [], []
    for size in (8, 1):
        shape = {"batch_size": size, "gradient_accumulation_steps": 8 // size, "max_steps": 3}
        trainer = make_trainer(tmp_path / str(size), items, objective, **shape)
        collect = trainer.get_batch_samples

        def recorded(*args, collect=collect):
            micro_batches, num_items = collect(*args)
            batches.extend(micro_batches)
            return micro_batches, num_items

        trainer.get_batch_samples = recorded
        trainer.train()
        results.append(weights(trainer.model))
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
    assert largest_difference(results[0], weights(tiny_model())) > 1e-3
    assert update_error(*results, weights(tiny_model())) < SAME_UPDATE
    model = tiny_model()
    plain = train_loop(copy.deepcopy(model), batches[3:], objective, options(max_steps=3))
    for one, other, ours in zip(*logs, plain, strict=True):
        for name in ours.keys() - {"tokens_per_second", "step"}:
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-6), name
            assert other[name] == pytest.approx(ours[name], rel=1e-3, abs=1e-6), name
    twin = copy.deepcopy(model)
    train_loop(twin, batches[3:], objective, options(max_steps=3))
    assert update_error(results[1], weights(twin), weights(model)) < SAME_UPDATE


def test_unknown_rollout_logprobs_cannot_be_corrected():
    model, items = tiny_model(), near_rollouts(3)
    items[1].rollout.rollout_logprobs[:] = float("nan")
    batch = Collator()(items)
    assert "log_ratio_to_rollout" not in step(model, batch, Objective("policy_gradient"), 1.0)[1]
    for change in CORRECTED.values():
        with pytest.raises(DataError, match=r"p0/0, p1/0, p2/0: their rollout log-probs"):
            step(model, batch, Objective("policy_gradient", **change), 1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"importance": "tokens"}, "importance: found 'tokens'; expected one of none, token"),
        ({"name": "reverse_kl", "importance": "token"}, "importance: reverse_kl has no correction"),
        ({"name": "jsd", "clip_range": 0.2}, "clip_range: jsd has no correction"),
        ({"importance": "token_truncated"}, "token_truncated needs one"),
        ({"importance": "token", "importance_cap": 2.0}, "importance 'token' has none"),
        ({"importance_cap": 2.0}, "importance 'none' has none"),
        ({"importance": "sequence", "importance_cap": 0.0}, "importance_cap: found 0.0"),
        ({"clip_range": float("nan")}, "clip_range: found nan"),
        ({"importance": "sequence", "clip_range": 0.2}, "found importance 'sequence' too"),
    ],
)
def test_contradicting_corrections_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        Objective(**{"name": "policy_gradient", **changes})


config = partial(distill_config, max_steps=2, batch_size=4, device="cpu", save_every=0, log_every=1)


def test_the_flags_reach_the_loss_and_the_manifest(pipeline, tmp_path):
    out = distill.main(
        config(
            pipeline,
            tmp_path,
            objective="policy_gradient",
            importance="sequence",
            importance_cap=1e-9,
        )
    )
    manifest = json.loads((out / MANIFEST_NAME).read_text())
    assert manifest["objective"]["importance"] == "sequence"
    assert manifest["objective"]["importance_cap"] == 1e-9
    entry = json.loads((out / "train_log.jsonl").read_text().splitlines()[0])
    assert 0 < entry["importance"] <= 1.01e-9


@pytest.mark.parametrize("change", [{"importance": "token"}, {"clip_range": 0.2}])
@pytest.mark.parametrize("why", ["unknown", "greedy"])
def test_a_cache_without_ratios_is_refused_before_a_model_is_built(
    pipeline, tmp_path, monkeypatch, why, change
):
    import transformers

    def explode(*args, **kwargs):
        raise AssertionError("a model was built")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", explode)
    rollouts = pipeline / "rollouts"
    if why == "greedy":
        sampling = {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 9, "seed": 0}
        monkeypatch.setattr("helpers_artefacts.SAMPLING", sampling)
        rollouts = write_sequences(tmp_path / "rollouts", pipeline / "student")
    teacher, known = pipeline / "teacher", why != "unknown"
    cache = write_cache(tmp_path / "cache", teacher, rollouts, has_logprobs=known)
    changes = {"cache": str(cache), "objective": "policy_gradient", **change}
    (flag,) = change
    with pytest.raises(ConfigError, match=rf"^{flag}: .*its rollout.* are {why}"):
        distill.main(config(pipeline, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()
