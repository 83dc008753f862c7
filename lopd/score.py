"""Score stored rollouts with the teacher, once, into the sparse cache (`lopd score`).

Shard i of the cache holds the sequences of shard i of the rollouts, tokens included, so
that the cache is complete without them. The teacher must tokenise as the student does:
its vocabulary is stored beside the shards for the check that `lopd distill` makes.
"""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm import tqdm

from lopd.cache import CacheWriter, RolloutStore
from lopd.engines.hf import HfEngine
from lopd.errors import ConfigError
from lopd.models import check_model_folder, resolve_device, resolve_dtype
from lopd.provenance import build_manifest, describe_model, save_vocab


@dataclass(kw_only=True)
class ScoreConfig:
    """Score rollouts with the teacher (`lopd score`)."""

    teacher: str = field(metadata={"help": "Teacher, a local model folder."})
    rollouts: str = field(metadata={"help": "Folder that `lopd rollout` wrote."})
    out: str = field(metadata={"help": "Cache folder; an interrupted one is continued."})
    k: int = field(default=64, metadata={"help": "Largest list of teacher tokens at a position."})
    top_p: float = field(
        default=0.999, metadata={"help": "Lists end where their mass reaches this; 1 keeps all k."}
    )
    codec: str = field(default="exact", metadata={"help": "exact or packed (fp16 log-probs)."})
    temperature: float = field(
        default=1.0, metadata={"help": "Divides the teacher's logits; distillation uses the same."}
    )
    tokens_per_batch: int = field(default=16384, metadata={"help": "Padded tokens in a forward."})
    dtype: str = field(default="bfloat16", metadata={"help": "float32, bfloat16 or float16."})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda or cuda:N."})

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"temperature: found {self.temperature}; expected a positive number")
        resolve_dtype(self.dtype)
        resolve_device(self.device)


def main(config: ScoreConfig) -> Path:
    """Score what is missing of the cache; returns its folder.

    Raises ShardError for rollouts that are altered: what is trained on is hashed first.
    """
    check_model_folder(config.teacher)
    rollouts = RolloutStore.open(config.rollouts, kind="rollouts")
    rollouts.verify()
    source = rollouts.manifest
    model = describe_model(config.teacher, dtype=config.dtype, engine=HfEngine.name)
    if not 1 <= config.k <= model["vocab_size"]:
        raise ConfigError(
            f"k: found {config.k}; expected 1 to the teacher's vocabulary of {model['vocab_size']}"
        )
    manifest = build_manifest(
        "cache",
        stage="score",
        config=asdict(config),
        model=model,
        inputs={
            "rollouts": {
                "digest": rollouts.digest(),
                "model": source["model"],
                "lineage": source["lineage"],
                "sampling": source["sampling"],
            }
        },
        plan=source["plan"],
        k=config.k,
        top_p=config.top_p,
        codec=config.codec,
        temperature=config.temperature,
    )
    with CacheWriter.create(config.out, manifest) as writer:
        missing = writer.missing()
        if missing:
            save_vocab(config.teacher, config.out)
            _fill(writer, missing, rollouts, config)
        writer.finish()
    return Path(config.out)


def _fill(
    writer: CacheWriter, missing: list[int], rollouts: RolloutStore, config: ScoreConfig
) -> None:
    engine = HfEngine.load(
        config.teacher,
        dtype=config.dtype,
        device=config.device,
        tokens_per_batch=config.tokens_per_batch,
    )
    sizes = rollouts.manifest["plan"]["shards"]
    done = sum(sizes) - sum(sizes[index] for index in missing)
    with tqdm(total=sum(sizes), initial=done, unit="seq", desc="scoring") as bar:
        for index in missing:
            sequences = rollouts.shard(index)
            scores = engine.score(
                [sequence.tokens for sequence in sequences],
                [sequence.prompt_length for sequence in sequences],
                config.k,
                temperature=config.temperature,
                progress=bar.update,
            )
            writer.write(index, list(zip(sequences, scores, strict=True)))
