"""SIGINT and SIGTERM in training: what is kept, exit codes, and the continued run."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_artefacts import trained_weights
from helpers_training import flags_of, largest_difference, make_trainer, tiny_model

from lopd.cli import main
from lopd.errors import Interrupted
from lopd.stages import distill
from lopd.training.checkpoints import checkpoints, unusable
from lopd.training.trainer import LopdTrainer

pytestmark = pytest.mark.thorough

SETTINGS = {"batch_size": 4, "learning_rate": 1e-2, "device": "cpu", "max_steps": 5}


def flags(pipeline, out, **changes):
    paths = {name: str(pipeline / name) for name in ("student", "cache")}
    return flags_of({**paths, "out": str(out), **SETTINGS, **changes})


def signalled(monkeypatch, *numbers, at=2):
    """Send signals to this process within training step `at`."""
    training_step = LopdTrainer.training_step

    def step(self, *args):
        if self.state.global_step + 1 == at:
            for number in numbers:
                os.kill(os.getpid(), number)
        return training_step(self, *args)

    monkeypatch.setattr(LopdTrainer, "training_step", step)


@pytest.mark.parametrize(
    ("number", "code", "keep_best"),
    [(signal.SIGINT, 130, True), (signal.SIGTERM, 143, False)],
    ids=["int", "term"],
)
def test_a_stopped_run_keeps_its_steps_and_continues(
    pipeline, tmp_path, monkeypatch, capfd, number, code, keep_best
):
    changes = {"save_every": 0}
    if keep_best:
        changes |= {"holdout": 3, "eval_steps": 2, "keep_best": True}
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        signalled(patch, number)
        assert main(["distill", *flags(pipeline, tmp_path / "cut", **changes)]) == code
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    errors = capfd.readouterr().err
    assert f"{number.name}: saving a checkpoint after this step" in errors
    assert "checkpoint-2 is kept, step 2 of 5; rerun the same command to continue" in errors
    assert [folder.name for folder in checkpoints(tmp_path / "cut")] == ["checkpoint-2"]
    assert main(["distill", *flags(pipeline, tmp_path / "cut", **changes)]) == 0
    assert "continues from checkpoint-2" in capfd.readouterr().err
    assert main(["distill", *flags(pipeline, tmp_path / "whole", **changes)]) == 0
    whole, cut = (trained_weights(tmp_path / name) for name in ("whole", "cut"))
    assert largest_difference(whole, cut) == 0.0


def test_a_second_signal_stops_at_once(tmp_path, monkeypatch):
    signalled(monkeypatch, signal.SIGTERM, signal.SIGINT)
    trainer = make_trainer(tiny_model(), tmp_path, max_steps=4, save_every=1)
    with pytest.raises(Interrupted, match="stopped at once") as caught:
        trainer.train()
    assert caught.value.exit_code == 130
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-1"]


def test_a_signal_in_the_last_step_leaves_only_the_export(pipeline, tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        signalled(patch, signal.SIGTERM, at=5)
        assert main(["distill", *flags(pipeline, tmp_path)]) == 143
    errors = capfd.readouterr().err
    assert "checkpoint-5 is kept, training is complete after 5 steps; rerun the same" in errors
    assert "to write the result" in errors
    steps = []
    monkeypatch.setattr(LopdTrainer, "training_step", lambda *args: steps.append(args))
    assert main(["distill", *flags(pipeline, tmp_path)]) == 0
    assert not steps


def evaluating_at(monkeypatch, step, number):
    """Send a signal to this process within the evaluation after a step."""
    evaluate = LopdTrainer.evaluate

    def terminated(self, *args, **kwargs):
        if self.state.global_step == step:
            os.kill(os.getpid(), number)
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(LopdTrainer, "evaluate", terminated)


HELD_OUT = {"holdout": 3, "eval_steps": 2}


def test_a_signal_in_an_evaluation_stops_without_another_step(
    pipeline, tmp_path, monkeypatch, capfd
):
    evaluating_at(monkeypatch, 2, signal.SIGTERM)
    assert main(["distill", *flags(pipeline, tmp_path, **HELD_OUT)]) == 143
    assert "checkpoint-2 is kept, step 2 of 5; rerun" in capfd.readouterr().err
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-2"]


@pytest.mark.parametrize(("save_every", "code"), [(3, 143), (0, 0)])
def test_a_signal_after_the_last_step_loses_nothing(
    pipeline, tmp_path, monkeypatch, capfd, save_every, code
):
    # Without checkpoints only the result keeps the steps, so it is written.
    from lopd.training import trainer

    check = LopdTrainer._check_weights

    def terminated(self):
        if self.state.global_step == 5 and not self.signals.received:
            self.signals._handle(signal.SIGTERM, None)
        check(self)

    monkeypatch.setattr(trainer.LopdTrainer, "_check_weights", terminated)
    assert main(["distill", *flags(pipeline, tmp_path, save_every=save_every)]) == code
    assert ("training is complete" in capfd.readouterr().err) == (code == 143)
    assert (tmp_path / "manifest.json").exists() == (code == 0)


def test_sigterm_elsewhere_says_that_finished_parts_are_kept(
    pipeline, tmp_path, monkeypatch, capsys
):
    def terminated(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(distill, "open_cache", terminated)
    assert main(["distill", *flags(pipeline, tmp_path)]) == 143
    kept = "interrupted; the last checkpoint, if one was saved, is kept; rerun"
    assert kept in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


RANKS = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from lopd.cli import main
from lopd.training.trainer import LopdTrainer
step = LopdTrainer.training_step
def training_step(self, *args):
    if os.environ["RANK"] == "1" and self.state.global_step + 1 == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self, *args)
LopdTrainer.training_step = training_step
code = main(sys.argv[1:])
assert not torch.distributed.is_initialized()
print("exit code", code, flush=True)
"""


@pytest.mark.thorough
def test_processes_stop_together_when_one_gets_the_signal(pipeline, tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(script), "distill", *flags(pipeline, tmp_path / "out", batch_size=2)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.count("exit code 143") == 2, done.stdout + done.stderr
    assert [folder.name for folder in checkpoints(tmp_path / "out")] == ["checkpoint-2"]
    assert not unusable(tmp_path / "out" / "checkpoint-2")
