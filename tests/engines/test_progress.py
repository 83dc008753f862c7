"""Lines of progress where there is no terminal."""

import doctest
import logging
from types import SimpleNamespace

import pytest

from lopd.engines import progress
from lopd.engines.progress import Progress, duration


@pytest.fixture
def lines(monkeypatch):
    """The lines that are logged, on a clock that tests set."""
    clock, found = SimpleNamespace(now=0.0), []
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(progress.LOG, "info", found.append)
    return clock, found


@pytest.mark.parametrize("terminal", [False, True])
def test_a_line_a_minute_where_the_bar_is_off(lines, monkeypatch, terminal):
    clock, found = lines
    off = SimpleNamespace(update=lambda count: None, close=lambda: None, disable=not terminal)
    monkeypatch.setattr(progress, "tqdm", lambda **settings: off)
    with Progress(total=100, initial=20, unit="seq", desc="sampling") as shown:
        for _ in range(8):
            clock.now += 25.0
            shown.update(10)
    assert found == ([] if terminal else [
        "sampling: 50/100 seq, 2 min left",
        "sampling: 80/100 seq, 50 s left",
    ])  # fmt: skip
    assert logging.getLogger("lopd.engines.progress") is progress.LOG


def test_nothing_is_predicted_before_anything_is_done():
    with Progress(total=3, initial=1, unit="seq", desc="scoring") as shown:
        assert shown.line(9.0) == "scoring: 1/3 seq"


def test_durations():
    assert [duration(seconds) for seconds in (0.4, 59.4, 60, 3599, 7260)] == [
        *("0 s", "59 s", "1 min", "1 h 0 min", "2 h 1 min")
    ]


def test_the_examples_run():
    failed, attempted = doctest.testmod(progress)
    assert attempted and not failed
