"""Locks, full disks, killed writers: finished shards stay, and resuming gives the same bytes."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from helpers_cache import RECEIPTS, SHARDS, files_of, flip, make_manifest, make_pair, write_cache
from helpers_disk import Disk

from lopd.errors import ConfigError, ShardError
from lopd.provenance import io as files
from lopd.store import CacheWriter, TeacherCache, shards

pytestmark = pytest.mark.thorough

PLAN = (1, 2, 1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    write_cache(folder, make_manifest(plan=PLAN))
    return folder


@pytest.fixture
def cache(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "cache"))


def test_one_writer_at_a_time(tmp_path):
    manifest = make_manifest(plan=PLAN)
    first = CacheWriter.create(tmp_path, manifest)
    with pytest.raises(ShardError, match="another process is writing there"):
        CacheWriter.create(tmp_path, manifest)
    first.close()
    second = CacheWriter.create(tmp_path, manifest)
    del second
    CacheWriter.create(tmp_path, manifest).close()


@contextlib.contextmanager
def without_privileges():
    """As a user whom permissions bind; root is bound by none."""
    former = os.geteuid()
    if former == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(former)


def test_a_read_only_folder_is_named_and_left_as_it_is(finished):
    with tempfile.TemporaryDirectory() as outer:  # the parents of tmp_path are closed to others
        os.chmod(outer, 0o755)
        folder = Path(shutil.copytree(finished, Path(outer, "cache")))
        (folder / RECEIPTS[1]).unlink()
        for path in (*folder.iterdir(), folder):
            path.chmod(0o555 if path.is_dir() else 0o444)
        before = files_of(folder)
        with without_privileges():
            for target in (folder, folder / "new"):
                with pytest.raises(ShardError, match="cannot be"):
                    CacheWriter.create(target, make_manifest(plan=PLAN))
            assert TeacherCache.open(folder, allow_incomplete=True).missing_shards == [1]
        assert files_of(folder) == before


def test_a_disk_that_is_really_full_loses_nothing(tmp_path, finished):
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", mount]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    try:
        folder = mount / "cache"
        ballast = mount / "ballast"
        with CacheWriter.create(folder, make_manifest(plan=PLAN)) as writer:
            writer.write(0, [make_pair(0)[:2]])
            with contextlib.suppress(OSError):
                ballast.write_bytes(bytes(65536))
            with pytest.raises(ShardError, match=r"not written \(No space left on device\)"):
                writer.write(1, [make_pair(1)[:2], make_pair(2)[:2]])
            assert writer.missing() == [1, 2]
        ballast.unlink()
        write_cache(folder, make_manifest(plan=PLAN))
        assert files_of(folder) == files_of(finished)
    finally:
        subprocess.run(["umount", mount], check=True)


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ShardError, match="file is a file; choose another"):
        CacheWriter.create(tmp_path / "file", make_manifest(plan=PLAN))


def test_a_failed_start_gives_the_folder_back(cache):
    with pytest.raises(ConfigError) as caught:
        CacheWriter.create(cache, make_manifest(plan=PLAN, k=4))
    assert caught.value.__traceback__ is not None  # whose frames keep the lock alive
    CacheWriter.create(cache, make_manifest(plan=PLAN)).close()


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
@pytest.mark.parametrize("failing", [SHARDS[1], RECEIPTS[1]])
def test_a_full_disk_leaves_finished_shards(tmp_path, finished, monkeypatch, call, failing):
    manifest = make_manifest(plan=PLAN)
    writer = CacheWriter.create(tmp_path, manifest)
    writer.write(0, [make_pair(0)[:2]])
    current = []
    real_open, real_call = os.open, getattr(os, call)

    def remember(path, *args, **kwargs):
        current.append(Path(path).name)
        return real_open(path, *args, **kwargs)

    def full(*args):
        if current[-1].startswith(f".{failing}"):
            raise OSError(28, "No space left on device")
        return real_call(*args)

    monkeypatch.setattr(files.os, "open", remember)
    monkeypatch.setattr(files.os, call, full)
    with pytest.raises(ShardError, match=rf"{failing}: not written \(No space left on device\)"):
        writer.write(1, [make_pair(1)[:2], make_pair(2)[:2]])
    monkeypatch.undo()
    assert writer.missing() == [1, 2]
    assert not list(tmp_path.glob(".*.tmp"))
    writer.close()
    write_cache(tmp_path, manifest)
    assert files_of(tmp_path) == files_of(finished)


def test_bytes_are_durable_before_they_are_named_and_data_before_receipt(cache, monkeypatch):
    flip(cache / SHARDS[0], -1)
    writer = CacheWriter.create(cache, make_manifest(plan=PLAN))
    events, names = [], {}
    real = {name: getattr(os, name) for name in ("open", "fsync", "replace")}

    def opened(path, *args, **kwargs):
        descriptor = real["open"](path, *args, **kwargs)
        names[descriptor] = Path(path).name
        return descriptor

    def synced(descriptor):
        events.append(("sync", names[descriptor].split(".safetensors.")[0].split(".json.")[0]))
        real["fsync"](descriptor)

    def replaced(source, target):
        events.append(("rename", Path(target).name))
        assert not (cache / RECEIPTS[0]).exists()
        real["replace"](source, target)

    monkeypatch.setattr(files.os, "open", opened)
    monkeypatch.setattr(files.os, "fsync", synced)
    monkeypatch.setattr(files.os, "replace", replaced)
    writer.write(0, [make_pair(0)[:2]])
    monkeypatch.undo()
    assert events == [
        ("sync", cache.name),
        ("sync", ".shard-00000"),
        ("rename", SHARDS[0]),
        ("sync", cache.name),
        ("sync", ".shard-00000"),
        ("rename", RECEIPTS[0]),
        ("sync", cache.name),
    ]
    assert writer.missing() == []


FILE_LIMIT = """
import resource, sys
sys.path.insert(0, sys.argv[2])
from helpers_cache import make_manifest, make_pair
from lopd.store import CacheWriter
from lopd.errors import ShardError
writer = CacheWriter.create(sys.argv[1], make_manifest(plan=[1, 1]))
writer.write(0, [make_pair(0)[:2]])
resource.setrlimit(resource.RLIMIT_FSIZE, (2500, 2500))
try:
    writer.write(1, [make_pair(1, length=200)[:2]])
