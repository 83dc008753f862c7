"""Large caches: peak memory, open files and correctness at 10^7 tokens, and at 5,000 shards.

`measure` writes a cache and reads it in a process of its own, which imports neither torch nor
transformers.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from helpers_cache import make_manifest, make_pair
from torture.pipeline import clear
from torture.table import Table

from lopd.store import CacheWriter, Rollout, TeacherScores

LIMIT_MIB = 300
OPEN_FILES = 1024  # the usual limit of a process; a reader keeps a quarter of it mapped
MAX_FILES = OPEN_FILES // 4 + 10
VOCAB, K = 512, 10

READ = """
import json, os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[3]), int(sys.argv[3])))
import numpy as np
from lopd.store import TeacherCache

peak_files = 0
def look():
    global peak_files
    peak_files = max(peak_files, len(os.listdir("/proc/self/fd")))

def peak_mib():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024

cache = TeacherCache.open(sys.argv[1])
start = peak_mib()
cache.verify()
after_verify = peak_mib()
summary, details = cache.summary(), cache.details()
order = np.random.default_rng(0).permutation(len(cache))[: int(sys.argv[2])]
tokens = 0
for number, index in enumerate(order.tolist()):
    item = cache[index]
    assert item.rollout.sample == index, (item.rollout.sample, index)
    tokens += len(item.teacher_logprobs)
    if number % 50 == 0:
        look()
status = open("/proc/self/status").read()
print(json.dumps({
    "tokens": summary["response_tokens"], "bytes": summary["bytes"], "read": tokens,
    "opened_mib": start, "verified_mib": after_verify,
    "private_mib": int(status.split("RssAnon:")[1].split()[0]) / 1024, "files": peak_files,
}))
"""


@dataclass(frozen=True)
class Size:
    """Shards, sequences in each, and response tokens of each sequence."""

    shards: int
    sequences: int
    length: int

    def __str__(self) -> str:
        tokens = self.shards * self.sequences * self.length
        return f"{tokens:,} tokens in {self.shards:,} shards"


WHOLE = (Size(200, 50, 1000), Size(5000, 1, 20), Size(1, 1, 131_072))
SLICE = (Size(10, 20, 500), Size(400, 1, 20), Size(1, 1, 16_384))


def measure(folder: Path, size: Size, reads: int = 2000) -> dict[str, float]:
    """Write a cache of this size, read `reads` sequences in random order, and remove it."""
    clear(folder)
    rollout, scores, _ = make_pair(0, vocab_size=VOCAB, k=K, length=size.length)
    manifest = make_manifest(
        plan=[size.sequences] * size.shards, vocab_size=VOCAB, k=K, codec="exact"
    )
    with CacheWriter.create(folder, manifest) as writer:
        for shard in range(size.shards):
            first = shard * size.sequences
            writer.write(shard, _records(rollout, scores, range(first, first + size.sequences)))
        writer.finish()
    command = [sys.executable, "-c", READ, os.fspath(folder), str(reads), str(OPEN_FILES)]
    done = subprocess.run(command, capture_output=True, text=True)
    clear(folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _records(
    rollout: Rollout, scores: TeacherScores, numbers: Sequence[int]
) -> list[tuple[Rollout, TeacherScores]]:
    return [(dataclasses.replace(rollout, sample=number), scores) for number in numbers]


def measure_all(root: Path, table: Table, sizes: Sequence[Size]) -> list[tuple[Size, dict]]:
    """Measure caches of these sizes.

    Opening and verifying must stay below the limit, and so must the private memory in the end.
    Pages that random reads have mapped belong to the page cache, and the system may drop them.
    """
    found = []
    for size in sizes:
        row = measure(root / "load", size)
        problem = ""
        if max(row["verified_mib"], row["private_mib"]) > LIMIT_MIB:
            problem = f"{row['verified_mib']:.0f} MiB, {row['private_mib']:.0f} MiB private"
        elif row["files"] > MAX_FILES:
            problem = f"{row['files']} open files"
        elif row["read"] != min(2000, size.shards * size.sequences) * size.length:
            problem = f"read {row['read']} tokens"
        table.add("load", str(size), problem)
        found.append((size, row))
    return found


def markdown(rows: Sequence[tuple[Size, dict]]) -> str:
    """The measurements as a table."""
    head = ["cache", "size", "opened and verified", "private after reading", "open files"]
    lines = [f"| {' | '.join(head)} |", "| --- | ---: | ---: | ---: | ---: |"]
    for size, row in rows:
        lines.append(
            f"| {size} | {row['bytes'] / 2**20:,.0f} MiB | {row['verified_mib']:,.0f} MiB "
            f"| {row['private_mib']:,.0f} MiB | {row['files']} |"
        )
    return "\n".join(lines)
