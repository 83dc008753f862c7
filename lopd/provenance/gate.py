"""The gate before distillation: do teacher, cache, rollouts and student belong together?"""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lopd.errors import ConfigError, MissingFileError, ProvenanceError
from lopd.provenance.fingerprint import (
    fingerprint_weights,
    load_vocab,
    read_vocab,
    tokenizer_digest,
    vocab_size_of,
)
from lopd.provenance.lineage import lineage_of
from lopd.provenance.manifest import CacheManifest, Override, short

OVERRIDES = ("teacher-mismatch", "student-mismatch", "tokenizer-mismatch", "incomplete-cache")


def check_distill(
    student: str | Path,
    cache_manifest: CacheManifest,
    *,
    used_ids: Callable[[], np.ndarray] | np.ndarray | None = None,
    cache_path: str | Path | None = None,
    missing_shards: Sequence[int] = (),
    allow: Collection[str] = frozenset(),
) -> list[Override]:
    """Refuse artefacts that do not belong together.

    Four comparisons, in this order: the cache is complete; the teacher that scored it is the
    one whose answers the student was fine-tuned on; the rollouts were made by the student; no
    id that the data uses means different tokens to teacher and student, or lies beyond the
    student's head though the tokenizer has it. Reads files only.

    Args:
        used_ids: the distinct ids of the cache, or a function that returns them; called only
            if the tokenizers differ or the student's head is short.
        cache_path: folder of the cache and its copy of the teacher's vocabulary.
        allow: names from `OVERRIDES`, one for each flag `--allow-<name>`.

    Returns:
        The overrides that were needed.

    Raises:
        ProvenanceError: found, expected, remedy, and the flag that overrides.
        ConfigError: an unknown name in `allow`.
        DataError: the student's manifest is no manifest.
    """
    unknown = sorted(set(allow) - set(OVERRIDES))
    if unknown:
        raise ConfigError(f"override '{unknown[0]}' is unknown; use one of {', '.join(OVERRIDES)}")
    mismatches = [
        _check_complete(missing_shards),
        _check_teacher(student, cache_manifest),
        _check_rollouts(student, cache_manifest),
        _check_tokenizer(student, cache_manifest, used_ids, cache_path),
    ]
    overrides = []
    for mismatch in filter(None, mismatches):
        if mismatch.name not in allow:
            raise ProvenanceError(
                f"{mismatch.name}: found {mismatch.found}, expected {mismatch.expected}; "
                f"{mismatch.remedy}, or pass --allow-{mismatch.name}"
            )
        overrides.append(
            Override(name=mismatch.name, found=mismatch.found, expected=mismatch.expected)
        )
    return overrides


class _Mismatch(NamedTuple):
    name: str  # of the override
    found: str
    expected: str
    remedy: str


def _check_complete(missing_shards: Sequence[int]) -> _Mismatch | None:
    if not missing_shards:
        return None
    return _Mismatch(
        "incomplete-cache",
        f"{len(missing_shards)} unfinished shards (the first is shard-{min(missing_shards):05d})",
        "every shard of the plan",
        "run the same 'lopd score' again to finish them",
    )


def _check_teacher(student: str | Path, cache_manifest: CacheManifest) -> _Mismatch | None:
    scorer = cache_manifest.model
    found = f"a cache scored by {scorer}"
    try:
        teacher = lineage_of(student).sft_teacher
    except ProvenanceError as error:
        return _Mismatch("teacher-mismatch", found, "a student of known origin", str(error))
    if teacher is None:
        return _Mismatch(
            "teacher-mismatch",
            f"{found} and a student ({student}) whose SFT teacher is not recorded",
            "a student fine-tuned on that teacher's answers",
            "name its teacher with 'lopd declare'",
        )
    if teacher.weights == scorer.weights:
        return None
    return _Mismatch(
        "teacher-mismatch",
        found,
        f"{teacher}, whose answers the student was fine-tuned on",
        "another teacher costs accuracy at a finite budget: score with that teacher "
        "('lopd score'), or fine-tune on this one's answers",
    )


