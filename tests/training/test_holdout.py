"""Held-out sequences: the split, their KL, early stopping, and the best checkpoint."""

import random
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers_artefacts import distill_config, logged, trained_weights
from helpers_training import (
    largest_difference,
    make_rollouts,
    make_scored,
    options,
    tiny_model,
    weights,
)

from lopd.config.objective import Objective
from lopd.config.training import MonitoringOptions
from lopd.errors import ConfigError, DataError, ShardError
from lopd.provenance import manifest_digest, read_manifest
from lopd.stages import distill
from lopd.training.batch import Collator, SequenceDataset, split_holdout
from lopd.training.checkpoints import checkpoints
from lopd.training.holdout import (
    Holdout,
    evaluation_line,
    evaluations,
    exhausted,
    holdout_kl,
    holdout_summary,
    sign,
)
from lopd.training.logging import LOG_NAME
from lopd.training.run import report
from lopd.training.step import step
from lopd.training.trainer import LopdTrainer

SHARE = 0.4


def scored(count=12):
    return make_scored(make_rollouts(count))


def names(subset):
    return sorted(subset.dataset.names[index] for index in subset.indices)


@pytest.mark.parametrize("amount", [SHARE, 4])
def test_the_split_depends_only_on_the_names(amount):
    items = scored()
    training, held_out = split_holdout(SequenceDataset(items), amount)
    assert len(training) + len(held_out) == 12 and not {*names(training)} & {*names(held_out)}
    shuffled = random.Random(3).sample(items, len(items))
    _, again = split_holdout(SequenceDataset(shuffled), amount)
    assert names(again) == names(held_out)
    assert [item.rollout.prompt_id for item in held_out.__getitems__([0, 1])] == [
        name.split("/")[0] for name in (held_out.dataset.names[i] for i in held_out.indices[:2])
    ]
    if amount < 1:
        part = [item for item in items if f"{item.rollout.prompt_id}/0" in names(held_out)[1:]]
        rest = [item for item in items if f"{item.rollout.prompt_id}/0" in names(training)]
        _, fewer = split_holdout(SequenceDataset(part + rest), amount)
        assert names(fewer) == names(held_out)[1:]
    else:
        assert len(held_out) == amount


@pytest.mark.parametrize(("amount", "expected"), [(SHARE, None), (4, 6), (6, 6)])
def test_no_prompt_is_on_both_sides(amount, expected):
    """Neither by several answers, nor by prompts that a file holds twice."""
    ids = [f"{number:016x}" for number in range(6)]
    first = make_rollouts(18)
    rollouts = [
        replace(rollout, prompt_id=ids[number // 3] + ("#1" if number % 3 == 2 else ""), sample=s)
        for number, rollout in enumerate(first)
        for s in [number % 3 % 2]
    ]
    training, held_out = split_holdout(SequenceDataset(rollouts), amount)
    sides = [{name[:16] for name in names(part)} for part in (training, held_out)]
    assert not sides[0] & sides[1] and len(training) + len(held_out) == 18
    assert len(held_out) == 3 * len(sides[1]) == expected or expected is None
    only_first = [replace(rollout, prompt_id=ids[i]) for i, rollout in enumerate(first[:6])]
    if amount < 1:  # a prompt's side does not depend on how many answers it has
        _, alone = split_holdout(SequenceDataset(only_first), amount)
        assert {name[:16] for name in names(alone)} == sides[1]


def test_a_share_holds_out_about_that_share():
    rollouts = make_rollouts(400, shortest=1, longest=2)
    _, held_out = split_holdout(SequenceDataset(rollouts), 0.25)
    assert 70 < len(held_out) < 130


@pytest.mark.parametrize("amount", [1e-9, 12, 50])
def test_a_split_with_an_empty_side_is_refused(amount):
    with pytest.raises(ConfigError, match=rf"holdout: {amount:g} keeps \d+ of 12"):
        split_holdout(SequenceDataset(scored()), amount)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stale_ess": 1.0}, "stale_ess: found 1.0"),
        ({"stale_ess": float("nan")}, "stale_ess: found nan"),
        ({"stale_every": 0}, "stale_every: found 0"),
        ({"holdout": 1.5}, "holdout: found 1.5"),
        ({"holdout": -0.1}, "holdout: found -0.1"),
        ({"holdout": float("nan")}, "holdout: found nan"),
        ({"holdout": float("inf")}, "holdout: found inf"),
        ({"eval_steps": 0}, "eval_steps: found 0"),
        ({"patience": -1}, "patience: found -1"),
        ({"keep_best": True}, "keep_best: found True, which has no effect: nothing is held out"),
        ({"patience": 2}, "patience: found 2, which has no effect: nothing is held out"),
        ({"eval_steps": 2}, "eval_steps: found 2, which has no effect: nothing is held out"),
        ({"stale_ess": 0.0, "stale_every": 9}, "stale_every: found 9, which has no effect"),
    ],
)
def test_options_refuse(changes, message):
    with pytest.raises(ConfigError, match=message):
        MonitoringOptions(**changes)


