"""Sample a model's answers to prompts, once, into a crash-safe store.

`lopd rollout` samples the fine-tuned student; `lopd sft-data` (lopd/stages/sft_data.py) uses the
same code path to sample the teacher. The store holds token ids, never text, with the
end-of-sequence token, and the log-probs of the sampling distribution; those at temperature 1 are
stored beside them where the two differ. Several processes may sample into one folder
(`--worker i/n`, or torchrun).
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory

from lopd.config.dtype import with_dtype
from lopd.config.inference import SamplingOptions
from lopd.config.rollout import RolloutConfig
from lopd.data.prompts import Prompt, check_prompts, describe_prompts, load_prompts
from lopd.data.rendering import PromptEncoder, parse_date
from lopd.data.turns import end_of_turn, turn_warnings
from lopd.engines import load_engine
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
    return sample_to_store(config, model=config.student, kind="rollouts", stage="rollout")


def sample_to_store(config: SamplingOptions, *, model: str, kind: str, stage: str) -> Path:
    """Sample the missing shards of a store of answers; returns its folder.

    Sequences are numbered prompt by prompt, sample by sample. Shard i holds the i-th run of
    `shard_size` sequences, so an interrupted run continues with the missing shards.
    """
    config, worker = with_dtype(config), this_worker(config.worker)
    check_model_folder(model)
    warn_if_edited(model)
    tokenizer = load_tokenizer(model)
    encoder = PromptEncoder(tokenizer, config, recorded_date(config.out))
    prompts = check_prompts(
        load_prompts(config.prompts, encoder, limit=config.limit),
        config.prompts,
        context=context_of(model, config.engine),
        vocab_size=vocab_size_of(model),
        max_new_tokens=config.max_new_tokens,
        skip=config.skip_bad_records,
    )
    config = with_batch_size(config, model, [prompt.tokens for prompt in prompts])
    jobs = [(prompt, sample) for prompt in prompts for sample in range(config.num_samples)]
    shards = [jobs[i : i + config.shard_size] for i in range(0, len(jobs), config.shard_size)]
    manifest = build_manifest(
        kind,
        stage=stage,
        config=asdict(config),
        model=describe_model(model, dtype=config.dtype, engine=config.engine),
        sampling=asdict(config.sampling())
        | {"seed": config.seed, "num_samples": config.num_samples},
        inputs={"prompts": describe_prompts(config.prompts, encoder)},
        lineage=lineage_of(model),
        plan={"shards": [len(shard) for shard in shards]},
        end_of_turn=end_of_turn(tokenizer),
    )
    with RolloutWriter.create(config.out, manifest, worker=worker) as writer:
        missing = writer.missing()
        if missing:
            save_vocab(model, config.out)
            _fill(writer, missing, shards, config, model, worker)
        else:
            say_finished(config.out)
        if not writer.finish():
            LOG.info(f"{config.out}: {worker} is done, others are still writing")
            return Path(config.out)
    _print_answers(config, kind)
    return Path(config.out)


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
    shards: list[list[tuple[Prompt, int]]],
    config: SamplingOptions,
    model: str,
    worker: Worker,
) -> None:
    engine = load_engine(
        config.engine,
        model,
        dtype=config.dtype,
        device=config.device,
        local_rank=worker.local_rank,
        options=config.options(),
        batch_size=config.batch_size,
    )
    _check_eos(engine, writer.manifest.model)
    for warning in turn_warnings(engine.tokenizer, engine.eos_ids):
        LOG.warning(f"{model}: {warning}")
    if isinstance(config, RolloutConfig):
        _check_student(engine, model)
    total, todo = sum(map(len, shards)), sum(len(shards[i]) for i in missing)
    with Progress(total=total, initial=total - todo, unit="seq", desc="sampling") as bar:
        for index in writer.claims():
            jobs = shards[index]
            generations = engine.generate(
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
