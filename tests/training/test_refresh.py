"""Refreshed rollouts: equality with a plain loop, resuming, and refusals."""

import shutil

import pytest
import torch
from helpers_artefacts import COUNT, describe, logged, trained_weights, write_model, write_pipeline
from helpers_cache import damaged
from helpers_training import SAME_UPDATE, largest_difference, update_error, weights

from lopd.config.objective import Objective
from lopd.config.training import TrainOptions
from lopd.data.prompts import Prompt
from lopd.engines.base import Sampling, sequence_seed, to_rollout
from lopd.engines.transformers import TransformersEngine
from lopd.errors import ConfigError, DataError, ProvenanceError, ShardError
from lopd.provenance import MANIFEST_NAME, manifest_digest, read_manifest
from lopd.stages import distill
from lopd.store import TeacherCache, scored_sequence
from lopd.training.batch import Collator
from lopd.training.loop import train_loop
from lopd.training.refresh import RefreshTrainer
from lopd.training.sampler import StepSampler
from lopd.training.trainer import LopdTrainer

SETTINGS = {
    "max_steps": 7,
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "device": "cpu",
    "save_every": 0,
    "log_every": 1,
}


def distilled(pipeline, out, every, **changes):
    paths = {name: str(pipeline / name) for name in ("student", "cache")}
    live = {"refresh_every": every, "teacher": str(pipeline / "teacher")} if every else {}
    settings = {**paths, **SETTINGS, **live, **changes}
    return distill.main(distill.DistillConfig(out=str(out), **settings))