except ShardError as error:
    print(error)
print(writer.missing())
"""


def test_errors_of_the_file_system_are_reported(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FILE_LIMIT, tmp_path, Path(__file__).parents[1]],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    error, missing = done.stdout.splitlines()
    assert f"{SHARDS[1]}: not written (File too large)" in error
    assert missing == "[1]"


WRITE_FOREVER = """
import sys
sys.path.insert(0, sys.argv[2])
from helpers_cache import make_manifest, make_pair
from lopd.store import CacheWriter
records = [make_pair(i)[:2] for i in range(12)]
with CacheWriter.create(sys.argv[1], make_manifest(plan=[1] * 12)) as writer:
    print("ready", flush=True)
    for shard in writer.missing():
        writer.write(shard, [records[shard]])
"""


def test_killed_writers_lose_nothing_that_was_finished(tmp_path):
    manifest = make_manifest(plan=[1] * 12)
    write_cache(tmp_path / "whole", manifest)
    folder, rng = tmp_path / "killed", random.Random(0)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", WRITE_FOREVER, folder, Path(__file__).parents[1]]
    for _ in range(10):
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=env) as process:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            time.sleep(rng.uniform(0, 0.012))
            process.send_signal(signal.SIGKILL)
        with CacheWriter.create(folder, manifest) as writer:
            done = sorted(set(range(12)) - set(writer.missing()))
        for shard in done:
            name = SHARDS[0].replace("00000", f"{shard:05d}")
            assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    write_cache(folder, manifest)
    assert files_of(folder) == files_of(tmp_path / "whole")
    assert TeacherCache.open(folder).digest() == TeacherCache.open(tmp_path / "whole").digest()


def test_a_power_cut_leaves_no_receipt_without_its_shard(tmp_path, monkeypatch):
    disk = Disk(tmp_path, monkeypatch)
    folder = tmp_path / "new" / "cache"
    write_cache(folder, make_manifest(plan=PLAN))
    flip(folder / SHARDS[1], -1)
    write_cache(folder, make_manifest(plan=PLAN))
    disk.check_everything()
    assert disk.faults == []


@pytest.mark.parametrize("lost", ["the file", "the folder"])
def test_the_disk_notices_a_sync_that_is_missing(tmp_path, monkeypatch, lost):
    disk = Disk(tmp_path, monkeypatch)
    if lost == "the folder":
        for module in (files, shards):
            monkeypatch.setattr(module, "sync_folder", lambda folder: None)
    else:
        monkeypatch.setattr(files.os, "fsync", lambda descriptor: None)
    write_cache(tmp_path / "cache", make_manifest(plan=PLAN))
    assert f"{RECEIPTS[0]} is named" in "; ".join(disk.faults)
