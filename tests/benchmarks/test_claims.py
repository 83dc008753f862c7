"""Verdicts on the paper's claims, from intervals."""

import pytest

from benchmarks import readme
from benchmarks.evidence import claims, intervals


@pytest.mark.parametrize(
    ("points", "verdict"),
    [
        ((0.1, -3.9, 3.9), intervals.REPRODUCED),
        ((0.1, -4.1, 3.9), intervals.IN_PART),
        ((-5.0, -9.0, -1.0), intervals.NOT),
    ],
)
def test_runs_are_equal_if_the_interval_lies_within_the_margin(points, verdict):
    assert intervals.equal({"points": points, "kl": (1.0, 0.5, 2.0)}) == verdict


def test_a_run_is_better_if_its_interval_says_so():
    def verdict(kl, points):
        return intervals.better({"kl": kl, "points": points})

    none = (0.0, -1.0, 1.0)
    assert verdict((0.5, 0.3, 0.9), none) == intervals.REPRODUCED
    assert verdict((0.5, 0.3, 1.1), (1.0, 0.5, 1.5)) == intervals.REPRODUCED
    assert verdict((0.5, 0.3, 1.1), none) == intervals.NOT


def test_stages_are_compared_on_the_same_seeds():
    rows = [
        {"stage": stage, "seed": seed, "kl": kl * scale, "sampled": sampled}
        for stage, scale, sampled in (("a", 0.5, 0.9), ("b", 1.0, 0.8))
        for seed, kl in enumerate((0.01, 0.1, 1.0))
    ]
    found = claims.compared(rows, "a", "b")
    assert found["kl"] == pytest.approx((0.5, 0.5, 0.5))
    assert found["points"] == pytest.approx((10.0, 10.0, 10.0))


def test_every_verdict_has_numbers_and_a_command():
    for claim, verdict, found, command in claims.claims(readme.read_rows):
        assert claim and found
        assert (command == "") == (verdict in (intervals.UNKNOWN, intervals.UNTESTABLE))


def test_intervals_are_those_of_students_t():
    """scipy.stats.t.interval(0.95, 4, loc=3, scale=stdev / sqrt(5)) of 1 to 5."""
    found = intervals.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found == pytest.approx((3.0, 1.03676, 4.96324), abs=1e-3)
    powers = intervals.ratio([2.0**x for x in (1.0, 2.0, 3.0, 4.0, 5.0)])
    assert powers == pytest.approx([2.0**x for x in found])
