"""Calibration: every correction against plain loops, and folds that never see themselves."""

import dataclasses

import numpy as np
import pytest
from helpers_cache import make_pair

from lopd.evaluation.calibration import SURPRISALS, Calibration, fold_of
from lopd.store import scored_sequence
from lopd.training.metrics import POSITIONS

V, FOLDS = 12, 5


def sequences(count=40, length=20):
    """Scored sequences of few ids, some tokens without loss; log p_ref is noise below log q."""
    made, rng = [], np.random.default_rng(3)
    for index in range(count):
        rollout, scores, _ = make_pair(index, vocab_size=V, k=4, length=length, seed=1)
        mask = rollout.loss_mask.copy()
        mask[rollout.prompt_length + 2 :: 7] = False
        reference = -rng.exponential(1.5, length).clip(max=7.5).astype(np.float32)
        reference[::6] = 0.0
        rollout = dataclasses.replace(
            rollout,
            prompt_id=f"prompt-{index // 2}",
            loss_mask=mask,
            rollout_logprobs=reference,
            rollout_logprobs_raw=reference,
        )
        made.append(scored_sequence(rollout, scores, support="list"))
    return made


def bin_of(edges, value):
    return sum(value >= edge for edge in edges) - 1


def tokens_of(items):
    """(prompt, row, id, cell of the context, d) of every token with loss, as plain tuples."""
    found = []
    for number, item in enumerate(items):
        r = item.rollout
        for row in range(len(item.teacher_logprobs)):
            if r.loss_mask[r.prompt_length + row]:
                p = float(r.rollout_logprobs[row])
                cell = (bin_of(POSITIONS, row), bin_of(SURPRISALS, -p))
                gap = float(item.teacher_logprobs[row]) - p
                token = int(r.tokens[r.prompt_length + row])
                found.append((number, r.prompt_id, row, token, cell, gap))
    return found


def oracle(items):
    """Calibrated log-probs by the formula, token by token."""
    tokens = tokens_of(items)
    result = [item.teacher_logprobs.astype(np.float64) for item in items]
    for number, prompt, row, token, cell, _ in tokens:
        others = [t for t in tokens if fold_of(t[1], FOLDS) != fold_of(prompt, FOLDS)]
        same_token = [t[5] for t in others if t[3] == token]
        same_cell = [t[5] for t in others if t[4] == cell]
        means = [sum(gaps) / len(gaps) if gaps else 0.0 for gaps in (same_token, same_cell)]
        result[number][row] -= sum(means) / 2
    return result


def calibrate(items):
    calibration = Calibration(V, FOLDS, "rollout_logprobs")
    for item in items:
        calibration.add(item)
    return calibration, [calibration.calibrated(item) for item in items]


def test_corrections_equal_the_formula():
    items = sequences(24)
    calibration, found = calibrate(items)
    for values, expected in zip(found, oracle(items), strict=True):
        np.testing.assert_array_equal(values, expected.astype(np.float32))
    assert calibration.folds_used == FOLDS
    tokens, summary = tokens_of(items), calibration.summary
    assert summary.tokens == len(tokens)
    assert summary.before[0] == pytest.approx(sum(t[5] for t in tokens))
    cells = {t[4] for t in tokens}
    assert len({c[0] for c in cells}) == 2 and len({c[1] for c in cells}) >= 6


def test_a_fold_is_calibrated_without_its_own_prompts():
    items = sequences()
    _, before = calibrate(items)
    changed = fold_of(items[0].rollout.prompt_id, FOLDS)
    shifted = [
        dataclasses.replace(item, teacher_logprobs=item.teacher_logprobs - 3)
        if fold_of(item.rollout.prompt_id, FOLDS) == changed
        else item
        for item in items
    ]
    _, after = calibrate(shifted)
    for item, old, new in zip(items, before, after, strict=True):
        if fold_of(item.rollout.prompt_id, FOLDS) == changed:
            np.testing.assert_allclose(new, old - 3, atol=1e-6)  # the same means as before
        else:
            mask = item.rollout.loss_mask[item.rollout.prompt_length :]
            assert (new[mask] > old[mask]).all()
            assert np.array_equal(new[~mask], old[~mask])


def test_a_teacher_that_is_offset_by_token_and_context_is_brought_back():
    """An offset of each id and bin alike is what the means are of, whatever the prompt."""
    items = sequences(200)
    flat = [
        dataclasses.replace(item, teacher_logprobs=item.rollout.rollout_logprobs - 2)
        for item in items
    ]
    calibration, found = calibrate(flat)
    for item, values in zip(items, found, strict=True):
        mask = item.rollout.loss_mask[item.rollout.prompt_length :]
        np.testing.assert_allclose(values[mask], item.rollout.rollout_logprobs[mask], atol=1e-6)
    shown = calibration.summary.rows()
    assert shown["log q - log p_ref before"].startswith("mean -2, deviation ")


def test_an_id_that_the_other_folds_lack_has_no_mean_of_its_own():
    items = sequences(20)
    only = next(item for item in items if fold_of(item.rollout.prompt_id, FOLDS) == 1)
    rollout = dataclasses.replace(only.rollout, tokens=np.full_like(only.rollout.tokens, V))
    calibration = Calibration(V + 1, FOLDS, "rollout_logprobs")
    rare = dataclasses.replace(only, rollout=rollout)
    for item in (*items, rare):
        calibration.add(item)
    before = calibration.summary.unseen
    values = calibration.calibrated(rare)
    mask = rollout.loss_mask[rollout.prompt_length :]
    assert calibration.summary.unseen - before == mask.sum()
    assert np.isfinite(values).all() and (values[mask] != rare.teacher_logprobs[mask]).any()


def test_a_prompt_that_a_file_holds_twice_is_in_one_fold():
    names = [f"{number:016x}" for number in range(50)]
    assert [fold_of(f"{name}#1", FOLDS) for name in names] == [fold_of(n, FOLDS) for n in names]
    assert len({fold_of(f"task#{number}", FOLDS) for number in range(50)}) == FOLDS


def test_folds_are_of_about_equal_size():
    counts = np.bincount([fold_of(f"p{i}", FOLDS) for i in range(2000)], minlength=FOLDS)
    assert counts.min() > 340 and counts.max() < 460
