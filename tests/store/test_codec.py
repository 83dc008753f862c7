"""The codecs: bits, bounds, and the log-space arithmetic of the tail."""

import math

import numpy as np
import pytest
from helpers_cache import log_softmax, make_manifest, make_pair, write_cache
from hypothesis import given, settings
from hypothesis import strategies as st

from lopd.errors import DataError
from lopd.store import CODECS, CacheWriter, TeacherCache
from lopd.store.bits import (
    MINIFLOATS,
    id_bits,
    pack_bits,
    pack_varints,
    packed_bytes,
    to_minifloats,
    unpack_bits,
    unpack_varints,
)
from lopd.store.codec import bucket_error, shift_to_tail
from lopd.store.lists import add_sampled, drop_ids, is_floored, subtract_from_tail
from lopd.store.ragged import TopKLists


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
    assert np.array_equal(unpack_bits(packed, np.arange(start, stop), bits), ids[start:stop])


def test_packing_in_steps_leaves_no_seam():
    ids = np.random.default_rng(0).integers(0, 151936, 3 * 65536 + 5).astype(np.int32)
    packed = pack_bits(ids, 18)
    whole = int.from_bytes(packed.tobytes(), "little")
    for index in (0, 65535, 65536, 131072, len(ids) - 1):
        assert whole >> (18 * index) & (2**18 - 1) == ids[index]
    assert np.array_equal(unpack_bits(packed, np.arange(65530, 131080), 18), ids[65530:131080])


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


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2**31 - 1) | st.integers(0, 300), max_size=40))
def test_varints_come_back(numbers):
    packed, sizes = pack_varints(np.array(numbers, np.int64))
    assert sizes.tolist() == [max(1, math.ceil(n.bit_length() / 7)) for n in numbers]
    assert len(packed) == sizes.sum()
    assert unpack_varints(packed).tolist() == numbers


@pytest.mark.parametrize("damaged", [[200], [5, 128], [255] * 5 + [1]])
def test_bytes_that_are_no_varints_are_refused(damaged):
    with pytest.raises(DataError, match="varint"):
        unpack_varints(np.array(damaged, np.uint8))


def test_minifloats_are_binary_fractions_and_the_nearest_is_taken():
    assert len(MINIFLOATS) == 256 and (np.diff(MINIFLOATS) > 0).all()
    assert MINIFLOATS[[0, 1, 16, 255]].tolist() == [0, 2**-9, 2**-5, 992]
    assert (MINIFLOATS.astype(np.float64) * 2**9 % 1 == 0).all()
    assert to_minifloats(MINIFLOATS).tolist() == list(range(256))
    assert to_minifloats(np.array([2**-10, 1 + 2**-5, -1.0])).tolist() == [1, 97, 0]
    values = np.random.default_rng(0).exponential(5.0, 2000).astype(np.float32)
    found = MINIFLOATS[to_minifloats(values)]
    nearest = np.abs(MINIFLOATS[:, None] - values).min(axis=0)
    np.testing.assert_allclose(np.abs(found - values), nearest, rtol=1e-6)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_the_receipt_tells_the_error_of_what_is_read_back(tmp_path, codec, top_p):
    shape = {"vocab_size": 3000, "k": 32, "length": 50, "spread": 3.0}
    for name, used in {"lossy": codec, "exact": "exact"}.items():
        manifest = make_manifest(plan=[2], vocab_size=3000, k=32, codec=used, top_p=top_p)
        write_cache(tmp_path / name, manifest, **shape)
    total = 0.0
    stored = [TeacherCache.open(tmp_path / name, support="list") for name in ("exact", "lossy")]
    for exact, lossy in zip(*stored, strict=True):
        assert lossy.topk_ids.shape == exact.topk_ids.shape
        for t in range(50):
            q = dict(zip(lossy.topk_ids[t].tolist(), lossy.topk_logprobs[t], strict=True))
            pairs = [
                (float(p), float(q[i]))
                for i, p in zip(exact.topk_ids[t].tolist(), exact.topk_logprobs[t], strict=True)
                if i >= 0
            ]
            pairs.append((float(exact.tail_logprobs[t]), float(lossy.tail_logprobs[t])))
            total += sum(math.exp(p) * (p - q) - math.exp(p) + math.exp(q) for p, q in pairs)
    error = stored[1].summary()["codec_error"]
    assert error == pytest.approx(total / 100, rel=1e-3, abs=1e-12)
    assert error == 0 if codec == "exact" else 0 < error < 1e-3


def test_the_error_is_the_divergence_and_is_never_negative():
    p, q = np.log([[0.5, 0.3, 0.2], [0.4, 0.3, 0.3]])
    lists = [TopKLists(np.array([1, 2]), x[:2].astype(np.float32), np.array([2])) for x in (p, q)]
    tails = [x[2:].astype(np.float32) for x in (p, q)]
    (found,) = bucket_error(lists[0], tails[0], lists[1], tails[1])
    assert found == pytest.approx((np.exp(p) * (p - q)).sum(), rel=1e-5)
    full = [TopKLists(x.ids, x.logprobs, x.lengths) for x in lists]
    (found,) = bucket_error(full[0], np.array([-np.inf]), full[0], np.array([-np.inf]))
    assert found == 0


