"""Rollouts, scores and folders for the tests of lopd.store."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lopd.provenance import Manifest, build_manifest
from lopd.provenance.io import pretty_json
from lopd.provenance.manifest import parse_manifest
from lopd.store import CacheWriter, Rollout, RolloutWriter, TeacherScores
from lopd.store.receipts import sealed

SHARDS = [f"shard-{i:05d}.safetensors" for i in range(3)]
RECEIPTS = [f"shard-{i:05d}.json" for i in range(3)]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def make_pair(
    index: int,
    *,
    vocab_size: int = 40,
    k: int = 8,
    prompt_length: int = 3,
    length: int = 6,
    spread: float = 2.0,
    raw_differs: bool = False,
    seed: int = 0,
) -> tuple[Rollout, TeacherScores, np.ndarray]:  # , the teacher's [R, V] fp64 log-probs
    """One rollout of uniform tokens and the scores of a random teacher, exact to fp32."""
    rng = np.random.default_rng([seed, index])
    dense = log_softmax(rng.normal(size=(length, vocab_size)) * spread)
    order = np.argsort(-dense, axis=1, kind="stable")
    ranked = np.take_along_axis(dense, order, axis=1)
    tokens = rng.integers(0, vocab_size, prompt_length + length).astype(np.int32)
    teacher_logprobs = np.take_along_axis(dense, tokens[prompt_length:, None], axis=1)[:, 0]
    sampled = (teacher_logprobs + 0.01).clip(max=0).astype(np.float32)
    with np.errstate(divide="ignore"):
        tail = np.log(np.exp(ranked[:, k:]).sum(axis=1))
    rollout = Rollout(
        prompt_id=f"prompt-{index}",
        sample=index % 3,
        tokens=tokens,
        prompt_length=prompt_length,
        finish_reason="stop" if index % 2 else "length",
        loss_mask=np.arange(prompt_length + length) >= prompt_length,
        rollout_logprobs=sampled,
        rollout_logprobs_raw=(sampled * 2).astype(np.float32) if raw_differs else sampled,
    )
    scores = TeacherScores(
        teacher_logprobs=teacher_logprobs.astype(np.float32),
        teacher_entropy=(-(np.exp(dense) * dense).sum(axis=1)).astype(np.float32),
        topk_ids=order[:, :k].astype(np.int32),
        topk_logprobs=ranked[:, :k].astype(np.float32),
        tail_logprobs=tail.astype(np.float32),
    )
    return rollout, scores, dense


def make_manifest(
    kind: str = "cache",
    *,
    plan: Sequence[int] = (2, 1, 2),
    vocab_size: int = 40,
    path: str = "/models/m",
    config: Any = None,
    **extra: Any,
) -> Any:  # a Manifest, a CacheManifest for a cache
    settings = {"k": 8, "top_p": 1.0, "codec": "exact", "temperature": 1.0}
    extra = {**settings, **extra} if kind == "cache" else extra
    model = {
        "path": path,
        "weights": "a" * 64,
        "tokenizer": "b" * 64,
        "vocab_size": vocab_size,
        **extra.pop("model", {}),
    }
    rollouts = {
        "digest": "c" * 64,
        "model": {"weights": "d" * 64},
        **extra.pop("rollouts", {}),
    }
    return build_manifest(
        kind,
        stage="test",
        config=config or {},
        model=model,
        inputs={"rollouts": rollouts} if kind == "cache" else None,
        plan={"shards": list(plan)},
        **extra,
    )


def damaged(manifest: Manifest, **fields: Any) -> Any:
    """The manifest with other top-level fields, which no writer would have written."""
    return parse_manifest({**manifest.raw, **fields})


def shards_of(plan: Sequence[int], make: Callable[[int], Any]) -> list[list[Any]]:
    """The plan's sequences, numbered through."""
    ends = np.cumsum(plan)
    return [[make(i) for i in range(end - n, end)] for n, end in zip(plan, ends, strict=True)]


def write_cache(folder: Path, manifest: Manifest, **pair: Any) -> None:
    """Write what is missing of a cache whose sequence i is `make_pair(i)`."""
    pair = {"vocab_size": manifest.vocab_size, "k": manifest.k, **pair}
    shards = shards_of(manifest.shards, lambda i: make_pair(i, **pair)[:2])
    with CacheWriter.create(folder, manifest) as writer:
        for shard in writer.missing():
            writer.write(shard, shards[shard])
        writer.finish()


def write_rollouts(folder: Path, manifest: Manifest, **pair: Any) -> None:
    shards = shards_of(manifest.shards, lambda i: make_pair(i, **pair)[0])
    with RolloutWriter.create(folder, manifest) as writer:
        for shard in writer.missing():
            writer.write(shard, shards[shard])
        writer.finish()


def edit_receipt(path: Path, *, without: str = "digest", **changes: Any) -> None:
    """Change a receipt and seal it again, as no accident would."""
    content = json.loads(path.read_text()) | changes
    del content["digest"]
    content.pop(without, None)
    path.write_bytes(pretty_json(sealed(content)))


def flip(path: Path, position: int) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def files_of(folder: Path) -> dict[str, bytes]:
    """The shards and receipts of a folder, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*"))}
