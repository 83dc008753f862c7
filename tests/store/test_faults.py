"""Damaged, foreign and locked folders: errors name the fault, and finished shards stay."""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers_cache import (
    RECEIPTS,
    SHARDS,
    damaged,
    edit_receipt,
    files_of,
    flip,
    make_manifest,
    make_pair,
    write_cache,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lopd.errors import ConfigError, ShardError
from lopd.store import CODECS, CacheWriter, RolloutWriter, TeacherCache
from lopd.store.arrays import INDEX_ARRAYS

PLAN = (1, 2, 1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    write_cache(folder, make_manifest(plan=PLAN))
    return folder


@pytest.fixture
def cache(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "cache"))


def truncate_and_amend(folder):
    shard = folder / SHARDS[1]
    shard.write_bytes(shard.read_bytes()[:-3])
    edit_receipt(folder / RECEIPTS[1], bytes=shard.stat().st_size)


def swap(folder, names):
    first, second = (folder / name for name in names)
    keep = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(keep)


def adopt_foreign_shard(folder):
    write_cache(folder / "other", make_manifest(plan=PLAN, top_p=0.9))
    shutil.copy(folder / "other" / SHARDS[1], folder / SHARDS[1])
    receipt = json.loads((folder / "other" / RECEIPTS[1]).read_text())
    del receipt["recipe"], receipt["digest"]
    edit_receipt(folder / RECEIPTS[1], **receipt)


AT_OPEN = {
    "shard missing": (lambda f: (f / SHARDS[1]).unlink(), SHARDS[1], "missing"),
    "receipt missing": (lambda f: (f / RECEIPTS[1]).unlink(), RECEIPTS[1], "missing"),
    "truncated": (lambda f: os.truncate(f / SHARDS[1], 900), SHARDS[1], "900 bytes"),
    "emptied": (lambda f: os.truncate(f / SHARDS[1], 0), SHARDS[1], "0 bytes"),
    "receipt torn": (lambda f: os.truncate(f / RECEIPTS[1], 40), RECEIPTS[1], "not JSON"),
    "receipt a list": (
        lambda f: (f / RECEIPTS[1]).write_text("[]\n"),
        RECEIPTS[1],
        "schema is None",
    ),
    "receipt short": (
        lambda f: edit_receipt(f / RECEIPTS[1], without="entropy"),
        RECEIPTS[1],
        "'entropy' is missing",
    ),
    "receipts swapped": (lambda f: swap(f, RECEIPTS[::2]), RECEIPTS[0], "shard is 2"),
    "foreign recipe": (
        lambda f: edit_receipt(f / RECEIPTS[1], recipe="0" * 64),
        RECEIPTS[1],
        "recipe is",
    ),
    "other plan": (lambda f: edit_receipt(f / RECEIPTS[1], sequences=7), RECEIPTS[1], "sequences"),
}


@pytest.mark.parametrize("spoil, name, message", AT_OPEN.values(), ids=AT_OPEN)
def test_opening_names_the_bad_file_and_resuming_mends_it(cache, finished, spoil, name, message):
    spoil(cache)
    with pytest.raises(ShardError, match=f"{name}: .*{message}"):
        TeacherCache.open(cache)
    lenient = TeacherCache.open(cache, allow_incomplete=True)
    assert set(lenient.missing_shards) <= {0, 1, 2} and lenient.missing_shards
    assert len(lenient) == 4 - sum(PLAN[i] for i in lenient.missing_shards)
    lenient.verify()
    write_cache(cache, make_manifest(plan=PLAN))
    assert files_of(cache) == files_of(finished)


AT_READ = {
    "truncated, receipt amended": (truncate_and_amend, "truncated or altered"),
    "header": (lambda f: flip(f / SHARDS[1], 3), "truncated or altered"),
    "shards swapped": (lambda f: [swap(f, n) for n in (SHARDS[:2], RECEIPTS[:2])], None),
    "foreign shard": (adopt_foreign_shard, "a foreign shard"),
    "token counts": (lambda f: edit_receipt(f / RECEIPTS[1], tokens=5), "its counts are not"),
}


@pytest.mark.parametrize("spoil, message", AT_READ.values(), ids=AT_READ)
def test_reading_names_the_bad_shard(cache, spoil, message):
    spoil(cache)
    if message is None:
        edit_receipt(cache / RECEIPTS[0], shard=0, sequences=1)
        edit_receipt(cache / RECEIPTS[1], shard=1, sequences=2)
        with pytest.raises(ShardError, match=f"{SHARDS[0]}: .*foreign shard"):
            TeacherCache.open(cache)[0]
        return
    reader = TeacherCache.open(cache)
    reader[0], reader[3]
    with pytest.raises(ShardError, match=f"{SHARDS[1]}: .*{message}"):
        reader[1]


def test_every_flipped_bit_is_detected_by_verify_and_by_resuming(cache, finished):
    size = (cache / SHARDS[1]).stat().st_size
    for position in range(0, size, size // 40):
        shutil.copy(finished / SHARDS[1], cache / SHARDS[1])
        flip(cache / SHARDS[1], position)
        with pytest.raises(ShardError, match=f"{SHARDS[1]}: sha256"):
            TeacherCache.open(cache).verify()
        with CacheWriter.create(cache, make_manifest(plan=PLAN)) as writer:
            assert writer.missing() == [1]


@pytest.mark.parametrize("codec", CODECS)
def test_flipped_bits_are_detected_and_those_of_header_and_offsets_when_opening(tmp_path, codec):
    write_cache(tmp_path, make_manifest(plan=PLAN, codec=codec, top_p=0.9))
    rng = np.random.default_rng(0)
    for shard, path in enumerate(tmp_path / name for name in SHARDS):
        whole = path.read_bytes()
        header = 8 + int.from_bytes(whole[:8], "little")
        index = set()
        for name, spec in json.loads(whole[8:header]).items():
            if name in INDEX_ARRAYS:
                start, stop = spec["data_offsets"]
                index |= set(range(header + start, header + stop))
        places = [*rng.integers(0, header, 20), *rng.choice(sorted(index), 40)]
        for place in [*places, *rng.integers(header, len(whole), 40)]:
            spoilt = bytearray(whole)
            spoilt[place] ^= 1 << rng.integers(8)
            path.write_bytes(spoilt)
            reader = TeacherCache.open(tmp_path)
            with pytest.raises(ShardError, match=SHARDS[shard]):
                reader.verify()
            if place < header or place in index:
                with pytest.raises(ShardError, match=SHARDS[shard]):
                    TeacherCache.open(tmp_path)[sum(PLAN[:shard])]
            else:
                with contextlib.suppress(ShardError):
                    list(TeacherCache.open(tmp_path))
        path.write_bytes(whole)
    TeacherCache.open(tmp_path).verify()


def test_an_altered_offset_or_id_is_not_read(cache):
    reader = TeacherCache.open(cache)
    view = reader._view(1)
    raw = (cache / SHARDS[1]).read_bytes()
    spoilt = {"token_offsets": 1000, "tokens": 40, "list_ids": 40, "list_offsets": -1}
    for name, value in spoilt.items():
        array = view.arrays[name]
        at = raw.index(array.tobytes()) + array.itemsize
        changed = raw[:at] + value.to_bytes(array.itemsize, "little", signed=True)
        (cache / SHARDS[1]).write_bytes(changed + raw[len(changed) :])
        with pytest.raises(ShardError, match=SHARDS[1]):
            TeacherCache.open(cache)[1]


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_resuming_after_any_loss_gives_the_same_bytes(finished, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("resume") / "cache"
    shutil.copytree(finished, folder)
    harmed = data.draw(st.sets(st.sampled_from(SHARDS + RECEIPTS)))
    for name in sorted(harmed):
        path, size = folder / name, (folder / name).stat().st_size
        match data.draw(st.sampled_from(["delete", "tear", "zero", "temporary"])):
            case "delete":
                path.unlink()
            case "tear":
                os.truncate(path, data.draw(st.integers(0, size - 1)))
            case "zero":
                path.write_bytes(bytes(size))
            case "temporary":
                path.rename(folder / f".{name}.123.tmp")
    write_cache(folder, make_manifest(plan=PLAN))
    assert files_of(folder) == files_of(finished)
    assert TeacherCache.open(folder).digest() == TeacherCache.open(finished).digest()
    assert not list(folder.glob(".*.tmp"))


def test_a_receipt_without_its_last_byte_is_torn(cache, finished):
    """It is still JSON, but resuming has to give the same bytes."""
    os.truncate(cache / RECEIPTS[0], (cache / RECEIPTS[0]).stat().st_size - 1)
    with pytest.raises(ShardError, match=f"{RECEIPTS[0]}: its last byte is missing"):
        TeacherCache.open(cache)
    write_cache(cache, make_manifest(plan=PLAN))
    assert files_of(cache) == files_of(finished)


def rewrite(folder, change):
    """Shard 1 with changed arrays and a receipt of the right size and hash."""
    path = folder / SHARDS[1]
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    arrays = load_file(path)
    change(arrays)
    save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, path, metadata)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    edit_receipt(folder / RECEIPTS[1], bytes=path.stat().st_size, sha256=digest)


def replace(name, make):
    return lambda arrays: arrays.update({name: make(arrays.get(name))})


def put(name, index, value):
    def change(arrays):
        arrays[name][index] = value

    return change


UNFIT = {
    "absent": (lambda arrays: arrays.pop("sample"), "array 'sample' is missing or unknown"),
    "unknown": (replace("more", lambda _: np.zeros(1)), "array 'more' is missing or unknown"),
    "type": (replace("tokens", lambda a: a.astype(np.int64)), "array 'tokens' is int64"),
    "shape": (replace("tokens", lambda a: a[None]), r"array 'tokens' is int32 \[1, 18\]"),
    "mask": (replace("loss_mask", lambda a: a[1:]), "array 'loss_mask' has 17 entries"),
    "tails": (replace("tail_logprobs", lambda a: a[1:]), "array 'tail_logprobs' has 11"),
    "raw": (replace("rollout_logprobs_raw", lambda _: np.zeros(3, np.float32)), "raw' has 3"),
    "ids": (replace("list_ids", lambda a: a[1:]), "array 'list_ids' has 95 entries, expected 96"),
    "names": (put("prompt_id_offsets", 1, 99), "prompt_id_offsets do not divide"),
    "responses": (put("response_offsets", 0, 1), "response_offsets do not divide"),
    "lists": (put("list_offsets", 2, 95), "list_offsets do not divide 96 entries among 2"),
    "list lengths": (put("list_lengths", 0, 9), "list lengths of sequence 0 do not add up"),
    "reason": (put("finish_reason", 0, 2), "sequence 0 has an invalid length or finish reason"),
    "no prompt": (put("token_offsets", 1, 6), "sequence 0 has an invalid length"),
    "infinite": (put("list_logprobs", 3, -np.inf), "sequence 0 has a listed invalid log-prob"),
    "positive": (put("list_logprobs", 3, 0.5), "sequence 0 has a listed invalid log-prob"),
}


@pytest.mark.parametrize("change, message", UNFIT.values(), ids=UNFIT)
def test_arrays_that_do_not_fit_are_not_read(cache, change, message):
    rewrite(cache, change)
    with pytest.raises(ShardError, match=f"{SHARDS[1]}: .*{message}"):
        TeacherCache.open(cache)[1]
    with pytest.raises(ShardError, match=f"{SHARDS[1]}: .*{message}"):
        TeacherCache.open(cache).verify()


def test_another_recipe_is_refused_and_named(cache, finished):
    with pytest.raises(
        ConfigError, match=r"codec was 'exact', is 'packed'; top_p was 1\.0, is 0\.5\); restore"
    ):
        CacheWriter.create(cache, make_manifest(plan=PLAN, codec="packed", top_p=0.5))
    assert files_of(cache) == files_of(finished)


def test_resuming_keeps_the_manifest_and_ignores_paths_and_times(cache):
    before = (cache / "manifest.json").read_bytes()
    later = make_manifest(plan=PLAN, path="/moved", config={"out": "/elsewhere"})
    with CacheWriter.create(cache, damaged(later, created="2030-01-01")) as writer:
        assert writer.missing() == []
    assert (cache / "manifest.json").read_bytes() == before


def test_digest_follows_content_and_recipe_not_time(cache, finished, tmp_path):
    same = TeacherCache.open(finished).digest()
    assert TeacherCache.open(cache).digest() == same
    write_cache(tmp_path / "seed", make_manifest(plan=PLAN), seed=1)
    write_cache(tmp_path / "recipe", make_manifest(plan=PLAN, note="other"))
    digests = {TeacherCache.open(tmp_path / name).digest() for name in ("seed", "recipe")}
    assert len(digests | {same}) == 3


def test_shards_without_a_manifest_are_not_overwritten(cache):
    (cache / "manifest.json").unlink()
    with pytest.raises(ShardError, match=r"holds shard-00000\.json and no manifest\.json"):
        CacheWriter.create(cache, make_manifest(plan=PLAN))


def test_finish_names_what_is_missing(tmp_path):
    with CacheWriter.create(tmp_path, make_manifest(plan=PLAN)) as writer:
        writer.write(0, [make_pair(0)[:2]])
        with pytest.raises(ShardError, match="2 of 3 shards are missing, the first is 1"):
            writer.finish()


def test_incomplete_caches_open_only_when_asked(cache):
    (cache / RECEIPTS[0]).unlink()
    lenient = TeacherCache.open(cache, allow_incomplete=True)
    assert lenient.missing_shards == [0] and len(lenient) == 3
    assert lenient[0].rollout.prompt_id == "prompt-1"
    assert lenient.summary()["missing_shards"] == 1


def test_a_recipe_without_shards_is_replaced_by_another_of_its_kind(tmp_path):
    first, second = make_manifest(plan=PLAN, k=5), make_manifest(plan=PLAN)
    with CacheWriter.create(tmp_path, first):
        (tmp_path / "teacher_vocab.json").write_text("{}")
    with pytest.raises(ShardError, match="holds 'cache' of 'lopd test'; choose a new or empty"):
        RolloutWriter.create(tmp_path, make_manifest("rollouts", plan=PLAN))
    write_cache(tmp_path, second)
    assert not (tmp_path / "teacher_vocab.json").exists()
    assert TeacherCache.open(tmp_path).manifest.k == 8
    with pytest.raises(ConfigError, match=r"another recipe \(k was 8, is 5\)"):
        CacheWriter.create(tmp_path, first)
    assert TeacherCache.open(tmp_path).manifest.k == 8
