"""Several processes on one folder: which shards each writes, and that the bytes are the same."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers_cache import files_of, flip, make_manifest, make_pair, write_cache

from lopd.errors import ConfigError, ShardError
from lopd.store import CacheWriter, TeacherCache
from lopd.store.locks import FolderLock, ShardLock, start_lock
from lopd.store.workers import Worker, this_worker

COUNT = 12
MANIFEST = make_manifest(plan=[1] * COUNT)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    write_cache(folder, MANIFEST)
    return folder


def write_claims(writer, seen=None):
    for shard in writer.claims():
        writer.write(shard, [make_pair(shard)[:2]])
        if seen is not None:
            seen.append(shard)


def test_a_worker_is_named_by_flag_or_by_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert this_worker(None) == Worker() and Worker().is_single
    assert this_worker("2/3") == Worker(2, 3)
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert this_worker(None) == Worker(5, 8, 1)
    assert this_worker("0/2") == Worker(0, 2, 1)


@pytest.mark.parametrize("given", ["2/2", "1", "-1/2", "a/b", "0/0", ""])
def test_workers_that_do_not_exist(given):
    with pytest.raises(ConfigError, match="expected i/n with i from 0 to n - 1"):
        this_worker(given)


def test_torchrun_variables_that_are_wrong(monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="RANK/WORLD_SIZE: found '2/2'"):
        this_worker(None)
    monkeypatch.setenv("LOCAL_RANK", "x")
    with pytest.raises(ConfigError, match="LOCAL_RANK: found 'x'"):
        this_worker("0/2")


def test_every_shard_is_first_on_one_workers_list():
    orders = [Worker(i, 3).order(list(range(8))) for i in range(3)]
    assert orders[1] == [1, 4, 7, 2, 5, 0, 3, 6]
    assert [sorted(order) for order in orders] == [list(range(8))] * 3
    assert all(sum(Worker(i, 3).owns(shard) for i in range(3)) == 1 for shard in range(8))


def test_workers_share_a_folder_and_a_shard_is_one_workers(tmp_path, whole):
    first = CacheWriter.create(tmp_path, MANIFEST, worker=Worker(0, 2))
    second = CacheWriter.create(tmp_path, MANIFEST, worker=Worker(1, 2))
    ours, theirs = first.claims(), second.claims()
    assert (next(ours), next(theirs)) == (0, 1)
    with pytest.raises(ShardError, match="shard 1 is not claimed"):
        first.write(1, [make_pair(1)[:2]])
    first.write(0, [make_pair(0)[:2]])
    for shard in ours:
        assert shard != 1  # which the second holds
        first.write(shard, [make_pair(shard)[:2]])
    assert first.missing() == [1]
    assert first.finish() is False
    second.write(1, [make_pair(1)[:2]])
    assert list(theirs) == []
    assert second.finish() is True
    assert files_of(tmp_path) == files_of(whole)
    assert not list(tmp_path.glob(".shard-*"))


def test_a_shard_that_another_worker_released_is_claimed_in_the_next_round(tmp_path, whole):
    seen = []
    with CacheWriter.create(tmp_path, MANIFEST, worker=Worker(0, 2)) as writer:
        lock = ShardLock.take(tmp_path, 0)
        for shard in writer.claims():
            writer.write(shard, [make_pair(shard)[:2]])
            seen.append(shard)
            if len(seen) == COUNT - 1:
                lock.release()
        assert seen[-1] == 0 and writer.finish()
    assert files_of(tmp_path) == files_of(whole)


def test_finishing_names_a_shard_that_nobody_is_at(tmp_path):
    writer = CacheWriter.create(tmp_path, MANIFEST, worker=Worker(0, 2))
    with pytest.raises(ShardError, match="12 of 12 shards are missing, the first is 0"):
        writer.finish()
    claims = writer.claims()
    next(claims)
    claims.close()  # gives the shard back
    assert ShardLock.take(tmp_path, 0) is not None


def test_a_single_writer_and_workers_exclude_each_other(tmp_path):
    alone = CacheWriter.create(tmp_path, MANIFEST)
    with pytest.raises(ShardError, match="another process is writing there"):
        CacheWriter.create(tmp_path, MANIFEST, worker=Worker(0, 2))
    alone.close()
    worker = CacheWriter.create(tmp_path, MANIFEST, worker=Worker(0, 2))
    with pytest.raises(ShardError, match="another process is writing there.*--worker"):
        CacheWriter.create(tmp_path, MANIFEST)
    CacheWriter.create(tmp_path, MANIFEST, worker=Worker(1, 2)).close()
    worker.close()
    CacheWriter.create(tmp_path, MANIFEST).close()


def test_a_worker_with_another_recipe_is_refused_while_others_work(tmp_path):
    worker = CacheWriter.create(tmp_path, MANIFEST, worker=Worker(0, 2))
    other = make_manifest(plan=[1] * COUNT, k=4)
    with pytest.raises(ConfigError, match="holds another recipe"):
        CacheWriter.create(tmp_path, other, worker=Worker(1, 2))
    worker.close()


def test_only_a_single_active_worker_removes_files_of_killed_ones(tmp_path):
    first = CacheWriter.create(tmp_path, MANIFEST, worker=Worker(0, 2))
    left = tmp_path / ".shard-00003.safetensors.1.tmp"
    left.touch()
    CacheWriter.create(tmp_path, MANIFEST, worker=Worker(1, 2)).close()
    assert left.exists()  # it may be the first's
    first.close()
    CacheWriter.create(tmp_path, MANIFEST, worker=Worker(1, 2)).close()
    assert not left.exists()


def test_starting_waits_for_whoever_is_starting(tmp_path):
    started = []

    def start():
        CacheWriter.create(tmp_path, MANIFEST, worker=Worker(0, 2)).close()
        started.append(time.monotonic())

    with start_lock(tmp_path):
        thread = threading.Thread(target=start)
        thread.start()
        time.sleep(0.1)
        assert not started
    thread.join()
    assert started


def test_a_lock_file_that_its_owner_removed_meanwhile_is_no_lock(tmp_path, monkeypatch):
    """The second opens the file, the first removes and frees it: the second must not have it."""
    first = ShardLock.take(tmp_path, 0)
    real, raced = os.fstat, []

    def racing(descriptor):
        if not raced:
            raced.append((tmp_path / ".shard-00000.lock").unlink())
        return real(descriptor)

    assert first is not None
    first.release()
    monkeypatch.setattr("lopd.store.locks.os.fstat", racing)
    lock = ShardLock.take(tmp_path, 0)
    monkeypatch.undo()
    assert raced and lock is not None
    assert ShardLock.take(tmp_path, 0) is None
    lock.release()
    lock.release()
    assert ShardLock.take(tmp_path, 0) is not None


def test_a_sharing_writer_excludes_others_until_it_shares(tmp_path):
    first = FolderLock(tmp_path, shared=True)
    assert first.is_exclusive
    with pytest.raises(ShardError):
        FolderLock(tmp_path, shared=True)
    first.share()
    second = FolderLock(tmp_path, shared=True)
    assert not second.is_exclusive
    with pytest.raises(ShardError):
        FolderLock(tmp_path)


def test_an_altered_shard_is_redone_by_the_worker_whose_it_is(tmp_path, whole):
    folder = Path(shutil.copytree(whole, tmp_path / "cache"))
    flip(folder / "shard-00001.safetensors", -1)
    for index, redone in ((0, []), (1, [1])):
        seen = []
        with CacheWriter.create(folder, MANIFEST, worker=Worker(index, 2)) as writer:
            write_claims(writer, seen)
            assert writer.finish()
        assert seen == redone
    assert files_of(folder) == files_of(whole)


WORK = """
import sys
sys.path.insert(0, sys.argv[2])
from helpers_cache import make_manifest, make_pair
from lopd.store import CacheWriter
from lopd.store.workers import this_worker
records = [make_pair(i)[:2] for i in range(12)]
print("ready", flush=True)
sys.stdin.readline()
with CacheWriter.create(
    sys.argv[1], make_manifest(plan=[1] * 12), worker=this_worker(sys.argv[3])
) as writer:
    for shard in writer.claims():
        writer.write(shard, [records[shard]])
        print(shard, flush=True)
    print("all" if writer.finish() else "part", flush=True)