def test_options_take_the_ends_of_their_ranges():
    assert MonitoringOptions(holdout=1, patience=1, keep_best=True, stale_ess=0).holdout == 1
    assert MonitoringOptions(holdout=0.999).holdout == 0.999


def make_trainer(out, objective=None, holdout=None, model=None, **changes):
    objective = objective or Objective("reverse_kl")
    training, held_out = split_holdout(SequenceDataset(scored()), SHARE)
    holdout = {"eval_steps": 2, **(holdout or {})}
    return LopdTrainer(
        tiny_model() if model is None else model,
        options(**changes).training_arguments(out),
        objective,
        training,
        Collator(),
        Holdout(held_out, objective.held_out, **holdout),
    )


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("name", ["reverse_kl", "jsd", "policy_gradient"])
def test_held_out_kl_is_the_divergence_over_all_held_out_sequences(name, aggregation):
    model, collate = tiny_model(), Collator(aggregation)
    model.model.layers[0].self_attn.attention_dropout = 0.5
    _, held_out = split_holdout(SequenceDataset(scored()), 5)
    evaluated = Objective(name, temperature=1.3).held_out
    assert evaluated.name == ("reverse_kl" if name == "policy_gradient" else name)
    whole = collate([held_out[i] for i in range(5)])
    n = whole["row_weights"].sum().item()
    expected = step(model, whole, evaluated, n)[0].item()
    assert evaluated.temperature == 1.3
    model.train()
    state = torch.get_rng_state()
    for size in (1, 2, 5, 64):
        holdout = Holdout(held_out, evaluated, 1)
        found = holdout_kl(model, holdout, collate, size, 3)["holdout_kl"]
        assert found == pytest.approx(expected, rel=1e-5)
    assert torch.equal(state, torch.get_rng_state()) and model.training
    held_out.dataset.source[held_out.indices[4]].tail_logprobs[0] = float("nan")
    with pytest.raises(DataError, match="step 3: the held-out loss is nan"):
        holdout_kl(model, holdout, collate, 2, 3)


def test_evaluation_changes_no_weight_and_training_leaves_out_held_out_sequences(tmp_path):
    evaluated = make_trainer(tmp_path / "a", max_steps=5)
    seen = set()
    compute_loss = evaluated.compute_loss

    def recorded(model, inputs, *args, **kwargs):
        seen.update(inputs["sequence_names"])
        return compute_loss(model, inputs, *args, **kwargs)

    evaluated.compute_loss = recorded
    evaluated.train()
    assert seen == {*names(evaluated.train_dataset)}
    args = options(max_steps=5).training_arguments(tmp_path / "b")
    plain = LopdTrainer(tiny_model(), args, Objective("reverse_kl"), evaluated.train_dataset)
    plain.train()
    assert largest_difference(weights(evaluated.model), weights(plain.model)) == 0.0
    found = evaluations(evaluated.state.log_history)
    assert [number for _, number in found] == [2, 4, 5]
    now = holdout_kl(evaluated.model, evaluated.holdout, Collator(), 4, 5)["holdout_kl"]
    assert found[-1][0] == now != found[0][0]
    lines = logged(tmp_path / "a")
    shown = [(line["holdout_kl"], line["step"]) for line in lines if "holdout_kl" in line]
    fresh = holdout_kl(tiny_model(), evaluated.holdout, Collator(), 4, 0)["holdout_kl"]
    assert shown == [(fresh, 0), *found]


def test_evaluating_without_a_holdout_is_refused(tmp_path):
    args = options().training_arguments(tmp_path)
    trainer = LopdTrainer(tiny_model(), args, Objective("reverse_kl"), SequenceDataset(scored()))
    with pytest.raises(ConfigError, match="evaluate: nothing was held out"):
        trainer.evaluate()


