"""Signals that end a command: none is lost, and the words fit the command."""

import gc
import os
import signal
import sys
import time
import weakref

import pytest

from lopd.cli import main
from lopd.cli.signals import ending_in_order
from lopd.config.evaluate import EvalConfig
from lopd.errors import Interrupted
from lopd.stages import evaluate

FOREVER_S = 600  # the test fails if it is ever waited for


def wait():
    """Until a signal ends it; in short sleeps, after which one that came before is noticed."""
    for _ in range(100 * FOREVER_S):
        time.sleep(0.01)


class Finalized:
    """An object in whose finalizer a signal arrives."""

    def __init__(self, number):
        self.number = number

    def __del__(self):
        os.kill(os.getpid(), self.number)
        time.sleep(0)  # Python runs its handlers between two instructions


@pytest.fixture(autouse=True)
def heard_sigint():
    """Shells let what they start in the background ignore SIGINT."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_within_a_finalizer_is_not_lost(number, capfd):
    with pytest.raises(KeyboardInterrupt) as caught, ending_in_order():
        item = Finalized(number)
        del item
        wait()
    assert getattr(caught.value, "signum", signal.SIGINT) == number
    assert "ignored" not in capfd.readouterr().err


def test_a_signal_within_the_callback_of_a_weak_reference_is_not_lost():
    def callback(reference):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)

    with pytest.raises(Interrupted), ending_in_order():
        item = type("Item", (), {})()
        reference = weakref.ref(item, callback)
        del item
        gc.collect()
        wait()
    assert reference() is None


def test_other_errors_of_finalizers_reach_the_hook_that_was_there(monkeypatch):
    class Failing:
        def __del__(self):
            raise ValueError("no signal")

    seen = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    with ending_in_order():
        Failing()
    assert sys.unraisablehook == seen.append
    assert [str(dropped.exc_value) for dropped in seen] == ["no signal"]


def test_an_interrupted_evaluation_says_that_it_starts_over(monkeypatch, capsys, tmp_path):
    def terminated(config):
        assert isinstance(config, EvalConfig)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(evaluate, "main", terminated)
    flags = ["--model", "m", "--cache", "c", "--out", str(tmp_path)]
    assert main(["eval", *flags]) == 128 + signal.SIGTERM
    printed = capsys.readouterr().err
    assert printed == (
        "lopd eval: interrupted; nothing was written; rerun the same command to start over\n"
    )
