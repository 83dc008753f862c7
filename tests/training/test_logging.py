"""The log file, and what cannot be written."""

import json

import pytest
from helpers_training import make_trainer, tiny_model
from safetensors import SafetensorError

from lopd.errors import ShardError
from lopd.training.logging import LOG_NAME
from lopd.training.trainer import LopdTrainer

DISK = [
    OSError(28, "No space left on device"),
    RuntimeError("PytorchStreamWriter failed\nenforce fail"),
    RuntimeError("basic_ios::clear: iostream error"),
    SafetensorError("I/O error"),
]


@pytest.mark.parametrize("error", DISK, ids=lambda error: type(error).__name__)
def test_a_checkpoint_that_cannot_be_written_is_named(tmp_path, monkeypatch, error):
    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(LopdTrainer, "_save_optimizer_and_scheduler", full)
    trainer = make_trainer(tiny_model(), tmp_path, max_steps=1, warmup_steps=0, save_every=1)
    with pytest.raises(ShardError, match=f"{tmp_path}: not written") as caught:
        trainer.train()
    assert str(error).splitlines()[0] in str(caught.value) and "\n" not in str(caught.value)


def test_errors_that_are_not_of_the_disk_pass_through(tmp_path, monkeypatch):
    def lost(*args, **kwargs):
        raise RuntimeError("Connection reset by peer")

    monkeypatch.setattr(LopdTrainer, "_save_optimizer_and_scheduler", lost)
    trainer = make_trainer(tiny_model(), tmp_path, max_steps=1, warmup_steps=0, save_every=1)
    with pytest.raises(RuntimeError, match="^Connection reset by peer"):
        trainer.train()


def test_the_log_is_on_disk_up_to_a_crash(tmp_path, monkeypatch):
    compute_loss = LopdTrainer.compute_loss

    def killed(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(LopdTrainer, "compute_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tiny_model(), tmp_path).train()
    lines = (tmp_path / LOG_NAME).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / LOG_NAME).mkdir()
    trainer = make_trainer(tiny_model(), tmp_path, max_steps=1, warmup_steps=0)
    with pytest.raises(ShardError, match=f"{LOG_NAME}: not written"):
        trainer.train()
