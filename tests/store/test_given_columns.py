"""Weights and rewards that come with the rollouts: stored, read and checked in every codec."""

import dataclasses
import math

import numpy as np
import pytest
from helpers_cache import make_manifest, make_pair

from lopd.errors import DataError
from lopd.store import CODECS, CacheWriter, RolloutStore, RolloutWriter, TeacherCache

GIVEN = [
    {"weight": 0.5, "reward": 1.0},
    {"token_weights": np.array([0, 1, 2, 0.25, 1, 1], np.float32)},
    {"reward": -1.0},
    {},
    {},
]


def pairs():
    made = [make_pair(index)[:2] for index in range(5)]
    return [
        (dataclasses.replace(rollout, **given), scores)
        for (rollout, scores), given in zip(made, GIVEN, strict=True)
    ]


def check(store, sequences):
    for found, (expected, _) in zip(sequences, pairs(), strict=True):
        assert (found.weight, found.reward) == (expected.weight, expected.reward)
        weights = [
            np.ones(6) if rollout.token_weights is None else rollout.token_weights
            for rollout in (found, expected)
        ]
        assert np.array_equal(*weights)
    assert store.weights().tolist() == [0.5, 1, 1, 1, 1]
    assert np.array_equal(store.rewards(), [1, np.nan, -1, np.nan, np.nan], equal_nan=True)
    assert store.has_token_weights


@pytest.mark.parametrize("codec", CODECS)
def test_a_cache_keeps_them(tmp_path, codec):
    made = pairs()
    with CacheWriter.create(tmp_path, make_manifest(codec=codec)) as writer:
        for shard, part in enumerate((made[:2], made[2:3], made[3:])):
            writer.write(shard, part)
        writer.finish()
    cache = TeacherCache.open(tmp_path)
    check(cache, [item.rollout for item in cache])
    check(cache, [item.rollout for item in reversed(cache.read([4, 3, 2, 1, 0]))])
    assert "weight" not in cache._view(2).arrays  # not stored where none is given


def test_rollouts_keep_them(tmp_path):
    made = [rollout for rollout, _ in pairs()]
    with RolloutWriter.create(tmp_path, make_manifest("rollouts")) as writer:
        for shard, part in enumerate((made[:2], made[2:3], made[3:])):
            writer.write(shard, part)
        writer.finish()
    store = RolloutStore.open(tmp_path)
    check(store, list(store))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight": 0.0}, "its weight is 0; expected a positive number"),
        ({"weight": -1.0}, "its weight is -1"),
        ({"weight": math.nan}, "its weight is nan"),
        ({"weight": 1e39}, r"its weight is 1e\+39"),
        ({"reward": math.inf}, "its reward is inf"),
        ({"token_weights": np.zeros(6, np.float32)}, "all tokens with loss are 0"),
        ({"token_weights": -np.ones(6, np.float32)}, "token_weights of response token 0 .*is -1"),
        ({"token_weights": np.full(6, np.nan, np.float32)}, "response token 0 .*is nan"),
        ({"token_weights": np.ones(5, np.float32)}, r"expected floats of shape \[6\]"),
    ],
)
def test_weights_that_no_mean_can_be_taken_with_are_refused(tmp_path, given, message):
    rollout = dataclasses.replace(make_pair(0)[0], **given)
    with (
        RolloutWriter.create(tmp_path, make_manifest("rollouts", plan=(1,))) as writer,
        pytest.raises(DataError, match=f"sequence prompt-0/0: .*{message}"),
    ):
        writer.write(0, [rollout])
