"""A model beside the teacher at every token of stored answers, for people to read."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lopd.engines.transformers import TransformersEngine
from lopd.store import TeacherSequence


@dataclass(frozen=True)
class TokenComparison:
    """Both distributions at the R tokens of an answer.

    Lists are sorted by probability and cut to the length that was asked for; -1 pads ids. A
    divergence is the reverse KL of model and teacher over the stored list and one bucket for all
    other ids, in nat: at most the KL over all ids. Ids of a class share a bucket, as in training.
    """

    divergence: np.ndarray  # [R] fp64
    teacher_ids: np.ndarray  # [R, L] int
    teacher_logprobs: np.ndarray  # [R, L]
    model_ids: np.ndarray  # [R, L] int
    model_logprobs: np.ndarray  # [R, L]
    teacher_sampled: np.ndarray  # [R] log-prob of the answer's token under the teacher
    model_sampled: np.ndarray  # [R] the same under the model


def compare_tokens(
    engine: TransformersEngine,
    sequences: Sequence[TeacherSequence],
    *,
    length: int,
    temperature: float = 1.0,
    eos_class: Sequence[int] = (),
) -> list[TokenComparison]:
    """Score answers with a model and put its lists beside the stored ones of the teacher.

    Args:
        sequences: of a cache that was opened with `support="list+sampled"` and the model's
            `vocab_size`.
        length: entries kept of each list.
        temperature: of the cache.
        eos_class: ids that the cache takes as one token.

    Raises:
        DataError: a sequence is longer than the model's context, or has an id beyond its
            vocabulary.
    """
    scores = engine.score(
        [s.rollout.tokens for s in sequences],
        [s.rollout.prompt_length for s in sequences],
        min(length, engine.vocab_size),
        temperature=temperature,
        extra_ids=[s.topk_ids for s in sequences],
    )
    results = []
    for sequence, score in zip(sequences, scores, strict=True):
        assert score.extra_logprobs is not None
        listed = sequence.topk_ids >= 0
        lp = np.where(listed, score.extra_logprobs, -np.inf).astype(np.float64)
        lq = np.where(listed, sequence.topk_logprobs, -np.inf).astype(np.float64)
        order = np.argsort(-lq, axis=1, kind="stable")[:, :length]
        member = listed & np.isin(sequence.topk_ids, eos_class)
        tail = sequence.tail_logprobs.astype(np.float64)
        results.append(
            TokenComparison(
                divergence=bucket_reverse_kl(as_one(lp, member), as_one(lq, member), tail),
                teacher_ids=np.take_along_axis(np.where(listed, sequence.topk_ids, -1), order, 1),
                teacher_logprobs=np.take_along_axis(lq, order, 1),
                model_ids=score.topk_ids,
                model_logprobs=score.topk_logprobs,
                teacher_sampled=sequence.teacher_logprobs,
                model_sampled=score.teacher_logprobs,
            )
        )
    return results


def as_one(logprobs: np.ndarray, member: np.ndarray) -> np.ndarray:
    """Log-probs [R, K] with the mass of the members [R, K] bool of each row at its first one."""
    mass = np.logaddexp.reduce(np.where(member, logprobs, -np.inf), axis=1, keepdims=True)
    is_first = member & (member.cumsum(1) == 1)
    return np.where(is_first, mass, np.where(member, -np.inf, logprobs))


def bucket_reverse_kl(lp: np.ndarray, lq: np.ndarray, tail: np.ndarray) -> np.ndarray:
    """sum_S p (log p - log q) + p_tail (log p_tail - log q_tail) for each row, in nat.

    Args:
        lp, lq: [R, K] log-probs of model and teacher on the list, -inf pads.
        tail: [R] log of the teacher's mass outside the list.

    The model's tail is a difference from 1 here, which is enough for a figure; `lopd_kernels`
    computes it from the logits.

    >>> half = np.log([[0.5]])
    >>> bucket_reverse_kl(half, half, np.log([0.5])).tolist()
    [0.0]
    """
    p = np.exp(lp)
    rest = np.clip(1.0 - p.sum(1), np.finfo(np.float64).tiny, None)
    with np.errstate(invalid="ignore", divide="ignore"):
        terms = np.where(p > 0.0, p * (lp - lq), 0.0).sum(1)
        return terms + np.where(np.isfinite(tail), rest * (np.log(rest) - tail), 0.0)
