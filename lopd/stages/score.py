"""Score stored rollouts with the teacher, once, into the sparse cache (`lopd score`).

A shard of the cache holds sequences of one shard of the rollouts, tokens included, so that training
needs only the cache; with several teachers, those of one teacher (`lopd.stages.routing`). Teacher
and student must share a tokenizer: the teacher's vocabulary is stored beside the shards, and
`lopd distill` compares the two.

Several processes may score into one folder (`--worker i/n`, or torchrun); a shard does not depend
on the process that writes it.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from lopd.config.dtype import with_dtype
from lopd.config.eos import parse_eos_class
from lopd.config.score import ScoreConfig
from lopd.data.skipped import Skipped
from lopd.engines import ENGINES, free_memory, load_engine
from lopd.engines.base import score_rollouts
from lopd.engines.progress import Progress
from lopd.engines.support import Support
from lopd.errors import DataError
from lopd.evaluation.agreement import by_teacher, low_coverage, measure
from lopd.models.limits import ModelLimits
from lopd.models.load import check_model_folder, context_of
from lopd.provenance import (
    CacheManifest,
    ModelIdentity,
    build_manifest,
    describe_model,
    save_vocab,
    tokenizer_digest,
    vocab_size_of,
)
from lopd.provenance.gate import check_eos, other_teacher
from lopd.provenance.teachers import described
from lopd.stages.finished import say_finished
from lopd.stages.model_access import loads_models
from lopd.stages.privileged import TeacherView, teacher_view
from lopd.stages.rollout_student import describe_support, find_student
from lopd.stages.routing import Part, Routing, Selection, routing_of, without
from lopd.stages.table import print_fields
from lopd.store import CacheWriter, RolloutStore, TeacherCache, TeacherScores
from lopd.store.folders import examine_shard_folder
from lopd.store.size import (
    Size,
    TimedSample,
    Work,
    check_fits,
    format_bytes,
    format_seconds,
    free_bytes,
    sample,
    size_bounds,
    time_sample,
    work_left,
)
from lopd.store.types import name_of
from lopd.store.workers import Worker, this_worker

LOG = logging.getLogger(__name__)
Scorer = Callable[..., list[TeacherScores]]  # of rollouts


@loads_models
def main(config: ScoreConfig) -> Path | None:
    """Score the missing shards of the cache; returns its folder, None after `plan`.

    Raises:
        ShardError: the rollouts are altered (they are hashed first), or another process is
            writing into the folder.
        ConfigError: a setting is out of range, the folder holds another recipe, or the disk has
            no room.
        ProvenanceError: `student` did not make the rollouts, or the teacher ends its answers with
            other ids than the student.
        DataError: a sequence exceeds the teacher's context or vocabulary.
    """
    config, worker = with_dtype(config), this_worker(config.worker)
    for teacher in config.teachers.values():
        check_model_folder(teacher)
    rollouts = RolloutStore.open(config.rollouts, kind="rollouts")
    rollouts.verify()
    routing = routing_of(config, rollouts)
    view = teacher_view(config, rollouts, routing)
    left_out = _left_out(config, rollouts, routing.parts, view)
    parts = without(routing.parts, left_out)
    manifest = _manifest(config, rollouts, replace(routing, parts=parts), left_out, view)
    left = _missing(config, manifest)
    if left and (warning := other_teacher(manifest)) is not None:
        LOG.warning(f"{config.out}: {warning}")
    if not config.skip_bad_records:
        _bad_sequences(config, rollouts, {i: parts[i] for i in left}, view)
    work = _Remaining(config, manifest, rollouts, view, parts, left)
    check_fits(config.out, work.bounds[0].of(work.of()), "with the shortest lists")
    if config.plan:
        _print_plan(work, worker)
        return None
    with CacheWriter.create(config.out, manifest, worker=worker) as writer:
        missing = writer.missing()
        if missing:
            for teacher in config.teachers.values():
                save_vocab(teacher, config.out, one_of_several=config.teacher_field is not None)
            _fill(writer, replace(work, missing=missing), worker)
        else:
            say_finished(config.out)
        finished = writer.finish()
    if finished:
        _print_agreement(TeacherCache.open(config.out, support="list"))
    else:
        LOG.info(f"{config.out}: {worker} is done, others are still writing")
    return Path(config.out)


@dataclass(frozen=True)
class _Remaining:
    """The shards that are not scored yet, as a whole and of each teacher."""

    config: ScoreConfig
    manifest: CacheManifest
    rollouts: RolloutStore
    view: TeacherView
    parts: Sequence[Part]
    missing: Sequence[int]

    @cached_property
    def bounds(self) -> tuple[Size, Size]:
        """Sizes with the shortest and the longest lists."""
        return size_bounds(self.manifest, sample(Selection(self.rollouts, self.parts)))

    def of(self, *teachers: str | None) -> Work:
        """The work that these teachers have, all by default."""
        chosen = [i for i in self.missing if not teachers or self.parts[i].teacher in teachers]
        return work_left(self.rollouts, [len(self.parts[i].names) for i in chosen])

    def try_out(self, teacher: str | None, scorer: Scorer) -> TimedSample:
        """Score a sample of a teacher's sequences, to know the time and the size of all."""
        own = [part for part in self.parts if part.teacher == teacher]
        return time_sample(self.manifest, sample(Selection(self.rollouts, own)), scorer)


