"""Absent entropy: declared, stored as NaN, and left out of means and batches."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers_cache import make_manifest, make_pair
from helpers_training import tiny_model

from lopd.config.objective import Objective
from lopd.errors import ConfigError, DataError
from lopd.store import CacheWriter, TeacherCache
from lopd.store.size import size_bounds
from lopd.training.batch import Collator
from lopd.training.step import step

ABSENT = make_manifest(plan=[2], scoring={"entropy": "absent"})


def without(pair):
    rollout, scores, _ = pair
    return rollout, dataclasses.replace(
        scores, teacher_entropy=np.full_like(scores.teacher_entropy, np.nan)
    )


@pytest.fixture
def cache(tmp_path):
    with CacheWriter.create(tmp_path, ABSENT) as writer:
        writer.write(0, [without(make_pair(i)) for i in range(2)])
        assert writer.finish()
    return TeacherCache.open(tmp_path)


def test_it_is_refused_where_it_is_not_declared(tmp_path):
    with pytest.raises(ConfigError, match="scoring.entropy 'unknown', expected one of computed"):
        CacheWriter.create(tmp_path, make_manifest(scoring={"entropy": "unknown"}))
    with (
        CacheWriter.create(tmp_path, make_manifest(plan=[2])) as writer,
        pytest.raises(DataError, match="entropy of response token 0 .* is nan"),
    ):
        writer.write(0, [make_pair(0)[:2], without(make_pair(1))])


def test_one_that_is_there_is_refused_where_it_is_declared_absent(tmp_path):
    with (
        CacheWriter.create(tmp_path, ABSENT) as writer,
        pytest.raises(DataError, match="entropy of response token 0 .* expected NaN"),
    ):
        writer.write(0, [without(make_pair(0)), make_pair(1)[:2]])


def test_it_is_in_no_mean(cache):
    cache.verify()
    assert cache.summary()["mean_entropy"] is None
    assert np.isnan(cache[1].teacher_entropy).all()


@pytest.mark.parametrize("objective", ["reverse_kl", "policy_gradient"])
def test_training_reports_none(cache, objective):
    batch = Collator()([cache[0], cache[1]])
    assert "teacher_entropy" not in batch
    loss, stats = step(tiny_model(), batch, Objective(objective), num_items=12.0)
    assert torch.isfinite(loss) and "teacher_entropy" not in stats


def test_the_size_of_such_a_cache_can_be_predicted(cache):
    size_bounds(ABSENT, [cache[0].rollout])
