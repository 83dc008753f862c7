"""`lopd distill`: checks before a model is loaded, resumed runs, the final manifest."""

import dataclasses
import json
import os
import re
import shutil

import pytest
import torch
import transformers
from helpers_artefacts import (
    VOCAB,
    describe,
    write_cache,
    write_model,
    write_pipeline,
    write_sequences,
)
from helpers_training import SAME_UPDATE, largest_difference, update_error, weights

from lopd.errors import ConfigError, DataError, MissingFileError, ProvenanceError, ShardError
from lopd.models.load import load_model
from lopd.provenance import MANIFEST_NAME, declare, manifest_digest, read_manifest
from lopd.stages import distill
from lopd.store import TeacherCache
from lopd.store.locks import FolderLock
from lopd.training import checkpoints as checkpoint_files
from lopd.training import run as runs
from lopd.training.checkpoints import last_checkpoint, unusable
from lopd.training.logging import LOG_NAME
from lopd.training.trainer import LopdTrainer

SETTINGS = {
    "max_steps": 5,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "device": "cpu",
    "save_every": 0,
    "log_every": 2,
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("pipeline"))


def config(pipeline, out, **changes):
    paths = {name: str(pipeline / name) for name in ("student", "cache")}
    return distill.DistillConfig(**{**paths, "out": str(out), **SETTINGS, **changes})


@pytest.fixture
def no_model(monkeypatch):
    def explode(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", explode)


def trained_weights(folder):
    return weights(load_model(folder, dtype="float32", device="cpu"))


@pytest.mark.parametrize(
    "objective",
    [{}, {"objective": "jsd"}, {"objective": "policy_gradient", "advantage_clip": 1.0}],
    ids=["reverse_kl", "jsd", "policy_gradient"],
)
def test_distill_trains_and_records_its_inputs(pipeline, tmp_path, objective):
    out = distill.main(config(pipeline, tmp_path / "out", **objective))
    manifest = read_manifest(out, kind="checkpoint").raw
    student, teacher = describe(pipeline / "student"), describe(pipeline / "teacher")
    assert manifest["model"]["weights"] == describe(out).weights != student.weights
    assert manifest["model"]["tokenizer"] == student.tokenizer
    assert manifest["base"]["weights"] == student.weights
    assert manifest["inputs"]["cache"]["model"]["weights"] == teacher.weights
    assert manifest["lineage"]["sft_teacher"]["weights"] == teacher.weights
    assert manifest["lineage"]["declared"] is True
    assert manifest["lineage"]["initial_student"] == student.weights
    assert manifest["objective"]["name"] == objective.get("objective", "reverse_kl")
    assert manifest["objective"]["beta"] == (0.5 if objective.get("objective") == "jsd" else None)
    assert manifest["overrides"] == []
    assert manifest["training"] == {"sequences": 12, "dropped_share": 0.0}
    assert [entry["step"] for entry in logged(out)] == [2, 4, 5]
    assert json.loads((out / "config.json").read_text())["use_cache"] is True


def logged(folder):
    return [json.loads(line) for line in (folder / LOG_NAME).read_text().splitlines()]


def test_settings_reach_the_training(pipeline, tmp_path):
    def first(name, **changes):
        settings = {"max_steps": 1, "batch_size": 12, **changes}
        return logged(distill.main(config(pipeline, tmp_path / name, **settings)))[0]

    plain, by_sequence = first("plain"), first("mean", loss_aggregation="sequence_mean")
    stored = first("stored", support="list")
    assert plain["loss"] != pytest.approx(by_sequence["loss"], rel=1e-4)
    assert plain["teacher_tail"] < 0.99 * stored["teacher_tail"]


def test_ids_beyond_the_students_vocabulary_join_the_tail(tmp_path):
    teacher = write_model(tmp_path / "teacher", seed=1)
    settings = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(settings | {"vocab_size": 60}))
    student = write_model(tmp_path / "student", seed=2)
    declare(student, teacher=teacher)
    rollouts = write_sequences(tmp_path / "rollouts", student)
    cache = write_cache(tmp_path / "cache", teacher, rollouts, vocab=60)
    assert TeacherCache.open(cache).used_ids().max() >= VOCAB
    out = distill.main(config(tmp_path, tmp_path / "out", max_steps=1))
    assert logged(out)[0]["loss"] > 0


