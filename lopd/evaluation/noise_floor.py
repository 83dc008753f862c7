"""The noise floor of a cache: how far the teacher, run again, is from its stored distributions.

For each token with loss, q is the stored distribution over its list and tail, q' the same
teacher's when it is run again, perhaps with another engine, dtype or batch size. KL(q' || q) is
the loss that a perfect student would still have: the noise. KL(p || q) of the student p on the
same tokens and buckets is the signal. In a cache without lists, which has only the log-probs of
the sampled tokens, the sampled token takes the place of the list.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lopd.config.inference import EngineOptions
from lopd.engines import free_memory, load_engine
from lopd.engines.base import Engine
from lopd.errors import ConfigError, DataError, ModelError, ProvenanceError
from lopd.provenance import CacheManifest, fingerprint_weights
from lopd.provenance.teachers import records_of
from lopd.store import Rollout, TeacherCache, TeacherScores, TeacherSequence
from lopd.store.codec import kl_terms


@dataclass(frozen=True)
class NoiseFloor:
    """Noise and signal, both KLs in nats per token with loss over the same buckets."""

    sequences: int
    tokens: int
    noise: float  # KL(rescored teacher || stored)
    signal: float  # KL(student || stored)
    coverage: float  # share of the listed ids that have a bucket of their own
    mean_gap: float  # of these tokens' log-probs, |rescored - stored|
    largest_gap: float
    same_student: bool  # whether the student is the model that made the rollouts

    @property
    def noise_share(self) -> float:
        """Noise relative to the signal."""
        return self.noise / self.signal if self.signal > 0 else float("inf")


def scorers_of(
    path: str | Path, teacher: str | Mapping[str, str], manifest: CacheManifest
) -> dict[str | None, str]:
    """The folders of the models that scored a cache that can be rescored: by name, or under None.

    Args:
        teacher: a folder, NAME=PATH, or folders by name.

    Raises:
        ProvenanceError: a folder does not hold the model that scored the cache.
        ConfigError: the names are not those of the cache; its lists were renormalised, so the mass
            outside them is unknown; or its log-probs are calibrated.
    """
    if manifest.scoring.tail == "renormalized":
        raise ConfigError(
            f"{path}: its lists were renormalised before they were imported, so the teacher's own "
            "distribution is lost and there is nothing to compare with; score the rollouts again"
        )
    if manifest.scoring.is_calibrated:
        raise ConfigError(
            f"{path}: its log-probs are calibrated, so they differ from the teacher's on purpose; "
            "rescore the cache that was calibrated"
        )
    expected = manifest.models
    named: dict[str | None, str] = {None: teacher} if isinstance(teacher, str) else {}
    if isinstance(teacher, Mapping):
        named.update(teacher.items())
    elif None not in expected:
        name, _, one = str(teacher).partition("=")
        named = {name: one}
    if named.keys() != expected.keys():
        names = [name for name in expected if name is not None]
        wanted = " ".join(f"--teacher {name}=PATH" for name in names) or "one --teacher PATH"
        raise ConfigError(f"teacher: {path} was scored by {manifest.model.path}; expected {wanted}")
    for known, folder in named.items():
        if (found := fingerprint_weights(folder)) != expected[known].weights:
            raise ProvenanceError(
                f"teacher: {folder} has weights {found[:12]}, {records_of(known) or 'the cache '}"
                f"{'were' if known else 'was'} scored by {expected[known].weights[:12]}; name the "
                f"model that scored {'them' if known else 'it'}"
            )
    return named


def measure_noise_floor(
    path: str | Path,
    count: int,
    *,
    teachers: Mapping[str | None, str],
    student: str | Path,
    options: EngineOptions,
    tokens_per_batch: int,
    seen_by_teacher: Callable[[Rollout], Rollout] = lambda rollout: rollout,
    seed: int,
) -> NoiseFloor:
    """Rescore sequences of a cache with the teacher and with the student.

    Args:
        count: number of sequences; at most all of them.
        teachers: folders of the models that scored the cache, from `scorers_of`.
        options: engine of the teacher. The student runs in transformers and shares only its
            dtype and device.
        seen_by_teacher: the sequence that the teacher reads for a rollout.
        seed: of the choice of sequences.

    Raises:
        ModelError: the engine did not score all sequences. DataError: no token of them bears loss.
    """
    cache = TeacherCache.open(path, support="list")
    if cache.has_no_lists:
        cache = TeacherCache.open(path, support="list+sampled")
    manifest = cache.manifest
    count = min(count, len(cache))
    chosen = np.sort(np.random.default_rng(seed).choice(len(cache), count, replace=False))
    items = [cache[int(i)] for i in chosen]
    settings: dict[str, Any] = {
        "dtype": options.dtype,
        "device": options.device,
        "tokens_per_batch": tokens_per_batch,
    }
    scores: dict[int, TeacherScores] = {}
    for name, folder in teachers.items():
        own = [i for i, item in enumerate(items) if item.teacher_id == name]
        if own:
            engine = load_engine(options.engine, folder, options=options.options(), **settings)
            mine = [items[i] for i in own]
            found = _score(engine, options.engine, mine, manifest, seen_by_teacher)
            scores.update(zip(own, found, strict=True))
            del engine  # before the next model takes its memory
            free_memory()
    teacher_scores = [scores[i] for i in range(len(items))]
    engine = load_engine("transformers", student, **settings)
    student_scores = _score(engine, "transformers", items, manifest, lambda rollout: rollout)
    same_student = fingerprint_weights(student) == manifest.rollouts.model.weights
    merged = manifest.scoring.eos_class
    return _compare(items, teacher_scores, student_scores, engine.vocab_size, same_student, merged)


def _score(
    engine: Engine,
    name: str,
    items: Sequence[TeacherSequence],
    manifest: CacheManifest,
    seen: Callable[[Rollout], Rollout],
) -> list[TeacherScores]:
    """Score the stored ids if the engine can, else the model's own top k."""
    vocab_size = engine.vocab_size
    k, stored_ids = min(max(1, manifest.k), vocab_size), None
    if name == "transformers":
        k = 1
        stored_ids = [np.where(item.topk_ids < vocab_size, item.topk_ids, -1) for item in items]
    rollouts = [seen(item.rollout) for item in items]
    scores = engine.score(
        [rollout.tokens for rollout in rollouts],
        [rollout.prompt_length for rollout in rollouts],
        k,
        temperature=manifest.temperature,
        extra_ids=stored_ids,
    )
    if len(scores) != len(items):
        raise ModelError(f"engine: {name} scored {len(scores)} of {len(items)} sequences")
    return scores


