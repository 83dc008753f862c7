"""The part `live`: tables and verdicts of known rows, and what is timed."""

import time

import pytest

from benchmarks.evidence import live, live_cells
from benchmarks.evidence.intervals import (
    IN_PART,
    NO_ROWS,
    NOT,
    REPRODUCED,
    UNDECIDED,
    UNKNOWN,
)


def row(seed, scale):
    parts = {part: {"clock": 2.0 * scale, "processor": scale} for part in live_cells.PARTS}
    near = {"mean": 0.9, "within a quarter": 0.95, "ess": 0.8, "kl": 0.1}
    return {
        "seed": seed,
        "objective": "lists",
        "offline": parts,
        "live": {"clock": 18.0 * scale, "processor": 6.0 * scale},
        "drift": {"trained on": near, "new": {**near, "mean": 1.0}},
        "quality": {
            "start": {"kl": 0.4 * scale, "sampled": 0.5},
            "offline": {"kl": 0.1 * scale, "sampled": 0.9},
            "live": {"kl": 0.05 * scale, "sampled": 0.92},
        },
    }


ROWS = [row(seed, scale) for seed, scale in enumerate((1.0, 2.0, 3.0))]


def test_the_ratios_are_those_of_one_seed():
    assert live.times(ROWS, "lists", "processor") == pytest.approx((2.0, 2.0, 2.0))
    assert live.times(ROWS, "lists", "clock") == pytest.approx((3.0, 3.0, 3.0))
    assert live.times(ROWS[:1], "lists", "clock") is None
    (line,) = live.cost_table(ROWS).splitlines()[2:]
    assert line.startswith("| lists | 33% | 33% | 33% | 2.00 [2.00, 2.00] | 3.00 [3.00, 3.00] |")
    assert "| 6.00 [6.00, 6.00] | 3 |" in line


def test_the_ends_are_compared_on_the_same_seeds():
    found = live.ends(ROWS, "lists", "offline", "live")
    assert found["kl"] == pytest.approx((2.0, 2.0, 2.0))
    assert found["points"] == pytest.approx((-2.0, -2.0, -2.0))
    assert "| lists | start | 0.7268 | 0.500 | 0.25 [0.25, 0.25] |" in live.ends_table(ROWS)
    assert "| lists | control |" not in live.ends_table(ROWS)
    assert live.ends(ROWS[:2], "lists", "offline", "live") is None
    assert "0.900 (0.900 to 0.900)" in live.drift_table(ROWS)


def test_the_control_of_every_objective_is_that_of_the_lists():
    control = {"kl": 0.02, "sampled": 0.95}
    rows = [{**row, "quality": {**row["quality"], "control": control}} for row in ROWS]
    token = [{**row, "objective": "sampled"} for row in ROWS]
    found = live.ends_table([*rows[:3], *token])
    assert "| sampled | control | 0.0200 | 0.950 | 9.09 [" in found
    assert found.count("| control | 0.0200 | 0.950 |") == 2


def test_tables_without_rows_say_so():
    assert [table([]) for table in live.PART.tables.values()] == [NO_ROWS] * 3


def test_a_cost_is_reproduced_if_the_whole_interval_reaches_the_factor():
    assert live.cheaper((5.0, 4.1, 6.0), 4.0) == REPRODUCED
    assert live.cheaper((2.0, 1.5, 2.5), 4.0) == IN_PART
    assert live.cheaper((0.9, 0.7, 1.1), 4.0) == NOT
    assert live.cheaper((4.5, 3.0, 6.5), 4.0) == UNDECIDED
    assert live.cheaper(None, 4.0) == UNKNOWN


def test_a_student_is_near_if_mean_and_most_tokens_are_and_no_few_outweigh_the_others():
    narrow, wide, most, some = (
        (0.94, 0.91, 0.98),
        (0.6, 0.4, 0.8),
        (0.95, 0.94, 0.96),
        (0.4, 0.3, 0.45),
    )
    assert live.near(narrow, most, most) == REPRODUCED
    assert live.near(narrow, (0.5, 0.4, 0.6), most) == IN_PART
    assert live.near(narrow, most, some) == IN_PART
    assert live.near(wide, (0.5, 0.4, 0.6), some) == NOT
    assert live.near(narrow, (0.96, 0.87, 1.05), most) == UNDECIDED
    assert live.near(narrow, most, (0.49, 0.0, 1.0)) == UNDECIDED


def test_sleep_takes_time_on_the_clock_but_none_of_the_processor():
    found = live_cells.timed(lambda: time.sleep(0.2))
    assert found["clock"] >= 0.2 and found["processor"] < found["clock"]
    assert live_cells.timed(lambda: sum(range(10**7)))["processor"] > 0.0
