"""The noise floor and its signal against dense distributions."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import save_qwen3
from helpers_stages import make_rollouts, score_argv
from helpers_training import make_rollouts as tiny_rollouts

from lopd.cli import main
from lopd.config.inference import EngineOptions
from lopd.engines.transformers import TransformersEngine
from lopd.errors import DataError
from lopd.evaluation.noise_floor import (
    _bucket_kl,
    _compare,
    _to_buckets,
    _with_extra_ids,
    measure_noise_floor,
)
from lopd.store import TeacherCache, TeacherScores, scored_sequence


def dense_signal(cache, student_folder):
    """Mean KL(student || stored) and share of the listed ids in its buckets, from full rows."""
    chosen = np.sort(np.random.default_rng(0).choice(20, 12, replace=False))
    items = [TeacherCache.open(cache, support="list")[int(i)] for i in chosen]
    student = TransformersEngine.load(student_folder, dtype="float32", device="cpu")
    size = student.vocab_size
    sequences = [s.rollout.tokens for s in items], [s.rollout.prompt_length for s in items]
    kls, shares = [], []
    for item, score in zip(items, student.score(*sequences, size), strict=True):
        for row in range(len(score.teacher_logprobs)):
            dense = np.empty(size)
            dense[score.topk_ids[row]] = score.topk_logprobs[row]
            listed = item.topk_ids[row] >= 0
            bucketed = listed & (item.topk_ids[row] < size)
            ids, q = item.topk_ids[row][bucketed], np.exp(item.topk_logprobs[row].astype(float))
            p = np.append(np.exp(dense[ids]), np.exp(np.delete(dense, ids)).sum())
            tail = np.exp(item.tail_logprobs[row]) + q[listed & ~bucketed].sum()
            kls.append((p * np.log(p / np.append(q[bucketed], tail))).sum())
            shares.append(bucketed.sum() / listed.sum())
    return np.mean(kls), np.mean(shares)


@pytest.mark.thorough
@pytest.mark.parametrize("teacher_rows", [None, 450], ids=["same rows", "more rows"])
def test_signal_equals_that_of_dense_distributions(
    teacher_folder, student_folder, tmp_path, teacher_rows
):
    """Ids in the lists that are beyond the student's vocabulary join the bucket of the others."""
    teacher = teacher_folder
    if teacher_rows is not None:
        teacher = save_qwen3(tmp_path / "teacher", seed=1, vocab_size=teacher_rows)
    rollouts, cache = make_rollouts(student_folder, tmp_path), tmp_path / "cache"
    assert main(score_argv(teacher, rollouts, cache, "--top-p", "1")) == 0
    floor = measure_noise_floor(
        cache,
        12,
        teachers={None: str(teacher)},
        student=student_folder,
        options=EngineOptions(dtype="float32", device="cpu"),
        tokens_per_batch=16384,
        seed=0,
    )
    signal, coverage = dense_signal(cache, student_folder)
    assert (coverage < 0.9) == (teacher_rows is not None)
    assert floor.coverage == pytest.approx(coverage)
    assert floor.signal == pytest.approx(signal, rel=1e-5)
    assert floor.noise < 1e-6 < 0.01 < floor.signal
    assert floor.same_student and floor.sequences == 12


def test_ids_without_a_bucket_join_the_others():
    stored_ids = np.array([[3, 5, 7, -1]])
    stored = np.log(np.array([[0.5, 0.2, 0.1, 0.0]]) + 1e-300)
    shared = np.array([[3, -1, 7, -1]])
    q = _to_buckets(shared, stored_ids, stored, np.log(np.array([0.2])))
    np.testing.assert_allclose(np.exp(q), [[0.5, 0, 0.1, 0, 0.4]], atol=1e-12)
    p = _to_buckets(
        shared, np.array([[3, 7, 9]]), np.log(np.array([[0.6, 0.1, 0.1]])), np.log(np.array([0.2]))
    )
    np.testing.assert_allclose(np.exp(p), [[0.6, 0, 0.1, 0, 0.3]], atol=1e-12)
    expected = 0.6 * np.log(0.6 / 0.5) + 0.3 * np.log(0.3 / 0.4)
    np.testing.assert_allclose(_bucket_kl(p, q), expected)
    assert 0 < _bucket_kl(q + 1e-6, q)[0] < 1e-11 and 0 < _bucket_kl(q - 1e-6, q)[0] < 1e-11