def _compare(
    items: Sequence[TeacherSequence],
    teacher_scores: Sequence[TeacherScores],
    student_scores: Sequence[TeacherScores],
    student_vocab_size: int,
    same_student: bool,
    merged: Sequence[int] = (),
) -> NoiseFloor:
    """Both KLs over the stored ids that teacher and student can score, and one bucket for others.

    A stored id without a score, or beyond the student's vocabulary, joins the bucket of the
    others in all three distributions. The ids of `merged` share a bucket of their own. Tokens
    without loss do not count: they may have no scores.

    Raises:
        DataError: no token bears loss.
    """
    noise: list[np.ndarray] = []
    signal: list[np.ndarray] = []
    gaps: list[np.ndarray] = []
    num_buckets = num_listed = 0
    for item, teacher, student in zip(items, teacher_scores, student_scores, strict=True):
        rows = item.rollout.loss_mask[item.rollout.prompt_length :]
        teacher_lists = _with_extra_ids(teacher)
        has_bucket = _is_in(item.topk_ids, teacher_lists[0]) & (item.topk_ids < student_vocab_size)
        buckets = _as_one(np.where(has_bucket, item.topk_ids, -1), merged)
        members = np.isin(buckets, merged)
        buckets = np.where(members & (np.cumsum(members, axis=1) > 1), -1, buckets)
        stored, q, p = (
            _to_buckets(buckets, _as_one(ids, merged), logprobs, tail)
            for ids, logprobs, tail in (
                (item.topk_ids, item.topk_logprobs, item.tail_logprobs),
                teacher_lists,
                _with_extra_ids(student),
            )
        )
        noise.append(_bucket_kl(q, stored)[rows])
        signal.append(_bucket_kl(p, stored)[rows])
        gaps.append(np.abs(teacher.teacher_logprobs - item.teacher_logprobs)[rows])
        num_buckets += int(has_bucket[rows].sum())
        num_listed += int((item.topk_ids[rows] >= 0).sum())
    gap = np.concatenate(gaps)
    if not len(gap):
        raise DataError(
            f"no token of {len(items)} sequences bears loss, so there is no noise to measure; "
            "expected a mask with at least one"
        )
    return NoiseFloor(
        sequences=len(items),
        tokens=len(gap),
        noise=float(np.concatenate(noise).mean()),
        signal=float(np.concatenate(signal).mean()),
        coverage=num_buckets / max(num_listed, 1),
        mean_gap=float(gap.mean()),
        largest_gap=float(gap.max()),
        same_student=same_student,
    )


