"""What `--report-to` sends to experiment trackers, offline."""

import json

import pytest
from helpers_artefacts import write_model, write_pipeline, write_sequences

from lopd import DistillConfig, SftConfig, distill, sft

SETTINGS = {"max_steps": 3, "log_every": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("pipeline"))


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


def test_wandb_runs_offline(pipeline, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="not installed; nothing else needs it")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    distill(
        DistillConfig(
            student=str(pipeline / "student"),
            cache=str(pipeline / "cache"),
            out=str(tmp_path / "out"),
            report_to="wandb",
            **SETTINGS,
        )
    )
    (run,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert run.stat().st_size > 0