def test_extra_ids_are_merged_without_duplicates(teacher_folder):
    engine = TransformersEngine.load(teacher_folder, dtype="float32", device="cpu")
    (top,) = engine.score([np.array([5, 6, 7, 8])], [2], 3)
    (score,) = engine.score([np.array([5, 6, 7, 8])], [2], 3, extra_ids=[top.topk_ids])
    ids, logprobs, tail = _with_extra_ids(score)
    mass = np.where(ids >= 0, np.exp(logprobs.astype(float)), 0).sum(1) + np.exp(tail.astype(float))
    np.testing.assert_allclose(mass, 1, atol=1e-5)


def test_ids_of_a_class_share_a_bucket():
    """In which stored, rescored and the student's distribution are the same."""
    rollout = tiny_rollouts(1, vocab=9)[0]
    rows = len(rollout.rollout_logprobs)

    def scores(p):
        ids, logprobs = np.tile([3, 5, 7], (rows, 1)), np.tile(np.log(p), (rows, 1))
        tail, column = np.full(rows, np.log(1 - sum(p))), np.zeros(rows)
        return TeacherScores(column, column, ids, logprobs, tail)

    item = scored_sequence(rollout, scores([0.4, 0.2, 0.3]), support="list")
    teacher, student = [scores([0.4, 0.3, 0.2])], [scores([0.4, 0.1, 0.4])]
    apart = _compare([item], teacher, student, 9, True)
    assert apart.noise > 0.01 and apart.signal > 0.01
    assert apart.coverage == 1
    merged = _compare([item], teacher, student, 9, True, (5, 7))
    assert abs(merged.noise) < 1e-7 and abs(merged.signal) < 1e-7


def test_only_tokens_with_loss_count():
    """The first has no scores, as that of another tool's masked token."""
    rollout = tiny_rollouts(1, vocab=9)[0]
    rows = len(rollout.rollout_logprobs)

    def scores(p, own):
        ids, logprobs = np.full((rows, 1), 3), np.full((rows, 1), np.log(p))
        tail = np.full(rows, np.log(1 - p))
        return TeacherScores(np.full(rows, own), np.zeros(rows), ids, logprobs, tail)

    stored = scores(0.5, -1.0)
    stored.topk_ids[0], stored.topk_logprobs[0], stored.tail_logprobs[0] = -1, -np.inf, 0.0
    stored.teacher_logprobs[0] = 0.0
    mask = rollout.loss_mask.copy()
    mask[rollout.prompt_length] = False
    item = scored_sequence(replace(rollout, loss_mask=mask), stored, support="list")
    floor = _compare([item], [scores(0.4, -1.5)], [scores(0.2, -3.0)], 9, True)
    assert floor.tokens == rows - 1
    assert floor.mean_gap == floor.largest_gap == pytest.approx(0.5)
    assert floor.noise == pytest.approx(0.4 * np.log(0.8) + 0.6 * np.log(1.2), abs=1e-7)
    assert floor.signal == pytest.approx(0.2 * np.log(0.4) + 0.8 * np.log(1.6), abs=1e-7)
    assert floor.coverage == 1
    silent = replace(item, rollout=replace(rollout, loss_mask=np.zeros_like(mask)))
    with pytest.raises(DataError, match="no token of 1 sequences bears loss"):
        _compare([silent], [stored], [stored], 9, True)