def _check_rollouts(student: str | Path, cache_manifest: CacheManifest) -> _Mismatch | None:
    policy, expected = cache_manifest.rollouts.model, fingerprint_weights(student)
    if policy.weights == expected:
        return None
    return _Mismatch(
        "student-mismatch",
        f"rollouts made by {policy}",
        f"rollouts of the student {student} (weights {short(expected)})",
        "sample rollouts from that student ('lopd rollout') and score them ('lopd score')",
    )


def _check_tokenizer(
    student: str | Path,
    cache_manifest: CacheManifest,
    used_ids: Callable[[], np.ndarray] | np.ndarray | None,
    cache_path: str | Path | None,
) -> _Mismatch | None:
    student_vocab = read_vocab(student)
    same = tokenizer_digest(student) == cache_manifest.model.tokenizer
    rows = vocab_size_of(student)
    if same and rows > max(student_vocab.values(), default=-1):
        return None
    remedy = "use a student and a teacher with the same tokenizer"
    try:
        teacher_vocab = student_vocab if same or cache_path is None else load_vocab(cache_path)
    except MissingFileError as error:
        return _Mismatch("tokenizer-mismatch", str(error), "the teacher's vocabulary", remedy)
    if (not same and cache_path is None) or used_ids is None:
        return _Mismatch(
            "tokenizer-mismatch",
            "tokenizers or heads that differ and no record of the ids that the data uses",
            "equal tokenizers, or both records to compare by",
            remedy,
        )
    ids = np.asarray(used_ids() if callable(used_ids) else used_ids)
    return _compare_tokens(ids, student_vocab, teacher_vocab, rows, remedy)


def differing_token(
    ours: Mapping[str, int], theirs: Mapping[str, int], ids: np.ndarray
) -> tuple[int, str | None, str | None] | None:
    """The first of `ids` [N] that two token -> id maps give different meanings.

    Returns (id, our token, their token), a token being None where a map lacks the id; None
    where every id means the same to both. An id that both lack counts as the same.
    """
    our_tokens = {index: token for token, index in ours.items()}
    their_tokens = {index: token for token, index in theirs.items()}
    for index in np.asarray(ids).ravel().tolist():
        if our_tokens.get(index) != their_tokens.get(index):
            return index, our_tokens.get(index), their_tokens.get(index)
    return None


def _compare_tokens(
    ids: np.ndarray,
    student_vocab: Mapping[str, int],
    teacher_vocab: Mapping[str, int],
    rows: int,
    remedy: str,
) -> _Mismatch | None:
    """The first used id that the student's head lacks, or that means different things."""
    beyond = differing_token({}, {**student_vocab, **teacher_vocab}, ids[ids >= rows])
    if beyond is not None:
        index, _, token = beyond
        return _Mismatch(
            "tokenizer-mismatch",
            f"id {index} ({token!r}) in the data",
            f"ids that the student's {rows} vocabulary rows can produce",
            remedy,
        )
    differing = differing_token(student_vocab, teacher_vocab, ids)
    if differing is None:
        return None
    index, student_token, teacher_token = differing
    return _Mismatch(
        "tokenizer-mismatch",
        f"id {index} is {teacher_token!r} to the teacher and {student_token!r} to the student",
        "one meaning for every id that the data uses",
        remedy,
    )


def check_same_tokens(
    model_vocab: Mapping[str, int], vocab: Mapping[str, int], used: np.ndarray, flag: str
) -> None:
    """Raise ProvenanceError for the first used id that the two token -> id maps disagree on."""
    if found := differing_token(model_vocab, vocab, used):
        index, ours, theirs = found
        raise ProvenanceError(
            f"{flag}: id {index} is {theirs!r} to it and {ours!r} to the model; a KL needs one "
            f"tokenizer, leave --{flag} out"
        )