def test_loss_on_a_small_cache_falls(pipeline, tmp_path):
    settings = {"max_steps": 60, "batch_size": 12, "learning_rate": 1e-2, "log_every": 10}
    out = distill.main(config(pipeline, tmp_path / "out", **settings))
    losses = [entry["loss"] for entry in logged(out)]
    assert losses[-1] < 0.5 * losses[0]


def test_killed_run_resumes_to_the_same_weights(pipeline, tmp_path, monkeypatch):
    settings = {"max_steps": 6, "save_every": 2}
    whole = distill.main(config(pipeline, tmp_path / "whole", **settings))
    compute_loss = LopdTrainer.compute_loss

    def killed(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return compute_loss(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LopdTrainer, "compute_loss", killed)
        with pytest.raises(KeyboardInterrupt):
            distill.main(config(pipeline, tmp_path / "cut", **settings))
    torn = tmp_path / "cut" / "checkpoint-5"
    shutil.copytree(tmp_path / "cut" / "checkpoint-4", torn)
    (torn / "trainer_state.json").unlink()
    assert not (tmp_path / "cut" / MANIFEST_NAME).exists()

    steps = []

    def counted(self, *args, **kwargs):
        steps.append(self.state.global_step)
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(LopdTrainer, "compute_loss", counted)
    with pytest.raises(ConfigError, match=r"another recipe \(learning_rate was 0.001, is 0.002\)"):
        distill.main(config(pipeline, tmp_path / "cut", learning_rate=2e-3, **settings))
    # the workspace bound is not part of the recipe
    cut = distill.main(config(pipeline, tmp_path / "cut", workspace_bytes="64MiB", **settings))
    assert steps == [4, 5]
    assert largest_difference(trained_weights(whole), trained_weights(cut)) == 0.0
    assert manifest_digest(read_manifest(whole)) == manifest_digest(read_manifest(cut))


# Three steps are an epoch: the run ends within one, at the end of one, and within a later one.
@pytest.mark.parametrize("max_steps", [2, 3, 4, 7])
@pytest.mark.parametrize("best", [{}, {"holdout": 2, "eval_steps": 1, "keep_best": True}], ids=str)
def test_run_killed_while_its_result_is_written_takes_no_further_step(
    pipeline, tmp_path, monkeypatch, max_steps, best
):
    settings = {"max_steps": max_steps, "save_every": 2, "save_total_limit": 9, **best}
    whole = distill.main(config(pipeline, tmp_path / "whole", **settings))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("lopd.training.result.result_model", interrupted)
        distill.main(config(pipeline, tmp_path / "cut", **settings))
    assert last_checkpoint(tmp_path / "cut").name == f"checkpoint-{max_steps}"
    with monkeypatch.context() as patch:
        patch.setattr(LopdTrainer, "training_step", one_step_too_many)
        cut = distill.main(config(pipeline, tmp_path / "cut", **settings))
    assert largest_difference(trained_weights(whole), trained_weights(cut)) == 0.0
    assert manifest_digest(read_manifest(whole)) == manifest_digest(read_manifest(cut))
    assert checkpoint_names(whole) == checkpoint_names(cut)
    clock = {"tokens_per_second", "epoch"}
    for entry, other in zip(logged(whole), logged(cut), strict=True):
        assert {k: v for k, v in entry.items() if k not in clock} == {
            k: v for k, v in other.items() if k not in clock
        }


def checkpoint_names(folder):
    return [item.name for item in checkpoint_files.checkpoints(folder)]


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt


def one_step_too_many(*args, **kwargs):
    raise AssertionError("the run was trained further")


def test_run_resumes_with_other_micro_batches(pipeline, tmp_path, monkeypatch):
    """As an out-of-memory error advises; but the number of sequences per step must not change."""
    settings = {"max_steps": 4, "save_every": 2}
    whole = distill.main(config(pipeline, tmp_path / "whole", batch_size=4, **settings))
    training_step = LopdTrainer.training_step

    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("no room")

    def full(self, *args):
        with monkeypatch.context() as patch:
            if self.state.global_step == 3:
                patch.setattr("lopd.training.objective_trainer.step", out_of_memory)
            return training_step(self, *args)

    cut = tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr(LopdTrainer, "training_step", full)
        expected = r"step 4: out of memory in a micro-batch of 4 x \d+ tokens; .*checkpointing"
        with pytest.raises(ConfigError, match=expected):
            distill.main(config(pipeline, cut, batch_size=4, **settings))
    with pytest.raises(ConfigError, match=r"recipe \(sequences_per_step was 4, is 2\)"):
        distill.main(config(pipeline, cut, batch_size=2, **settings))
    smaller = {"batch_size": 2, "gradient_accumulation_steps": 2, "max_tokens_per_batch": 30}
    distill.main(config(pipeline, cut, gradient_checkpointing=True, **smaller, **settings))
    start = trained_weights(pipeline / "student")
    assert update_error(trained_weights(cut), trained_weights(whole), start) < SAME_UPDATE


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        ({"dtype": "bfloat16", "learning_rate": 2e-6}, True),
        ({"dtype": "bfloat16", "learning_rate": 1e-3}, False),
        ({"dtype": "bfloat16", "learning_rate": 2e-6, "lora_rank": 2}, False),
        ({"mixed_precision": "bf16", "learning_rate": 2e-6}, False),
    ],
)
def test_updates_lost_to_bfloat16_rounding_are_reported(
    pipeline, tmp_path, capsys, changes, warned
):
    if "lora_rank" in changes:
        pytest.importorskip("peft")
    out = distill.main(config(pipeline, tmp_path / "out", max_steps=1, **changes))
    assert ("this small are lost to rounding" in capsys.readouterr().err) == warned
    assert out.is_dir()


