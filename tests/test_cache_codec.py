"""The codecs: bits, bounds, and the log-space arithmetic of the tail."""

import math

import numpy as np
import pytest
from helpers_cache import log_softmax, make_manifest, make_pair, write_cache
from hypothesis import given, settings
from hypothesis import strategies as st

from lopd.cache import TeacherCache
from lopd.cache.codec import (
    Lists,
    add_sampled,
    drop_ids,
    id_bits,
    is_floored,
    pack_bits,
    packed_bytes,
    pad_lists,
    take_from_tail,
    unpack_bits,
)


@pytest.mark.parametrize(
    "vocab_size, bits",
    [(1, 1), (2, 1), (3, 2), (256, 8), (257, 9), (151936, 18), (2**18, 18), (2**18 + 1, 19)],
)
def test_bits_per_id(vocab_size, bits):
    assert id_bits(vocab_size) == bits


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_slice_of_packed_ids_comes_back(data):
    bits = data.draw(st.integers(1, 31))
    ids = np.array(data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=70)), np.int32)
    packed = pack_bits(ids, bits)
    assert len(packed) == packed_bytes(len(ids), bits) == math.ceil(len(ids) * bits / 8)
    start = data.draw(st.integers(0, len(ids)))
    stop = data.draw(st.integers(start, len(ids)))
    assert np.array_equal(unpack_bits(packed, start, stop, bits), ids[start:stop])


def test_packing_in_steps_leaves_no_seam():
    ids = np.random.default_rng(0).integers(0, 151936, 3 * 65536 + 5).astype(np.int32)
    packed = pack_bits(ids, 18)
    whole = int.from_bytes(packed.tobytes(), "little")
    for index in (0, 65535, 65536, 131072, len(ids) - 1):
        assert whole >> (18 * index) & (2**18 - 1) == ids[index]
    assert np.array_equal(unpack_bits(packed, 65530, 131080, 18), ids[65530:131080])


def test_packed_is_smaller_and_its_divergence_from_exact_is_small(tmp_path):
    size, shape = {}, {"vocab_size": 151936, "k": 64, "length": 12, "spread": 4.0}
    for codec in ("exact", "packed"):
        manifest = make_manifest(plan=[1], vocab_size=151936, k=64, codec=codec)
        write_cache(tmp_path / codec, manifest, **shape)
    exact, packed = (TeacherCache.open(tmp_path / codec)[0] for codec in ("exact", "packed"))
    size = {c: TeacherCache.open(tmp_path / c).summary()["bytes"] for c in ("exact", "packed")}
    saved = (size["exact"] - size["packed"]) / (12 * 64)
    assert saved == pytest.approx(8 - 34 / 8, abs=0.05)
    assert np.array_equal(exact.topk_ids, packed.topk_ids)
    listed = exact.topk_ids >= 0
    p, q = (np.where(listed, s.topk_logprobs, 0).astype(np.float64) for s in (exact, packed))
    divergence = np.where(listed, np.exp(p) * (p - q), 0).sum(axis=1)
    assert 0 < np.abs(divergence).mean() < 2e-3


@pytest.mark.parametrize("gap", [-30.0, -3.0, -1e-2, -1e-4])
def test_taking_a_token_out_of_the_tail_is_exact_at_any_size(gap):
    tail = np.array([-0.5, -20.0, -600.0])
    found = take_from_tail(tail, tail + gap)
    np.testing.assert_allclose(found, tail + math.log(-math.expm1(gap)), rtol=1e-9)
    assert not is_floored(tail, tail + gap).any()


@pytest.mark.parametrize("gap", [0.0, 1e-3, -1e-9])
def test_a_remainder_within_rounding_is_floored(gap):
    tail = np.array([-0.5, -20.0])
    np.testing.assert_allclose(take_from_tail(tail, tail + gap), tail + math.log(2.0**-20))
    assert is_floored(tail, tail + gap).all()


def test_nothing_taken_changes_nothing():
    tail = np.array([-0.5, -np.inf])
    assert np.array_equal(take_from_tail(tail, np.full(2, -np.inf)), tail)


def ragged(rows):
    ids = [i for row in rows for i, _ in row]
    logprobs = [p for row in rows for _, p in row]
    lengths = np.array([len(row) for row in rows], np.int64)
    return Lists(np.array(ids, np.int32), np.array(logprobs, np.float32), lengths)


def test_padding_keeps_rows_apart():
    lists = ragged([[(3, -1.0), (1, -2.0)], [], [(7, -0.5)]])
    ids, logprobs = pad_lists(lists)
    assert ids.tolist() == [[3, 1], [-1, -1], [7, -1]]
    assert logprobs.tolist() == [[-1, -2], [-math.inf, -math.inf], [-0.5, -math.inf]]
    empty, _ = pad_lists(ragged([[], []]))
    assert empty.shape == (2, 0)


def test_sampled_tokens_join_empty_and_last_rows():
    lists = ragged([[], [(3, -1.0)], [], [(5, -1.0)]])
    tail = np.full(4, -0.25, np.float32)
    grown, rest = add_sampled(
        lists, tail, np.array([9, 3, 8, 7]), np.array([-2, -1, -3, -4], np.float32)
    )
    assert grown.ids.tolist() == [9, 3, 8, 5, 7]
    assert grown.lengths.tolist() == [1, 1, 1, 2]
    assert rest[1] == tail[1] and (rest[[0, 2, 3]] < tail[[0, 2, 3]]).all()
    assert (tail == -0.25).all()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_support_has_mass_one(data):
    vocab_size = data.draw(st.integers(2, 20))
    rows = data.draw(st.integers(1, 5))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    dense = log_softmax(rng.normal(size=(rows, vocab_size)) * data.draw(st.sampled_from([0.1, 9])))
    chosen = rng.random((rows, vocab_size)) < data.draw(st.sampled_from([0.0, 0.3, 0.9]))
    chosen[:, -1] = False
    lists = Lists(
        np.nonzero(chosen)[1].astype(np.int32),
        dense[chosen].astype(np.float32),
        chosen.sum(axis=1),
    )
    tail = np.logaddexp.reduce(np.where(chosen, -np.inf, dense), axis=1).astype(np.float32)
    keep = data.draw(st.integers(1, vocab_size))
    sampled = rng.integers(0, keep, rows)
    own = dense[np.arange(rows), sampled].astype(np.float32)
    lists, tail = drop_ids(lists, tail, keep)
    lists, tail = add_sampled(lists, tail, sampled, own)
    ids, logprobs = pad_lists(lists)
    assert ids.max(initial=-1) < keep
    assert (ids == sampled[:, None]).sum(axis=1).tolist() == [1] * rows
    total = np.exp(logprobs.astype(np.float64)).sum(axis=1) + np.exp(tail.astype(np.float64))
    np.testing.assert_allclose(total, 1, atol=3e-6)


def test_lists_that_hold_everything_have_no_tail(tmp_path):
    write_cache(tmp_path, make_manifest(plan=[1], k=40))
    found = TeacherCache.open(tmp_path)[0]
    assert np.isneginf(found.tail_logprobs).all()
    truth = np.take_along_axis(make_pair(0, k=40)[2], found.topk_ids, axis=1)
    np.testing.assert_allclose(found.topk_logprobs, truth, rtol=1e-6)
