"""Sample a model's answers to prompts, once, into a crash-safe store.

`lopd rollout` samples the fine-tuned student; `lopd sft-data` (lopd/stages/sft_data.py) uses the
same code path to sample the teacher. The store holds token ids, never text, with the
end-of-sequence token, and the log-probs of the sampling distribution; those at temperature 1 are
stored beside them where the two differ. Several processes may sample into one folder
(`--worker i/n`, or torchrun).
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from lopd.config.fields import setting
from lopd.data.prompts import Prompt, check_prompts, load_prompts
from lopd.engines import load_engine
from lopd.engines.base import Engine, sequence_seed, to_rollout
from lopd.engines.options import EngineOptions, GenerationOptions
from lopd.errors import ModelError
from lopd.models.load import check_model_folder, context_of, load_tokenizer
from lopd.provenance import (
    build_manifest,
    describe_file,
    describe_model,
    lineage_of,
    save_vocab,
    vocab_size_of,
)
from lopd.store import RolloutWriter
from lopd.store.workers import Worker, this_worker


@dataclass(kw_only=True)
class SamplingOptions(EngineOptions, GenerationOptions):
    """Settings that `lopd sft-data` and `lopd rollout` share."""

    out: str = setting(identity=False, help="Folder to write; an interrupted run is continued.")
    num_samples: int = setting(
        1, within="[1, inf)", group="Sampling", help="Number of answers to each prompt."
    )
    shard_size: int = setting(
        1024, within="[1, inf)", group="Model and data", help="Sequences per shard file."
    )
    worker: str | None = setting(
        None,
        group="Devices and processes",
        identity=False,
        help="i/n: be worker i (from 0) of n workers on this folder.",
    )


@dataclass(kw_only=True)
class RolloutConfig(SamplingOptions):
    """Sample the student's answers to prompts (`lopd rollout`)."""

    student: str = setting(identity=False, help="Folder of the fine-tuned student.")


def main(config: RolloutConfig) -> Path:
    return sample_to_store(config, model=config.student, kind="rollouts", stage="rollout")


def sample_to_store(config: SamplingOptions, *, model: str, kind: str, stage: str) -> Path:
    """Sample the missing shards of a store of answers; returns its folder.

    Sequences are numbered prompt by prompt, sample by sample. Shard i holds the i-th run of
    `shard_size` sequences, so an interrupted run continues with the missing shards.
    """
    worker = this_worker(config.worker)
    check_model_folder(model)
    tokenizer = load_tokenizer(model)
    prompts = load_prompts(config.prompts, tokenizer, limit=config.limit)
    check_prompts(
        prompts,
        config.prompts,
        context=context_of(model, config.engine),
        vocab_size=vocab_size_of(model),
        max_new_tokens=config.max_new_tokens,
    )
    jobs = [(prompt, sample) for prompt in prompts for sample in range(config.num_samples)]
    shards = [jobs[i : i + config.shard_size] for i in range(0, len(jobs), config.shard_size)]
    manifest = build_manifest(
        kind,
        stage=stage,
        config=asdict(config),
        model=describe_model(model, dtype=config.dtype, engine=config.engine),
        sampling=asdict(config.sampling())
        | {"seed": config.seed, "num_samples": config.num_samples},
        inputs={"prompts": describe_file(config.prompts)},
        lineage=lineage_of(model),
        plan={"shards": [len(shard) for shard in shards]},
    )
    with RolloutWriter.create(config.out, manifest, worker=worker) as writer:
        missing = writer.missing()
        if missing:
            save_vocab(model, config.out)
            _fill(writer, missing, shards, config, model, worker)
        if not writer.finish():
            print(f"{config.out}: {worker} is done, others are still writing", file=sys.stderr)
    return Path(config.out)


def _check_student(engine: Engine, path: str) -> None:
    """Refuse a student that training would refuse, before its answers are sampled and scored."""
    from lopd.models.head import check_trainable
    from lopd.training.dry_run import meta_model

    loaded = getattr(engine, "model", None)  # only transformers shows it
    check_trainable(meta_model(path, "float32") if loaded is None else loaded)


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
    if isinstance(config, RolloutConfig):
        _check_student(engine, model)
    total, todo = sum(map(len, shards)), sum(len(shards[i]) for i in missing)
    with tqdm(total=total, initial=total - todo, unit="seq", desc="sampling") as bar:
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
