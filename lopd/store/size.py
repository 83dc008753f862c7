"""The size of a cache and the scoring time, predicted from bounds and from a timed sample.

Bytes are measured by encoding with the codec of the cache: for the bounds, synthetic scores with
the shortest and the longest lists that the settings allow; for the sample, real scores.
"""

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from lopd.errors import ConfigError
from lopd.provenance import CacheManifest
from lopd.store import Rollout, RolloutStore, TeacherScores
from lopd.store.writer import encode_records

SAMPLE_SEQUENCES = 8
RECEIPT_BYTES = 1024  # and the mark in the shard's header


@dataclass(frozen=True)
class Work:
    """The part of a cache that is not scored yet."""

    shards: int
    sequences: int
    tokens: float  # a share of all tokens, as the sequences are of all sequences
    response_tokens: float


@dataclass(frozen=True)
class Size:
    """Bytes of a shard file, per response token and per shard."""

    per_token: float
    per_shard: float

    def of(self, work: Work) -> int:
        """Bytes of some work."""
        return math.ceil(self.per_token * work.response_tokens + self.per_shard * work.shards)


@dataclass(frozen=True)
class TimedSample:
    """What the scoring of a few sequences took, in time and in bytes."""

    sequences: int
    tokens: int
    seconds: float
    size: Size

    def seconds_for(self, work: Work) -> float:
        """Seconds that other work takes at this speed."""
        return self.seconds / self.tokens * work.tokens


def work_left(rollouts: RolloutStore, sizes: Sequence[int]) -> Work:
    """The work that some shards of a cache are.

    Args:
        sizes: how many of the rollouts each of the shards holds.
    """
    totals, sequences = rollouts.summary(), sum(sizes)
    share = sequences / totals["sequences"]
    tokens, responses = share * totals["tokens"], share * totals["response_tokens"]
    return Work(len(sizes), sequences, tokens, responses)


def sample(
    source: Sequence[Rollout] | RolloutStore, count: int = SAMPLE_SEQUENCES
) -> list[Rollout]:
    """Evenly spaced sequences of a store, or of a part of one."""
    positions = np.linspace(0, len(source) - 1, min(count, len(source)))
    return [source[int(i)] for i in positions]


def size_bounds(manifest: CacheManifest, sequences: Sequence[Rollout]) -> tuple[Size, Size]:
    """Sizes with the shortest and with the longest lists that the cache can have."""
    k, top_p = manifest.k, manifest.top_p
    shortest = 1 if top_p < 1 and not manifest.teacher_k else k
    bounds = (
        ((1 + top_p) / 2 if top_p < 1 else 1 / (k + 1), shortest),
        (0.9 * min(top_p, 1.0) / k, manifest.most_listed),
    )
    shorter, longer = (
        measure_size(manifest, [(s, _synthetic_scores(s, manifest, *bound)) for s in sequences])
        for bound in bounds
    )
    return shorter, longer


def measure_size(manifest: CacheManifest, records: Sequence[tuple[Rollout, TeacherScores]]) -> Size:
    """Encode the records as one shard of such a cache."""
    arrays, _ = encode_records(manifest, records)
    data = sum(values.nbytes for values in arrays.values())
    tokens = sum(len(rollout.rollout_logprobs) for rollout, _ in records)
    return Size(data / tokens, len(save(arrays)) - data + RECEIPT_BYTES)


def time_sample(
    manifest: CacheManifest,
    sequences: Sequence[Rollout],
    score: Callable[[Sequence[Rollout]], Sequence[TeacherScores]],
) -> TimedSample:
    """Score the sequences and time it; the first is scored once before, as a warm-up."""
    score(sequences[:1])
    start = time.perf_counter()
    scores = score(sequences)
    seconds = time.perf_counter() - start
    size = measure_size(manifest, list(zip(sequences, scores, strict=True)))
    return TimedSample(len(sequences), sum(len(s.tokens) for s in sequences), seconds, size)


def check_fits(out: str | Path, needed: int, basis: str) -> None:
    """Raise ConfigError if that many bytes do not fit on the disk of `out`."""
    free = free_bytes(out)
    if needed > free:
        raise ConfigError(
            f"{out}: what is left to score needs {format_bytes(needed)} ({basis}), the disk has "
            f"{format_bytes(free)} free; make room, choose another --out, or lower --k, --top-p, "
            "or take a smaller --codec"
        )


def free_bytes(out: str | Path) -> int:
    """Bytes that an unprivileged user may still write on the disk of `out`."""
    path = Path(out).absolute()
    return shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free


def format_bytes(count: float) -> str:
    """Bytes with a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def format_seconds(seconds: float) -> str:
    """Seconds, minutes or hours, in words."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _synthetic_scores(
    rollout: Rollout, manifest: CacheManifest, first: float, width: int
) -> TeacherScores:
    """Scores of the right shape, with ids spread over the vocabulary.

    Args:
        first: probability of the first id, and the largest of any other id.
        width: ids that are scored: the teacher's own, then others.
    """
    k, rows, length = manifest.teacher_k, manifest.vocab_size, len(rollout.rollout_logprobs)
    start = np.random.default_rng(0).integers(rows, size=(length, 1))
    ids = ((start + np.arange(width) * (rows // width)) % rows).astype(np.int32)
    probabilities = np.full(width, min(first, (1 - first) / (width + 1)))
    probabilities[0] = first
    logprobs = np.broadcast_to(np.log(probabilities), (length, width)).astype(np.float32)
    tail, rest = (
        np.full(length, math.log1p(-probabilities[:n].sum()), np.float32) for n in (k, width)
    )
    matches = ids == rollout.tokens[rollout.prompt_length :, None]
    sampled = np.where(matches.any(1), np.where(matches, logprobs, 0).sum(1), rest)
    has_entropy = manifest.scoring.entropy != "absent"
    entropy = np.full(length, 0.0 if has_entropy else np.nan, np.float32)
    return TeacherScores(
        sampled.astype(np.float32),
        entropy,
        ids[:, :k],
        logprobs[:, :k],
        tail,
        extra_ids=ids[:, k:],
        extra_logprobs=logprobs[:, k:],
        extra_tail_logprobs=rest,
    )
