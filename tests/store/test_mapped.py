"""Reading is mapped: no private memory, few file descriptors, and a file that changes is named."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers_cache import SHARDS, edit_receipt, make_manifest, make_pair, write_cache
from safetensors.numpy import save_file

from lopd.errors import ShardError
from lopd.provenance.io import sha256_file
from lopd.store import CacheWriter, TeacherCache
from lopd.store import reader as readers
from lopd.store.mapped import MappedFile

LENGTH, COUNT, K = 4000, 20, 64  # 80,000 response tokens, 42 MB

# Reads every list of the cache argv[1] and prints kB: private memory gained, the file's resident
# pages, those of them that are private copies, and what stays mapped when all has been read.
READ_ALL = """
import sys
import numpy as np
from lopd.store import TeacherCache

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

def of_file(key):
    total, inside = 0, False
    for line in open("/proc/self/smaps"):
        if "-" in line.split()[0]:
            inside = line.rstrip().endswith(".safetensors")
        elif inside and line.startswith(key + ":"):
            total += int(line.split()[1])
    return total

cache = TeacherCache.open(sys.argv[1], support="list")
cache[0]
before = anonymous()
total = 0.0
for part in cache.chunks():
    total += float(part.lists.logprobs.sum()) + int(part.lists.ids.max())
    resident = of_file("Rss")
    copied = of_file("Private_Dirty") + of_file("Anonymous")
assert total < 0
print(anonymous() - before, resident, copied, of_file("Rss"))
del part
print(of_file("Rss"))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    rollout, scores, _ = make_pair(0, vocab_size=128, k=K, length=LENGTH)
    records = []
    for sample in range(COUNT):
        copy = type(rollout)(**{**vars(rollout), "sample": sample})
        records.append((copy, scores))
    with CacheWriter.create(folder, make_manifest(plan=[COUNT], vocab_size=128, k=K)) as writer:
        writer.write(0, records)
        writer.finish()
    return folder


def test_reading_takes_no_private_memory(large):
    size = (large / SHARDS[0]).stat().st_size
    assert size > 40e6
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL, large],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    gained, resident, copied, _, left = map(int, done.stdout.split())
    assert resident * 1024 > 0.9 * size  # the pages that were read belong to the page cache
    assert copied == 0
    assert gained * 1024 < 0.25 * size  # temporaries of a few thousand tokens
    assert left == 0


def open_files(folder):
    links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
    targets = [os.readlink(link) for link in links if link.is_symlink()]
    return sum(target.startswith(str(folder)) for target in targets)


def test_few_shards_are_open_at_a_time_and_order_does_not_matter(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "most_mapped", lambda: 4)
    count = 24
    write_cache(tmp_path, make_manifest(plan=[1] * count))
    cache = TeacherCache.open(tmp_path)
    whole = [cache[i].teacher_logprobs for i in range(count)]
    assert open_files(tmp_path) == 4
    for index in np.random.default_rng(0).permutation(count).tolist() * 2:
        assert np.array_equal(cache[index].teacher_logprobs, whole[index])
    assert open_files(tmp_path) == 4
    for _ in cache:
        assert open_files(tmp_path) <= 5
    assert open_files(tmp_path) == 0


def test_arrays_outlive_their_mapping(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "most_mapped", lambda: 1)
    write_cache(tmp_path, make_manifest(plan=[1, 1]))
    cache = TeacherCache.open(tmp_path)
    first, second = (part.lists for part in cache.chunks())
    assert not first.ids.flags.writeable and not second.ids.flags.writeable
    assert np.array_equal(first.ids, make_pair(0)[1].topk_ids.ravel())


def test_a_shard_that_is_replaced_while_it_is_read_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "most_mapped", lambda: 1)
    write_cache(tmp_path, make_manifest(plan=[1, 1]))
    cache = TeacherCache.open(tmp_path)
    cache[0], cache[1]
    data = (tmp_path / SHARDS[0]).read_bytes()
    (tmp_path / "new").write_bytes(data)
    os.replace(tmp_path / "new", tmp_path / SHARDS[0])
    with pytest.raises(ShardError, match=f"{SHARDS[0]}: was replaced or altered while it was read"):
        cache[0]


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3", "C64", "X9"])
def test_an_exotic_type_is_named(tmp_path, dtype):
    write_cache(tmp_path, make_manifest(plan=[1, 1]))
    path = tmp_path / SHARDS[1]
    old, new = b'"dtype":"F32"', b'"dtype":"%s"' % dtype.encode()
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].replace(old, new).rstrip()
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
    edit_receipt(tmp_path / "shard-00001.json", bytes=path.stat().st_size, sha256=sha256_file(path))
    with pytest.raises(ShardError, match=f"{SHARDS[1]}: .*run the stage again") as caught:
        TeacherCache.open(tmp_path)[1]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\xff" * 40, b"\x08" + bytes(15)])
def test_bytes_that_are_no_safetensors_file_are_named(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ShardError, match=r"x.safetensors: truncated or altered \("):
        MappedFile(tmp_path / "x.safetensors")


def test_empty_and_boolean_arrays_are_mapped(tmp_path):
    arrays = {"none": np.zeros(0, np.float16), "flags": np.array([True, False, True])}
    save_file(arrays, tmp_path / "x.safetensors")
    found = MappedFile(tmp_path / "x.safetensors").arrays()
    assert found.keys() == arrays.keys()
    for name, values in arrays.items():
        assert found[name].dtype == values.dtype and np.array_equal(found[name], values)


def test_a_reader_takes_a_quarter_of_the_files_that_a_process_may_open(monkeypatch):
    for limit, expected in ((1024, 256), (2, 1), (1 << 20, 4096), (resource.RLIM_INFINITY, 4096)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        assert readers.most_mapped() == expected