def _print_agreement(cache: TeacherCache) -> None:
    """Print how near the student is to the teacher, and warn if the lists hold too little."""
    if (found := measure(cache)) is not None:
        print_fields(found.rows() | by_teacher(cache))
    if (warning := low_coverage(cache, found)) is not None:
        LOG.warning(warning)


def _manifest(
    config: ScoreConfig,
    rollouts: RolloutStore,
    routing: Routing,
    left_out: Mapping[int, frozenset[str]],
    view: TeacherView,
) -> CacheManifest:
    source, parts = rollouts.manifest, routing.parts
    models = {
        name: describe_model(path, dtype=config.dtype, engine=config.engine)
        for name, path in config.teachers.items()
    }
    merged = parse_eos_class(config.eos_class)
    overrides = []
    for name, model in models.items():
        assert model.vocab_size is not None
        limits = ModelLimits("the teacher", model.vocab_size)
        limits.check_k(config.k)
        limits.check_ids("eos_class", merged)
        overrides += check_eos(
            model, source.model, "the rollouts", config.allow_eos_mismatch, merged, name
        )
    ModelLimits("the student", source.vocab_size).check_ids("eos_class", merged)
    plan: dict[str, Any] = {"shards": [len(part.names) for part in parts]}
    inputs: dict[str, Any] = {
        "rollouts": {
            "digest": rollouts.digest(),
            "model": source.model,
            "lineage": source.lineage,
            "sampling": source.sampling,
            **({"left_out": sum(map(len, left_out.values()))} if left_out else {}),
        }
    }
    if routing.described is not None:
        plan["teachers"] = [part.teacher for part in parts]
        inputs["routing"] = routing.described
    if view.described is not None:
        inputs["teacher_prompts"] = view.described
    return build_manifest(
        "cache",
        stage="score",
        config=asdict(config),
        **described(models),
        inputs=inputs,
        overrides=overrides,
        plan=plan,
        k=config.k,
        top_p=config.top_p,
        codec=config.codec,
        temperature=config.temperature,
        **({"declared": True} if source.declared else {}),
        scoring={
            **ENGINES[config.engine],
            "rollout_logprobs": source.scoring.rollout_logprobs,
            "support": describe_support(config, _support(config), source.model),
        },
    )


def _support(config: ScoreConfig) -> Support:
    return Support(
        config.k, config.support, config.top_p, config.extra_ids, parse_eos_class(config.eos_class)
    )


def _missing(config: ScoreConfig, manifest: CacheManifest) -> list[int]:
    """Shards without a receipt; does not write anything."""
    if examine_shard_folder(config.out, manifest).state == "new":
        return list(range(len(manifest.shards)))
    return TeacherCache.open(config.out, allow_incomplete=True).missing_shards


def _left_out(
    config: ScoreConfig, rollouts: RolloutStore, parts: Sequence[Part], view: TeacherView
) -> dict[int, frozenset[str]]:
    """The names of the sequences that their teacher cannot read, by part; none without the flag."""
    if not config.skip_bad_records:
        return {}
    found = _bad_sequences(config, rollouts, dict(enumerate(parts)), view)
    for number, names in found.items():
        if names == parts[number].names:
            raise DataError(
                f"{config.rollouts}: the teacher can read no sequence of shard "
                f"{parts[number].shard}; use models that share a tokenizer, or roll out again"
            )
    return found


def _bad_sequences(
    config: ScoreConfig, rollouts: RolloutStore, parts: Mapping[int, Part], view: TeacherView
) -> dict[int, frozenset[str]]:
    """Check the sequences of some parts; the names of those that their teacher cannot read.

    Raises:
        DataError: there is one, and `skip_bad_records` is not set.
    """
    limits = {
        name: _limits(config, path, rollouts.manifest.model, view)
        for name, path in config.teachers.items()
    }
    skipped = Skipped(config.rollouts, config.skip_bad_records)
    found: dict[int, set[str]] = {}
    for number, part in parts.items():
        for rollout in part.read(rollouts):
            try:
                view.check(limits[part.teacher], rollout)
                skipped.kept += 1
            except DataError as error:
                skipped.handle(error)
                found.setdefault(number, set()).add(name_of(rollout))
    skipped.report()
    return {number: frozenset(names) for number, names in found.items()}