def test_finished_runs_and_other_folders_are_not_overwritten(pipeline, tmp_path, no_model):
    done = tmp_path / "done"
    done.mkdir()
    (done / MANIFEST_NAME).write_text("{}")
    with pytest.raises(DataError, match=r"manifest\.json is not a lopd manifest"):
        distill.main(config(pipeline, done))
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds notes\.txt and no recipe\.json"):
        distill.main(config(pipeline, other))
    assert [file.name for file in other.iterdir()] == ["notes.txt"]


def test_run_without_a_checkpoint_may_change_its_recipe(pipeline, checkpoints, tmp_path):
    (tmp_path / ".recipe.json.1.tmp").write_text("{")
    base = describe(pipeline / "student")
    assert runs.begin(config(pipeline, tmp_path), base=base, cache="c") is None
    changed = config(pipeline, tmp_path, drop_truncated=True)
    assert runs.begin(changed, base=base, cache="d") is None
    checkpoint = shutil.copytree(checkpoints / "checkpoint-2", tmp_path / "checkpoint-2")
    assert runs.begin(changed, base=base, cache="d") == checkpoint
    with pytest.raises(ConfigError, match=r"holds another recipe \(cache was 'd', is 'e'\)"):
        runs.begin(changed, base=base, cache="e")
    with pytest.raises(ConfigError, match=r"another recipe \(base\.weights was"):
        runs.begin(changed, base=dataclasses.replace(base, weights="0"), cache="d")


@pytest.fixture(scope="module")
def checkpoints(pipeline, tmp_path_factory):
    """A run that was killed after its last checkpoint: 2, 4 and 6 are complete."""
    out = tmp_path_factory.mktemp("killed") / "out"
    settings = {"max_steps": 6, "save_every": 2, "save_total_limit": 3}
    distill.main(config(pipeline, out, **settings))
    (out / MANIFEST_NAME).unlink()
    return out


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


TORN = {
    "nothing": shutil.rmtree,
    "an empty folder": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
    "no state": lambda folder: (folder / "trainer_state.json").unlink(),
    "torn state": lambda folder: os.truncate(folder / "trainer_state.json", 40),
    "another state": lambda folder: (folder / "trainer_state.json").write_text("{}"),
    "no optimizer": lambda folder: (folder / "optimizer.pt").unlink(),
    "torn optimizer": lambda folder: truncate(folder / "optimizer.pt"),
    "torn scheduler": lambda folder: truncate(folder / "scheduler.pt"),
    "torn random state": lambda folder: os.truncate(folder / "rng_state.pth", 0),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "torn weights": lambda folder: truncate(folder / "model.safetensors"),
}


@pytest.mark.parametrize("tear", TORN.values(), ids=TORN)
def test_run_resumes_from_the_last_complete_checkpoint(checkpoints, tmp_path, tear):
    assert last_checkpoint(tmp_path / "nowhere") is None
    out = shutil.copytree(checkpoints, tmp_path / "out")
    (out / "checkpoint-bak").mkdir()
    (out / "checkpoint-7").write_text("a file")
    shutil.copytree(out / "checkpoint-6", out / "checkpoint-10")  # its state says step 6
    assert last_checkpoint(out) == out / "checkpoint-6"
    tear(out / "checkpoint-6")
    assert last_checkpoint(out) == out / "checkpoint-4"


