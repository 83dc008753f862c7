"""Drift statistics against their definitions, over micro-batches and steps."""

import dataclasses
import math

import pytest
import torch
from helpers_training import make_rollouts, make_scored, options, tiny_model

from lopd.config.objective import Objective
from lopd.store import TopKLists
from lopd.training.batch import Collator, SequenceDataset
from lopd.training.metrics import MetricsAccumulator, drift_moments
from lopd.training.step import step
from lopd.training.trainer import LopdTrainer

OBJECTIVES = [
    Objective("reverse_kl"),
    Objective("forward_kl", temperature=1.5),
    Objective("jsd", tail="truncate"),
    Objective("policy_gradient"),
    Objective("policy_gradient", importance="sequence", importance_cap=0.5),
]


def sampled_logprobs(model, batch, temperature=1.0):
    logits = model(batch["input_ids"], batch["attention_mask"]).logits.flatten(0, 1)
    log_p = torch.log_softmax(logits[batch["loss_index"]].detach() / temperature, -1)
    return log_p.gather(1, batch["labels"][:, None])[:, 0]


def kish(log_ratio, weights):
    ratio = log_ratio.double().exp()
    return ((weights * ratio).sum() ** 2 / (weights.sum() * (weights * ratio**2).sum())).item()


def popped(*steps):
    """Metrics of steps of (stats, tokens) micro-batches."""
    metrics = MetricsAccumulator()
    for micro_batches in steps:
        metrics.begin_step()
        for stats in micro_batches:
            metrics.add(stats, 1)
    return metrics, metrics.pop()


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: f"{o.name}-{o.importance}")
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "cohere", "phi"])
def test_drift_equals_that_from_the_models_logits(family, objective, aggregation):
    model, items = tiny_model(family, spread=3.0), make_scored(make_rollouts(6))
    collate = Collator(aggregation)
    together, parts = collate(items), [collate(items[:1]), collate(items[1:4]), collate(items[4:])]
    weights = together["row_weights"]
    n = weights.sum().item()
    log_ratio = sampled_logprobs(model, together, objective.temperature)
    log_ratio = log_ratio - together["rollout_logprobs"]
    index = together["sequence_index"]
    totals = torch.stack([log_ratio[index == i].sum() for i in range(6)])
    _, found = popped([step(model, part, objective, n)[1] for part in parts])
    mean = (weights * log_ratio).sum().item() / n
    assert found["log_ratio_to_rollout"] == pytest.approx(mean, rel=1e-4)
    absolute = (weights * log_ratio.abs()).sum().item() / n
    assert found["abs_log_ratio_to_rollout"] == pytest.approx(absolute, rel=1e-4)
    assert found["ess_tokens"] == pytest.approx(kish(log_ratio, weights), rel=1e-3)
    assert found["ess_sequences"] == pytest.approx(kish(totals, torch.ones(6)), rel=1e-3)
    assert not {"token_moments", "sequence_moments"} & found.keys()


def test_reverse_kl_and_teacher_tail_are_logged_if_known():
    model, batch = tiny_model(), Collator()(make_scored(make_rollouts(4)))
    n = float(len(batch["labels"]))
    loss, stats = step(model, batch, Objective("reverse_kl"), n)
    assert stats["reverse_kl"].item() == pytest.approx(loss.item(), rel=1e-5)
    _, stats = step(model, batch, Objective("policy_gradient"), n)
    tail = batch["tail_logprobs"].exp().mean().item()
    assert stats["teacher_tail"].item() == pytest.approx(tail, rel=1e-5)
    assert "reverse_kl" not in step(model, batch, Objective("jsd"), n)[1]
    renormalized = step(model, batch, Objective("reverse_kl", tail="renormalize"), n)[1]
    assert "log_ratio_to_rollout" not in renormalized and "token_moments" not in renormalized


def test_a_row_without_a_list_has_a_log_ratio():
    items = make_scored(make_rollouts(3))
    ids = items[1].topk_ids.copy()
    ids[2] = -1
    lists = TopKLists.from_padded(ids, items[1].topk_logprobs)
    items[1] = dataclasses.replace(items[1], lists=lists)
    items[1].tail_logprobs[2] = 0.0
    model, batch = tiny_model("phi"), Collator()(items)
    row = int((batch["sequence_index"] == 0).sum()) + 2
    assert batch["unlisted"].tolist() == [row]
    _, stats = step(model, batch, Objective("reverse_kl"), 1.0)
    expected = (sampled_logprobs(model, batch) - batch["rollout_logprobs"]).sum().item()
    assert stats["log_ratio_to_rollout"].item() == pytest.approx(expected, rel=1e-4)


