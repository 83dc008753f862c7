"""Sample a model's answers to prompts, once, into a crash-safe store.

`lopd rollout` samples the fine-tuned student; `lopd sft-data` (lopd/stages/sft_data.py) uses the
same code path to sample the teacher. The store holds token ids, never text, with the
end-of-sequence token, and the log-probs of the sampling distribution; those at temperature 1 are
stored beside them where the two differ. Several processes may sample into one folder
(`--worker i/n`, or torchrun).
"""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm import tqdm

from lopd.data.prompts import Prompt, check_prompts, load_prompts
from lopd.engines import load_engine
from lopd.engines.base import Sampling, sequence_seed, to_rollout
from lopd.engines.options import EngineOptions
from lopd.errors import ConfigError, ModelError
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
class SamplingOptions(EngineOptions):
    """What `sft-data` and `rollout` share."""

    prompts: str = field(
        metadata={"help": "JSONL or parquet with 'prompt' or 'messages' in each record."}
    )
    out: str = field(metadata={"help": "Folder to write; an interrupted one is continued."})
    num_samples: int = field(default=1, metadata={"help": "Answers to each prompt."})
    limit: int | None = field(default=None, metadata={"help": "Use the first so many prompts."})
    max_new_tokens: int = field(default=4096, metadata={"help": "Longest answer, in tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature; 0 is greedy."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus of the sampling distribution."})
    seed: int = field(default=0, metadata={"help": "Seed of every sequence's own random stream."})
    batch_size: int = field(default=64, metadata={"help": "Sequences decoded together."})
    shard_size: int = field(default=1024, metadata={"help": "Sequences in a shard file."})
    worker: str | None = field(
        default=None, metadata={"help": "i/n: be worker i, from 0, of n on this folder."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_samples", "batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: found {getattr(self, name)}; expected at least 1")
        self.sampling()

    def sampling(self) -> Sampling:
        return Sampling(self.max_new_tokens, self.temperature, self.top_p)


@dataclass(kw_only=True)
class RolloutConfig(SamplingOptions):
    """Sample the student's answers to prompts (`lopd rollout`)."""

    student: str = field(metadata={"help": "Fine-tuned student, a model folder."})


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
        context=context_of(model),
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
        sampling={
            **asdict(config.sampling()),
            "seed": config.seed,
            "num_samples": config.num_samples,
        },
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
