"""Readers and writers: records are read as written, in any order, and bad input is refused."""

import dataclasses
import gc
import pickle

import numpy as np
import pytest
from helpers_cache import (
    make_manifest,
    make_pair,
    shards_of,
    write_cache,
    write_rollouts,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from lopd.errors import ConfigError, DataError, MissingFileError, ShardError
from lopd.store import CODECS, CacheWriter, RolloutStore, TeacherCache


def assert_same_rollout(found, expected, codec="exact"):
    for field in dataclasses.fields(expected):
        left, right = getattr(found, field.name), getattr(expected, field.name)
        if codec == "compact" and "logprobs" in field.name:
            right = right.astype(np.float16)
        assert np.array_equal(left, right), field.name
    assert found.tokens.dtype == np.int32 and found.rollout_logprobs.dtype == np.float32


def by_id(ids, logprobs):
    return dict(sorted((int(i), float(p)) for i, p in zip(ids, logprobs, strict=True) if i >= 0))


def bound(logprobs, codec):
    """What the codec's rounding and the shift that makes up for it may change, of one list."""
    if codec == "exact":
        return np.zeros_like(logprobs)
    step, least = {"packed": (2**-11, 2**-25), "compact": (2**-5, 2**-10)}[codec]
    rounding, mass = step * np.abs(logprobs) + least, np.exp(logprobs)
    shift = (mass * rounding).sum() / max(mass.sum(), 1e-30)
    return 1.1 * (rounding + shift) + 1e-6


def mass(sequence):
    listed = np.exp(sequence.topk_logprobs.astype(np.float64)).sum(axis=1)
    return listed + np.exp(sequence.tail_logprobs.astype(np.float64))


@pytest.mark.parametrize("raw_differs", [False, True])
@pytest.mark.parametrize("kind", ["rollouts", "sft_data"])
def test_rollouts_come_back(tmp_path, kind, raw_differs):
    manifest = make_manifest(kind)
    write_rollouts(tmp_path, manifest, raw_differs=raw_differs)
    store = RolloutStore.open(tmp_path, kind=kind)
    assert len(store) == 5 and store.num_shards == 3
    for index in (4, 0, 3, 1, 2, -1):
        expected = make_pair(index % 5, raw_differs=raw_differs)[0]
        assert_same_rollout(store[index], expected)
    assert [r.prompt_id for r in store.shard(2)] == ["prompt-3", "prompt-4"]
    assert [r.prompt_id for r in store] == [f"prompt-{i}" for i in range(5)]
    with pytest.raises(IndexError):
        store[5]


def test_equal_raw_logprobs_are_stored_once(tmp_path):
    write_rollouts(tmp_path / "one", make_manifest("rollouts"))
    write_rollouts(tmp_path / "two", make_manifest("rollouts"), raw_differs=True)
    one, two = (RolloutStore.open(tmp_path / name).summary()["bytes"] for name in ("one", "two"))
    assert two - one >= 5 * 6 * 4


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_shape_round_trips(tmp_path_factory, data):
    vocab_size = data.draw(st.sampled_from([2, 3, 40, 257, 151936]))
    k = data.draw(st.integers(0, min(vocab_size, 12)))
    codec = data.draw(st.sampled_from(CODECS))
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    cut = data.draw(st.integers(1, len(lengths)))
    plan = [n for n in (cut, len(lengths) - cut) if n]
    pairs = [
        make_pair(i, vocab_size=vocab_size, k=k, length=n, prompt_length=1 + i)
        for i, n in enumerate(lengths)
    ]
    folder = tmp_path_factory.mktemp("shape")
    manifest = make_manifest(plan=plan, vocab_size=vocab_size, k=k, codec=codec)
    with CacheWriter.create(folder, manifest) as writer:
        for shard, records in enumerate(shards_of(plan, lambda i: pairs[i][:2])):
            writer.write(shard, records)
        writer.finish()
    cache = TeacherCache.open(folder, support="list")
    for index in data.draw(st.permutations(range(len(lengths)))):
        rollout, scores, _ = pairs[index]
        found = cache[index]
        assert_same_rollout(found.rollout, rollout, codec)
        own, entropy, tail = scores.teacher_logprobs, scores.teacher_entropy, scores.tail_logprobs
        if codec == "compact":
            own, entropy = own.astype(np.float16), entropy.astype(np.float16)
            np.testing.assert_allclose(found.tail_logprobs, tail, rtol=2**-10, atol=2**-10)
        else:
            assert np.array_equal(found.tail_logprobs, tail)
            assert np.array_equal(found.topk_ids, scores.topk_ids)
        assert np.array_equal(found.teacher_logprobs, own)
        assert np.array_equal(found.teacher_entropy, entropy)
        for t in range(len(own)):
            listed = by_id(found.topk_ids[t], found.topk_logprobs[t])
            exact = by_id(scores.topk_ids[t], scores.topk_logprobs[t])
            assert listed.keys() == exact.keys()
            left, right = (np.array(list(part.values())) for part in (listed, exact))
            assert (np.abs(left - right) <= bound(right, codec)).all()
    cache.verify()


@pytest.mark.parametrize("codec", CODECS)
def test_top_p_keeps_the_smallest_prefix_and_the_mass_outside_it(tmp_path, codec):
    manifest = make_manifest(top_p=0.7, codec=codec)
    write_cache(tmp_path, manifest)
    cache = TeacherCache.open(tmp_path, support="list")
    lengths = set()
    for index in range(len(cache)):
        _, scores, dense = make_pair(index)
        found = cache[index]
        covered = np.cumsum(np.exp(scores.topk_logprobs.astype(np.float64)), axis=1)
        for t in range(len(dense)):
            listed = found.topk_ids[t][found.topk_ids[t] >= 0]
            n = len(listed)
            lengths.add(n)
            assert set(listed) == set(scores.topk_ids[t, :n])
            assert codec == "compact" or np.array_equal(listed, scores.topk_ids[t, :n])
            assert n == 8 or covered[t, n - 1] >= 0.7
            assert n == 1 or covered[t, n - 2] < 0.7
            outside = np.delete(dense[t], listed)
            slack = 2e-3 if codec == "compact" else 2e-6
            assert found.tail_logprobs[t] == pytest.approx(np.logaddexp.reduce(outside), abs=slack)
            assert (found.topk_ids[t, n:] == -1).all()
            assert np.isneginf(found.topk_logprobs[t, n:]).all()
    assert len(lengths) > 2


def test_a_tiny_tail_keeps_its_digits(tmp_path):
    rollout, scores, dense = make_pair(0, spread=60.0, length=40)
    manifest = make_manifest(plan=[1], top_p=0.9)
    with CacheWriter.create(tmp_path, manifest) as writer:
        writer.write(0, [(rollout, scores)])
    found = TeacherCache.open(tmp_path, support="list")[0]
    truth = np.array(
        [
            np.logaddexp.reduce(np.delete(row, ids[ids >= 0]))
            for row, ids in zip(dense, found.topk_ids, strict=True)
        ]
    )
    assert truth.min() < -20
    np.testing.assert_allclose(found.tail_logprobs, truth, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("codec", CODECS)
def test_the_sampled_token_joins_the_list_and_leaves_the_tail(tmp_path, codec):
    write_cache(tmp_path, make_manifest(top_p=0.6, codec=codec))
    stored = TeacherCache.open(tmp_path, support="list")
    cache = TeacherCache.open(tmp_path)
    joined = 0
    for index in range(len(cache)):
        rollout, scores, dense = make_pair(index)
        before, after = stored[index], cache[index]
        for t, token in enumerate(rollout.tokens[rollout.prompt_length :]):
            old = before.topk_ids[t][before.topk_ids[t] >= 0].tolist()
            new = after.topk_ids[t][after.topk_ids[t] >= 0].tolist()
            expected = old if token in old else [*old, token]
            assert new == expected or (codec == "compact" and sorted(new) == sorted(expected))
            truth = np.logaddexp.reduce(np.delete(dense[t], new))
            slack = 2e-3 if codec == "compact" else 1e-5
            assert after.tail_logprobs[t] == pytest.approx(truth, abs=slack)
            if token not in old:
                joined += 1
                found, own = after.topk_logprobs[t, new.index(token)], scores.teacher_logprobs[t]
                near = bound(np.append(scores.topk_logprobs[t, : len(old)], own), codec).max()
                assert abs(found - own) <= near
        np.testing.assert_allclose(mass(after), 1, atol=2e-6)
        np.testing.assert_allclose(mass(before), 1, atol=2e-6)
        assert np.array_equal(after.rollout.loss_mask, rollout.loss_mask)
        own = scores.teacher_logprobs
        own = own.astype(np.float16) if codec == "compact" else own
        assert np.array_equal(after.teacher_logprobs, own)
    assert joined > 5


def test_k_zero_gives_only_the_sampled_token(tmp_path):
    write_cache(tmp_path, make_manifest(k=0, plan=[1]))
    found = TeacherCache.open(tmp_path)[0]
    assert np.array_equal(found.topk_ids[:, 0], found.rollout.tokens[3:])
    np.testing.assert_allclose(
        found.tail_logprobs, np.log1p(-np.exp(found.teacher_logprobs.astype(np.float64))), rtol=1e-6
    )


def test_a_token_that_is_all_of_the_tail_leaves_the_floor_and_is_counted(tmp_path):
    rollout, scores, _ = make_pair(0, vocab_size=9, k=8, length=4)
    absent = np.array([np.setdiff1d(np.arange(9), row)[0] for row in scores.topk_ids])
    rollout.tokens[rollout.prompt_length :] = absent
    scores = dataclasses.replace(scores, teacher_logprobs=scores.tail_logprobs)
    with CacheWriter.create(tmp_path, make_manifest(plan=[1], vocab_size=9)) as writer:
        writer.write(0, [(rollout, scores)])
    cache = TeacherCache.open(tmp_path)
    np.testing.assert_allclose(
        cache[0].tail_logprobs, scores.tail_logprobs + np.log(2.0**-20), rtol=1e-6
    )
    assert cache.summary()["floored_tails"] == 4


def test_extra_ids_are_stored_once_and_leave_the_tail(tmp_path):
    rollout, scores, dense = make_pair(0, k=4, length=5)
    rng = np.random.default_rng(3)
    extra = np.stack([rng.choice(40, 6, replace=False) for _ in range(5)]).astype(np.int32)
    extra[:, 0] = scores.topk_ids[:, 0]
    extra[:, 1] = scores.topk_ids[:, 3]
    extra[:, 2] = -1
    for row in extra:
        row[3:] = np.setdiff1d(np.arange(40), row[:3])[5:8]
    logprobs = np.take_along_axis(dense, np.maximum(extra, 0), axis=1).astype(np.float32)
    scores = dataclasses.replace(scores, extra_ids=extra, extra_logprobs=logprobs)
    with CacheWriter.create(tmp_path, make_manifest(plan=[1], k=4, top_p=0.5)) as writer:
        writer.write(0, [(rollout, scores)])
    found = TeacherCache.open(tmp_path, support="list")[0]
    for t in range(5):
        listed = found.topk_ids[t][found.topk_ids[t] >= 0]
        assert len(set(listed.tolist())) == len(listed)
        assert set(extra[t][extra[t] >= 0]) <= set(listed.tolist())
        np.testing.assert_allclose(
            found.topk_logprobs[t, : len(listed)], dense[t, listed], rtol=1e-6
        )
        truth = np.logaddexp.reduce(np.delete(dense[t], listed))
        assert found.tail_logprobs[t] == pytest.approx(truth, abs=1e-5)


def test_ids_beyond_the_students_rows_go_to_the_tail_and_are_counted(tmp_path):
    rows = 25
    plan = [1]
    pairs = [make_pair(0)]
    pairs[0][0].tokens[:] %= rows
    own = np.take_along_axis(pairs[0][2], pairs[0][0].tokens[3:, None], axis=1)[:, 0]
    scores = dataclasses.replace(pairs[0][1], teacher_logprobs=own.astype(np.float32))
    with CacheWriter.create(tmp_path, make_manifest(plan=plan)) as writer:
        writer.write(0, [(pairs[0][0], scores)])
    cache = TeacherCache.open(tmp_path, vocab_size=rows)
    found = cache[0]
    assert found.topk_ids.max() < rows
    assert cache.summary()["dropped_entries"] == (scores.topk_ids >= rows).sum() > 0
    for t, row in enumerate(found.topk_ids):
        truth = np.logaddexp.reduce(np.delete(pairs[0][2][t], row[row >= 0]))
        assert found.tail_logprobs[t] == pytest.approx(truth, abs=1e-5)
    short = TeacherCache.open(tmp_path, vocab_size=2)
    with pytest.raises(
        DataError, match=r"prompt-0/0: token \d+ has id \d+; .*\[0, 2\), .* student"
    ):
        short[0]


def test_shards_open_when_needed_and_survive_pickling(tmp_path):
    write_cache(tmp_path, make_manifest())
    (tmp_path / "shard-00001.safetensors").write_bytes(
        bytes((tmp_path / "shard-00001.safetensors").stat().st_size)
    )
    cache = TeacherCache.open(tmp_path)
    copy = pickle.loads(pickle.dumps(cache))
    assert np.array_equal(copy[4].topk_ids, cache[4].topk_ids)
    with pytest.raises(ShardError, match="shard-00001"):
        cache[2]


def test_arrays_belong_to_the_caller_and_views_are_read_only(tmp_path):
    write_cache(tmp_path, make_manifest())
    cache = TeacherCache.open(tmp_path)
    first = cache[1]
    with pytest.raises(ValueError, match="read-only"):
        first.topk_ids[:] = 7  # a padded copy of the lists: writing to it would have no effect
    for values in (first.rollout.tokens, first.lists.ids, first.tail_logprobs):
        values[:] = 7
    first.teacher_logprobs[:] = 7
    assert cache[1].rollout.tokens.max() != 7 or cache[1].rollout.tokens.min() != 7
    assert cache[1].teacher_logprobs.max() < 0 and cache[1].tail_logprobs.max() < 0
    lists = next(cache.chunks()).lists
    with pytest.raises(ValueError, match="read-only"):
        lists.ids[0] = 1
    del cache
    gc.collect()
    assert lists.ids.min() >= 0


@pytest.mark.parametrize("codec", CODECS)
def test_summary_and_used_ids(tmp_path, codec):
    write_cache(tmp_path, make_manifest(codec=codec, top_p=0.7))
    cache = TeacherCache.open(tmp_path, support="list")
    sequences = list(cache)
    tails = np.concatenate([s.tail_logprobs for s in sequences]).astype(np.float64)
    summary = cache.summary()
    assert summary["sequences"] == 5 and summary["response_tokens"] == 30
    assert summary["tokens"] == 45
    assert summary["finish_reasons"] == {"stop": 2, "length": 3}
    files = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert summary["bytes"] == files and summary["bytes_per_response_token"] == files / 30
    assert summary["codec"] == codec
    entries = sum((s.topk_ids >= 0).sum() for s in sequences)
    assert summary["mean_list_length"] == entries / 30
    loose = 1e-3 if codec == "compact" else 1e-6
    assert summary["mean_covered_mass"] == pytest.approx((1 - np.exp(tails)).mean(), rel=loose)
    entropy = np.concatenate([s.teacher_entropy for s in sequences])
    assert summary["mean_entropy"] == pytest.approx(entropy.mean(), rel=loose)
    ids = {int(i) for s in sequences for i in s.topk_ids.ravel() if i >= 0}
    ids |= {int(i) for s in sequences for i in s.rollout.tokens}
    assert cache.used_ids().tolist() == sorted(ids)


def test_readers_refuse_what_they_cannot_read(tmp_path):
    with pytest.raises(MissingFileError, match="nowhere: no such file or folder; name a folder"):
        TeacherCache.open(tmp_path / "nowhere")
    write_rollouts(tmp_path, make_manifest("rollouts"))
    with pytest.raises(ConfigError, match="holds 'rollouts', expected 'cache'"):
        TeacherCache.open(tmp_path)
    write_cache(tmp_path / "cache", make_manifest())
    with pytest.raises(ConfigError, match="support is 'top'"):
        TeacherCache.open(tmp_path / "cache", support="top")