def _limits(
    config: ScoreConfig, teacher: str, policy: ModelIdentity, view: TeacherView
) -> ModelLimits:
    """What a teacher can read."""
    remedy = "use models that share a tokenizer"
    if tokenizer_digest(teacher) == policy.tokenizer:
        remedy = (
            "the tokenizers are the same, so it is a padding row of the student's head: leave the "
            "sequence out"
        )
    context = context_of(teacher, config.engine)
    return ModelLimits("the teacher", vocab_size_of(teacher), context, view.length_remedy, remedy)


def _load_scorer(work: _Remaining, name: str | None, worker: Worker) -> Scorer:
    """Load a teacher and, for its ids, the student; return the function that scores with them.

    The function takes rollouts and, optionally, `progress`.
    """
    config = work.config
    common: dict[str, Any] = {
        "dtype": config.dtype,
        "device": config.device,
        "local_rank": worker.local_rank,
        "options": config.options(),
        "tokens_per_batch": config.tokens_per_batch,
    }
    support, student = _support(config), None
    if support.student_k:  # first, so that vLLM sees the memory that it takes
        folder = find_student(config.student, work.rollouts.manifest.model)
        own = common if config.engine == "transformers" else common | {"options": {}}
        student = load_engine("transformers", folder, **own)
    teacher = load_engine(config.engine, config.teachers[name], **common)
    return partial(
        score_rollouts,
        teacher,
        support=support,
        temperature=config.temperature,
        student=student,
        seen_by_teacher=work.view.of,
    )


def _fill(writer: CacheWriter, work: _Remaining, worker: Worker) -> None:
    config, sizes = work.config, writer.manifest.shards
    # If the longest lists do not fit, a sample says whether the teacher's do.
    may_not_fit = work.bounds[1].of(work.of()) > free_bytes(config.out)
    done = sum(sizes) - sum(sizes[shard] for shard in work.missing)
    loaded: dict[str | None, Scorer] = {}  # one at a time
    with Progress(total=sum(sizes), initial=done, unit="seq", desc="scoring") as bar:
        for index in writer.claims():
            part = work.parts[index]
            if part.teacher not in loaded:
                loaded.clear()
                free_memory()
                loaded[part.teacher] = scorer = _load_scorer(work, part.teacher, worker)
                if may_not_fit:
                    timed = work.try_out(part.teacher, scorer)
                    needed = timed.size.of(work.of(part.teacher))
                    check_fits(config.out, needed, f"by {timed.sequences} scored sequences")
            sequences = part.read(work.rollouts)
            scores = loaded[part.teacher](sequences, progress=bar.update)
            writer.write(index, list(zip(sequences, scores, strict=True)))


def _print_plan(work: _Remaining, worker: Worker) -> None:
    """Print what scoring will take, by a sample of each teacher's sequences.

    Raises:
        ConfigError: the disk has no room for the cache.
    """
    config = work.config
    timed: dict[str | None, TimedSample] = {}
    for name in config.teachers:
        free_memory()
        timed[name] = work.try_out(name, _load_scorer(work, name, worker))
    sizes = [sum(each.size.of(work.of(name)) for name, each in timed.items())]
    sizes += [size.of(work.of()) for size in work.bounds]
    _print_forecast(work, timed, sizes, free_bytes(config.out), worker)
    sampled = sum(each.sequences for each in timed.values())
    check_fits(config.out, sizes[0], f"by {sampled} scored sequences")


def _print_forecast(
    work: _Remaining,
    timed: Mapping[str | None, TimedSample],
    sizes: list[int],  # measured, lower bound, upper bound
    free: int,
    worker: Worker,
) -> None:
    totals, left = work.rollouts.summary(), work.of()
    needed, low, high = map(format_bytes, sizes)
    share = f", each of {worker.count} workers" if not worker.is_single else ""
    seconds = {name: each.seconds_for(work.of(name)) for name, each in timed.items()}
    sampled, tokens = (
        sum(getattr(each, count) for each in timed.values()) for count in ("sequences", "tokens")
    )
    speed = tokens / sum(each.seconds for each in timed.values())
    rows = {
        "sequences": f"{totals['sequences']}, {left.sequences} to score",
        "tokens": f"{totals['tokens']}, {totals['response_tokens']} of them responses",
        "shards": f"{len(work.parts)}, {left.shards} to write",
        "bytes": f"{needed} by the sample; {low} with the shortest lists, {high} with the longest",
        "free disk": format_bytes(free),
        "sample": f"{sampled} sequences, {tokens} tokens, {speed:.0f} tokens/s",
        "time": f"{format_seconds(sum(seconds.values()) / worker.count)}{share}",
    }
    for name in work.config.teachers:
        if name is not None:
            own = work.of(name)
            rows[f"teacher {name}"] = (
                f"{own.sequences} sequences in {own.shards} shards, "
                f"{format_seconds(seconds[name] / worker.count)}"
            )
    print_fields(rows)