def by_hand(pipeline, every):
    """On-policy distillation in a plain loop: sample, score, step."""
    student = TransformersEngine.load(pipeline / "student", dtype="float32", device="cpu")
    teacher = TransformersEngine.load(pipeline / "teacher", dtype="float32", device="cpu")
    cached = [*TeacherCache.open(pipeline / "cache").rollouts()]
    options = TrainOptions(**SETTINGS, weight_decay=0.1)
    sampler = StepSampler([len(r.tokens) for r in cached], 2, 2, seed=options.seed)
    turns = [turn for epoch in range(4) for turn in sampler.steps(epoch)]

    def sampled(index, window):
        old = cached[index]
        prompt = Prompt(old.prompt_id, old.tokens[: old.prompt_length].tolist(), None)
        stream = sequence_seed(sequence_seed(options.seed, "window", window), old.prompt_id, 0)
        (answer,) = student.generate([prompt.tokens], Sampling(9), [stream])
        rollout = to_rollout(prompt, 0, answer)
        (scores,) = teacher.score([rollout.tokens], [rollout.prompt_length], 4)
        return scored_sequence(rollout, scores)

    def batches():
        for step in range(options.max_steps):
            if step % every == 0:
                wanted = {i for turn in turns[step : step + every] for i in turn}
                fresh = {i: sampled(i, step // every) for i in wanted}
            items = [fresh[i] for i in turns[step]]
            yield [Collator()(items[:2]), Collator()(items[2:])]

    train_loop(student.model, batches(), Objective("reverse_kl"), options)
    return weights(student.model)


@pytest.mark.parametrize("every", [1, 3])
def test_refreshed_training_equals_on_policy_distillation(pipeline, tmp_path, every):
    out = distilled(pipeline, tmp_path / "out", every)
    expected = by_hand(pipeline, every)
    start = trained_weights(pipeline / "student")
    assert update_error(trained_weights(out), expected, start) < SAME_UPDATE
    assert largest_difference(start, expected) > 1e-2
    other = by_hand(pipeline, 4 - every)
    assert largest_difference(trained_weights(out), other) > 1e-3


@pytest.mark.thorough
def test_packing_and_checkpointing_affect_only_rounding(pipeline, tmp_path):
    plain = distilled(pipeline, tmp_path / "plain", 2)
    packed = distilled(pipeline, tmp_path / "packed", 2, max_tokens_per_batch=30)
    again = distilled(pipeline, tmp_path / "again", 2, gradient_checkpointing=True)
    start = trained_weights(pipeline / "student")
    for other in (packed, again):
        assert update_error(trained_weights(other), trained_weights(plain), start) < SAME_UPDATE


def test_adapters_are_trained_on_refreshed_rollouts(pipeline, tmp_path):
    pytest.importorskip("peft")
    out = distilled(pipeline, tmp_path / "out", 2, lora_rank=2, max_steps=3)
    start = trained_weights(pipeline / "student")
    assert largest_difference(trained_weights(out), start) > 1e-5


def kill_at(monkeypatch, step):
    compute_loss = LopdTrainer.compute_loss

    def killed(self, *args, **kwargs):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(LopdTrainer, "compute_loss", killed)


def windows(out):
    return sorted(folder.name for folder in (out / "refresh").iterdir())


@pytest.mark.parametrize("limit", [2, 1], ids=["inside a window", "between two"])
def test_a_killed_run_continues_to_the_same_weights(pipeline, tmp_path, monkeypatch, limit):
    settings = {"save_every": 2 * limit, "max_steps": 8}
    every = 3 if limit == 2 else 2
    whole = distilled(pipeline, tmp_path / "whole", every, **settings)
    cut = tmp_path / "cut"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_at(patch, 7)
        distilled(pipeline, cut, every, **settings)
    renewed, renew = [], RefreshTrainer.renew
    monkeypatch.setattr(
        RefreshTrainer, "renew", lambda *args: renewed.append(args[2]) or renew(*args)
    )
    distilled(pipeline, cut, every, **settings)
    assert renewed == ([2] if limit == 2 else [3])
    assert largest_difference(trained_weights(whole), trained_weights(cut)) == 0.0
    first, second = read_manifest(whole), read_manifest(cut)
    assert manifest_digest(first) == manifest_digest(second)
    assert first.raw["seconds"] != second.raw["seconds"]


def test_a_missing_window_is_named(pipeline, tmp_path, monkeypatch):
    out, settings = tmp_path / "out", {"save_every": 4}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_at(patch, 5)
        distilled(pipeline, out, 3, **settings)
    assert windows(out) == ["step-00000003"]
    shutil.rmtree(out / "refresh" / "step-00000003")
    with pytest.raises(ShardError, match="step-00000003: missing or altered, and checkpoint-4"):
        distilled(pipeline, out, 3, **settings)
    with pytest.raises(ConfigError, match=r"another recipe \(refresh_every was 3, is 2\)"):
        distilled(pipeline, out, 2, **settings)


def test_windows_that_contain_a_checkpoint_are_not_removed(pipeline, tmp_path):
    out = distilled(pipeline, tmp_path / "a", 3, save_every=4, save_total_limit=3)
    assert windows(out) == ["step-00000003", "step-00000006"]
    assert windows(distilled(pipeline, tmp_path / "b", 3)) == ["step-00000006"]


def test_only_windows_are_removed(pipeline, tmp_path, monkeypatch):
    out, renew = tmp_path / "out", RefreshTrainer.renew

    def watched(trainer, sequences, window):
        (out / "refresh" / "step-00000000.copy").mkdir(exist_ok=True)
        return renew(trainer, sequences, window)

    monkeypatch.setattr(RefreshTrainer, "renew", watched)
    assert windows(distilled(pipeline, out, 3)) == ["step-00000000.copy", "step-00000006"]


def test_a_window_is_a_cache_with_the_settings_of_the_runs(pipeline, tmp_path):
    cache = tmp_path / "compact"
    shutil.copytree(pipeline / "cache", cache)
    manifest = damaged(read_manifest(cache), codec="compact", top_p=0.6)
    for file in cache.glob("shard-*"):
        file.unlink()
    rewritten = rewrite(cache, manifest, pipeline)
    out = distilled(pipeline, tmp_path / "out", 20, cache=str(rewritten), max_steps=6)
    window = TeacherCache.open(out / "refresh" / "step-00000000")
    assert len(window) == COUNT
    keys = ("codec", "top_p", "k", "temperature")
    assert [getattr(window.manifest, key) for key in keys] == ["compact", 0.6, 4, 1.0]
    assert window.manifest.model.weights == describe(pipeline / "teacher").weights
    old = {r.prompt_id: r for r in TeacherCache.open(pipeline / "cache").rollouts()}
    for new in window.rollouts():
        length = new.prompt_length
        assert (new.tokens[:length] == old[new.prompt_id].tokens[:length]).all()
    assert any(len(n.tokens) != len(old[n.prompt_id].tokens) for n in window.rollouts())


def rewrite(cache, manifest, pipeline):
    from lopd.store import CacheWriter, RolloutStore, TeacherScores

    source = TeacherCache.open(pipeline / "cache", support="list")
    store = RolloutStore.open(pipeline / "rollouts")
    start = 0
    with CacheWriter.create(cache, manifest) as writer:
        for shard, count in enumerate(manifest.shards):
            items = source.read(range(start, start + count))
            scores = [
                TeacherScores(
                    item.teacher_logprobs,
                    item.teacher_entropy,
                    item.topk_ids,
                    item.topk_logprobs,
                    item.tail_logprobs,
                )
                for item in items
            ]
            writer.write(shard, [*zip(store.shard(shard), scores, strict=True)])
            start += count
        writer.finish()
    return cache


def test_log_and_manifest_report_the_seconds_of_each_part(pipeline, tmp_path):
    out = distilled(pipeline, tmp_path / "out", 3)
    manifest, log = read_manifest(out).raw, logged(out)
    begun = [entry for entry in log if "generation_seconds" in entry]
    ended = [entry for entry in log if "update_seconds" in entry]
    assert [entry["step"] for entry in begun] == [0, 3, 6]
    assert [(e["step"], e["update_steps"]) for e in ended] == [(3, 3), (6, 3), (7, 1)]
    assert manifest["refresh"]["every"] == 3 and manifest["refresh"]["windows"] == 3
    assert manifest["refresh"]["sequences"] == sum(e["renewed_sequences"] for e in begun)
    for name, entries in (("generation", begun), ("scoring", begun), ("update", ended)):
        spent = sum(entry[f"{name}_seconds"] for entry in entries)
        assert manifest["seconds"][name] == pytest.approx(spent) and spent > 0
    assert manifest["inputs"]["teacher"]["weights"] == describe(pipeline / "teacher").weights
    assert "refresh" not in read_manifest(distilled(pipeline, tmp_path / "offline", 0)).raw


def test_refreshing_restores_the_mode_and_draws_no_random_number(pipeline, tmp_path, monkeypatch):
    found, renew = [], RefreshTrainer.renew

    def observed(self, *args):
        self.model.train()
        before = torch.get_rng_state()
        result = renew(self, *args)
        found.append((self.model.training, torch.equal(before, torch.get_rng_state())))
        return result

    monkeypatch.setattr(RefreshTrainer, "renew", observed)
    distilled(pipeline, tmp_path / "out", 2, max_steps=3)
    assert found == [(True, True)] * 2


def test_another_teacher_is_refused(pipeline, tmp_path, no_model):
    other = write_model(tmp_path / "other", seed=5)
    with pytest.raises(ProvenanceError, match=r"other has weights \w{12}, .* scored with \w{12}"):
        distilled(pipeline, tmp_path / "out", 1, teacher=str(other))
    assert not (tmp_path / "out").exists()


def test_several_processes_are_refused(pipeline, tmp_path, no_model, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="refresh_every: found 2 processes"):
        distilled(pipeline, tmp_path / "out", 1)


def test_packs_too_small_for_the_longest_answer_are_refused(pipeline, tmp_path, no_model):
    with pytest.raises(ConfigError, match="found 12, but a refreshed sequence may have 13 tokens"):
        distilled(pipeline, tmp_path / "out", 1, max_tokens_per_batch=12)


def test_a_context_too_short_for_the_longest_answer_is_refused(tmp_path, no_model):
    pipeline = write_pipeline(tmp_path / "pipeline")
    for name in ("student", "teacher"):
        file = pipeline / name / "config.json"
        file.write_text(file.read_text().replace(": 64", ": 12", 1))
    assert (pipeline / "cache" / MANIFEST_NAME).exists()
    with pytest.raises((DataError, ProvenanceError)):
        distilled(pipeline, tmp_path / "out", 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"refresh_every": 2}, "refresh_every: found 2 with teacher None"),
        ({"teacher": "t"}, "refresh_every: found 0 with teacher 't'"),
        ({"refresh_every": -1, "teacher": "t"}, "refresh_every: found -1"),
        ({"refresh_every": 1, "teacher": "t", "drop_truncated": True}, "drop_truncated: depends"),
        ({"refresh_batch_size": 0}, "refresh_batch_size: found 0"),
    ],
)
def test_contradicting_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        distill.DistillConfig(student="s", cache="c", out="o", **changes)