"""
ENV = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


def start_workers(folder, count):
    """Real processes, held at the door until all are there."""
    command = [sys.executable, "-c", WORK, folder, Path(__file__).parents[1]]
    processes = [
        subprocess.Popen(
            [*command, f"{i}/{count}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=ENV,
        )
        for i in range(count)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    return processes


@pytest.mark.parametrize("count", [2, 3])
def test_workers_write_what_one_writes(tmp_path, whole, count):
    processes = start_workers(tmp_path, count)
    outputs = [process.communicate()[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0] * count
    shards = [int(word) for output in outputs for word in output[:-1]]
    assert sorted(shards) == list(range(COUNT))  # each by exactly one of them
    assert "all" in [output[-1] for output in outputs]
    assert files_of(tmp_path) == files_of(whole)
    assert TeacherCache.open(tmp_path).digest() == TeacherCache.open(whole).digest()


def test_killed_workers_are_replaced_by_any_number(tmp_path, whole):
    rng = random.Random(0)
    for count in (2, 3, 2):
        processes = start_workers(tmp_path, count)
        time.sleep(rng.uniform(0.002, 0.02))
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.communicate()
    (last,) = start_workers(tmp_path, 1)
    assert last.communicate()[0].split()[-1] == "all"
    assert files_of(tmp_path) == files_of(whole)


def test_the_survivor_takes_over_what_a_killed_worker_left(tmp_path, whole):
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path, Path(__file__).parents[1]],
        stdout=subprocess.PIPE,
        text=True,
        env=ENV,
    )
    assert first.stdout.readline() == "0\n"
    with CacheWriter.create(tmp_path, MANIFEST, worker=Worker(1, 2)) as writer:
        write_claims(writer)
        assert writer.missing() == [0]
        first.send_signal(signal.SIGKILL)
        first.communicate()
        with pytest.raises(ShardError, match="1 of 12 shards are missing"):
            writer.finish()
        write_claims(writer)
        assert writer.finish()
    assert files_of(tmp_path) == files_of(whole)


HOLD = """
import sys, time
sys.path.insert(0, sys.argv[2])
from helpers_cache import make_manifest
from lopd.store import CacheWriter
from lopd.store.workers import Worker
writer = CacheWriter.create(sys.argv[1], make_manifest(plan=[1] * 12), worker=Worker(0, 2))
claims = writer.claims()
print(next(claims), flush=True)
time.sleep(3600)
"""
