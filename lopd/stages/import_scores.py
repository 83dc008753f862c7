"""Make a teacher cache from the scores of another tool (`lopd import`).

`lopd.data.external_scores` describes the formats. Teacher and student are declared, not verified: a
model folder is fingerprinted, a digest is recorded unchanged, and for any other name `lopd distill`
requires an override. The manifest's `scoring` records that tail and entropy are derived from the
lists, and whether rollout log-probs are absent.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from lopd.config.import_scores import ImportConfig
from lopd.data.external_scores import Dumped, read_dump
from lopd.errors import ConfigError, DataError
from lopd.models.load import eos_ids_of, load_tokenizer
from lopd.provenance import (
    ModelIdentity,
    build_manifest,
    describe_file,
    describe_model,
    lineage_of,
    save_vocab,
    vocab_size_of,
)
from lopd.store import CacheWriter, Rollout, TeacherScores
from lopd.store.lists import derived_tail
from lopd.store.validate import MASS_TOLERANCE

_DIGEST = re.compile(r"[0-9a-f]{64}")
# Lists are renormalised if each has mass 1 within rounding and their mean mass is 1 within this.
RENORMALIZED = 1e-4


@dataclass(frozen=True)
class Survey:
    """Totals of a file, read once before anything is written."""

    sequences: int
    shortest: int  # entries in the shortest list
    longest: int
    renormalized: bool
    known_rollouts: bool


def main(config: ImportConfig) -> Path:
    """Read the file twice: to check and count, then to write. Returns the cache's folder.

    Raises:
        DataError: a record is invalid (names it), or the lists were renormalised.
        ConfigError: neither model is a folder, so that the vocabulary is unknown.
        MissingFileError: the file does not exist.
    """
    student, teacher = _describe_models(config.student, config.teacher)
    assert teacher.vocab_size is not None
    tokenizer, eos_ids = None, []
    if Path(config.student).is_dir():
        tokenizer = load_tokenizer(config.student)
        eos_ids = eos_ids_of(config.student, tokenizer)

    def read() -> Iterator[Dumped]:
        return read_dump(config.source, config.format, tokenizer, eos_ids)

    survey = take_survey(config, teacher.vocab_size, read())
    source = describe_file(config.source)
    full, rest = divmod(survey.sequences, config.shard_size)
    manifest = build_manifest(
        "cache",
        stage="import",
        config=asdict(config),
        model=teacher,
        inputs={
            "source": {**source, "format": config.format},
            "rollouts": {
                "digest": source["sha256"],
                "model": student,
                "lineage": lineage_of(config.student) if tokenizer is not None else None,
                "sampling": None,
            },
        },
        plan={"shards": [config.shard_size] * full + [rest] * bool(rest)},
        k=survey.shortest,
        top_p=1.0,
        codec=config.codec,
        temperature=config.temperature,
        declared=True,
        scoring={
            "tail": "renormalized" if survey.renormalized else "derived",
            "entropy": "derived",
            "rollout_logprobs": "computed" if survey.known_rollouts else "absent",
            "support": {"ids": "as imported", "extra_ids": 0},
        },
    )
    with CacheWriter.create(config.out, manifest) as writer:
        missing = writer.missing()
        if missing and Path(config.teacher).is_dir():
            save_vocab(config.teacher, config.out)
        records = read()
        width = survey.longest - survey.shortest
        for shard, size in enumerate(manifest.shards):
            dumped = list(islice(records, size))
            if shard in missing:
                scored = _scores(dumped, survey.shortest, width, teacher.vocab_size)
                writer.write(shard, list(scored))
        writer.finish()
    return Path(config.out)


def _describe_models(*names: str) -> list[ModelIdentity]:
    """Models by their folders, or as far as a digest or another name identifies them."""
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


def take_survey(config: ImportConfig, vocab_size: int, records: Iterable[Dumped]) -> Survey:
    """Read and check every record.

    Raises:
        DataError: as `read_dump`; the file is empty, only some records have rollout log-probs, or
            the lists were renormalised and that is not allowed.
    """
    sequences = known = longest = tokens = 0
    shortest, whole, excess = vocab_size, True, 0.0
    for dumped in records:
        sequences += 1
        known += not np.isnan(dumped.rollout.rollout_logprobs).any()
        lengths = dumped.lists.lengths
        shortest, longest = min(shortest, lengths.min()), max(longest, lengths.max())
        over = dumped.lists.row_sums(np.exp(dumped.lists.logprobs)) - 1
        tokens, excess = tokens + len(over), excess + float(over.sum())
        whole &= bool(((np.abs(over) <= MASS_TOLERANCE) & (lengths < vocab_size)).all())
    if not sequences:
        raise DataError(f"{config.source}: holds no records; expected at least one")
    if known not in (0, sequences):
        raise DataError(
            f"{config.source}: {known} of {sequences} records have rollout_logprobs; expected all "
            "or none"
        )
    renormalized = whole and abs(excess) <= RENORMALIZED * tokens
    if renormalized and not config.allow_renormalized:
        raise DataError(
            f"{config.source}: every list has mass 1 within rounding, though the longest "
            f"holds {longest} of {vocab_size} ids: the lists were renormalised and the mass "
            "outside them is lost; dump raw log-probs, or pass --allow_renormalized to admit them "
            "for --tail renormalize only"
        )
    return Survey(sequences, int(shortest), int(longest), renormalized, known == sequences)


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
