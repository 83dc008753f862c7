"""Checkpoints: every flipped byte is found, and only what the run wrote is removed."""

import json
import os
import shutil

import pytest
import torch
from helpers_training import make_trainer, tiny_model, weights

from lopd.errors import DataError, ShardError
from lopd.provenance.folder_receipt import RECEIPT_NAME, check_receipt, seal
from lopd.training.checkpoints import (
    STAGING,
    checkpoints,
    finish,
    last_checkpoint,
    put_aside,
    rotate,
    saving,
    unusable,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with checkpoints of steps 2 and 4."""
    out = tmp_path_factory.mktemp("run")
    make_trainer(tiny_model(), out, max_steps=4, save_every=2).train()
    return out


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1
    path.write_bytes(data)


def test_a_flipped_byte_is_found_in_every_file(run, tmp_path):
    names = sorted(file.name for file in (run / "checkpoint-4").iterdir())
    assert {"config.json", "model.safetensors", "optimizer.pt", "rng_state.pth"} < {*names}
    assert {"scheduler.pt", "trainer_state.json", "window.pt", RECEIPT_NAME} < {*names}
    for name in names:
        for at in (0, 100, -1):
            out = shutil.copytree(run, tmp_path / f"{name}{at}")
            flip(out / "checkpoint-4" / name, at)
            assert unusable(out / "checkpoint-4"), (name, at)
            assert last_checkpoint(out) == out / "checkpoint-2"


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"files": {"a": 3}}', "[" * 10000])
def test_a_damaged_receipt_does_not_kill_the_resume(run, tmp_path, text):
    out = shutil.copytree(run, tmp_path / "out")
    (out / "checkpoint-4" / RECEIPT_NAME).write_text(text)
    assert last_checkpoint(out) == out / "checkpoint-2"


def test_a_checkpoint_without_a_receipt_is_used_with_a_word(run, tmp_path, capsys):
    out = shutil.copytree(run, tmp_path / "out")
    (out / "checkpoint-4" / RECEIPT_NAME).unlink()
    assert last_checkpoint(out) == out / "checkpoint-4"
    put_aside(out, out / "checkpoint-4")
    assert "continues from checkpoint-4, which has no receipt" in capsys.readouterr().err
    (out / "checkpoint-4" / "config.json").write_text('{"vocab_size":')
    assert "config.json is not JSON" in unusable(out / "checkpoint-4")
    assert last_checkpoint(out) == out / "checkpoint-2"


def test_a_best_checkpoint_that_is_damaged_makes_later_ones_unusable(run, tmp_path):
    out = shutil.copytree(run, tmp_path / "out")
    folder = out / "checkpoint-4"
    state = json.loads((folder / "trainer_state.json").read_text()) | {"best_global_step": 2}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    seal(folder, [*check_receipt_names(folder)], step=4, run="")
    assert last_checkpoint(out, keep_best=True) == folder
    flip(out / "checkpoint-2" / "model.safetensors", -1)
    assert last_checkpoint(out) == folder and last_checkpoint(out, keep_best=True) is None
    why = unusable(folder, keep_best=True)
    assert "its best step is 2, and checkpoint-2 cannot be used" in why and "altered" in why


def check_receipt_names(folder):
    return json.loads((folder / RECEIPT_NAME).read_text())["files"]


def make_checkpoints(out, *steps, run="r"):
    for step in steps:
        folder = out / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "file").write_text(str(step))
        seal(folder, ["file"], step=step, run=run)


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        *[(2, None, [9, 10]), (1, None, [10]), (2, 2, [2, 10]), (1, 2, [2, 10])],
        *[(3, 10, [3, 9, 10]), (5, None, [2, 3, 9, 10]), (6, 3, [2, 3, 9, 10])],
    ],
)
def test_rotation_goes_by_step_and_spares_the_best(tmp_path, limit, best, left):
    make_checkpoints(tmp_path, 2, 3, 9, 10)
    for age, step in enumerate((10, 2, 9, 3)):  # the newest step is the oldest file
        os.utime(tmp_path / f"checkpoint-{step}", (1000 * age, 1000 * age))
    rotate(tmp_path, limit, "r", best)
    assert sorted(int(folder.name.split("-")[1]) for folder in checkpoints(tmp_path)) == left


def test_rotation_removes_only_what_this_run_wrote(tmp_path):
    make_checkpoints(tmp_path, 1, 2, 3)
    make_checkpoints(tmp_path, 4, run="another")
    shutil.copytree(tmp_path / "checkpoint-1", tmp_path / "checkpoint-5")  # a copy under a new name
    (tmp_path / "checkpoint-6").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    rotate(tmp_path, 1, "r")
    expected = {"3", "4", "5", "6", "7", "best"}
    assert {item.name for item in tmp_path.iterdir()} == {f"checkpoint-{x}" for x in expected}


def test_a_bare_exception_of_a_rust_library_about_the_disk_is_named(tmp_path):
    message = r"not written \(File too large \(os error 27\)\)"
    with pytest.raises(ShardError, match=message), saving(tmp_path):
        raise Exception("File too large (os error 27)")
    with pytest.raises(Exception, match="another kind"), saving(tmp_path):
        raise Exception("another kind")


def test_a_checkpoint_whose_receipt_names_no_run_is_nobodys(tmp_path):
    make_checkpoints(tmp_path, 1, 2, 3)
    receipt = tmp_path / "checkpoint-1" / "receipt.json"
    receipt.write_bytes(receipt.read_bytes().replace(b'"run"', b'"ruo"'))
    rotate(tmp_path, 1, "r")
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-1"]


def test_a_checkpoint_gets_its_name_when_it_is_durable_and_sealed(tmp_path, monkeypatch):
    events = []
    replace, fsync = os.replace, os.fsync

    def replaced(source, target):
        events.append(os.path.basename(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", replaced)
    monkeypatch.setattr(os, "fsync", lambda fd: events.append("sync") or fsync(fd))
    make_trainer(tiny_model(), tmp_path, max_steps=2, save_every=2, log_every=9).train()
    events = events[: events.index("checkpoint-2") + 2]
    files = len(check_receipt(tmp_path / "checkpoint-2")["files"])
    assert events[-3 - files :].count("sync") >= files + 1
    assert events[-4:] == [RECEIPT_NAME, "sync", "checkpoint-2", "sync"]
    assert not (tmp_path / STAGING).exists()


def test_a_checkpoint_replaces_only_one_of_its_run(tmp_path):
    make_checkpoints(tmp_path, 1)
    for number, run in enumerate(("r", "another")):
        (tmp_path / STAGING / "checkpoint-1").mkdir(parents=True)
        (tmp_path / STAGING / "checkpoint-1" / "file").write_text(f"new {number}")
        if run == "r":
            finish(tmp_path, 1, run)
        else:
            with pytest.raises(ShardError, match="checkpoint-1: is there already, and this run"):
                finish(tmp_path, 1, run)
        assert (tmp_path / "checkpoint-1" / "file").read_text() == "new 0"
        assert check_receipt(tmp_path / "checkpoint-1")["run"] == "r"


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    trainer = make_trainer(tiny_model(), tmp_path, max_steps=4, save_every=2, log_every=1)
    step = trainer.create_optimizer().step

    def broken(*args, **kwargs):
        result = step(*args, **kwargs)
        if trainer.state.global_step == 3:  # the last update, after which no loss is computed
            with torch.no_grad():
                trainer.model.model.norm.weight[0] = float("inf")
        return result

    trainer.optimizer.step = broken
    with pytest.raises(DataError, match=r"step 4: weights are not finite.*model\.norm\.weight"):
        trainer.train()
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-2"]
    assert weights(trainer.model)["model.norm.weight"].isinf().any()


def test_a_receipt_names_what_is_wrong(tmp_path):
    make_checkpoints(tmp_path, 1)
    folder = tmp_path / "checkpoint-1"
    assert check_receipt(folder)["step"] == 1
    (folder / "file").write_text("2")
    with pytest.raises(ShardError, match="file: altered, its sha256 is not the receipt's"):
        check_receipt(folder)
    (folder / "file").write_text("12")
    with pytest.raises(ShardError, match="file: found 2 bytes, the receipt says 1"):
        check_receipt(folder)
    (folder / "file").unlink()
    with pytest.raises(ShardError, match="file: missing; its receipt lists it"):
        check_receipt(folder)
