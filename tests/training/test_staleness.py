"""Warnings of a stale cache, and the lowest effective sample size of a run."""

import copy
from functools import partial

import pytest
from helpers_artefacts import distill_config, logged
from transformers import TrainerState

from lopd.provenance import read_manifest
from lopd.stages import distill
from lopd.training.staleness import StalenessMonitor, stale_summary
from lopd.training.trainer import LopdTrainer

SETTINGS = {"batch_size": 4, "learning_rate": 1e-2, "device": "cpu", "log_every": 1}


config = partial(distill_config, **SETTINGS)


class Metrics:
    """Replaces the accumulator: the ESS of each step, in order."""

    def __init__(self, shares):
        self.shares = iter(shares)

    def step_ess(self):
        return next(self.shares)


def monitored(shares, limit=0.5, every=3, history=(), first=1):
    """The log history after steps with these ESS."""
    state = TrainerState(log_history=copy.deepcopy([*history]))
    callback = StalenessMonitor(Metrics(shares), limit, every)
    for number in range(first, first + len(shares)):
        state.global_step = number
        callback.on_step_end(None, state, None)
    return state.log_history


@pytest.fixture
def every_step(monkeypatch):
    """A window of one step."""
    monkeypatch.setattr("lopd.training.staleness.WINDOW", 1)


SHARES = [0.9, 0.5, 0.4, 0.3, 0.2, 0.1, 0.3, 0.05, 0.45]


def test_a_stale_cache_is_warned_of_once_and_then_every_few_steps(every_step, capsys):
    shares = [0.9, 0.5, 0.4, 0.3, 0.2, 0.1, 0.3, 0.7, 0.45]
    history = monitored(shares)
    assert [entry["step"] for entry in history if "stale_ess" in entry] == [3, 6, 9]
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("step 3: the student has moved away") and "worth 40 %" in lines[0]
    assert stale_summary(0.5, history) == {
        "limit": 0.5,
        "watched": True,
        "warnings": 3,
        "first": {"ess": 0.4, "step": 3},
        "lowest": {"ess": 0.1, "step": 6},
    }
    resumed = monitored(shares[4:], history=monitored(shares[:4]), first=5)
    assert resumed == history
    assert stale_summary(0.5, [])["watched"] is True
    assert stale_summary(0.0, [])["watched"] is False


@pytest.mark.parametrize("cut", [None, 1, 4, 8])
@pytest.mark.parametrize("every", [1, 3, 100])
def test_the_lowest_ess_is_of_all_steps_however_often_warnings_are_printed(every_step, every, cut):
    history = monitored(SHARES[:cut], every=every)
    if cut is not None:
        history = monitored(SHARES[cut:], every=every, history=history, first=cut + 1)
    summary = stale_summary(0.5, history)
    assert summary["lowest"] == {"ess": 0.05, "step": 8}
    assert summary["warnings"] == {1: 7, 3: 3, 100: 1}[every]


def test_single_steps_do_not_warn_and_a_resumed_window_does(monkeypatch):
    """The median of 3 steps is below the limit from step 7 on."""
    monkeypatch.setattr("lopd.training.staleness.WINDOW", 3)
    shares = [0.9, 0.1, 0.9, 0.9, 0.05, 0.9, 0.4, 0.3]
    whole = monitored(shares)
    assert [entry["stale_ess"] for entry in whole if "stale_ess" in entry] == [0.4]
    assert stale_summary(0.5, whole)["first"] == {"ess": 0.4, "step": 7}
    for cut in range(1, len(shares)):
        resumed = monitored(shares[cut:], history=monitored(shares[:cut]), first=cut + 1)
        assert resumed == whole
    assert not any("stale_ess" in entry for entry in monitored([0.1, 0.1]))


def test_the_lowest_ess_is_reported_without_warnings():
    summary = stale_summary(0.5, monitored([0.9, 0.6, 0.8]))
    assert summary["warnings"] == 0 and summary["first"] is None
    assert summary["lowest"] == {"ess": 0.6, "step": 2}


def test_a_checkpoint_without_a_lowest_ess_continues_from_its_warnings(every_step):
    history = [entry for entry in monitored(SHARES[:6]) if "stale_ess" in entry]
    resumed = monitored([0.3, 0.4], history=history, first=7)
    assert stale_summary(0.5, resumed)["lowest"] == {"ess": 0.1, "step": 6}


def test_unknown_drift_is_warned_of_once(capsys):
    history = monitored([None] * 6)
    assert len(history) == 1
    assert capsys.readouterr().err.count("is unknown, so a stale cache will not be noticed") == 1
    summary = stale_summary(0.5, history)
    assert summary["watched"] is False and summary["warnings"] == 0


@pytest.mark.parametrize(
    ("changes", "watched", "warned"),
    [
        ({}, True, True),
        ({"stale_ess": 0.0, "stale_every": 100}, False, False),
        ({"tail": "renormalize"}, False, False),
    ],
)
def test_the_manifest_reports_how_stale_the_cache_became(
    pipeline, tmp_path, every_step, capsys, changes, watched, warned
):
    settings = {"max_steps": 3, "save_every": 0, "stale_every": 2, **changes}
    out = distill.main(config(pipeline, tmp_path, **settings))
    summary = read_manifest(out).raw["stale"]
    assert summary["watched"] is watched and (summary["warnings"] > 0) is warned
    assert ("moved away" in capsys.readouterr().err) is warned
    if warned:
        assert summary["first"]["step"] == 1 and 0 < summary["lowest"]["ess"] < 0.5


@pytest.mark.parametrize("stale_every", [1, 100])
def test_a_resumed_run_reports_the_lowest_ess_of_its_log(
    pipeline, tmp_path, monkeypatch, every_step, stale_every
):
    settings = {"max_steps": 6, "save_every": 2, "stale_every": stale_every}
    compute_loss = LopdTrainer.compute_loss

    def killed(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return compute_loss(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LopdTrainer, "compute_loss", killed)
        distill.main(config(pipeline, tmp_path, **settings))
    out = distill.main(config(pipeline, tmp_path, **settings))
    log = logged(out)
    ess, step = min((entry["ess_tokens"], entry["step"]) for entry in log)
    assert len(log) == 6 and step > 1
    summary = read_manifest(out).raw["stale"]
    assert summary["lowest"] == {"ess": pytest.approx(ess), "step": step}
    assert summary["warnings"] == (6 if stale_every == 1 else 1)
