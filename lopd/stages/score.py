"""Score stored rollouts with the teacher, once, into the sparse cache (`lopd score`).

Shard i of the cache holds the sequences of shard i of the rollouts, tokens included, so that
training needs only the cache. The teacher and the student must share a tokenizer: the teacher's
vocabulary is stored beside the shards, and `lopd distill` compares the two.

Several processes may score into one folder (`--worker i/n`, or torchrun); a shard does not depend
on the process that writes it.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from lopd.config.dtype import with_dtype
from lopd.config.eos import parse_eos_class
from lopd.config.score import ScoreConfig
from lopd.data.skipped import Skipped
from lopd.engines import ENGINES, load_engine
from lopd.engines.base import score_rollouts
from lopd.engines.progress import Progress
from lopd.engines.support import Support
from lopd.errors import DataError
from lopd.evaluation.agreement import low_coverage, measure
from lopd.models.limits import ModelLimits
from lopd.models.load import check_model_folder, context_of
from lopd.provenance import (
    CacheManifest,
    build_manifest,
    describe_model,
    save_vocab,
    tokenizer_digest,
    vocab_size_of,
)
from lopd.provenance.gate import check_eos
from lopd.stages.finished import say_finished
from lopd.stages.model_access import loads_models
from lopd.stages.privileged import TeacherView, teacher_view
from lopd.stages.rollout_student import describe_support, find_student
from lopd.stages.table import print_fields
from lopd.store import CacheWriter, Rollout, RolloutStore, TeacherCache, TeacherScores
from lopd.store.folders import examine_shard_folder
from lopd.store.size import (
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
    check_model_folder(config.teacher)
    rollouts = RolloutStore.open(config.rollouts, kind="rollouts")
    rollouts.verify()
    view = teacher_view(config, rollouts)
    left_out = _left_out(config, rollouts, view)
    manifest = _manifest(config, rollouts, left_out, view)
    left = _missing(config, manifest)
    if not config.skip_bad_records:
        _bad_sequences(config, rollouts, left, view)
    names = frozenset[str]().union(*left_out.values())
    some = _usable(sample(rollouts), names) or _usable(rollouts.shard(0), names)
    bounds = size_bounds(manifest, some)
    work = work_left(rollouts, left)
    check_fits(config.out, bounds[0].of(work), "with the shortest lists")
    if config.plan:
        timed = time_sample(manifest, some, _load_scorer(config, rollouts, view, worker))
        sizes = [timed.size.of(work), *(size.of(work) for size in bounds)]
        _print_forecast(rollouts, work, timed, sizes, free_bytes(config.out), worker)
        check_fits(config.out, sizes[0], f"by {timed.sequences} scored sequences")
        return None
    with CacheWriter.create(config.out, manifest, worker=worker) as writer:
        missing = writer.missing()
        if missing:
            save_vocab(config.teacher, config.out)
            may_not_fit = bounds[1].of(work) > free_bytes(config.out)
            check_size = some if may_not_fit else None
            scorer = _load_scorer(config, rollouts, view, worker)
            _fill(writer, missing, rollouts, left_out, scorer, check_size=check_size)
        else:
            say_finished(config.out)
        finished = writer.finish()
    if finished:
        _print_agreement(TeacherCache.open(config.out, support="list"))
    else:
        LOG.info(f"{config.out}: {worker} is done, others are still writing")
    return Path(config.out)


def _print_agreement(cache: TeacherCache) -> None:
    """Print how near the student is to the teacher, and warn if the lists hold too little."""
    if (found := measure(cache)) is not None:
        print_fields(found.rows())
    if (warning := low_coverage(cache, found)) is not None:
        LOG.warning(warning)


def _manifest(
    config: ScoreConfig,
    rollouts: RolloutStore,
    left_out: Mapping[int, frozenset[str]],
    view: TeacherView,
) -> CacheManifest:
    source = rollouts.manifest
    model = describe_model(config.teacher, dtype=config.dtype, engine=config.engine)
    assert model.vocab_size is not None
    ModelLimits("the teacher", model.vocab_size).check_k(config.k)
    merged = parse_eos_class(config.eos_class)
    for limits in (
        ModelLimits("the teacher", model.vocab_size),
        ModelLimits("the student", source.vocab_size),
    ):
        limits.check_ids("eos_class", merged)
    overrides = check_eos(model, source.model, "the rollouts", config.allow_eos_mismatch, merged)
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
                **({"left_out": sum(map(len, left_out.values()))} if left_out else {}),
            },
            **({"teacher_prompts": view.described} if view.described else {}),
        },
        overrides=overrides,
        plan={"shards": [n - len(left_out.get(i, ())) for i, n in enumerate(source.shards)]},
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
    config: ScoreConfig, rollouts: RolloutStore, view: TeacherView
) -> dict[int, frozenset[str]]:
    """The names of the sequences that the teacher cannot read, by shard; none without the flag."""
    if not config.skip_bad_records:
        return {}
    found = _bad_sequences(config, rollouts, range(rollouts.num_shards), view)
    for shard, names in found.items():
        if len(names) == rollouts.manifest.shards[shard]:
            raise DataError(
                f"{config.rollouts}: the teacher can read no sequence of shard {shard}; use models "
                "that share a tokenizer, or roll out again"
            )
    return found


def _bad_sequences(
    config: ScoreConfig, rollouts: RolloutStore, shards: Iterable[int], view: TeacherView
) -> dict[int, frozenset[str]]:
    """Check the sequences of some shards; the names of those that the teacher cannot read.

    Raises:
        DataError: there is one, and `skip_bad_records` is not set.
    """
    remedy = "use models that share a tokenizer"
    if tokenizer_digest(config.teacher) == rollouts.manifest.model.tokenizer:
        remedy = (
            "the tokenizers are the same, so it is a padding row of the student's head: leave the "
            "sequence out"
        )
    teacher, context = config.teacher, context_of(config.teacher, config.engine)
    limits = ModelLimits("the teacher", vocab_size_of(teacher), context, view.length_remedy, remedy)
    skipped = Skipped(config.rollouts, config.skip_bad_records)
    found: dict[int, set[str]] = {}
    for shard in shards:
        for rollout in rollouts.shard(shard):
            try:
                view.check(limits, rollout)
                skipped.kept += 1
            except DataError as error:
                skipped.handle(error)
                found.setdefault(shard, set()).add(name_of(rollout))
    skipped.report()
    return {shard: frozenset(names) for shard, names in found.items()}


def _usable(sequences: Sequence[Rollout], left_out: frozenset[str]) -> list[Rollout]:
    return [rollout for rollout in sequences if name_of(rollout) not in left_out]


def _load_scorer(
    config: ScoreConfig, rollouts: RolloutStore, view: TeacherView, worker: Worker
) -> Callable[..., list[TeacherScores]]:
    """Load the teacher and, for its ids, the student; return the function that scores with them.

    The function takes rollouts and, optionally, `progress`.
    """
    common: dict[str, Any] = {
        "dtype": config.dtype,
        "device": config.device,
        "local_rank": worker.local_rank,
        "options": config.options(),
        "tokens_per_batch": config.tokens_per_batch,
    }
    support, student = _support(config), None
    if support.student_k:  # first, so that vLLM sees the memory that it takes
        folder = find_student(config.student, rollouts.manifest.model)
        own = common if config.engine == "transformers" else common | {"options": {}}
        student = load_engine("transformers", folder, **own)
    teacher = load_engine(config.engine, config.teacher, **common)
    return partial(
        score_rollouts,
        teacher,
        support=support,
        temperature=config.temperature,
        student=student,
        seen_by_teacher=view.of,
    )


def _fill(
    writer: CacheWriter,
    missing: list[int],
    rollouts: RolloutStore,
    left_out: Mapping[int, frozenset[str]],
    scorer: Callable[..., list[TeacherScores]],
    *,
    check_size: list[Rollout] | None,  # score these first, to check that the rest fits on the disk
) -> None:
    sizes = writer.manifest.shards
    work = work_left(rollouts, missing)
    if check_size is not None:
        timed = time_sample(writer.manifest, check_size, scorer)
        check_fits(writer.path, timed.size.of(work), f"by {timed.sequences} scored sequences")
    done = sum(sizes) - sum(sizes[shard] for shard in missing)
    with Progress(total=sum(sizes), initial=done, unit="seq", desc="scoring") as bar:
        for index in writer.claims():
            sequences = _usable(rollouts.shard(index), left_out.get(index, frozenset()))
            scores = scorer(sequences, progress=bar.update)
            writer.write(index, list(zip(sequences, scores, strict=True)))


def _print_forecast(
    rollouts: RolloutStore,
    work: Work,
    timed: TimedSample,
    sizes: list[int],  # measured, lower bound, upper bound
    free: int,
    worker: Worker,
) -> None:
    totals = rollouts.summary()
    needed, low, high = map(format_bytes, sizes)
    share = f", each of {worker.count} workers" if not worker.is_single else ""
    rows = {
        "sequences": f"{totals['sequences']}, {work.sequences} to score",
        "tokens": f"{totals['tokens']}, {totals['response_tokens']} of them responses",
        "shards": f"{totals['shards']}, {work.shards} to write",
        "bytes": f"{needed} by the sample; {low} with the shortest lists, {high} with the longest",
        "free disk": format_bytes(free),
        "sample": f"{timed.sequences} sequences, {timed.tokens} tokens, "
        f"{timed.tokens / timed.seconds:.0f} tokens/s",
        "time": f"{format_seconds(timed.seconds_for(work) / worker.count)}{share}",
    }
    print_fields(rows)
