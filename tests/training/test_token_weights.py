"""Token weights: each rule against plain loops, masses, micro-batches, given weights, refusals."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from helpers_training import (
    SAME_UPDATE,
    make_rollouts,
    make_scored,
    make_trainer,
    options,
    tiny_model,
    update_error,
    weights,
)

from lopd.config.objective import Objective
from lopd.errors import ConfigError, DataError
from lopd.training.batch import Collator, SequenceDataset
from lopd.training.loop import train_loop
from lopd.training.step import step
from lopd.training.token_weights import Answers, select_rows
from lopd_kernels import reference

WEIGHTED = {
    "advantage": Objective("reverse_kl", token_weights="advantage", weight_beta=1.7),
    "divergence_rank": Objective("reverse_kl", token_weights="divergence_rank"),
    "prefix": Objective("forward_kl", token_weights="prefix", weight_share=0.5),
    "entropy": Objective("reverse_kl", token_weights="entropy", weight_entropy=1.9),
}


def rewarded(count=6):
    rollouts = [
        dataclasses.replace(rollout, reward=float(number % 2))
        for number, rollout in enumerate(make_rollouts(count))
    ]
    return make_scored(rollouts)


def expected_factors(name, objective, log_p, log_q, reward):
    """The factors of one answer by plain arithmetic, before they are normalised."""
    count = len(log_p)
    gaps = [q - p for p, q in zip(log_p, log_q, strict=True)]
    if name == "advantage":
        middle = float(np.median(np.abs(gaps)))
        sign = 1 if reward > 0 else -1
        return [1 / (1 + math.exp(-objective.weight_beta * sign * gap / middle)) for gap in gaps]
    if name == "prefix":
        return [1.0 if t < math.ceil(objective.weight_share * count) else 0.0 for t in range(count)]
    if name == "entropy":
        return [1.0] * count

    def score(t):
        mean = (math.exp(log_q[t]) - math.exp(log_p[t])) / gaps[t]
        return abs(gaps[t]) * mean**objective.weight_beta

    best = sorted(range(count), key=score, reverse=True)[: math.ceil(0.4 * count)]
    return [1.0 if t in best else 0.0 for t in range(count)]


def expected_weights(name, objective, model, batch):
    """The row weights [N] after the rule, answer by answer."""
    logits = model(batch["input_ids"], batch["attention_mask"]).logits.flatten(0, 1)
    log_p = logits[batch["loss_index"]].double().log_softmax(1)
    log_p = log_p.gather(1, batch["labels"][:, None])[:, 0].detach()
    result = batch["row_weights"].double().clone()
    for number in range(len(batch["sequence_names"])):
        rows = (batch["sequence_index"] == number).nonzero()[:, 0]
        reward = batch["rewards"][rows[0]].item()
        log_q = batch["teacher_logprobs"][rows].double().tolist()
        factors = expected_factors(name, objective, log_p[rows].tolist(), log_q, reward)
        new = result[rows] * torch.tensor(factors, dtype=torch.float64)
        result[rows] = new * result[rows].sum() / new.sum()
    return result.float()


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("name", WEIGHTED)
def test_the_step_equals_plain_loops_over_dense_logits(name, aggregation):
    model, objective = tiny_model(spread=3.0), WEIGHTED[name]
    batch = Collator(aggregation)(rewarded())
    total = batch["row_weights"].sum().item()
    loss, stats = step(model, batch, objective, total)
    loss.backward()
    found = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    row_weights = expected_weights(name, objective, model, batch)
    assert row_weights.sum().item() == pytest.approx(total, rel=1e-6)
    logits = model(batch["input_ids"], batch["attention_mask"]).logits.flatten(0, 1)
    losses = {
        kind: reference.sparse_divergence(
            logits[batch["loss_index"]], batch["topk_ids"], batch["topk_logprobs"],
            tail_logprobs=batch["tail_logprobs"], divergence=kind, reduction="none",
        )
        for kind in ("reverse_kl", "forward_kl")
    }  # fmt: skip
    chosen = losses[objective.name]
    if name == "entropy":
        uncertain = batch["teacher_entropy"] > 1.9
        assert 0 < uncertain.float().mean() < 1
        chosen = torch.where(uncertain, losses["forward_kl"], losses["reverse_kl"])
    expected = (row_weights * chosen).sum() / total
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for key, parameter in model.named_parameters():
        error = (found[key] - parameter.grad).norm() / parameter.grad.norm().clamp(min=1e-6)
        assert error < 1e-4, key
    before = batch["row_weights"]
    if name == "entropy":
        share = (before * uncertain).sum() / total
        assert stats["share_forward"].item() == pytest.approx(share.item())
        assert "reverse_kl" not in stats
        return
    kept = (before * (row_weights > 0)).sum() / total
    assert stats["kept_share"].item() == pytest.approx(kept.item())
    ess = row_weights.sum() ** 2 / (before.sum() * (row_weights.square() / before).sum())
    zeroth, first, second = stats["weight_moments"].tolist()
    assert math.exp(2 * first - zeroth - second) == pytest.approx(ess.item(), rel=1e-5)


@pytest.mark.parametrize("name", WEIGHTED)
def test_neither_micro_batches_nor_packs_change_the_loss(name):
    model, items, objective = tiny_model(spread=3.0), rewarded(), WEIGHTED[name]
    together = Collator("sequence_mean")(items)
    total = together["row_weights"].sum().item()
    loss, stats = step(model, together, objective, total)
    for collate in (Collator("sequence_mean"), Collator("sequence_mean", packed=True)):
        parts = [step(model, collate(part), objective, total) for part in (items[:1], items[1:])]
        assert sum(part.item() for part, _ in parts) == pytest.approx(loss.item(), rel=1e-5)
        if name != "entropy":
            shares = [part["kept_share"].item() for _, part in parts]
            assert sum(shares) == pytest.approx(stats["kept_share"].item())


@pytest.mark.parametrize("bound", [0.0, 1e3])
def test_a_gate_that_all_or_no_tokens_pass_is_one_divergence(bound):
    model, batch = tiny_model(), Collator()(rewarded())
    gated = Objective("reverse_kl", token_weights="entropy", weight_entropy=bound)
    loss, stats = step(model, batch, gated, 7.0)
    expected, _ = step(model, batch, Objective("reverse_kl" if bound else "forward_kl"), 7.0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert (stats["share_forward"].item() > 0) == (bound == 0)


@pytest.mark.parametrize("saving", [{"dense_share": 0.5}, {"tolerance": 0.1}], ids=str)
@pytest.mark.parametrize("name", ["entropy", "divergence_rank"])
def test_rules_go_with_what_saves_work_in_the_backward(name, saving):
    model, batch = tiny_model(spread=3.0), Collator()(rewarded())
    torch.manual_seed(0)
    loss, stats = step(model, batch, dataclasses.replace(WEIGHTED[name], **saving), 7.0)
    expected, _ = step(model, batch, WEIGHTED[name], 7.0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert all(value.isfinite().all() for value in stats.values())


def test_a_rule_sees_no_nan_as_a_reason_to_leave_a_token_out():
    batch = Collator()(rewarded())
    batch["teacher_logprobs"][3] = torch.nan
    for name in ("advantage", "divergence_rank"):
        objective = dataclasses.replace(WEIGHTED[name], name="policy_gradient")
        loss, _ = step(tiny_model(), batch, objective, 1.0)
        assert math.isnan(loss.item()), name


@pytest.mark.parametrize("packed", [False, True])
def test_rows_are_left_out_of_every_column_that_has_them(packed):
    items = [dataclasses.replace(item, teacher_id="ab"[n % 2]) for n, item in enumerate(rewarded())]
    batch = Collator(packed=packed)(items)
    count = len(batch["labels"])
    kept = torch.arange(count) % 3 != 0
    selected = select_rows(batch, kept)
    assert selected.keys() == batch.keys()
    of_rows = {name for name, x in batch.items() if isinstance(x, torch.Tensor) and len(x) == count}
    assert {"teacher_index", "rewards", "topk_ids", "parts", "row_weights"} <= of_rows
    for name in of_rows:
        assert torch.equal(selected[name], batch[name][kept]), name
    for name in ("overlap_rows", "unlisted"):
        place = {row: n for n, row in enumerate(kept.nonzero()[:, 0].tolist())}
        expected = [place[row] for row in batch[name].tolist() if row in place]
        assert selected[name].tolist() == expected
    for name in WEIGHTED:
        _, stats = step(tiny_model(), batch, WEIGHTED[name], 7.0)
        assert {"divergence/a", "divergence/b"} <= stats.keys()


def test_answers_as_a_grid():
    answers = Answers.of(torch.tensor([0, 0, 0, 0, 1, 2, 2]))
    values = torch.tensor([4.0, 1.0, 4.0, 2.0, 7.0, 3.0, 9.0])
    assert answers.sums(values).tolist() == [11.0] * 4 + [7.0] + [12.0] * 2
    assert answers.medians(values).tolist() == [3.0] * 4 + [7.0] + [6.0] * 2
    assert answers.ranks(values).tolist() == [0, 3, 1, 2, 0, 1, 0]
    assert answers.kept(0.5).tolist() == [2] * 4 + [1] + [1] * 2
    ten = Answers.of(torch.zeros(10, dtype=torch.int64))
    assert ten.kept(0.3).tolist() == [3] * 10 and ten.kept(0.301).tolist() == [4] * 10
    assert ten.kept(1.0).tolist() == [10] * 10


@pytest.mark.parametrize("objective", [Objective("policy_gradient"), Objective("reverse_kl")])
def test_the_loop_and_the_trainer_agree(tmp_path, objective):
    objective = dataclasses.replace(objective, token_weights="divergence_rank")
    given = [dataclasses.replace(r, weight=1.0 + n) for n, r in enumerate(make_rollouts(8))]
    dataset = SequenceDataset(make_scored(given))
    settings = {"max_steps": 3, "batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = make_trainer(tiny_model(), tmp_path, dataset, objective, "sequence_mean", **settings)
    loader = trainer.get_train_dataloader()
    batches = []
    for epoch in range(2):
        loader.batch_sampler.set_epoch(epoch)
        batches += [*loader]
    start = weights(trainer.model)
    trainer.train()
    model = tiny_model()
    log = train_loop(model, batches, objective, options(**settings))
    assert update_error(weights(model), weights(trainer.model), start) < SAME_UPDATE
    for entry in (log[0], trainer.state.log_history[0]):
        assert 0.4 <= entry["kept_share"] < 0.8 and 0.2 < entry["ess_weights"] < 0.8


def given_items():
    token_weights = np.array([0.0, 2.0, 1.0, 1.0, 0.5, 0.25, 3.0, 1.0, 1.0], np.float32)
    return [
        dataclasses.replace(
            rollout,
            weight=weight,
            token_weights=token_weights[: len(rollout.rollout_logprobs)],
        )
        for rollout, weight in zip(make_rollouts(3), (0.5, 1.0, 2.0), strict=True)
    ]


def test_given_weights_make_a_weighted_mean():
    items = given_items()
    for aggregation in ("token_mean", "sequence_mean"):
        batch = Collator(aggregation)(make_scored(items))
        expected = []
        for item in items:
            given = item.token_weights[item.token_weights > 0].astype(np.float64)
            scale = given.sum() if aggregation == "sequence_mean" else 1.0
            expected += (item.weight * given / scale).tolist()
        assert batch["row_weights"].tolist() == pytest.approx(expected, rel=1e-6)
        labels = [t for item in items for t in item.tokens[item.prompt_length + 1 :]]
        assert batch["labels"].tolist() == labels
        assert len(batch["topk_ids"]) == len(labels)
    plain = Collator(weighted=False)(make_scored(items))
    assert torch.equal(
        plain["row_weights"], torch.ones(sum(len(i.rollout_logprobs) for i in items))
    )
    assert "rewards" not in plain


def test_the_share_of_given_weights_is_that_of_kish(tmp_path):
    items = given_items()
    share = SequenceDataset(items).weight_share
    w = np.concatenate([item.weight * item.token_weights for item in items]).astype(np.float64)
    assert share.given
    assert share.value == pytest.approx(w.sum() ** 2 / (len(w) * np.square(w).sum()), rel=1e-6)
    assert not SequenceDataset(make_rollouts(3)).weight_share.given
    bad = dataclasses.replace(items[0], weight=-1.0)
    with pytest.raises(DataError, match="sequence p0/0: its weight is -1"):
        SequenceDataset([bad])


def test_held_out_sequences_ignore_every_weight(tmp_path):
    objective = WEIGHTED["prefix"]
    assert objective.held_out == Objective("forward_kl")
    assert WEIGHTED["entropy"].held_out == Objective("reverse_kl")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_weights": "prefix", "weight_beta": 1.0}, "weight_beta: token_weights 'prefix'"),
        ({"weight_share": 0.5}, "weight_share: token_weights 'none' has none; expected divergence"),
        ({"token_weights": "prefix", "weight_share": 0.0}, "weight_share: found 0.0"),
        ({"token_weights": "best"}, "token_weights: found 'best'; expected one of none, advantage"),
        ({"token_weights": "entropy", "name": "jsd"}, "for forward KL; found objective jsd"),
        ({"token_weights": "entropy", "tail": "unbiased"}, "another tail than unbiased"),
        ({"token_weights": "advantage", "tail": "unbiased"}, "would bias it"),
        ({"token_weights": "prefix", "name": "cross_entropy"}, "cross_entropy has no teacher"),
        (
            {"token_weights": "prefix", "name": "policy_gradient", "importance": "sequence"},
            "prefix leaves tokens out",
        ),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        Objective(**{"name": "reverse_kl", **changes})


def test_a_batch_without_what_a_rule_reads_is_refused():
    items = make_scored(make_rollouts(2))
    with pytest.raises(DataError, match="rewards are not all known, and token_weights 'advantage'"):
        step(tiny_model(), Collator()(items), WEIGHTED["advantage"], 1.0)
    items[0].teacher_entropy[:] = np.nan
    with pytest.raises(DataError, match="entropies are not all known"):
        step(tiny_model(), Collator()(items), WEIGHTED["entropy"], 1.0)
