"""Import the scores or rollouts of another tool (`lopd import`).

`lopd.data.external_scores` describes the formats. Teacher and student are declared, not verified: a
model folder is fingerprinted, a digest is recorded unchanged, and for any other name `lopd distill`
requires an override. The manifest's `scoring` records that tail and entropy are derived from the
lists, and whether rollout log-probs are absent.
"""

import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from lopd.config.import_scores import ImportConfig
from lopd.data.external_scores import ROUNDING, Dumped, read_dump
from lopd.data.records import describe_data
from lopd.data.skipped import Skipped
from lopd.errors import ConfigError, DataError
from lopd.models.load import load_tokenizer
from lopd.provenance import (
    CacheManifest,
    ModelIdentity,
    build_manifest,
    describe_model,
    eos_ids_of,
    lineage_of,
    save_vocab,
    vocab_size_of,
)
from lopd.provenance.folder import refuse_gguf
from lopd.stages.finished import say_finished
from lopd.stages.import_rollouts import import_rollouts
from lopd.stages.model_access import loads_models
from lopd.store import CacheWriter, Rollout, TeacherScores
from lopd.store.lists import derived_tail
from lopd.store.validate import MASS_TOLERANCE

LOG = logging.getLogger(__name__)

_DIGEST = re.compile(r"[0-9a-f]{64}")
# Lists are renormalised if each has mass 1 within rounding and their mean mass is 1 within this.
RENORMALIZED = 1e-4
# A whole number that so many sampled tokens have as their log-prob, and far more than have its
# neighbours half a nat away, stands for "none": rounding to any grid would favour both alike.
_REPEATS = 5
_LOW = -15.0  # the lowest log-prob of a file, if below this, is a floor where it occurs so often
_FLOORED_IDS = 3  # and for so many ids: answers that occur twice repeat theirs
_STANDS_OUT = 4


@dataclass(frozen=True)
class Survey:
    """Totals of a file, read once before anything is written."""

    sequences: int
    shortest: int  # entries in the shortest list
    longest: int
    renormalized: bool
    known_rollouts: bool
    unscored: int  # masked tokens without a log-prob
    unlisted: int  # tokens outside their renormalised lists
    padding: int  # entries left out of the lists
    rounded: int  # lists whose mass exceeded 1 by rounding
    left_out: int  # records


@loads_models
def main(config: ImportConfig) -> Path:
    """Import the file's rollouts or scores. Returns the folder of the rollouts or of the cache."""
    return import_rollouts(config) if config.format == "rollouts" else import_cache(config)


def import_cache(config: ImportConfig) -> Path:
    """Read the file twice: to check and count, then to write. Returns the cache's folder.

    Raises:
        DataError: a record is invalid (names it), or the lists were renormalised.
        ConfigError: neither model is a folder, so that the vocabulary is unknown.
        MissingFileError: the file does not exist.
    """
    assert config.teacher is not None
    student, teacher = _describe_models(config.student, config.teacher)
    assert teacher.vocab_size is not None
    tokenizer, eos_ids = None, []
    if Path(config.student).is_dir():
        tokenizer = load_tokenizer(config.student)
        eos_ids = eos_ids_of(config.student) or []

    def read(skipped: Skipped, renormalized: bool) -> Iterator[Dumped]:
        return read_dump(
            config.source,
            config.format,
            tokenizer,
            eos_ids,
            list_of=config.support,
            vocab_size=teacher.vocab_size,
            renormalized=renormalized,
            skipped=skipped,
        )

    for renormalized in (True, False) if config.allow_renormalized else (False,):
        skipped = Skipped(config.source, config.skip_bad_records)
        records = read(skipped, renormalized)
        survey = take_survey(config, teacher.vocab_size, records, skipped)
        if survey.renormalized:  # not a few lists, but all: else they are read again, as raw ones
            break
    skipped.report()
    _print_notes(config.source, survey)
    manifest = _manifest(config, survey, student, teacher)
    with CacheWriter.create(config.out, manifest) as writer:
        missing = writer.missing()
        if not missing:
            say_finished(config.out)
        elif Path(config.teacher).is_dir():
            save_vocab(config.teacher, config.out)
        records = read(Skipped(config.source, config.skip_bad_records), survey.renormalized)
        k = manifest.teacher_k
        width = survey.longest - k
        for shard, size in enumerate(manifest.shards):
            dumped = list(islice(records, size))
            if shard in missing:
                scored = _scores(dumped, k, width, teacher.vocab_size)
                writer.write(shard, list(scored))
        writer.finish()
    return Path(config.out)


