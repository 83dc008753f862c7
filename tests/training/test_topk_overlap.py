"""Overlap of the student's top-k with the teacher's lists, and divergence by position."""

import numpy as np
import pytest
import torch
from helpers_training import make_rollouts, make_scored, tiny_model

from lopd.config.objective import Objective
from lopd.training.batch import Collator
from lopd.training.metrics import POSITIONS, RATIOS, MetricsAccumulator, by_position
from lopd.training.step import step
from lopd.training.topk_overlap import STRIDE, is_overlap_position, topk_overlap


def test_parts_of_an_answer_begin_at_their_positions():
    (item, other) = make_scored(make_rollouts(2, shortest=18, longest=18))
    item.rollout.loss_mask[item.rollout.prompt_length + 3] = False
    batch = Collator(packed=True)([item, other])
    assert batch["parts"].tolist() == 15 * [0] + 2 * [1] + 16 * [0] + 2 * [1]
    rows, weights = torch.arange(35.0), torch.full((35,), 0.5)
    weights[3] = 0.0
    sums = by_position(rows, weights, batch["parts"])
    assert sums[0, 1] == 0.5 * (15 + 16 + 33 + 34) and sums[1, 1] == 2.0
    assert sums[0, 0] == 0.5 * (rows.sum() - 3) - sums[0, 1] and sums[1, 0] == 0.5 * 30
    assert not sums[:, 2:].any()


def test_one_position_in_64_is_measured_from_a_start_that_varies():
    positions = np.arange(300)
    chosen = np.flatnonzero(is_overlap_position("p0/0", positions))
    assert (np.diff(chosen) == STRIDE).all() and 0 <= chosen[0] < STRIDE
    firsts = {int(np.flatnonzero(is_overlap_position(f"p{i}/0", positions))[0]) for i in range(99)}
    assert len(firsts) > 30


def test_the_measured_rows_do_not_depend_on_the_batch():
    items = make_scored(make_rollouts(30))
    together = Collator(packed=True)(items)
    chosen = []
    for item in items:
        single = Collator()([item])
        chosen += [
            (single["sequence_names"][0], *single["labels"][single["overlap_rows"]].tolist())
        ]
    by_name = {name: [] for name in together["sequence_names"]}
    for row in together["overlap_rows"].tolist():
        name = together["sequence_names"][together["sequence_index"][row]]
        by_name[name].append(together["labels"][row].item())
    assert chosen == [(name, *labels) for name, labels in by_name.items()]
    assert any(len(entry) > 1 for entry in chosen)


def test_overlap_is_with_a_student_top_k_of_the_lists_length():
    logits = torch.tensor([[9.0, 8.0, 7.0, 6.0, 5.0], [1.0, 2.0, 3.0, 4.0, 5.0]]).repeat(2, 1)[:3]
    rows, weight = logits, torch.eye(5)
    ids = torch.tensor([[1, 3, 0], [4, 0, -1], [-1, -1, -1]])
    weights = torch.tensor([1.0, 0.5, 7.0])
    overlap = topk_overlap(rows, weight, ids, weights, {})
    assert overlap.tolist() == pytest.approx([2 / 3 + 0.5 * 0.5, 1.5])
    assert topk_overlap(rows[2:], weight, ids[2:], weights[2:], {}).tolist() == [0.0, 0.0]


def test_lists_longer_than_the_hidden_size_are_compared_in_full():
    generator = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(n, 2, generator=generator) for n in (3, 9))
    ids = torch.stack([torch.randperm(9, generator=generator)[:6] for _ in rows])
    shared = [
        len({*row.tolist()} & {*top.tolist()})
        for row, top in zip(ids, (rows @ weight.T).topk(6).indices, strict=True)
    ]
    assert min(shared) > 2  # more than a top-k as long as the hidden size could share
    overlap = topk_overlap(rows, weight, ids, torch.ones(3), {})
    assert overlap.tolist() == pytest.approx([sum(shared) / 6, 3.0])


@pytest.mark.parametrize("name", ["reverse_kl", "jsd", "policy_gradient"])
def test_step_reports_overlap_and_divergence_by_position(name):
    model = tiny_model()
    batch = Collator()(make_scored(make_rollouts(9)))
    total = batch["row_weights"].sum().item()
    metrics = MetricsAccumulator()
    metrics.begin_step()
    loss, stats = step(model, batch, Objective(name), total)
    part = batch["overlap_rows"]
    assert 0 < len(part) < len(batch["labels"])
    with torch.no_grad():
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        rows = model(**inputs).logits.flatten(0, 1)[batch["loss_index"][part]]
    overlaps = []
    for row, ids in zip(rows, batch["topk_ids"][part], strict=True):
        ids = {i for i in ids.tolist() if i >= 0}
        top = set(row.topk(len(ids)).indices.tolist())
        overlaps.append(len(ids & top) / len(ids))
    metrics.add(stats, 1)
    logged = metrics.pop()
    assert logged["topk_overlap"] == pytest.approx(sum(overlaps) / len(overlaps))
    logged_names = [key for key in logged if key.startswith(RATIOS[1])]
    assert logged_names == [f"divergence_from_{POSITIONS[0]}"]
    if name == "policy_gradient":
        assert logged[logged_names[0]] == pytest.approx(-stats["advantage"].item(), rel=1e-5)
    else:
        assert logged[logged_names[0]] == pytest.approx(loss.item(), rel=1e-5)


def test_no_overlap_without_gradient():
    model = tiny_model()
    batch = Collator()(make_scored(make_rollouts(3)))
    with torch.no_grad():
        _, stats = step(model, batch, Objective("reverse_kl"), 1.0)
    assert "topk_overlap" not in stats and "divergence_from" in stats


def test_ratios_without_weight_are_not_logged():
    metrics = MetricsAccumulator()
    metrics.begin_step()
    metrics.add({"topk_overlap": torch.zeros(2), "divergence_from": torch.zeros(2, 7)}, 1)
    assert [*metrics.pop()] == ["tokens_per_second"]