def test_exhausted_counts_from_the_best():
    def history(*values):
        return [{"holdout_kl": kl, "step": 10 * i} for i, kl in enumerate(values)] + [{"loss": 0}]

    assert not exhausted(history(), 1)
    assert not exhausted(history(3.0, 2.0, 2.5), 0)
    assert exhausted(history(3.0, 2.0, 2.5), 1)
    assert not exhausted(history(3.0, 2.0, 2.5), 2)
    assert exhausted(history(3.0, 2.0, 2.0, 2.0), 2)
    assert not exhausted(history(2.0, 3.0, 1.0), 1)


def fake_kl(monkeypatch, values):
    """Evaluations at steps 1, 2, ... return these values."""

    def fake(model, holdout, collate, batch_size, step_number, **processes):
        return {"holdout_kl": values[step_number - 1]}

    monkeypatch.setattr("lopd.training.trainer.holdout_kl", fake)


SETTINGS = {"batch_size": 4, "learning_rate": 1e-2, "device": "cpu", "log_every": 1}


config = partial(distill_config, **SETTINGS)


BEST = {"max_steps": 6, "holdout": 4, "eval_steps": 1, "keep_best": True}


@pytest.mark.parametrize(("save_every", "limit"), [(0, 2), (1, 2), (2, 1)])
def test_the_result_is_the_best_checkpoint(pipeline, tmp_path, monkeypatch, save_every, limit):
    fake_kl(monkeypatch, [5.0, 4.0, 1.0, 3.0, 2.0, 2.5])
    saving = {"save_every": save_every, "save_total_limit": limit}
    out = distill.main(config(pipeline, tmp_path / "best", **BEST, **saving))
    assert read_manifest(out).raw["holdout"] == {
        "sequences": 4,
        "objective": "reverse_kl",
        "start": 2.5,
        "best": {"kl": 1.0, "step": 3},
        "last": {"kl": 2.5, "step": 6},
        "result_step": 3,
        "stopped_early": False,
    }
    assert read_manifest(out).raw["training"]["sequences"] == 8
    left = [folder.name for folder in checkpoints(out)]
    assert "checkpoint-3" in left and len(left) <= 2
    if not save_every:
        assert left == ["checkpoint-3", "checkpoint-2"]
    assert largest_difference(trained_weights(out), trained_weights(out / "checkpoint-3")) == 0.0
    last = distill.main(config(pipeline, tmp_path / "last", **{**BEST, "keep_best": False}))
    assert read_manifest(last).raw["holdout"]["result_step"] == 6
    assert largest_difference(trained_weights(out), trained_weights(last)) > 0.0
    short = {**BEST, "keep_best": False, "max_steps": 3}
    at_three = distill.main(
        config(pipeline, tmp_path / "three", **short, lr_scheduler_type="constant")
    )
    assert largest_difference(trained_weights(out), trained_weights(at_three)) == 0.0


def test_a_missing_best_checkpoint_is_named(pipeline, tmp_path, monkeypatch):
    fake_kl(monkeypatch, [1.0, 2.0])
    out, train = tmp_path / "out", LopdTrainer.train

    def losing(self, **kwargs):
        train(self, **kwargs)
        shutil.rmtree(out / "checkpoint-1")

    monkeypatch.setattr(LopdTrainer, "train", losing)
    with pytest.raises(ShardError, match="checkpoint-1: the checkpoint with the best held-out KL"):
        distill.main(config(pipeline, out, **{**BEST, "max_steps": 2}))


def test_training_stops_early_and_prints_why(pipeline, tmp_path, monkeypatch, capsys):
    fake_kl(monkeypatch, [5.0, 3.0, 4.0, 3.5, 1.0, 1.0])
    out = distill.main(config(pipeline, tmp_path, **BEST, patience=2))
    expected = "step 4: stopping early, held-out KL 3.5 is no better than 3 at step 2"
    assert expected in capsys.readouterr().err
    found = read_manifest(out).raw["holdout"]
    assert found["stopped_early"] is True
    assert (found["result_step"], found["last"]["step"]) == (2, 4)


