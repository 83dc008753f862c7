"""Offline against live at toy size: rows, gate and ratios."""

import json
import shlex

import pytest

from benchmarks import live_runs, offline_live, readme
from benchmarks.live_runs import PARTS, SIZES, Bench, InvalidResult, Run
from benchmarks.offline_live import GATE_STEPS

pytestmark = pytest.mark.thorough

QUICK = SIZES["quick"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    out = tmp_path_factory.mktemp("live")
    assert offline_live.main(["--quick", "--seeds", "3", "5", "--out", str(out)]) == 0
    return [json.loads(line) for line in (out / offline_live.NAME).open()]


def test_rows_are_offline_and_each_r(rows):
    assert [row["every"] for row in rows] == [None, *QUICK.every]
    for row in rows:
        assert set(row["parts"]) == set(row["seconds_per_step"]) == set(PARTS)
        assert min(row["parts"].values()) > 0
        assert min(row["ratios"]) <= row["ratio"] <= max(row["ratios"])
        assert row["ratio_to_training"] > row["ratio"]
        assert min(row["quality"]["kl"] + row["start"]["kl"]) > 0
    kls = [kl for row in rows for kl in row["quality"]["kl"]]
    assert len(set(kls)) == len(kls) == 2 * len(rows)


def test_parts_are_shares_of_the_offline_total(rows):
    offline, *live = rows
    assert sum(offline["parts"].values()) == pytest.approx(1, abs=0.01) and offline["ratio"] == 1
    assert offline["update_seconds_per_step"] is None and not offline["renewed"]
    for row in live:
        assert 0 < row["update_seconds_per_step"] < row["seconds_per_step"]["training"]
        assert row["renewed"]["every"] == row["every"]


def test_the_gate_is_in_the_rows(rows):
    for row in rows:
        assert row["gate"]["one_window"] == [0.0, 0.0] and min(row["gate"]["every_step"]) > 0.4


def test_the_command_repeats_the_run(rows):
    (command,) = {row["command"] for row in rows}
    head, flags = command.split(" --", 1)
    assert head == "python -m benchmarks.offline_live"
    args = offline_live.parse(shlex.split("--" + flags))
    assert (args.size, args.every, args.seeds) == ("quick", [1, 4], [3, 5])
    assert (args.device, args.threads) == ("cpu", 1)


@pytest.mark.parametrize(
    ("every", "changes", "message"),
    [
        (GATE_STEPS, {"learning_rate": 2e-2}, "differs from the offline run"),
        (1, {"every": GATE_STEPS}, "nothing was renewed"),
    ],
)
def test_a_wrong_window_is_not_measured(monkeypatch, capsys, every, changes, message):
    distil = Bench.distill

    def wrong(self, cache, name, kind, **settings):
        settings |= {"every": kind} | (changes if kind == every else {})
        return distil(self, cache, name, **settings)

    monkeypatch.setattr(Bench, "distill", wrong)
    monkeypatch.setattr(Bench, "run", lambda *_: pytest.fail("it was timed"))
    assert offline_live.main(["--quick"]) == 1
    printed = capsys.readouterr()
    assert message in printed.err and not printed.out


SECONDS = {"generation": 1.0, "scoring": 1.0, "update": 1.0}


@pytest.mark.parametrize(
    ("seconds", "renewed"),
    [
        ({**SECONDS, "scoring": 0.0}, {"windows": 2, "sequences": 32}),
        ({**SECONDS, "update": 3.0}, {"windows": 2, "sequences": 32}),
        (SECONDS, {"windows": 3, "sequences": 32}),
        (SECONDS, {"windows": 2, "sequences": 28}),
    ],
)
def test_parts_that_do_not_add_up_are_refused(seconds, renewed):
    live_runs.check_parts(SECONDS, 4.0, {"windows": 2, "sequences": 32}, QUICK, 4)
    with pytest.raises(InvalidResult, match="R = 4"):
        live_runs.check_parts(seconds, 4.0, renewed, QUICK, 4)


def test_a_prompt_is_renewed_once_in_a_window():
    live_runs.check_parts(SECONDS, 4.0, {"windows": 1, "sequences": QUICK.prompts}, QUICK, 8)


def test_ratios_compare_runs_of_one_seed():
    """The second seed ran on a machine with half the speed."""

    def run(*seconds, update=None):
        return Run("", dict(zip(PARTS, seconds, strict=True)), {}, update, None)

    offline = [run(1.0, 1.0, 2.0), run(2.0, 2.0, 4.0), run(1.0, 1.0, 2.0)]
    live = [run(3.0, 3.0, 2.0, update=1.5), run(6.0, 6.0, 4.0, update=3.0), run(1.0, 1.0, 2.0)]
    summary = offline_live.timing(live, offline, steps=2)
    assert (summary["ratio"], summary["ratios"]) == (2.0, [2.0, 2.0, 1.0])
    assert summary["ratio_to_training"] == 4.0
    assert summary["parts"] == {"generation": 0.75, "scoring": 0.75, "training": 0.5}
    assert summary["seconds"] == 8.0 and summary["seconds_per_step"]["generation"] == 1.5
    assert summary["update_seconds_per_step"] == 1.125


@pytest.mark.parametrize(
    "flags", [["--every", "3"], ["--every", "0"], ["--seeds", "1", "1"], ["--size", "quick"]]
)
def test_bad_arguments(flags):
    with pytest.raises(SystemExit):
        offline_live.parse(["--quick", *flags])


def test_the_committed_rows_come_from_one_run():
    rows = readme.read_rows(offline_live.NAME)
    assert [row["every"] for row in rows] == [None, *SIZES["toy"].every]
    assert len({(row["commit"], row["date"], row["command"]) for row in rows}) == 1
    for row in rows:
        assert max(row["gate"]["one_window"]) <= offline_live.GATE_BOUND["cpu"]
        assert row["dirty"] is False
