"""How much of what a cache teaches is the numerics of the engine that scored it.

With q the stored distribution of a response token over its list and tail, and q' what the
same teacher gives now, KL(q' || q) is the loss that a perfect student would still have: the
noise floor. KL(p || q) of the student p on the same tokens and buckets is the signal. A cache
without lists, of sampled-token log-probs alone, has the sampled token for its list.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lopd.engines import load_engine
from lopd.engines.base import Engine
from lopd.engines.options import EngineOptions
from lopd.errors import ConfigError, ModelError, ProvenanceError
from lopd.provenance import CacheManifest, fingerprint_weights
from lopd.store import TeacherCache, TeacherScores, TeacherSequence
from lopd.store.codec import kl_terms


@dataclass(frozen=True)
class Noise:
    """KLs in nat per response token, over the same buckets."""

    sequences: int
    tokens: int
    noise: float
    signal: float
    coverage: float  # share of listed ids that both teachers list
    own_mean: float  # |difference| of the tokens' own log-probs
    own_largest: float
    same_student: bool

    @property
    def share(self) -> float:
        return self.noise / self.signal if self.signal > 0 else float("inf")

    def rows(self) -> dict[str, str]:
        """The measurement, in words."""
        student = "" if self.same_student else " (not the one that rolled out)"
        return {
            "rescored": f"{self.sequences} sequences, {self.tokens} response tokens",
            "buckets": f"{100 * self.coverage:.1f} % of the listed ids, and the rest as one",
            "own log-prob": f"differs by {self.own_mean:.3g} in the mean, {self.own_largest:.3g} "
            "at most",
            "teacher": f"{self.noise:.4g} nat/token, KL(teacher again || stored)",
            "student": f"{self.signal:.4g} nat/token, KL(student || stored){student}",
            "noise share": f"{self.share:.3g}",
        }


def measure_noise(
    path: str | Path,
    count: int,
    *,
    teacher: str | Path,
    student: str | Path,
    options: EngineOptions,
    tokens_per_batch: int,
    seed: int,
) -> Noise:
    """Score `count` sequences of a cache again with the teacher, and with the student.

    The student, for which no options but dtype and device are meant, runs in transformers.

    Raises:
        ProvenanceError: `teacher` is not the model that scored the cache.
        ConfigError: the mass outside the lists was lost before they were imported.
    """
    cache = TeacherCache.open(path, support="list")
    if cache.has_no_lists:
        cache = TeacherCache.open(path, support="list+sampled")
    manifest = cache.manifest
    if manifest.scoring.tail == "renormalized":
        raise ConfigError(
            f"{path}: its lists were renormalised before they were imported, so the teacher's own "
            "distribution is lost and there is nothing to compare with; score the rollouts again"
        )
    found, expected = fingerprint_weights(teacher), manifest.model.weights
    if found != expected:
        raise ProvenanceError(
            f"teacher: {teacher} has weights {found[:12]}, the cache was scored by "
            f"{expected[:12]}; name the model that scored it"
        )
    count = min(count, len(cache))
    chosen = np.sort(np.random.default_rng(seed).choice(len(cache), count, replace=False))
    items = [cache[int(i)] for i in chosen]
    settings: dict[str, Any] = {
        "dtype": options.dtype,
        "device": options.device,
        "tokens_per_batch": tokens_per_batch,
    }
    engine = load_engine(options.engine, teacher, options=options.options(), **settings)
    again = _score(engine, options.engine, items, manifest)
    del engine
    engine = load_engine("transformers", student, **settings)
    own = _score(engine, "transformers", items, manifest)
    policy = manifest.rollouts.model.weights
    return _compare(
        items, again, own, engine.vocab_size, same_student=fingerprint_weights(student) == policy
    )


def _score(
    engine: Engine, name: str, items: Sequence[TeacherSequence], manifest: CacheManifest
) -> list[TeacherScores]:
    """Scores at the stored ids where the engine can, at its own top-k else."""
    rows = engine.vocab_size
    k, stored = min(max(1, manifest.k), rows), None
    if name == "transformers":
        k, stored = 1, [np.where(item.topk_ids < rows, item.topk_ids, -1) for item in items]
    scores = engine.score(
        [item.rollout.tokens for item in items],
        [item.rollout.prompt_length for item in items],
        k,
        temperature=manifest.temperature,
        extra_ids=stored,
    )
    if len(scores) != len(items):
        raise ModelError(f"engine: {name} scored {len(scores)} of {len(items)} sequences")
    return scores


def _compare(
    items: Sequence[TeacherSequence],
    again: Sequence[TeacherScores],
    own: Sequence[TeacherScores],
    student_rows: int,
    *,
    same_student: bool,
) -> Noise:
    """Both KLs over the stored ids that teacher and student know, and the rest as one bucket."""
    noise: list[np.ndarray] = []
    signal: list[np.ndarray] = []
    gaps: list[np.ndarray] = []
    known = listed = 0
    for item, teacher, student in zip(items, again, own, strict=True):
        told, *_ = _candidates(teacher)
        shared = np.where(item.topk_ids < student_rows, item.topk_ids, -1)
        shared = np.where(_in(shared, told), shared, -1)
        stored = _fold(shared, item.topk_ids, item.topk_logprobs, item.tail_logprobs)
        noise.append(_bucket_kl(_fold(shared, *_candidates(teacher)), stored))
        signal.append(_bucket_kl(_fold(shared, *_candidates(student)), stored))
        gaps.append(np.abs(teacher.teacher_logprobs - item.teacher_logprobs))
        known, listed = known + int((shared >= 0).sum()), listed + int((item.topk_ids >= 0).sum())
    gap = np.concatenate(gaps)
    return Noise(
        sequences=len(items),
        tokens=len(gap),
        noise=float(np.concatenate(noise).mean()),
        signal=float(np.concatenate(signal).mean()),
        coverage=known / max(listed, 1),
        own_mean=float(gap.mean()),
        own_largest=float(gap.max()),
        same_student=same_student,
    )


_Lists = tuple[np.ndarray, np.ndarray, np.ndarray]  # ids [R, C], log-probs [R, C], tail [R]


def _candidates(scores: TeacherScores) -> _Lists:
    """Every id that scores tell of, once, and the log of the mass outside them."""
    ids, logprobs = scores.topk_ids, scores.topk_logprobs
    if scores.extra_ids is None or scores.extra_logprobs is None:
        return ids, logprobs, scores.tail_logprobs
    assert scores.extra_tail_logprobs is not None
    extra = np.where(_in(scores.extra_ids, ids), -1, scores.extra_ids)
    return (
        np.concatenate([ids, extra], axis=1),
        np.concatenate([logprobs, scores.extra_logprobs], axis=1),
        scores.extra_tail_logprobs,
    )


def _in(ids: np.ndarray, others: np.ndarray) -> np.ndarray:  # [R, K] bool of [R, K], [R, C]
    """Which ids (-1 never) a row's others hold."""
    held = np.zeros(ids.shape, bool)
    for column in others.T:
        held |= ids == column[:, None]
    return held & (ids >= 0)


def _fold(
    buckets: np.ndarray,  # [R, K] ids, -1 pads
    ids: np.ndarray,  # [R, C]
    logprobs: np.ndarray,  # [R, C]
    tail: np.ndarray,  # [R]
) -> np.ndarray:  # [R, K + 1] fp64
    """Log-probs of the buckets and, last, of all the others; -inf at pads."""
    result = np.full((len(buckets), buckets.shape[1] + 1), -np.inf)
    rest = tail.astype(np.float64)
    for column in range(ids.shape[1]):
        match = (buckets == ids[:, column, None]) & (buckets >= 0)
        value = logprobs[:, column].astype(np.float64)
        result[:, :-1] = np.where(match, value[:, None], result[:, :-1])
        lone = (ids[:, column] >= 0) & ~match.any(axis=1)
        rest = np.where(lone, np.logaddexp(rest, value), rest)
    result[:, -1] = rest
    return result


def _bucket_kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:  # [R] of [R, B] log-probs
    """KL over the buckets, not negative where a mass is not quite 1."""
    return kl_terms(p, q).sum(axis=1)
