"""Ragged lists: parts, sums and padding agree with rectangular arrays."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lopd.store import TopKLists
from lopd.store.ragged import offsets_of


def random_lists(seed, rows, width):
    """Lists of 0 to `width` entries, and the same as rectangular arrays."""
    rng = np.random.default_rng(seed)
    used = np.arange(width) < rng.integers(0, width + 1, rows)[:, None]
    ids = np.where(used, rng.integers(0, 1000, (rows, width)), -1).astype(np.int32)
    logprobs = np.where(used, -rng.exponential(size=(rows, width)), -np.inf).astype(np.float32)
    return TopKLists.from_padded(ids, logprobs), ids, logprobs


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 8), st.integers(0, 5), st.data())
def test_parts_are_those_of_the_padded_arrays(seed, rows, width, data):
    lists, ids, logprobs = random_lists(seed, rows, width)
    assert lists.width == (ids >= 0).sum(axis=1).max(initial=0)
    for found, expected in zip(lists.padded(width), (ids, logprobs), strict=True):
        assert found.dtype == expected.dtype and np.array_equal(found, expected)
    chosen = data.draw(st.lists(st.integers(0, max(rows - 1, 0)), max_size=6 if rows else 0))
    part = lists.take(np.array(chosen, np.int64))
    assert np.array_equal(part.padded(width)[0], ids[chosen])
    assert np.array_equal(part.padded(width)[1], logprobs[chosen])
    sums = lists.row_sums(np.exp(lists.logprobs.astype(np.float64)))
    np.testing.assert_allclose(sums, np.exp(logprobs.astype(np.float64)).sum(axis=1))
    tokens = np.array([row[data.draw(st.integers(0, max(width - 1, 0)))] for row in ids if width])
    if width:
        assert lists.contains(tokens).tolist() == (tokens >= 0).tolist()


def test_lists_are_split_and_concatenated():
    lists, ids, _ = random_lists(0, 7, 4)
    parts = lists.split(offsets_of(np.array([2, 4, 1])))
    assert [len(part.lengths) for part in parts] == [2, 4, 1]
    assert np.array_equal(parts[1].padded(4)[0], ids[2:6])
    whole = TopKLists.concatenate(parts)
    assert np.array_equal(whole.padded(4)[0], ids)
    assert np.shares_memory(parts[1].ids, lists.ids)


def test_following_rows_are_a_view():
    lists, _, _ = random_lists(0, 7, 4)
    assert np.shares_memory(lists.take(np.arange(2, 6)).ids, lists.ids)
    assert not np.shares_memory(lists.take(np.array([2, 4])).ids, lists.ids)


def test_a_width_below_the_longest_list_is_an_error():
    lists = TopKLists.from_padded(np.array([[1, 2, 3]]), np.array([[-1.0, -2.0, -math.inf]]))
    with pytest.raises((AssertionError, IndexError)):
        lists.padded(2)
