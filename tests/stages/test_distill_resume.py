"""Runs of `lopd distill` that were stopped: what the same command continues from."""

import dataclasses
import os
import re
import shutil
from functools import partial

import pytest
import torch
import transformers
from helpers_artefacts import (
    describe,
    distill_config,
    logged,
    trained_weights,
)
from helpers_training import SAME_UPDATE, largest_difference, update_error

from lopd.errors import ConfigError, ShardError
from lopd.provenance import MANIFEST_NAME, manifest_digest, read_manifest
from lopd.stages import distill
from lopd.training import checkpoints as checkpoint_files
from lopd.training import run as runs
from lopd.training.checkpoints import last_checkpoint, unusable
from lopd.training.trainer import LopdTrainer

config = partial(
    distill_config,
    max_steps=5,
    batch_size=4,
    learning_rate=1e-3,
    device="cpu",
    save_every=0,
    log_every=2,
)


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