@pytest.mark.parametrize("cut_at", [1, 3, 5])
def test_a_killed_run_resumes_with_its_evaluations(pipeline, tmp_path, monkeypatch, cut_at):
    settings = {**BEST, "save_every": 2, "patience": 3}
    values = [5.0, 1.0, 4.0, 3.0, 2.0, 6.0]  # best at 2, exhausted at 5
    fake_kl(monkeypatch, values)
    whole = distill.main(config(pipeline, tmp_path / "whole", **settings))
    evaluate = LopdTrainer.evaluate

    def killed(self, *args, **kwargs):
        if self.state.global_step == cut_at:
            raise KeyboardInterrupt
        return evaluate(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LopdTrainer, "evaluate", killed)
        with pytest.raises(KeyboardInterrupt):
            distill.main(config(pipeline, tmp_path / "cut", **settings))
    cut = distill.main(config(pipeline, tmp_path / "cut", **settings))
    assert read_manifest(whole).raw["holdout"]["last"]["step"] == 5
    assert largest_difference(trained_weights(whole), trained_weights(cut)) == 0.0
    assert manifest_digest(read_manifest(whole)) == manifest_digest(read_manifest(cut))
    assert read_manifest(whole).raw["stale"] == read_manifest(cut).raw["stale"]


def test_a_run_that_stopped_early_is_not_continued(pipeline, tmp_path, monkeypatch):
    fake_kl(monkeypatch, [1.0, 2.0, 0.5])
    settings = {"max_steps": 3, "holdout": 4, "eval_steps": 1, "patience": 1, "save_every": 2}
    whole = distill.main(config(pipeline, tmp_path / "whole", **settings))
    train = LopdTrainer.train

    def killed(self, **kwargs):
        train(self, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LopdTrainer, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            distill.main(config(pipeline, tmp_path / "cut", **settings))
    cut = distill.main(config(pipeline, tmp_path / "cut", **settings))
    assert read_manifest(cut).raw["holdout"]["last"]["step"] == 2
    assert largest_difference(trained_weights(whole), trained_weights(cut)) == 0.0
    assert manifest_digest(read_manifest(whole)) == manifest_digest(read_manifest(cut))


def test_evaluations_and_the_end_of_a_run_are_shown(pipeline, tmp_path, monkeypatch, capsys):
    fake_kl(monkeypatch, [5.0, 1.0, 4.0, 7.0])  # the last is that of step 0
    out = distill.main(config(pipeline, tmp_path, **{**BEST, "max_steps": 3}))
    errors = capsys.readouterr().err
    for line in (
        "step 0: held-out reverse_kl >= 7\n",
        "step 1: held-out reverse_kl >= 5 (7 at the start, the best so far)\n",
        "step 3: held-out reverse_kl >= 4 (7 at the start, best 1 at step 2)\n",
        f"{out}: held-out reverse_kl >= 7 at the start, >= 1 at step 2 (best), >= 4 at step 3 "
        "(last); the result is that of step 2\n",
        f"{out}: log in {out / LOG_NAME}\n",
    ):
        assert line in errors, line
    assert "at most the whole divergence" in errors and "outside lists " in errors


def test_a_step_that_is_worse_than_the_start_is_not_called_the_best(tmp_path):
    objective = Objective("log_ratio")
    history = [{"holdout_kl": 3.0, "step": 0}, {"holdout_kl": 4.0, "step": 1}]
    assert evaluation_line(history, objective) == "held-out log_ratio 4 (3 at the start)"
    better = [*history, {"holdout_kl": 2.0, "step": 2}]
    assert evaluation_line(better, objective).endswith("2 (3 at the start, the best so far)")
    later = [*better, {"holdout_kl": 3.5, "step": 3}]
    for found, keep_best, end in (
        (history, True, "the result is that of step 1, no better than the start"),
        (better, True, "the result is that of step 2"),
        (
            [*better, {"holdout_kl": 3.5, "step": 3}],
            False,
            "that of step 3, no better than the start",
        ),
        (later, True, "the result is that of step 2"),
    ):
        holdout = Holdout([1], objective, 1, keep_best)
        summary = holdout_summary(holdout, found, last_step=found[-1]["step"])
        assert report(tmp_path, {"holdout": summary}, objective)[0].endswith(end)


def test_only_bounds_are_shown_as_bounds():
    assert sign(Objective("reverse_kl")) == sign(Objective("jsd")) == ">= "
    assert (
        sign(Objective("reverse_kl", tail="renormalize")) == sign(Objective("cross_entropy")) == ""
    )