def test_torn_checkpoint_is_set_aside_and_reported(pipeline, checkpoints, tmp_path, capsys):
    out = shutil.copytree(checkpoints, tmp_path / "out")
    truncate(out / "checkpoint-6" / "optimizer.pt")
    shutil.copytree(checkpoints / "checkpoint-6", out / "checkpoint-7")
    (out / "checkpoint-bak").mkdir()
    (out / ".saving.tmp" / "checkpoint-5").mkdir(parents=True)  # of a killed writer
    settings = {"max_steps": 6, "save_every": 1, "save_total_limit": 1}
    distill.main(config(pipeline, out, **settings))
    errors = capsys.readouterr().err
    assert f"{out}: checkpoint-6 is put aside as torn-checkpoint-6: " in errors
    assert re.search(r"optimizer\.pt: found \d+ bytes, the receipt says \d+; restore it\n", errors)
    assert "checkpoint-7 is put aside as torn-checkpoint-7: its receipt is that of step 6" in errors
    assert f"{out}: continues from checkpoint-4\n" in errors
    assert (out / "checkpoint-bak").is_dir() and not [*out.glob(".*.tmp")]
    assert not unusable(out / "checkpoint-6") and (out / "torn-checkpoint-6").is_dir()
    assert largest_difference(trained_weights(out), trained_weights(checkpoints)) == 0.0


def test_second_process_in_the_same_folder_is_refused(pipeline, tmp_path, no_model):
    first = config(pipeline, tmp_path / "out")
    (tmp_path / "out").mkdir()
    lock = FolderLock(tmp_path / "out")
    with pytest.raises(ShardError, match="another process is writing there"):
        distill.main(first)
    with pytest.raises(ShardError, match="another process is writing there"):
        runs.train(first, [], None, model_path=first.student, checkpoint=None)
    lock.release()


def test_out_that_cannot_be_a_folder_is_refused(pipeline, tmp_path, no_model):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="file is a file; choose another"):
        distill.main(config(pipeline, tmp_path / "file"))
    with pytest.raises(ConfigError, match="file/below: .*file is a file; choose another"):
        distill.main(config(pipeline, tmp_path / "file" / "below"))


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_torn_recipe_is_named(pipeline, tmp_path, no_model, text):
    (tmp_path / "recipe.json").write_text(text)
    with pytest.raises(DataError, match=r"recipe\.json: (torn|holds no settings)"):
        distill.main(config(pipeline, tmp_path))


