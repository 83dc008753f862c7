"""Overlap of the student's own top with the teacher's lists, and divergence by position."""

import pytest
import torch
from helpers_training import make_rollouts, make_scored, tiny_model

from lopd.data import Collator
from lopd.probe import STRIDE, probed_rows, topk_overlap
from lopd.stats import POSITIONS, RATIOS, StatsWindow, by_position, positions_of
from lopd.step import Objective, step


def test_positions_begin_anew_with_each_sequence():
    index = torch.tensor([0, 0, 0, 2, 2])
    assert positions_of(index, 3).tolist() == [0, 1, 2, 0, 1]


def test_parts_begin_where_they_say():
    rows = torch.arange(20.0)
    weights = torch.full((20,), 0.5)
    weights[3] = 0.0
    index = torch.tensor([0] * 18 + [1] * 2)
    sums = by_position(rows, weights, index, 2)
    first = torch.tensor([*range(3), *range(4, 16), 18, 19])
    assert sums[0, 0] == 0.5 * first.sum() and sums[1, 0] == 0.5 * len(first)
    assert sums[0, 1] == 0.5 * (16 + 17) and sums[1, 1] == 1.0
    assert not sums[:, 2:].any()


def test_rows_are_chosen_whatever_they_are_batched_with():
    lengths = {"a": 300, "b": 7, "c": 150}
    alone = {
        name: probed_rows([name], torch.zeros(length, dtype=torch.int64)).tolist()
        for name, length in lengths.items()
    }
    index = torch.repeat_interleave(torch.arange(3), torch.tensor([*lengths.values()]))
    expected = alone["a"] + [300 + i for i in alone["b"]] + [307 + i for i in alone["c"]]
    assert probed_rows([*lengths], index).tolist() == expected
    assert len(alone["a"]) in (300 // STRIDE, 300 // STRIDE + 1)
    firsts = {probed_rows([str(i)], torch.zeros(64, dtype=torch.int64)).item() for i in range(99)}
    assert len(firsts) > 30


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
    part = probed_rows(batch["sequence_names"], batch["sequence_index"])
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
