"""Score stored rollouts with the teacher, once, into the sparse cache (`lopd score`).

Shard i of the cache holds the sequences of shard i of the rollouts, tokens included, so
that the cache is complete without them. The teacher must tokenise as the student does:
its vocabulary is stored beside the shards for the check that `lopd distill` makes.

Several processes may score into one folder (`--worker i/n`, or torchrun); which of them
writes a shard changes nothing in it.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lopd.engines import ENGINES, load_engine
from lopd.engines.base import Engine, Progress
from lopd.engines.options import EngineOptions
from lopd.errors import ConfigError, DataError, ModelError, ProvenanceError
from lopd.models.load import check_model_folder, context_of
from lopd.provenance import (
    CacheManifest,
    ModelIdentity,
    build_manifest,
    describe_model,
    save_vocab,
    vocab_size_of,
)
from lopd.store import CacheWriter, Codec, Rollout, RolloutStore, TeacherCache, TeacherScores
from lopd.store.folders import examine_shard_folder
from lopd.store.size import (
    Probe,
    Work,
    check_fits,
    format_bytes,
    format_seconds,
    free_bytes,
    measure,
    sample,
    size_bounds,
    work_left,
)
from lopd.store.types import name_of
from lopd.store.workers import Worker, this_worker


@dataclass(kw_only=True)
class ScoreConfig(EngineOptions):
    """Score rollouts with the teacher (`lopd score`)."""

    teacher: str = field(metadata={"help": "Teacher, a local model folder."})
    rollouts: str = field(metadata={"help": "Folder that `lopd rollout` wrote."})
    out: str = field(metadata={"help": "Cache folder; an interrupted one is continued."})
    k: int = field(default=64, metadata={"help": "Largest list of teacher tokens at a position."})
    top_p: float = field(
        default=0.999, metadata={"help": "Lists end where their mass reaches this; 1 keeps all k."}
    )
    codec: Codec = field(
        default="exact",
        metadata={"help": "How lists and log-probs are stored; all but exact round them."},
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Divides the teacher's logits; distillation uses the same."}
    )
    student: str | None = field(
        default=None, metadata={"help": "The student that rolled out, for --extra_ids."}
    )
    extra_ids: int = field(
        default=0, metadata={"help": "Add so many of the student's own top ids to every list."}
    )
    tokens_per_batch: int = field(default=16384, metadata={"help": "Padded tokens in a forward."})
    worker: str | None = field(
        default=None, metadata={"help": "i/n: be worker i, from 0, of n on this folder."}
    )
    plan: bool = field(
        default=False, metadata={"help": "Print bytes, shards, time and free disk; write nothing."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens_per_batch < 1:
            raise ConfigError(
                f"tokens_per_batch: found {self.tokens_per_batch}; expected at least 1"
            )
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"temperature: found {self.temperature}; expected a positive number")
        if self.extra_ids < 0 or (self.extra_ids > 0) != (self.student is not None):
            raise ConfigError(
                f"extra_ids: found {self.extra_ids} with student {self.student!r}; expected a "
                "positive number and the student that made the rollouts, or neither"
            )
        if self.engine == "vllm" and (self.temperature != 1 or self.extra_ids):
            raise ConfigError(
                "engine: vllm scores at temperature 1 and without extra_ids; use transformers"
            )


def main(config: ScoreConfig) -> Path | None:
    """Score what is missing of the cache; returns its folder, None after `plan`.

    Raises:
        ShardError: rollouts that are altered (what is trained on is hashed first), or another
            process at work in the folder.
        ConfigError: a setting out of range, a folder of another recipe, or no room on the disk.
        ProvenanceError: `student` is not the one that made the rollouts.
        DataError: a sequence that the teacher has no room or no embedding for.
    """
    worker = this_worker(config.worker)
    check_model_folder(config.teacher)
    rollouts = RolloutStore.open(config.rollouts, kind="rollouts")
    rollouts.verify()
    manifest = _manifest(config, rollouts)
    left = _missing(config, manifest)
    _check_sequences(rollouts, left, config.teacher)
    bounds = size_bounds(manifest, sample(rollouts))
    work = work_left(rollouts, left)
    check_fits(config.out, bounds[0].of(work), "with the shortest lists")
    if config.plan:
        probe = measure(manifest, sample(rollouts), _Scorer(config, worker))
        sizes = [probe.size.of(work), *(size.of(work) for size in bounds)]
        _print_plan(rollouts, work, probe, sizes, free_bytes(config.out), worker)
        check_fits(config.out, sizes[0], f"by {probe.sequences} scored sequences")
        return None
    with CacheWriter.create(config.out, manifest, worker=worker) as writer:
        missing = writer.missing()
        if missing:
            save_vocab(config.teacher, config.out)
            doubtful = bounds[1].of(work) > free_bytes(config.out)
            _fill(writer, missing, rollouts, config, worker, probe=doubtful)
        if not writer.finish():
            print(f"{config.out}: {worker} is done, others still write", file=sys.stderr)
    return Path(config.out)


def _manifest(config: ScoreConfig, rollouts: RolloutStore) -> CacheManifest:
    source, numerics = rollouts.manifest, ENGINES[config.engine]
    model = describe_model(config.teacher, dtype=config.dtype, engine=config.engine)
    rows = vocab_size_of(config.teacher)
    if not 1 <= config.k <= rows:
        raise ConfigError(f"k: found {config.k}; expected 1 to the teacher's vocabulary of {rows}")
    return build_manifest(
        "cache",
        stage="score",
        config=asdict(config),
        model=model,
        inputs={
            "rollouts": {
                "digest": rollouts.digest(),
                "model": source.model,
                "lineage": source.lineage,
                "sampling": source.sampling,
            }
        },
        plan={"shards": source.shards},
        k=config.k,
        top_p=config.top_p,
        codec=config.codec,
        temperature=config.temperature,
        scoring={
            "tail": numerics.tail,
            "entropy": numerics.entropy,
            "rollout_logprobs": "computed",
            "support": _describe_support(config, source.model),
        },
    )


def _describe_support(config: ScoreConfig, policy: ModelIdentity) -> dict[str, Any]:
    """Which ids the lists hold; with extra ids, whose."""
    if config.student is None:
        return {"ids": "teacher's top k", "extra_ids": 0}
    student = describe_model(config.student, dtype=config.dtype, engine="transformers")
    if student.weights != policy.weights:
        raise ProvenanceError(
            f"student: {config.student} has weights {student.weights[:12]}, the rollouts were "
            f"made by {policy.weights[:12]}; name the student that made them"
        )
    rows = vocab_size_of(config.student)
    if config.extra_ids > rows:
        raise ConfigError(
            f"extra_ids: found {config.extra_ids}; expected at most the student's vocabulary of "
            f"{rows}"
        )
    return {
        "ids": "teacher's top k and student's top extra_ids",
        "extra_ids": config.extra_ids,
        "student": student,
    }


def _missing(config: ScoreConfig, manifest: CacheManifest) -> list[int]:
    """Shards without a receipt, found without writing anything."""
    if examine_shard_folder(config.out, manifest).state == "new":
        return list(range(len(manifest.shards)))
    return TeacherCache.open(config.out, allow_incomplete=True).missing_shards


def _check_sequences(rollouts: RolloutStore, shards: Sequence[int], teacher: str) -> None:
    """Refuse before the first shard what the teacher could not score in the last."""
    context, rows = context_of(teacher), vocab_size_of(teacher)
    for rollout in (rollout for shard in shards for rollout in rollouts.shard(shard)):
        length, largest = len(rollout.tokens), int(rollout.tokens.max())
        if context is not None and length > context:
            raise DataError(
                f"{name_of(rollout)}: {length} tokens; the teacher's context holds {context}; roll "
                "out with fewer --max_new_tokens"
            )
        if largest >= rows:
            raise DataError(
                f"{name_of(rollout)}: token id {largest}; the teacher's vocabulary ends at "
                f"{rows - 1}: the two models do not share a tokenizer"
            )


class _Scorer:
    """The teacher and, for its ids, the student."""

    def __init__(self, config: ScoreConfig, worker: Worker) -> None:
        self.config = config
        common: dict[str, Any] = {
            "dtype": config.dtype,
            "device": config.device,
            "local_rank": worker.local_rank,
            "options": config.options(),
            "tokens_per_batch": config.tokens_per_batch,
        }
        self.teacher = load_engine(config.engine, config.teacher, **common)
        self.student: Engine | None = None
        if config.student is not None:
            self.student = load_engine("transformers", config.student, **common)

    def __call__(
        self, rollouts: Sequence[Rollout], progress: Progress | None = None
    ) -> list[TeacherScores]:
        tokens = [rollout.tokens for rollout in rollouts]
        lengths = [rollout.prompt_length for rollout in rollouts]
        temperature = self.config.temperature
        extra = None
        if self.student is not None:
            own = self.student.score(
                tokens, lengths, self.config.extra_ids, temperature=temperature
            )
            rows = self.teacher.vocab_size  # a student's padding rows may lie beyond
            extra = [np.where(s.topk_ids < rows, s.topk_ids, -1) for s in own]
        scores = self.teacher.score(
            tokens,
            lengths,
            self.config.k,
            temperature=temperature,
            extra_ids=extra,
            progress=progress,
        )
        if len(scores) != len(rollouts):
            raise ModelError(
                f"engine: {self.config.engine} scored {len(scores)} of {len(rollouts)} sequences; "
                "nothing of them is written"
            )
        return scores


def _fill(
    writer: CacheWriter,
    missing: list[int],
    rollouts: RolloutStore,
    config: ScoreConfig,
    worker: Worker,
    *,
    probe: bool,  # whether it is in doubt that the rest fits on the disk
) -> None:
    scorer, sizes = _Scorer(config, worker), rollouts.manifest.shards
    work = work_left(rollouts, missing)
    if probe:
        scored = measure(writer.manifest, sample(rollouts), scorer)
        check_fits(config.out, scored.size.of(work), f"by {scored.sequences} scored sequences")
    done = sum(sizes) - work.sequences
    with tqdm(total=sum(sizes), initial=done, unit="seq", desc="scoring") as bar:
        for index in writer.claims():
            sequences = rollouts.shard(index)
            scores = scorer(sequences, progress=bar.update)
            writer.write(index, list(zip(sequences, scores, strict=True)))


def _print_plan(
    rollouts: RolloutStore,
    work: Work,
    probe: Probe,
    sizes: list[int],  # by the probe, at least, at most
    free: int,
    worker: Worker,
) -> None:
    totals = rollouts.summary()
    needed, low, high = map(format_bytes, sizes)
    share = f", each of {worker.count} workers" if not worker.alone else ""
    rows = {
        "sequences": f"{totals['sequences']}, {work.sequences} to score",
        "tokens": f"{totals['tokens']}, {totals['response_tokens']} of them responses",
        "shards": f"{totals['shards']}, {work.shards} to write",
        "bytes": f"{needed} by the probe; {low} with the shortest lists, {high} with the longest",
        "free disk": format_bytes(free),
        "probe": f"{probe.sequences} sequences, {probe.tokens} tokens, "
        f"{probe.tokens / probe.seconds:.0f} tokens/s",
        "time": f"{format_seconds(probe.seconds_for(work) / worker.count)}{share}",
    }
    for name, value in rows.items():
        print(f"{name:<9}  {value}")