def test_failure_to_save_the_model_leaves_the_checkpoint(pipeline, tmp_path, monkeypatch):
    settings = {"max_steps": 2, "save_every": 2}
    save, out = transformers.PreTrainedModel.save_pretrained, tmp_path / "out"

    def full(self, folder, *args, **kwargs):
        if ".result" in str(folder):
            raise OSError(28, "No space left on device")
        return save(self, folder, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
        with pytest.raises(ShardError, match=r"out: not written .*No space left"):
            distill.main(config(pipeline, out, **settings))
    assert last_checkpoint(out) == out / "checkpoint-2"
    assert read_manifest(distill.main(config(pipeline, out, **settings))).stage == "distill"


def test_cache_of_another_teacher_is_refused_before_a_model_is_loaded(pipeline, tmp_path, no_model):
    other = write_model(tmp_path / "other", seed=3)
    cache = write_cache(tmp_path / "cache", other, pipeline / "rollouts")
    with pytest.raises(ProvenanceError, match="teacher-mismatch.*--allow-teacher-mismatch"):
        distill.main(config(pipeline, tmp_path / "out", cache=str(cache)))
    assert not (tmp_path / "out").exists()


def test_override_accepts_another_teacher_and_is_recorded(pipeline, tmp_path):
    other = write_model(tmp_path / "other", seed=3)
    cache = write_cache(tmp_path / "cache", other, pipeline / "rollouts")
    changes = {"cache": str(cache), "allow_teacher_mismatch": True, "max_steps": 1}
    out = distill.main(config(pipeline, tmp_path / "out", **changes))
    (override,) = read_manifest(out).overrides
    assert override.name == "teacher-mismatch"


def test_student_that_did_not_make_the_rollouts_is_refused(pipeline, tmp_path, no_model):
    other = write_model(tmp_path / "other", seed=4)
    declare(other, teacher=pipeline / "teacher")
    with pytest.raises(ProvenanceError, match="student-mismatch"):
        distill.main(config(pipeline, tmp_path / "out", student=str(other)))


def test_incomplete_cache_needs_its_override(pipeline, tmp_path):
    part = write_cache(tmp_path / "cache", pipeline / "teacher", pipeline / "rollouts", shards=(1,))
    with pytest.raises(ProvenanceError, match="incomplete-cache"):
        distill.main(config(pipeline, tmp_path / "out", cache=str(part)))
    changes = {"cache": str(part), "allow_incomplete_cache": True, "max_steps": 1}
    out = distill.main(config(pipeline, tmp_path / "out", **changes))
    assert read_manifest(out).raw["training"]["sequences"] == 4


def test_altered_shard_is_refused(pipeline, tmp_path, no_model):
    cache = shutil.copytree(pipeline / "cache", tmp_path / "cache")
    shard = cache / "shard-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ShardError, match="shard-00001"):
        distill.main(config(pipeline, tmp_path / "out", cache=str(cache)))


def test_temperature_must_be_that_of_the_cache(pipeline, tmp_path):
    warm = write_cache(
        tmp_path / "cache", pipeline / "teacher", pipeline / "rollouts", temperature=0.7
    )
    with pytest.raises(ConfigError, match=r"found 1.0, but .* was scored at 0.7"):
        distill.main(config(pipeline, tmp_path / "out", cache=str(warm), temperature=1.0))
    out = distill.main(config(pipeline, tmp_path / "out", cache=str(warm), max_steps=1))
    assert read_manifest(out).raw["objective"]["temperature"] == 0.7


def test_missing_inputs_are_named(pipeline, tmp_path, no_model):
    with pytest.raises(MissingFileError, match="nowhere"):
        distill.main(config(pipeline, tmp_path / "out", student=str(tmp_path / "nowhere")))
    with pytest.raises(MissingFileError, match="nowhere"):
        distill.main(config(pipeline, tmp_path / "out", cache=str(tmp_path / "nowhere")))


def test_sequence_beyond_the_context_is_refused(tmp_path):
    write_model(tmp_path / "teacher", seed=1)
    student = write_model(tmp_path / "student", seed=2)
    settings = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 8}))
    declare(student, teacher=tmp_path / "teacher")
    rollouts = write_sequences(tmp_path / "rollouts", student)
    write_cache(tmp_path / "cache", tmp_path / "teacher", rollouts)
    with pytest.raises(DataError, match="expected at most 8, the context of the model"):
        distill.main(config(tmp_path, tmp_path / "out"))


def test_truncated_rollouts_can_be_dropped(tmp_path):
    write_model(tmp_path / "teacher", seed=1)
    student = write_model(tmp_path / "student", seed=2)
    declare(student, teacher=tmp_path / "teacher")
    rollouts = write_sequences(tmp_path / "rollouts", student, truncated=(0, 1, 2))
    write_cache(tmp_path / "cache", tmp_path / "teacher", rollouts)
    out = distill.main(config(tmp_path, tmp_path / "out", drop_truncated=True, max_steps=1))
    assert read_manifest(out).raw["training"] == {"sequences": 9, "dropped_share": 0.25}


def test_result_depends_only_on_the_seed(pipeline, tmp_path):
    results = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.rand(7)
        out = distill.main(config(pipeline, tmp_path / name, seed=seed))
        results.append(trained_weights(out))
    assert largest_difference(results[0], results[1]) == 0.0
    assert largest_difference(results[0], results[2]) > 0.0


def test_config_checks_the_objective():
    with pytest.raises(ConfigError, match="beta"):
        distill.DistillConfig(student="s", cache="c", out="o", objective="jsd", beta=0.0)
    with pytest.raises(ConfigError, match="beta: forward_kl has no mixture"):
        distill.DistillConfig(student="s", cache="c", out="o", objective="forward_kl", beta=0.3)
    with pytest.raises(ConfigError, match="advantage_clip"):
        distill.DistillConfig(student="s", cache="c", out="o", advantage_clip=1.0)
