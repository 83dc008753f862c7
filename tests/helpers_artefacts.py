"""Small artefact folders for the tests of the training stages, made without an engine."""

import dataclasses
import json

import numpy as np
from helpers_training import make_rollouts, weights

from lopd.config.distill import DistillConfig
from lopd.models.load import load_model
from lopd.provenance import build_manifest, declare, describe_model, lineage_of, save_vocab
from lopd.stages.demo import arithmetic as toy
from lopd.store import CacheWriter, RolloutStore, RolloutWriter, TeacherScores
from lopd.training.logging import LOG_NAME

SIZE = {"hidden_size": 32, "intermediate_size": 32}
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 9, "seed": 0}
COUNT = 12
VOCAB = len(toy.build_tokenizer())


def describe(model):
    return describe_model(model, dtype="float32", engine="transformers")


def write_model(folder, seed=0, **changes):
    return toy.write_model(folder, {**SIZE, **changes}, seed=seed)


def write_sequences(folder, model, kind="rollouts", seed=0, truncated=(), vocab=VOCAB):
    """Random sequences in two shards, as if `model` had sampled them."""
    manifest = build_manifest(
        kind,
        stage="test",
        config={},
        model=describe(model),
        sampling=SAMPLING,
        lineage=lineage_of(model),
        plan={"shards": [COUNT - 4, 4]},
    )
    sequences = make_rollouts(COUNT, seed=seed, vocab=vocab, truncated=truncated)
    with RolloutWriter.create(folder, manifest) as writer:
        writer.write(0, sequences[:-4])
        writer.write(1, sequences[-4:])
        writer.finish()
    return folder


def write_cache(
    folder, teacher, rollouts, temperature=1.0, shards=(0, 1), vocab=VOCAB, has_logprobs=True,
    has_entropy=True,
):  # fmt: skip
    """Scores of a random teacher, as if `teacher` had given them."""
    store = RolloutStore.open(rollouts)
    source = {key: getattr(store.manifest, key) for key in ("model", "lineage", "sampling")}
    manifest = build_manifest(
        "cache",
        stage="test",
        config={},
        model=describe(teacher),
        inputs={"rollouts": {"digest": store.digest(), **source}},
        plan={"shards": store.manifest.shards},
        k=4,
        top_p=1.0,
        codec="exact",
        temperature=temperature,
        scoring=({} if has_logprobs else {"rollout_logprobs": "absent"})
        | ({} if has_entropy else {"entropy": "absent"}),
    )
    rng = np.random.default_rng(5)
    with CacheWriter.create(folder, manifest) as writer:
        save_vocab(teacher, folder)
        for shard in shards:
            sequences = store.shard(shard)
            if not has_logprobs:
                sequences = [without_logprobs(rollout) for rollout in sequences]
            pairs = [(rollout, score(rollout, rng, vocab)) for rollout in sequences]
            if not has_entropy:
                for _, scores in pairs:
                    scores.teacher_entropy[:] = np.nan
            writer.write(shard, pairs)
    return folder


def without_logprobs(rollout):
    unknown = np.full_like(rollout.rollout_logprobs, np.nan)
    return dataclasses.replace(rollout, rollout_logprobs=unknown, rollout_logprobs_raw=unknown)


def score(rollout, rng, vocab, k=4):
    length = len(rollout.tokens) - rollout.prompt_length
    logits = rng.normal(0, 2, (length, vocab))
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    ids = np.argsort(-logprobs, axis=1)[:, :k]
    listed = np.take_along_axis(logprobs, ids, 1)
    return TeacherScores(
        teacher_logprobs=logprobs[
            np.arange(length), rollout.tokens[rollout.prompt_length :]
        ].astype("f4"),
        teacher_entropy=-(np.exp(logprobs) * logprobs).sum(1).astype("f4"),
        topk_ids=ids.astype(np.int32),
        topk_logprobs=listed.astype("f4"),
        tail_logprobs=np.log1p(-np.exp(listed).sum(1)).astype("f4"),
    )


def write_pipeline(folder, **changes):
    """Teacher, declared student, its rollouts and their scores: what `lopd distill` reads.

    `changes` are of the student's config.
    """
    teacher = write_model(folder / "teacher", seed=1)
    student = write_model(folder / "student", seed=2, **changes)
    declare(student, teacher=teacher)
    rollouts = write_sequences(folder / "rollouts", student)
    write_cache(folder / "cache", teacher, rollouts)
    return folder


def distill_config(pipeline, out, **settings):
    """Settings of `lopd distill` on the student and the cache of `write_pipeline`."""
    paths = {name: str(pipeline / name) for name in ("student", "cache")}
    return DistillConfig(**{**paths, "out": str(out), **settings})


def trained_weights(folder):
    """The weights of a result, by name."""
    return weights(load_model(folder, dtype="float32", device="cpu"))


def logged(folder):
    """The entries of a run's log."""
    return [json.loads(line) for line in (folder / LOG_NAME).read_text().splitlines()]
