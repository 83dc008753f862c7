"""Make a teacher cache from scores that another tool dumped (`lopd import`).

The formats are those of `lopd.data.external_scores`. Who scored and who rolled out is taken on
trust and marked `declared`: a model folder is fingerprinted, a digest is taken as it is, and any
other name cannot be verified, so that `lopd distill` asks for its override. The `scoring` of the
manifest says what a dump lacks: tail and entropy are derived from the lists, rollout log-probs may
be absent.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from lopd.data.external_scores import Dumped, Format, read_dump
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
from lopd.store import CacheWriter, Codec, Rollout, TeacherScores
from lopd.store.lists import derived_tail, row_sums
from lopd.store.validate import MASS_TOLERANCE

_DIGEST = re.compile(r"[0-9a-f]{64}")
# Lists were renormalised where every one has mass 1 within rounding, and all together within this.
RENORMALIZED = 1e-4


@dataclass(kw_only=True)
class ImportConfig:
    """A cache from scores that another tool dumped (`lopd import`)."""

    source: str = field(metadata={"help": "Parquet (.parquet) or JSONL file."})
    format: Format = field(
        metadata={
            "help": "The paper's parquet, or top-k log-probs; see lopd/data/external_scores.py."
        }
    )
    teacher: str = field(metadata={"help": "Who scored: a folder, a digest of weights, or a name."})
    student: str = field(metadata={"help": "Who rolled out: likewise; a folder for its tokenizer."})
    out: str = field(metadata={"help": "Cache folder; an interrupted one is continued."})
    codec: Codec = field(
        default="exact",
        metadata={"help": "How lists and log-probs are stored; all but exact round them."},
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Temperature that the log-probs were taken at."}
    )
    shard_size: int = field(default=1024, metadata={"help": "Sequences in a shard file."})
    allow_renormalized: bool = field(
        default=False, metadata={"help": "Admit renormalised lists, for --tail renormalize alone."}
    )

    def __post_init__(self) -> None:
        if self.shard_size < 1:
            raise ConfigError(f"shard_size: found {self.shard_size}; expected at least 1")
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(f"temperature: found {self.temperature}; expected a positive number")


@dataclass(frozen=True)
class Survey:
    """What one reading of a dump tells before anything is written."""

    sequences: int
    shortest: int  # entries in the shortest list
    longest: int
    renormalized: bool
    known_rollouts: bool


def main(config: ImportConfig) -> Path:
    """Read the file twice: to check it and count, then to write. Returns the cache's folder.

    Raises:
        DataError: place and fault of a record; lists that were renormalised.
        ConfigError: neither model is a folder that tells the vocabulary.
        MissingFileError: no such file.
    """
    student, teacher = _describe_both(config.student, config.teacher)
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


def _describe_both(student: str, teacher: str) -> tuple[ModelIdentity, ModelIdentity]:
    rows = [vocab_size_of(name) for name in (student, teacher) if Path(name).is_dir()]
    if not rows:
        raise ConfigError(
            f"neither student '{student}' nor teacher '{teacher}' is a folder; give the folder of "
            "one of them, which tells the vocabulary"
        )
    return _describe(student, max(rows)), _describe(teacher, max(rows))


def _describe(name: str, vocab_size: int) -> ModelIdentity:
    """A model by its folder, or as far as a digest or another name identifies it."""
    unknown = f"unidentified: {name}"
    known: Mapping[str, Any] = {
        "path": name,
        "weights": name if _DIGEST.fullmatch(name) else unknown,
        "tokenizer": unknown,
        "vocab_size": vocab_size,
    }
    if Path(name).is_dir():
        known = describe_model(name, dtype="unspecified", engine="unspecified").raw
    return ModelIdentity.from_json({**known, "declared": True})


def take_survey(config: ImportConfig, vocab_size: int, records: Iterable[Dumped]) -> Survey:
    """Read and check every record.

    Raises:
        DataError: as `read_dump`; an empty file, rollout log-probs that only some have, or lists
            that were renormalised, unless that is allowed.
    """
    sequences = known = longest = tokens = 0
    shortest, whole, excess = vocab_size, True, 0.0
    for dumped in records:
        sequences += 1
        known += not np.isnan(dumped.rollout.rollout_logprobs).any()
        lengths = dumped.lengths
        shortest, longest = min(shortest, lengths.min()), max(longest, lengths.max())
        over = row_sums(np.exp(dumped.listed), lengths) - 1
        tokens, excess = tokens + len(over), excess + float(over.sum())
        whole &= bool(((np.abs(over) <= MASS_TOLERANCE) & (lengths < vocab_size)).all())
    if not sequences:
        raise DataError(f"{config.source}: holds no records; expected at least one")
    if known not in (0, sequences):
        raise DataError(
            f"{config.source}: {known} of {sequences} records have rollout_logprobs; give all or "
            "none"
        )
    renormalized = whole and abs(excess) <= RENORMALIZED * tokens
    if renormalized and not config.allow_renormalized:
        raise DataError(
            f"{config.source}: every list has mass 1 within rounding, though the longest "
            f"holds {longest} of {vocab_size} ids: the lists were renormalised and the mass "
            "outside them is lost; dump raw log-probs, or pass --allow_renormalized to admit them "
            "for --tail renormalize alone"
        )
    return Survey(sequences, int(shortest), int(longest), renormalized, known == sequences)


def _scores(
    dumped: list[Dumped], k: int, width: int, vocab_size: int
) -> Iterator[tuple[Rollout, TeacherScores]]:
    """The first k of every list as the top-k, the rest as extra ids."""
    for item in dumped:
        rows = len(item.logprobs)
        ids = np.full((rows, k + width), -1, np.int64)
        listed = np.full((rows, k + width), -np.inf)
        filled = np.arange(k + width) < item.lengths[:, None]
        ids[filled], listed[filled] = item.ids, item.listed
        own = item.rollout.tokens[item.rollout.prompt_length :]
        outside = np.where((ids == own[:, None]).any(axis=1), -np.inf, item.logprobs)
        tail = derived_tail(listed, outside, item.lengths == vocab_size)
        buckets = np.column_stack([listed, tail])
        mass = np.exp(buckets)
        entropy = -(mass * np.where(mass > 0, buckets, 0)).sum(axis=1)
        yield (
            item.rollout,
            TeacherScores(
                logprobs=item.logprobs.astype(np.float32),
                entropy=np.maximum(entropy, 0).astype(np.float32),
                topk_ids=ids[:, :k],
                topk_logprobs=listed[:, :k].astype(np.float32),
                tail_logprobs=np.logaddexp.reduce(buckets[:, k:], axis=1).astype(np.float32),
                extra_ids=ids[:, k:] if width else None,
                extra_logprobs=listed[:, k:].astype(np.float32) if width else None,
                extra_tail_logprobs=tail if width else None,
            ),
        )
