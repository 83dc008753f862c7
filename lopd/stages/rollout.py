"""Sample a model's answers to prompts, once, into a crash-safe store.

`lopd rollout` samples the fine-tuned student; `lopd sft-data` (lopd/stages/sft_data.py) uses the
same code path to sample the teacher. The store holds token ids, never text, with the
end-of-sequence token, and the log-probs of the sampling distribution; those at temperature 1 are
stored beside them where the two differ. Several processes may sample into one folder
(`--worker i/n`, or torchrun).
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lopd.config.dtype import with_dtype
from lopd.config.inference import SamplingOptions
from lopd.config.rollout import RolloutConfig
from lopd.data.prompts import Prompt, Routes, check_prompts, describe_prompts, load_prompts
from lopd.data.records import data_files
from lopd.data.rendering import PromptEncoder, parse_date
from lopd.data.turns import end_of_turn, turn_warnings
from lopd.engines import free_memory, load_engine
from lopd.engines.base import Engine, sequence_seed, to_rollout
from lopd.engines.progress import Progress
from lopd.errors import ModelError
from lopd.models.load import check_model_folder, context_of, load_tokenizer
from lopd.provenance import (
    MANIFEST_NAME,
    ModelIdentity,
    build_manifest,
    describe_model,
    lineage_of,
    read_manifest,
    save_vocab,
    vocab_size_of,
    warn_if_edited,
)
from lopd.provenance.teachers import described
from lopd.stages.batch_size import with_batch_size
from lopd.stages.finished import say_finished
from lopd.stages.model_access import loads_models
from lopd.store import RolloutStore, RolloutWriter
from lopd.store.workers import Worker, this_worker

LOG = logging.getLogger(__name__)

MANY_CUT = 0.1  # a larger share of answers that were cut off is a warning


@loads_models
def main(config: RolloutConfig) -> Path:
    """Sample the missing shards of the rollouts; returns their folder.

    Raises:
        LopdError: the model, the prompts or the folder cannot be used.
    """
    return sample_to_store(config, {None: config.student}, kind="rollouts", stage="rollout")


def sample_to_store(
    config: SamplingOptions,
    models: Mapping[str | None, str],
    *,
    kind: str,
    stage: str,
    field: str | None = None,
) -> Path:
    """Sample the missing shards of a store of answers; returns its folder.

    Sequences are numbered prompt by prompt, sample by sample, those of one model after those of
    another. Shard i holds the i-th run of up to `shard_size` sequences of one model, so an
    interrupted run continues with the missing shards.

    Args:
        models: folders of the models by name, or of one under None.
        field: of the records, which names the model that answers.
    """
    config, worker = with_dtype(config), this_worker(config.worker)
    for model in models.values():
        check_model_folder(model)
    data_files(config.prompts)  # a wrong path is told before models are read
    for model in models.values():
        warn_if_edited(model)
    today = recorded_date(config.out)
    encoders = {
        name: PromptEncoder(load_tokenizer(model), config, today) for name, model in models.items()
    }
    prompts, reading = _prompts(config, models, encoders, field)
    config = with_batch_size(config, models.values(), [prompt.tokens for prompt in prompts])
    shards = [
        (name, part)
        for name in models
        for part in _shards([prompt for prompt in prompts if prompt.teacher == name], config)
    ]
    plan: dict[str, Any] = {"shards": [len(jobs) for _, jobs in shards]}
    described_models = {
        name: describe_model(model, dtype=config.dtype, engine=config.engine)
        for name, model in models.items()
    }
    if field is not None:
        plan["teachers"] = [name for name, _ in shards]
        lineage: Any = None
        ends: Any = {name: end_of_turn(each.tokenizer) for name, each in encoders.items()}
    else:
        (lineage,) = map(lineage_of, models.values())
        (ends,) = (end_of_turn(each.tokenizer) for each in encoders.values())
    manifest = build_manifest(
        kind,
        stage=stage,
        config=asdict(config),
        **described(described_models),
        sampling=asdict(config.sampling())
        | {"seed": config.seed, "num_samples": config.num_samples},
        inputs={"prompts": reading},
        lineage=lineage,
        plan=plan,
        end_of_turn=ends,
    )
    with RolloutWriter.create(config.out, manifest, worker=worker) as writer:
        missing = writer.missing()
        if missing:
            for model in models.values():
                save_vocab(model, config.out, one_of_several=field is not None)
            _fill(writer, missing, shards, config, models, worker)
        else:
            say_finished(config.out)
        if not writer.finish():
            LOG.info(f"{config.out}: {worker} is done, others are still writing")
            return Path(config.out)
    _print_answers(config, kind)
    return Path(config.out)


def _prompts(
    config: SamplingOptions,
    models: Mapping[str | None, str],
    encoders: Mapping[str | None, PromptEncoder],
    field: str | None,
) -> tuple[list[Prompt], dict[str, Any]]:
    """The prompts, each for the model that answers it, and how they were read."""
    first, *_ = encoders.values()
    routes = None
    if field is not None:
        by_name = {str(name): encoder for name, encoder in encoders.items()}
        routes = Routes(field, [*by_name], by_name)
    prompts = load_prompts(config.prompts, first, limit=config.limit, routes=routes)
    usable: list[Prompt] = []
    for name, model in models.items():
        if own := [prompt for prompt in prompts if prompt.teacher == name]:
            usable += check_prompts(
                own,
                config.prompts,
                context=context_of(model, config.engine),
                vocab_size=vocab_size_of(model),
                max_new_tokens=config.max_new_tokens,
                skip=config.skip_bad_records,
            )
    if routes is not None:
        routes.check_used({prompt.teacher for prompt in prompts}, config.prompts)
    wrote_date = next((encoder for encoder in encoders.values() if encoder.wrote_date), first)
    described = describe_prompts(config.prompts, wrote_date)
    return usable, described if field is None else described | {"teacher_field": field}


def _shards(prompts: Sequence[Prompt], config: SamplingOptions) -> list[list[tuple[Prompt, int]]]:
    """The prompts and the numbers of their samples, by shard."""
    jobs = [(prompt, sample) for prompt in prompts for sample in range(config.num_samples)]
    return [jobs[i : i + config.shard_size] for i in range(0, len(jobs), config.shard_size)]


def _print_answers(config: SamplingOptions, kind: str) -> None:
    """Print the answers of a finished folder in one line; a warning if many were cut off."""
    totals = RolloutStore.open(config.out, kind=kind).summary()
    answers, cut = totals["sequences"], totals["finish_reasons"]["length"]
    text = f"{config.out}: {answers} answers, {totals['response_tokens']} tokens"
    if cut:
        text += (
            f"; {cut} answers ({cut / answers:.0%}) were cut off at max_new_tokens "
            f"{config.max_new_tokens}: a larger one lets them end"
        )
    else:
        text += ", none cut off"
    LOG.log(logging.WARNING if cut > MANY_CUT * answers else logging.INFO, text)


def recorded_date(out: str) -> date | None:
    """The date that the prompts of an earlier run into this folder were written with, if any."""
    if not (Path(out) / MANIFEST_NAME).is_file():
        return None
    prompts = read_manifest(out).inputs.get("prompts")
    reading = prompts.get("reading") if isinstance(prompts, Mapping) else None
    text = reading.get("date") if isinstance(reading, Mapping) else None
    return parse_date(text, f"{out}: {MANIFEST_NAME}") if text is not None else None


def _check_student(engine: Engine, path: str) -> None:
    """Refuse a student that training would refuse, before its answers are sampled and scored."""
    from lopd.models.head import check_trainable
    from lopd.training.dry_run import meta_model
    from lopd.training.result import rehearse

    model = getattr(engine, "model", None)  # only transformers shows it
    if model is None:
        model = meta_model(path, "float32")
    check_trainable(model)
    with TemporaryDirectory() as folder:
        rehearse(Path(folder), model, engine.tokenizer)


def _fill(
    writer: RolloutWriter,
    missing: list[int],
    shards: Sequence[tuple[str | None, list[tuple[Prompt, int]]]],
    config: SamplingOptions,
    models: Mapping[str | None, str],
    worker: Worker,
) -> None:
    sizes = writer.manifest.shards
    todo = sum(sizes[i] for i in missing)
    loaded: dict[str | None, Engine] = {}  # one at a time
    with Progress(total=sum(sizes), initial=sum(sizes) - todo, unit="seq", desc="sampling") as bar:
        for index in writer.claims():
            name, jobs = shards[index]
            if name not in loaded:
                loaded.clear()
                free_memory()
                loaded[name] = _load(config, models[name], writer.manifest.models[name], worker)
            generations = loaded[name].generate(
                [prompt.tokens for prompt, _ in jobs],
                config.sampling(),
                [sequence_seed(config.seed, prompt.id, sample) for prompt, sample in jobs],
                progress=bar.update,
            )
            if len(generations) != len(jobs):
                raise ModelError(
                    f"engine: {config.engine} gave {len(generations)} answers to {len(jobs)} "
                    "prompts; nothing is written"
                )
            pairs = zip(jobs, generations, strict=True)
            writer.write(index, [to_rollout(*job, generation) for job, generation in pairs])


def _load(config: SamplingOptions, model: str, recorded: ModelIdentity, worker: Worker) -> Engine:
    """The engine of a model, checked."""
    engine = load_engine(
        config.engine,
        model,
        dtype=config.dtype,
        device=config.device,
        local_rank=worker.local_rank,
        options=config.options(),
        batch_size=config.batch_size,
    )
    _check_eos(engine, recorded)
    for warning in turn_warnings(engine.tokenizer, engine.eos_ids):
        LOG.warning(f"{model}: {warning}")
    if isinstance(config, RolloutConfig):
        _check_student(engine, model)
    return engine


def _check_eos(engine: Engine, recorded: ModelIdentity) -> None:
    """Check that answers end with the ids that the manifest says they end with."""
    if recorded.behaviour is None:  # a folder that an older version began
        return
    ids, named = sorted(engine.eos_ids), list(recorded.eos_ids or ())
    if ids != named:
        raise ModelError(
            f"{recorded.path}: its files name the end-of-sequence ids {named}, but answers would "
            f"end with {ids}, in part a default of transformers; write the ids that you want into "
            "eos_token_id of generation_config.json"
        )