_Lists = tuple[np.ndarray, np.ndarray, np.ndarray]  # ids [R, C], log-probs [R, C], tail [R]


def _with_extra_ids(scores: TeacherScores) -> _Lists:
    """Lists that hold the extra ids too, each id once, and the tail outside them."""
    ids, logprobs = scores.topk_ids, scores.topk_logprobs
    if scores.extra_ids is None or scores.extra_logprobs is None:
        return ids, logprobs, scores.tail_logprobs
    assert scores.extra_tail_logprobs is not None
    extra_ids = np.where(_is_in(scores.extra_ids, ids), -1, scores.extra_ids)
    return (
        np.concatenate([ids, extra_ids], axis=1),
        np.concatenate([logprobs, scores.extra_logprobs], axis=1),
        scores.extra_tail_logprobs,
    )


def _as_one(ids: np.ndarray, merged: Sequence[int]) -> np.ndarray:
    """The ids, with the first of `merged` in place of each of them."""
    return np.where(np.isin(ids, merged), merged[0], ids) if merged else ids


def _is_in(ids: np.ndarray, lists: np.ndarray) -> np.ndarray:  # [R, K], [R, C] -> [R, K] bool
    """Whether each id is in the list of its row; False at pads."""
    listed = np.zeros(ids.shape, bool)
    for column in lists.T:
        listed |= ids == column[:, None]
    return listed & (ids >= 0)


def _to_buckets(
    buckets: np.ndarray,  # [R, K] ids, -1 pads
    ids: np.ndarray,  # [R, C]
    logprobs: np.ndarray,  # [R, C]
    tail: np.ndarray,  # [R]
) -> np.ndarray:  # [R, K + 1] fp64
    """Log-probs of the bucketed ids and, in the last column, of all others; -inf at pads."""
    result = np.full((len(buckets), buckets.shape[1] + 1), -np.inf)
    others = tail.astype(np.float64)
    for column in range(ids.shape[1]):
        match = (buckets == ids[:, column, None]) & (buckets >= 0)
        logprob = logprobs[:, column].astype(np.float64)
        added = np.logaddexp(result[:, :-1], logprob[:, None])  # ids can share a bucket
        result[:, :-1] = np.where(match, added, result[:, :-1])
        outside = (ids[:, column] >= 0) & ~match.any(axis=1)
        others = np.where(outside, np.logaddexp(others, logprob), others)
    result[:, -1] = others
    return result


def _bucket_kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:  # [R, B] log-probs -> [R]
    """KL(p || q) over the buckets; stays non-negative if rounding leaves a mass other than 1."""
    return kl_terms(p, q).sum(axis=1)