def test_a_list_of_next_to_no_mass_is_not_shifted():
    lists = TopKLists(np.array([1, 2, 3]), np.log([3e-9, 1e-9, 0.5]).astype("f4"), np.array([2, 1]))
    shifted = shift_to_tail(lists, np.array([0.0, math.log(0.4)], np.float32))
    assert np.array_equal(shifted.logprobs[:2], lists.logprobs[:2])
    assert shifted.logprobs[2] == pytest.approx(math.log(0.6), rel=1e-6)


@pytest.mark.parametrize("codec", ["packed", "compact"])
def test_equal_input_gives_equal_bytes_and_batches_equal_singles(tmp_path, codec):
    for name in ("one", "two"):
        write_cache(tmp_path / name, make_manifest(plan=[3, 2], codec=codec, top_p=0.8))
    shards = [sorted((tmp_path / name).glob("shard-*")) for name in ("one", "two")]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*shards, strict=True))
    for support in ("list", "list+sampled"):
        cache = TeacherCache.open(tmp_path / "one", support=support)
        order = [4, 0, 2, -4, 4]
        for index, found in zip(order, cache.read(order), strict=True):
            single = cache[index]
            assert found.rollout.prompt_id == single.rollout.prompt_id
            for name in ("topk_ids", "topk_logprobs", "tail_logprobs", "teacher_entropy"):
                assert np.array_equal(getattr(found, name), getattr(single, name)), name
    assert cache.read([]) == []


def test_compact_joins_the_sampled_token_without_a_difference(tmp_path):
    """The tail beside the sampled token is stored, so a token that is nearly all of the
    tail leaves what it really leaves."""
    rollout, scores, dense = make_pair(0, vocab_size=64, k=4, length=60, spread=6.0)
    own = scores.teacher_logprobs
    with CacheWriter.create(
        tmp_path, make_manifest(plan=[1], vocab_size=64, k=4, codec="compact")
    ) as writer:
        writer.write(0, [(rollout, scores)])
    found = TeacherCache.open(tmp_path)[0]
    shares = []
    for t, token in enumerate(rollout.tokens[3:].tolist()):
        outside = np.logaddexp.reduce(
            np.delete(dense[t], found.topk_ids[t][found.topk_ids[t] >= 0])
        )
        assert token in found.topk_ids[t]
        assert found.tail_logprobs[t] == pytest.approx(outside, rel=2**-10, abs=2e-3)
        if token not in scores.topk_ids[t]:
            shares.append(own[t] - scores.tail_logprobs[t])
    assert max(shares) > -1


def test_compact_refuses_what_8_bits_cannot_hold(tmp_path):
    rollout, scores, _ = make_pair(0)
    scores.topk_logprobs[:, 0], scores.topk_logprobs[:, 1:] = 0, -993.0
    scores.teacher_logprobs[:], scores.tail_logprobs[:] = 0, -993.0
    rollout.tokens[3:] = scores.topk_ids[:, 0]
    with (
        CacheWriter.create(tmp_path, make_manifest(plan=[1], codec="compact")) as writer,
        pytest.raises(DataError, match="log-prob -993.0 for id .* codec 'compact' holds -992"),
    ):
        writer.write(0, [(rollout, scores)])
    scores.topk_logprobs[:, 1:], scores.tail_logprobs[:] = -900.0, -70000.0
    with (
        CacheWriter.create(tmp_path, make_manifest(plan=[1], codec="compact")) as writer,
        pytest.raises(DataError, match="response token 0 has log-prob -70000.0, codec 'compact'"),
    ):
        writer.write(0, [(rollout, scores)])


@pytest.mark.parametrize("gap", [-30.0, -3.0, -1e-2, -1e-4])
def test_taking_a_token_out_of_the_tail_is_exact_at_any_size(gap):
    tail = np.array([-0.5, -20.0, -600.0])
    found = subtract_from_tail(tail, tail + gap)
    np.testing.assert_allclose(found, tail + math.log(-math.expm1(gap)), rtol=1e-9)
    assert not is_floored(tail, tail + gap).any()


@pytest.mark.parametrize("gap", [0.0, 1e-3, -1e-9])
def test_a_remainder_within_rounding_is_floored(gap):
    tail = np.array([-0.5, -20.0])
    np.testing.assert_allclose(subtract_from_tail(tail, tail + gap), tail + math.log(2.0**-20))
    assert is_floored(tail, tail + gap).all()


def test_nothing_taken_changes_nothing():
    tail = np.array([-0.5, -np.inf])
    assert np.array_equal(subtract_from_tail(tail, np.full(2, -np.inf)), tail)


def ragged(rows):
    ids = [i for row in rows for i, _ in row]
    logprobs = [p for row in rows for _, p in row]
    lengths = np.array([len(row) for row in rows], np.int64)
    return TopKLists(np.array(ids, np.int32), np.array(logprobs, np.float32), lengths)


def test_padding_keeps_rows_apart():
    lists = ragged([[(3, -1.0), (1, -2.0)], [], [(7, -0.5)]])
    ids, logprobs = lists.padded()
    assert ids.tolist() == [[3, 1], [-1, -1], [7, -1]]
    assert logprobs.tolist() == [[-1, -2], [-math.inf, -math.inf], [-0.5, -math.inf]]
    empty, _ = ragged([[], []]).padded()
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
    lists = TopKLists(
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
    ids, logprobs = lists.padded()
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
