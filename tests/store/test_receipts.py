"""Receipts: no total can be altered unnoticed, wrong types are named, and older ones are read."""

import json
import shutil
from pathlib import Path

import pytest
from helpers_cache import (
    RECEIPTS,
    edit_receipt,
    files_of,
    make_manifest,
    make_pair,
    write_cache,
    write_rollouts,
)

from lopd.errors import ShardError
from lopd.provenance.io import pretty_json
from lopd.store import CacheWriter, RolloutStore, TeacherCache
from lopd.store.receipts import SCHEMAS

PLAN = (1, 2, 1)
OLDER = Path(__file__).parent / "schema1"  # written before receipts had a digest


@pytest.fixture
def cache(tmp_path):
    write_cache(tmp_path / "cache", make_manifest(plan=PLAN))
    return tmp_path / "cache"


def test_every_number_and_digest_of_a_receipt_is_bound(cache):
    path = cache / RECEIPTS[1]
    whole = json.loads(path.read_text())
    changes = {name: value + 1 for name, value in whole.items() if isinstance(value, int | float)}
    changes |= {name: "0" * 64 for name, value in whole.items() if isinstance(value, str)}
    changes["finish_reasons"] = {"stop": 2, "length": 0}
    assert changes.keys() == whole.keys()
    for name, value in changes.items():
        path.write_bytes(pretty_json(whole | {name: value}))
        with pytest.raises(ShardError, match=f"{path.name}: "):
            TeacherCache.open(cache)


@pytest.mark.parametrize("name", ["covered_mass", "entropy", "floored_tails", "codec_error"])
def test_totals_with_a_new_digest_differ_from_the_shard(cache, name):
    """No array shows these without decoding it, so the header of the shard repeats a digest."""
    edit_receipt(cache / RECEIPTS[1], **{name: 7})
    reader = TeacherCache.open(cache)
    with pytest.raises(ShardError, match="its counts are not those of .*shard-00001.json"):
        reader[1]
    edit_receipt(cache / RECEIPTS[1], schema=1)
    path = cache / RECEIPTS[1]
    content = json.loads(path.read_text())
    del content["digest"]
    path.write_bytes(pretty_json(content))
    with pytest.raises(ShardError, match="its counts are not those of .*shard-00001.json"):
        TeacherCache.open(cache)[1]


WRONG = {
    "tokens": "18",
    "shard": 1.0,
    "sequences": 2.0,
    "bytes": None,
    "sha256": 7,
    "finish_reasons": {"stop": 1},
    "response_tokens": True,
    "list_entries": -1,
    "covered_mass": [],
    "entropy": "low",
    "index_sha256": {},
}


@pytest.mark.parametrize("name, value", WRONG.items(), ids=WRONG)
def test_a_wrong_type_is_named(cache, name, value):
    edit_receipt(cache / RECEIPTS[1], **{name: value})
    with pytest.raises(ShardError, match=f"{RECEIPTS[1]}: '{name}' is") as caught:
        TeacherCache.open(cache)
    assert "\n" not in str(caught.value)
    assert TeacherCache.open(cache, allow_incomplete=True).missing_shards == [1]


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "{", "NaN\n", '{"schema": NaN}\n', "7\n", '"x"\n', "{}\n", "\xff\n"]
)
def test_text_that_is_no_receipt_is_named(cache, text):
    (cache / RECEIPTS[1]).write_text(text, encoding="latin-1")
    with pytest.raises(ShardError, match=f"{RECEIPTS[1]}: "):
        TeacherCache.open(cache)


def test_a_receipt_of_another_run_says_what_helps(cache, tmp_path):
    other, whole = tmp_path / "other", files_of(cache)
    write_cache(other, make_manifest(plan=PLAN, top_p=0.5))
    shutil.copy(other / RECEIPTS[1], cache / RECEIPTS[1])
    with pytest.raises(ShardError, match="of another run; run the stage again to redo the shard"):
        TeacherCache.open(cache)
    with pytest.raises(
        ShardError, match="1 of 3 shards are unfinished or damaged; the first is .*of a"
    ):
        TeacherCache.open(cache, allow_incomplete=True).check_complete()
    write_cache(cache, make_manifest(plan=PLAN))
    assert files_of(cache) == whole


def test_older_receipts_are_read_continued_and_counted(tmp_path):
    assert SCHEMAS == (1, 2)
    for folder in OLDER.iterdir():
        shutil.copytree(folder, tmp_path / folder.name)
    rollouts, cache = (
        RolloutStore.open(tmp_path / "rollouts"),
        TeacherCache.open(tmp_path / "cache"),
    )
    rollouts.verify()
    cache.verify()
    assert rollouts.summary()["response_tokens"] == 18
    assert cache[2].rollout.prompt_id == "prompt-2"
    manifest = make_manifest("rollouts", plan=[1, 2])
    before = files_of(tmp_path / "rollouts")
    (tmp_path / "rollouts" / RECEIPTS[1]).unlink()
    write_rollouts(tmp_path / "rollouts", manifest)
    RolloutStore.open(tmp_path / "rollouts").verify()
    after = files_of(tmp_path / "rollouts")
    assert after[RECEIPTS[0]] == before[RECEIPTS[0]]
    assert json.loads(after[RECEIPTS[1]])["schema"] == 2


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("tokens", 5, "token counts"),
        ("finish_reasons", {"stop": 0, "length": 2}, "finish reasons"),
        ("list_entries", 5, "counts of list entries"),
    ],
)
def test_counts_of_an_older_receipt_are_compared_with_the_arrays(tmp_path, name, value, message):
    shutil.copytree(OLDER / "cache", tmp_path / "cache")
    path = tmp_path / "cache" / RECEIPTS[1]
    path.write_bytes(pretty_json(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(ShardError, match=f"shard-00001.safetensors: {message} .*differ from"):
        TeacherCache.open(tmp_path / "cache")[1]


def test_an_older_receipt_without_the_error_says_so(tmp_path):
    shutil.copytree(OLDER / "cache", tmp_path / "cache")
    path = tmp_path / "cache" / RECEIPTS[1]
    content = json.loads(path.read_text())
    del content["codec_error"], content["index_sha256"]
    path.write_bytes(pretty_json(content))
    cache = TeacherCache.open(tmp_path / "cache")
    cache.verify()
    assert cache.summary()["codec_error"] is None


@pytest.mark.parametrize("codec", ["exact", "packed", "compact"])
def test_the_count_of_list_entries_is_that_of_the_lists(tmp_path, codec):
    write_cache(tmp_path, make_manifest(plan=PLAN, codec=codec, top_p=0.7))
    cache = TeacherCache.open(tmp_path)
    entries = sum(len(part.lists.ids) for part in cache.chunks())
    assert sum(json.loads((tmp_path / r).read_text())["list_entries"] for r in RECEIPTS) == entries


def test_a_missing_receipt_of_an_unfinished_run_is_not_called_damaged(tmp_path):
    with CacheWriter.create(tmp_path, make_manifest(plan=PLAN)) as writer:
        writer.write(0, [make_pair(0)[:2]])
    with pytest.raises(ShardError, match="2 of 3 .*the shard and its receipt is missing; run"):
        TeacherCache.open(tmp_path, allow_incomplete=True).check_complete()