def _manifest(
    config: ImportConfig, survey: Survey, student: ModelIdentity, teacher: ModelIdentity
) -> CacheManifest:
    source = describe_data(config.source)
    full, rest = divmod(survey.sequences, config.shard_size)
    return build_manifest(
        "cache",
        stage="import",
        config=asdict(config),
        model=teacher,
        inputs={
            "source": {
                **source,
                "format": config.format,
                **{name: getattr(survey, name) for name in _COUNTS if getattr(survey, name)},
            },
            "rollouts": {
                "digest": source["sha256"],
                "model": student,
                "lineage": lineage_of(config.student) if Path(config.student).is_dir() else None,
                "sampling": None,
            },
        },
        plan={"shards": [config.shard_size] * full + [rest] * bool(rest)},
        k=survey.longest if config.support == "student" else survey.shortest,
        top_p=1.0,
        codec=config.codec,
        temperature=config.temperature,
        declared=True,
        scoring={
            "tail": "renormalized" if survey.renormalized else "derived",
            "entropy": "derived",
            "rollout_logprobs": "computed" if survey.known_rollouts else "absent",
            "support": {"ids": "as imported", "list_of": config.support, "extra_ids": 0},
        },
    )


def _describe_models(*names: str) -> list[ModelIdentity]:
    """Models by their folders, or as far as a digest or another name identifies them."""
    for name in names:
        refuse_gguf(Path(name))
    sizes = [vocab_size_of(name) for name in names if Path(name).is_dir()]
    if not sizes:
        raise ConfigError(
            f"neither student '{names[0]}' nor teacher '{names[1]}' is a folder; name the folder "
            "of one of them, to read the vocabulary from"
        )
    models = []
    for name in names:
        unknown = f"unidentified: {name}"
        known: Mapping[str, Any] = {
            "path": name,
            "weights": name if _DIGEST.fullmatch(name) else unknown,
            "tokenizer": unknown,
            "vocab_size": max(sizes),
        }
        if Path(name).is_dir():
            known = describe_model(name, dtype="unspecified", engine="unspecified").raw
        models.append(ModelIdentity.from_json({**known, "declared": True}))
    return models


_COUNTS = ("unscored", "unlisted", "padding", "rounded", "left_out")


def _print_notes(source: str, survey: Survey) -> None:
    notes = {
        "masked tokens have no log-prob; their lists are empty": survey.unscored,
        "sampled tokens are outside their renormalised lists, so that their log-probs are lost": (
            survey.unlisted
        ),
        "list entries are padding (id -1, or a log-prob such as -inf or -9999); left out": (
            survey.padding
        ),
        f"lists of rounded log-probs have a mass up to {1 + ROUNDING}; scaled to 1": survey.rounded,
    }
    for text, count in notes.items():
        if count:
            LOG.info(f"{source}: {count} {text}")


def take_survey(
    config: ImportConfig, vocab_size: int, records: Iterable[Dumped], skipped: Skipped
) -> Survey:
    """Read and check every record.

    Raises:
        DataError: as `read_dump`; the file is empty, only some records have rollout log-probs,
            a number that stands for no log-prob is frequent, or the lists were renormalised and
            that is not allowed.
    """
    sequences = known = longest = unscored = unlisted = padding = 0
    shortest, masses, halves, sampled = vocab_size, _Masses(), Counter[float](), Counter[float]()
    low: dict[float, Counter[int]] = {}
    for dumped in records:
        sequences += 1
        known += not np.isnan(dumped.rollout.rollout_logprobs).any()
        unscored, padding = unscored + dumped.unscored, padding + dumped.padding
        unlisted += int(dumped.unlisted.sum())
        lengths = dumped.lists.lengths
        shortest, longest = min(shortest, lengths.min()), max(longest, lengths.max())
        mask = dumped.rollout.loss_mask[dumped.rollout.prompt_length :]
        masses.add(dumped.mass[mask], lengths[mask] < vocab_size)
        scored = mask & ~dumped.unlisted
        halves.update(_halves(dumped.teacher_logprobs[scored]))
        answer = dumped.rollout.tokens[dumped.rollout.prompt_length :]
        for place in np.flatnonzero(scored & (dumped.teacher_logprobs < _LOW)).tolist():
            ids = low.setdefault(float(dumped.teacher_logprobs[place]), Counter())
            ids[int(answer[place])] += 1
        sampled.update(_halves(dumped.rollout.rollout_logprobs[mask]))
    if not sequences:
        raise DataError(f"{config.source}: no usable records; expected at least one")
    for name, counts in (("log-prob", halves), ("rollout_logprob", sampled)):
        _refuse_frequent(config.source, name, counts)
    _refuse_floor(config.source, low)
    if known not in (0, sequences):
        raise DataError(
            f"{config.source}: {known} of {sequences} records have rollout_logprobs; expected all "
            "or none"
        )
    renormalized = masses.are_one()
    if renormalized and not config.allow_renormalized:
        raise DataError(
            f"{config.source}: every list has mass 1 within rounding, though the longest "
            f"holds {longest} of {vocab_size} ids: the lists were renormalised and the mass "
            "outside them is lost; dump raw log-probs, or pass --allow-renormalized to admit them "
            "for --tail renormalize only"
        )
    return Survey(
        sequences=sequences,
        shortest=int(shortest),
        longest=int(longest),
        renormalized=renormalized,
        known_rollouts=known == sequences,
        unscored=unscored,
        unlisted=unlisted,
        padding=padding,
        rounded=masses.rounded,
        left_out=len(skipped.errors),
    )


