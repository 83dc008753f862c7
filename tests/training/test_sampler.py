"""The sampler: every sequence once per epoch, in steps that do not depend on their split."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lopd.errors import ConfigError
from lopd.training.sampler import StepDataset, StepSampler, share, split

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=40)


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(1, 8), st.one_of(st.none(), st.integers(30, 90)), st.integers(1, 4))
def test_a_split_contains_every_sequence_once_within_its_limits(lengths, size, budget, at_least):
    at_least = min(at_least, len(lengths))
    parts = split(lengths, size, budget, at_least)
    assert sorted(i for part in parts for i in part) == [*range(len(lengths))]
    assert len(parts) >= at_least and all(parts)
    for part in parts:
        if budget is None:
            assert len(part) <= size
        else:
            assert sum(lengths[i] for i in part) <= budget


def test_padded_micro_batches_have_sequences_of_similar_length():
    lengths = [9, 1, 8, 2, 9, 1]
    assert [sorted(lengths[i] for i in p) for p in split(lengths, 2)] == [[9, 9], [2, 8], [1, 1]]
    assert split(lengths, 6) == [[0, 1, 2, 3, 4, 5]]  # one batch keeps its order


def test_packs_are_filled():
    parts = split([5, 5, 4, 6], 1, 10)
    assert sorted(sum([5, 5, 4, 6][i] for i in part) for part in parts) == [10, 10]


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(1, 4))
def test_shares_have_the_same_number_of_sequences(lengths, world_size):
    lengths = lengths * world_size
    shares = share(lengths, world_size)
    assert {len(part) for part in shares} == {len(lengths) // world_size}
    assert sorted(i for part in shares for i in part) == [*range(len(lengths))]
    tokens = [sum(lengths[i] for i in part) for part in shares]
    assert max(tokens) - min(tokens) <= max(lengths)


def sampler(lengths, **changes):
    return StepSampler(lengths, **{"batch_size": 2, "accumulation": 3, "seed": 5, **changes})


@pytest.mark.parametrize("budget", [None, 40])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_have_the_same_number_of_micro_batches(world_size, budget):
    lengths = np.random.default_rng(0).integers(1, 30, 43)
    ranks = [
        sampler(lengths, max_tokens=budget, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for epoch in (0, 1):
        plans = []
        for one in ranks:
            one.set_epoch(epoch)
            plans.append([*one])
            assert len(plans[-1]) == len(one)
        seen = []
        for step, whole in zip(zip(*plans, strict=True), ranks[0].steps(epoch), strict=True):
            assert len({len(parts) for parts in step}) == 1
            assert len({sum(map(len, parts)) for parts in step}) == 1
            held = [i for parts in step for part in parts for i in part]
            assert sorted(held) == sorted(whole)
            seen += held
        assert len(seen) == len({*seen}) == 43 // world_size * world_size
    assert ranks[0].steps(0) != ranks[0].steps(1)


def test_steps_do_not_depend_on_the_split_into_micro_batches():
    lengths = [3, 9, 4, 8, 5, 7, 6, 2]
    ways = [{"batch_size": 4, "accumulation": 1}, {"batch_size": 1, "accumulation": 4}]
    ways += [{"batch_size": 2, "accumulation": 1, "world_size": 2}]
    ways += [{"batch_size": 4, "accumulation": 1, "max_tokens": 20}]
    assert len({str(sampler(lengths, **way).steps(3)) for way in ways}) == 1


def test_impossible_splits_are_refused(capsys):
    with pytest.raises(ConfigError, match=r"max_tokens_per_batch: found 8, but a sequence has 9"):
        sampler([3, 9], max_tokens=8)
    with pytest.raises(ConfigError, match="3 processes for 2 sequences"):
        sampler([3, 9], world_size=3)
    sampler([3] * 7, world_size=3)
    assert "leaves out 1 of 7 sequences" in capsys.readouterr().err


def test_the_items_of_a_step_are_read_together():
    class Items:
        def __getitems__(self, indices):
            self.asked = indices
            return [f"item {i}" for i in indices]

    items = Items()
    assert StepDataset(items).__getitems__([[4, 1], [0]]) == [["item 4", "item 1"], ["item 0"]]
    assert items.asked == [4, 1, 0]
