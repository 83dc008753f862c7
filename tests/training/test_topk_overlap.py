"""Overlap of the student's own top with the teacher's lists, and divergence by position."""

import numpy as np
import pytest
import torch
from helpers_training import make_rollouts, make_scored, tiny_model

from lopd.training.batch import Collator
from lopd.training.metrics import (
    POSITIONS,
    RATIOS,
    STRIDE,
    StatsWindow,
    by_position,
    is_probed,
    topk_overlap,
)
from lopd.training.objective import Objective
from lopd.training.step import step


def test_parts_begin_where_they_say():
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


def test_one_position_in_so_many_is_probed_and_sequences_begin_elsewhere():
    positions = np.arange(300)
    chosen = np.flatnonzero(is_probed("p0/0", positions))
    assert (np.diff(chosen) == STRIDE).all() and 0 <= chosen[0] < STRIDE
    firsts = {int(np.flatnonzero(is_probed(f"p{i}/0", positions))[0]) for i in range(99)}
    assert len(firsts) > 30


def test_rows_are_chosen_whatever_they_are_batched_with():
    items = make_scored(make_rollouts(30))
    together = Collator(packed=True)(items)
    chosen = []
    for item in items:
        alone = Collator()([item])
        chosen += [(alone["sequence_names"][0], *alone["labels"][alone["probes"]].tolist())]
    by_name = {name: [] for name in together["sequence_names"]}
    for row in together["probes"].tolist():
        name = together["sequence_names"][together["sequence_index"][row]]
        by_name[name].append(together["labels"][row].item())
    assert chosen == [(name, *labels) for name, labels in by_name.items()]
    assert any(len(found) > 1 for found in chosen)


def test_overlap_counts_the_list_among_as_many_of_the_student():
    logits = torch.tensor([[9.0, 8.0, 7.0, 6.0, 5.0], [1.0, 2.0, 3.0, 4.0, 5.0]]).repeat(2, 1)[:3]
    rows, weight = logits, torch.eye(5)
    ids = torch.tensor([[1, 3, 0], [4, 0, -1], [-1, -1, -1]])
    weights = torch.tensor([1.0, 0.5, 7.0])
    found = topk_overlap(rows, weight, ids, weights, {})
    assert found.tolist() == pytest.approx([2 / 3 + 0.5 * 0.5, 1.5])
    assert topk_overlap(rows[2:], weight, ids[2:], weights[2:], {}).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", ["reverse_kl", "jsd", "policy_gradient"])
def test_step_tells_both_by_the_tokens_they_are_of(name):
    model = tiny_model()
    batch = Collator()(make_scored(make_rollouts(9)))
    total = batch["row_weights"].sum().item()
    window = StatsWindow()
    window.begin_step()
    loss, stats = step(model, batch, Objective(name), total)
    part = batch["probes"]
    assert 0 < len(part) < len(batch["labels"])
    with torch.no_grad():
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        rows = model(**inputs).logits.flatten(0, 1)[batch["loss_index"][part]]
    overlaps = []
    for row, ids in zip(rows, batch["topk_ids"][part], strict=True):
        ids = {i for i in ids.tolist() if i >= 0}
        own = set(row.topk(len(ids)).indices.tolist())
        overlaps.append(len(ids & own) / len(ids))
    window.add(stats, 1)
    logged = window.pop()
    assert logged["topk_overlap"] == pytest.approx(sum(overlaps) / len(overlaps))
    told = [key for key in logged if key.startswith(RATIOS[1])]
    assert told == [f"divergence_from_{POSITIONS[0]}"]
    if name == "policy_gradient":
        assert logged[told[0]] == pytest.approx(-stats["advantage"].item(), rel=1e-5)
    else:
        assert logged[told[0]] == pytest.approx(loss.item(), rel=1e-5)


def test_a_measurement_does_not_look_for_the_overlap():
    model = tiny_model()
    batch = Collator()(make_scored(make_rollouts(3)))
    with torch.no_grad():
        _, stats = step(model, batch, Objective("reverse_kl"), 1.0)
    assert "topk_overlap" not in stats and "divergence_from" in stats


def test_what_has_no_weight_is_not_told():
    window = StatsWindow()
    window.begin_step()
    window.add({"topk_overlap": torch.zeros(2), "divergence_from": torch.zeros(2, 7)}, 1)
    assert [*window.pop()] == ["tokens_per_second"]