@dataclass
class _Masses:
    """Masses of the lists of tokens that bear loss."""

    count: int = 0
    rounded: int = 0  # lists whose mass exceeded 1 by rounding
    excess: float = 0.0
    squares: float = 0.0
    largest: float = 0.0  # distance from 1
    partial: bool = True  # no list holds the whole vocabulary

    def add(self, mass: np.ndarray, partial: np.ndarray) -> None:  # [n], [n] bool
        over = mass - 1
        self.count += len(over)
        self.rounded += int((over > MASS_TOLERANCE).sum())
        self.excess += float(over.sum())
        self.squares += float((over**2).sum())
        self.largest = max(self.largest, float(np.abs(over).max(initial=0)))
        self.partial &= bool(partial.all())

    def are_one(self) -> bool:
        """Whether every mass is 1 within rounding, in the mean too."""
        if not self.count or not self.partial:
            return False
        mean, bound, most = self.excess / self.count, RENORMALIZED, MASS_TOLERANCE
        if self.rounded:  # coarsely, so that the mean too has a larger error
            deviation = math.sqrt(max(self.squares / self.count - mean**2, 0) / self.count)
            bound, most = max(bound, 2 * deviation), ROUNDING
        return self.largest <= most and abs(mean) <= bound


def _halves(logprobs: np.ndarray) -> list[float]:
    """The log-probs that are multiples of a half."""
    return list(logprobs[2 * logprobs == np.round(2 * logprobs)].tolist())


def _refuse_frequent(source: str, name: str, halves: Counter[float]) -> None:
    """Refuse a whole number that stands for "none" in the log-probs of sampled tokens.

    `halves` counts the log-probs that are multiples of a half.
    """
    for value, count in halves.items():
        near = halves[value - 0.5] + halves[value + 0.5]
        if value < 0 and value == round(value) and count >= max(_REPEATS, _STANDS_OUT * near + 1):
            raise DataError(
                f"{source}: {count} sampled tokens have a {name} of exactly {value:g}, which "
                "stands for none; dump their log-probs, or set their loss_mask to 0"
            )


def _refuse_floor(source: str, low: Mapping[float, Counter[int]]) -> None:
    """Refuse log-probs that were cut off below, as by log(max(p, epsilon)).

    `low` counts the ids that have each of the low log-probs.
    """
    if not low:
        return
    lowest, ids = min(low.items())
    if ids.total() >= _REPEATS and len(ids) >= _FLOORED_IDS:
        raise DataError(
            f"{source}: {ids.total()} sampled tokens have a log-prob of exactly {lowest:g}, and "
            "none has a lower one: they were cut off there; dump log-probs without a floor or an "
            "epsilon"
        )


def _scores(
    dumped: list[Dumped], k: int, width: int, vocab_size: int
) -> Iterator[tuple[Rollout, TeacherScores]]:
    """The first k of every list as the top-k, the rest as extra ids."""
    for item in dumped:
        rows, lists = len(item.teacher_logprobs), item.lists
        ids = np.full((rows, k + width), -1, np.int64)
        listed = np.full((rows, k + width), -np.inf)
        filled = np.arange(k + width) < lists.lengths[:, None]
        ids[filled], listed[filled] = lists.ids, lists.logprobs
        sampled = item.rollout.tokens[item.rollout.prompt_length :]
        outside = np.where(lists.contains(sampled), -np.inf, item.teacher_logprobs)
        tail = derived_tail(listed, outside, lists.lengths == vocab_size)
        buckets = np.column_stack([listed, tail])
        mass = np.exp(buckets)
        entropy = -(mass * np.where(mass > 0, buckets, 0)).sum(axis=1)
        yield (
            item.rollout,
            TeacherScores(
                teacher_logprobs=item.teacher_logprobs.astype(np.float32),
                teacher_entropy=np.maximum(entropy, 0).astype(np.float32),
                topk_ids=ids[:, :k],
                topk_logprobs=listed[:, :k].astype(np.float32),
                tail_logprobs=np.logaddexp.reduce(buckets[:, k:], axis=1).astype(np.float32),
                extra_ids=ids[:, k:] if width else None,
                extra_logprobs=listed[:, k:].astype(np.float32) if width else None,
                extra_tail_logprobs=tail if width else None,
            ),
        )
