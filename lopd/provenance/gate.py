"""The gate before distillation: whether teacher, cache, rollouts and student belong together."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lopd.config.distill import OVERRIDES
from lopd.errors import ConfigError, MissingFileError, ProvenanceError
from lopd.provenance.behaviour import behaviour_of
from lopd.provenance.fingerprint import (
    fingerprint_weights,
    load_vocab,
    tokenizer_digest,
)
from lopd.provenance.folder import read_vocab, vocab_size_of
from lopd.provenance.identity import difference
from lopd.provenance.lineage import lineage_of
from lopd.provenance.manifest import CacheManifest, Lineage, ModelIdentity, Override, short
from lopd.provenance.teachers import records_of


def check_distill(
    student: str | Path,
    cache_manifest: CacheManifest,
    *,
    used_ids: Callable[..., np.ndarray] | np.ndarray | None = None,
    cache_path: str | Path | None = None,
    faults: Sequence[str] = (),
    allow: Collection[str] = frozenset(),
    sampled_only: bool = False,
) -> list[Override]:
    """Refuse artefacts that do not belong together.

    Five checks, in this order: the cache is complete; the teacher that scored it is the one whose
    answers the student was fine-tuned on, or the student itself with prompts that tell it more;
    the student made the rollouts; every id in the data means the same token to teacher and student,
    and the student's head has a row for it; the same ids end an answer. Teacher and student are
    compared by their weights and by what else decides what they compute (`behaviour_of`), as far
    as the manifests record it. Of several teachers, each is compared with the one of its name. No
    model is loaded.

    A cache whose log-probs were calibrated (`lopd calibrate`) may be of another teacher, and the
    difference is among the overrides that are returned.

    Args:
        used_ids: the distinct ids of the cache, or a function that returns them, those of one
            teacher's records if it is given a name; called only if the tokenizers differ or the
            student's head is short.
        cache_path: folder of the cache and its copy of the teacher's vocabulary.
        faults: what is wrong with each shard that cannot be read, and the remedy.
        allow: names from `OVERRIDES`, one for each flag `--allow-<name>`.
        sampled_only: whether the objective reads the sampled tokens' log-probs only, so that
            `lopd calibrate` is a remedy for another teacher.

    Returns:
        The overrides that were needed, and the difference that a calibration admits.

    Raises:
        ProvenanceError: a check fails that `allow` does not name.
        ConfigError: an unknown name in `allow`.
        DataError: the student's manifest is invalid.
    """
    unknown = sorted(set(allow) - set(OVERRIDES))
    if unknown:
        raise ConfigError(f"override '{unknown[0]}' is unknown; use one of {', '.join(OVERRIDES)}")
    policy, scorers = cache_manifest.rollouts.model, cache_manifest.models.items()
    merged = cache_manifest.scoring.eos_class

    calibration = _Calibration(cache_manifest.scoring.is_calibrated, sampled_only)

    def used_by(name: str | None) -> Callable[[], np.ndarray] | np.ndarray | None:
        return used_ids if name is None or not callable(used_ids) else partial(used_ids, name)

    mismatches: tuple[list[_Mismatch | None], ...] = (
        [_check_complete(faults)],
        [
            _check_teacher(student, model, name, calibration)
            for name, model in scorers
            if not is_own_teacher(cache_manifest, model)
        ],
        [_check_rollouts(student, policy)],
        [
            _check_tokenizer(student, model.tokenizer, used_by(name), cache_path)
            for name, model in scorers
        ],
        [
            eos_mismatch(model, policy, "the student's rollouts", merged, name)
            for name, model in scorers
        ],
    )
    overrides = []
    for name, found_ones in zip(OVERRIDES, mismatches, strict=True):
        for mismatch in found_ones:
            if mismatch is None:
                continue
            found, expected, remedy = mismatch
            if name not in allow and remedy is not None:
                raise ProvenanceError(
                    f"{name}: found {found}, expected {expected}; {remedy}, or pass --allow-{name}"
                )
            overrides.append(Override(name=name, found=found, expected=expected))
    return overrides


_Mismatch = tuple[str, str, str | None]  # found, expected, remedy; without one it is admitted


@dataclass(frozen=True)
class _Calibration:
    """What `lopd calibrate` has to do with a cache of another teacher."""

    done: bool  # the difference was taken out of it, as far as that goes
    possible: bool  # the objective could be trained on such a cache


def _check_complete(faults: Sequence[str]) -> _Mismatch | None:
    if not faults:
        return None
    found = f"{len(faults)} unfinished or damaged shards"
    return found, "every shard of the plan", f"the first is {faults[0]}"


def _check_teacher(
    student: str | Path, scorer: ModelIdentity, name: str | None, calibration: _Calibration
) -> _Mismatch | None:
    found = f"{records_of(name) or 'a cache '}scored by {scorer}"
    try:
        lineage = lineage_of(student)
    except ProvenanceError as error:
        return found, "a student of known origin", str(error)
    if lineage.sft_teacher is None:
        return (
            f"{found} and a student ({student}) whose SFT teacher is not recorded",
            "a student fine-tuned on that teacher's answers",
            "name its teacher with 'lopd declare'",
        )
    return _other_lineage(found, lineage, scorer, name, calibration)


def other_teacher(manifest: CacheManifest) -> str | None:
    """A warning before scoring, if `check_distill` will refuse the cache for its teacher.

    Only the lineage of the rollouts is known then. If it names no teacher, the student may still be
    declared.

    Args:
        manifest: of the cache that will be written.
    """
    lineage = manifest.rollouts.lineage
    if lineage is None or lineage.sft_teacher is None:
        return None
    for name, model in manifest.models.items():
        if is_own_teacher(manifest, model):
            continue
        found = f"{records_of(name) or 'a cache '}scored by {model}"
        calibration = _Calibration(done=False, possible=True)
        mismatch = _other_lineage(found, lineage, model, name, calibration)
        if mismatch is not None:
            found, expected, remedy = mismatch
            return (
                f"this will be {found}, and 'lopd distill' expects {expected}; {remedy}, or pass "
                "--allow-teacher-mismatch to 'lopd distill'"
            )
    return None


def _other_lineage(
    found: str,
    lineage: Lineage,
    scorer: ModelIdentity,
    name: str | None,
    calibration: _Calibration,
) -> _Mismatch | None:
    """How the scorer differs from the teachers that a lineage names."""
    assert lineage.sft_teacher is not None
    named = lineage.sft_teachers
    if named is None:
        teachers = [lineage.sft_teacher]
    elif name is None:  # any of its records may be any teacher's
        teachers = [*named.values()]
    elif name in named:
        teachers = [named[name]]
    else:
        return (
            found,
            f"one of the teachers whose answers the student was fine-tuned on, {', '.join(named)}",
            "fine-tune on that teacher's answers too, or leave its records out",
        )
    differences = (_other_teacher(found, each, scorer, calibration) for each in teachers)
    return next((mismatch for mismatch in differences if mismatch is not None), None)


def _other_teacher(
    found: str, teacher: ModelIdentity, scorer: ModelIdentity, calibration: _Calibration
) -> _Mismatch | None:
    """How the scorer differs from the teacher whose answers the student was fine-tuned on."""
    if teacher.weights == scorer.weights:
        edited = _edited(teacher.behaviour, scorer.behaviour, ("config", "code"))
        if edited is None:
            return None
        return (
            f"{found} with an edited config: {edited}",
            f"{teacher} as the student's answers were sampled from it",
            "restore that setting and score again ('lopd score'), or sample and fine-tune again",
        )
    expected = f"{teacher}, whose answers the student was fine-tuned on"
    if calibration.done:
        return f"{found}, calibrated", expected, None
    remedy = (
        "another teacher costs accuracy at a finite budget: score with that teacher "
        "('lopd score'), or fine-tune on this one's answers"
    )
    if calibration.possible:
        remedy += ", or take the teachers' mean difference out of the cache ('lopd calibrate')"
    return found, expected, remedy


def is_own_teacher(manifest: CacheManifest, scorer: ModelIdentity) -> bool:
    """Whether the student scored its own rollouts with prompts that tell it more.

    It needs no fine-tuning on a teacher's answers: the answers that it was fitted to are its own.

    Args:
        scorer: the model that scored the cache, or one of several.
    """
    policy = manifest.rollouts.model
    return (
        manifest.teacher_template is not None
        and scorer.weights == policy.weights
        and _edited(policy.behaviour, scorer.behaviour, ("config", "code")) is None
    )


def _check_rollouts(student: str | Path, policy: ModelIdentity) -> _Mismatch | None:
    expected = fingerprint_weights(student)
    if policy.weights == expected:
        edited = _edited(policy.behaviour, behaviour_of(student))
        if edited is None:
            return None
        return (
            f"{student} edited since it made the rollouts: {edited}",
            "the files that the rollouts were sampled with",
            "restore that setting, or roll out ('lopd rollout') and score again",
        )
    return (
        f"rollouts made by {policy}",
        f"rollouts of the student {student} (weights {short(expected)})",
        "sample rollouts from that student ('lopd rollout') and score them ('lopd score')",
    )


def _edited(
    recorded: Mapping[str, Any] | None,
    found: Mapping[str, Any] | None,
    parts: Collection[str] | None = None,
) -> str | None:
    """What differs between two behaviours of equal weights; None if nothing does.

    None too where an older artefact does not record one.

    Args:
        parts: the parts to compare; all by default.
    """
    if recorded is None or found is None:
        return None
    was, now = (
        {name: value for name, value in item.items() if parts is None or name in parts}
        for item in (recorded, found)
    )
    return difference(was, now) or None


def _check_tokenizer(
    student: str | Path,
    teacher_tokenizer: str | None,  # its digest
    used_ids: Callable[[], np.ndarray] | np.ndarray | None,
    cache_path: str | Path | None,
) -> _Mismatch | None:
    remedy = "use a student and a teacher with the same tokenizer"
    student_vocab, rows = read_vocab(student), vocab_size_of(student)
    same = tokenizer_digest(student) == teacher_tokenizer
    if same and rows > max(student_vocab.values(), default=-1):
        return None
    try:
        known = same or cache_path is None
        teacher_vocab = student_vocab if known else load_vocab(str(cache_path), teacher_tokenizer)
    except MissingFileError as error:
        return str(error), "the teacher's vocabulary", remedy
    if (not same and cache_path is None) or used_ids is None:
        found = "tokenizers or heads that differ and no record of the ids that the data uses"
        return found, "equal tokenizers, or both records to compare by", remedy
    ids = np.asarray(used_ids() if callable(used_ids) else used_ids)
    if beyond := differing_token({}, {**student_vocab, **teacher_vocab}, ids[ids >= rows]):
        found = f"id {beyond[0]} ({beyond[2]!r}) in the data"
        return found, f"ids that the student's {rows} vocabulary rows can produce", remedy
    if differing := differing_token(student_vocab, teacher_vocab, ids):
        index, ours, theirs = differing
        found = f"id {index} is {theirs!r} to the teacher and {ours!r} to the student"
        return found, "one meaning for every id that the data uses", remedy
    return None


def eos_mismatch(
    teacher: ModelIdentity,
    student: ModelIdentity,
    what: str,
    merged: Collection[int] = (),
    name: str | None = None,
) -> _Mismatch | None:
    """How the ids that end an answer differ between two models; None if they do not.

    None too where an older artefact does not record them.

    Args:
        what: what ends with the student's ids.
        merged: ids that count as one token.
        name: of the teacher, if it has one.
    """
    ours, theirs = student.eos_ids, teacher.eos_ids
    if ours is None or theirs is None or set(ours) == set(theirs):
        return None
    union = sorted({*ours, *theirs})
    if {*union} <= {*merged}:
        return None
    whose = "the teacher's" if name is None else f"teacher {name}'s"
    return (
        f"{what} end with id {_words(ours)}, {whose} answers with {_words(theirs)}",
        "one set of end-of-sequence ids, or the probability of ending is trained away",
        f"set eos_token_id to {union} in generation_config.json of both models before sampling, or "
        f"score with --eos-class {','.join(map(str, union))}",
    )


def check_eos(
    teacher: ModelIdentity,
    student: ModelIdentity,
    what: str,
    allow: bool,
    merged: Collection[int] = (),
    name: str | None = None,
) -> list[Override]:
    """Refuse a teacher and a student whose answers end with different ids.

    Args:
        what, merged, name: as in `eos_mismatch`.
        allow: whether `--allow-eos-mismatch` is set.

    Returns:
        The override, if it was needed.

    Raises:
        ProvenanceError: they differ and `allow` is not set.
    """
    mismatch = eos_mismatch(teacher, student, what, merged, name)
    if mismatch is None:
        return []
    found, expected, remedy = mismatch
    if not allow:
        raise ProvenanceError(
            f"eos-mismatch: found that {found}; expected {expected}; {remedy}, or pass "
            "--allow-eos-mismatch"
        )
    return [Override(name="eos-mismatch", found=found, expected=expected)]


def _words(ids: Sequence[int]) -> str:
    return " or ".join(map(str, ids))


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