def test_many_rows_are_gathered_in_parts(monkeypatch):
    model, batch = tiny_model(), Collator()(make_scored(make_rollouts(5)))
    whole = step(model, batch, Objective("reverse_kl"), 1.0)[1]["log_ratio_to_rollout"]
    monkeypatch.setattr("lopd.training.row_losses.GATHERED_ROWS", 4)
    parts = step(model, batch, Objective("reverse_kl"), 1.0)[1]["log_ratio_to_rollout"]
    assert parts.item() == whole.item()


def test_long_sequences_do_not_underflow():
    log_ratio = torch.tensor([-300.0, -300.0, -500.0, -101.0])
    index = torch.tensor([0, 0, 1, 2])
    moments = drift_moments(log_ratio, torch.ones(4), index, 3)
    _, found = popped([moments])
    # of -600, -500 and -101 the last has all the weight
    assert found["ess_sequences"] == pytest.approx(1 / 3, rel=1e-5)
    even = drift_moments(torch.full((4,), -400.0), torch.ones(4), torch.arange(4), 4)
    _, found = popped([even])
    assert found["ess_tokens"] == found["ess_sequences"] == pytest.approx(1.0, rel=1e-4)


def test_ess_is_over_all_steps_and_step_ess_over_the_last():
    def moments(ratios):
        log_ratio = torch.tensor(ratios).log()
        ones = torch.ones(len(ratios))
        return drift_moments(log_ratio, ones, torch.arange(len(ratios)), len(ratios))

    metrics = MetricsAccumulator()
    assert metrics.step_ess() is None
    metrics.begin_step()
    metrics.add(moments([1.0, 1.0]), 2)
    assert metrics.step_ess() == pytest.approx(1.0)
    metrics.begin_step()
    metrics.add(moments([4.0]), 1)
    metrics.add(moments([1.0, 1.0]), 2)
    assert metrics.step_ess() == pytest.approx(36 / (3 * 18), rel=1e-6)
    assert metrics.pop()["ess_tokens"] == pytest.approx(64 / (5 * 20), rel=1e-6)
    assert math.isclose(metrics.step_ess(), 36 / 54, rel_tol=1e-6)
    metrics.begin_step()
    assert metrics.step_ess() is None


def test_the_rollout_policy_has_an_ess_of_one(tmp_path):
    model, items = tiny_model(), make_scored(make_rollouts(6))
    for item in items:
        logprobs = sampled_logprobs(model, Collator()([item]))
        item.rollout.rollout_logprobs[:] = logprobs.numpy()
    args = options(max_steps=8, learning_rate=2e-2, warmup_steps=0).training_arguments(tmp_path)
    trainer = LopdTrainer(model, args, Objective("reverse_kl"), SequenceDataset(items))
    trainer.train()
    shares = [e["ess_tokens"] for e in trainer.state.log_history if "ess_tokens" in e]
    assert shares[0] == pytest.approx(1.0, abs=1e-4) and shares[-1] < 0.9


def test_excluded_time_is_not_counted(monkeypatch):
    now = iter([10.0, 15.0])
    monkeypatch.setattr("lopd.training.metrics.time.perf_counter", lambda: next(now))
    metrics = MetricsAccumulator()
    metrics.begin_step()
    metrics.add({}, 6)
    metrics.exclude_time(3.0)
    assert metrics.pop()["tokens_per_second"] == pytest.approx(3.0)


def test_loaded_sums_move_to_the_device_of_new_ones():
    """Sums from a checkpoint are on the CPU, those of a micro-batch on the training device."""
    metrics = MetricsAccumulator()
    metrics.begin_step()
    stats = {
        "loss": torch.tensor(1.0),
        "token_moments": torch.zeros(3),
        "divergence_from": torch.ones(2, 7),
    }
    metrics.add(stats, 1)
    again = MetricsAccumulator()
    again.load(metrics.state())
    again.begin_step()
    again.add({name: value.to("meta") for name, value in stats.items()}, 1)
    assert all(value.device.type == "meta" for value in again._sums.values())
