"""What `--report-to` sends to experiment trackers, offline."""

import json
import sys
from types import SimpleNamespace

import pytest
from helpers_artefacts import write_model, write_sequences

from lopd import DistillConfig, SftConfig, distill, sft
from lopd.training.logging import own_tracker_run

SETTINGS = {"max_steps": 3, "log_every": 1, "device": "cpu"}


def scalars(folder):
    """Name to the (step, value) pairs of the event files under a folder."""
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="part of the extra `test`"
    )
    (events,) = folder.rglob("events.out.tfevents.*")
    found = reader.EventAccumulator(str(events))
    found.Reload()
    names = found.Tags()["scalars"]
    return {name: [(e.step, e.value) for e in found.Scalars(name)] for name in names}


def expected(out):
    """The same from train_log.jsonl, whose names stand without tensorboard's prefixes."""
    series = {}
    for line in (out / "train_log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        for name, value in entry.items():
            series.setdefault(name, []).append((entry["step"], value))
    return series


def check(out, names):
    shown = {name.split("/")[-1]: pairs for name, pairs in scalars(out).items()}
    series = expected(out)
    for name in names:
        assert shown[name] == [(step, pytest.approx(value)) for step, value in series[name]]


def test_tensorboard_shows_distillation(pipeline, tmp_path):
    config = DistillConfig(
        student=str(pipeline / "student"),
        cache=str(pipeline / "cache"),
        out=str(tmp_path / "out"),
        report_to="tensorboard",
        holdout=2,
        eval_steps=1,
        **SETTINGS,
    )
    distill(config)
    check(tmp_path / "out", {"loss", "reverse_kl", "student_tail", "ess_tokens", "holdout_kl"})
    assert distill(config) == tmp_path / "out"  # finished, whatever the tracker has written


def test_tensorboard_shows_fine_tuning(tmp_path):
    teacher, base = write_model(tmp_path / "teacher", seed=1), write_model(tmp_path / "base")
    data = write_sequences(tmp_path / "data", teacher, kind="sft_data")
    sft(
        SftConfig(
            model=str(base),
            data=str(data),
            out=str(tmp_path / "out"),
            report_to="tensorboard",
            **SETTINGS,
        )
    )
    check(tmp_path / "out", {"loss", "grad_norm", "learning_rate"})


def test_each_training_is_a_run_of_its_own_in_wandb(pipeline, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="in no extra: it pins a pre-release")
    for name in ("DIR", "CACHE_DIR", "CONFIG_DIR", "DATA_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / "tracker"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    settings = {"student": str(pipeline / "student"), "cache": str(pipeline / "cache")}
    outs = [tmp_path / "first", tmp_path / "second"]
    for out in outs:
        distill(DistillConfig(out=str(out), report_to="wandb", **settings, **SETTINGS))
        assert wandb.run is None
    wandb.teardown()  # waits until the files are written
    files = [*(tmp_path / "tracker").glob("wandb/offline-run-*/run-*.wandb")]
    records = [file.read_bytes() for file in files]
    assert len(records) == len(outs)
    for out in outs:
        (record,) = [each for each in records if f"{tmp_path.name}/{out.name}".encode() in each]
        for name in ("loss", "reverse_kl", "student_tail", "ess_tokens"):
            assert f"train/{name}".encode() in record
            for _, value in expected(out)[name]:
                assert json.dumps(value).encode() in record


def test_a_run_of_the_caller_stays_open(monkeypatch):
    """As in a sweep, whose runs wandb begins and ends."""
    ended, run = [], object()
    wandb = SimpleNamespace(run=None, finish=lambda exit_code: ended.append(exit_code))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with own_tracker_run("none"):
        wandb.run = run
    with own_tracker_run("wandb"):
        pass
    assert ended == []
    wandb.run = None
    with pytest.raises(ValueError, match="stop"), own_tracker_run("wandb"):
        wandb.run = run
        raise ValueError("stop")
    assert ended == [1]
