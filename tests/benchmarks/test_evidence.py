"""Verdicts on the paper's claims, from intervals."""

import pytest

from benchmarks import evidence, readme


@pytest.mark.parametrize(
    ("points", "verdict"),
    [
        ((0.1, -3.9, 3.9), evidence.REPRODUCED),
        ((0.1, -4.1, 3.9), evidence.IN_PART),
        ((-5.0, -9.0, -1.0), evidence.NOT),
    ],
)
def test_runs_are_equal_if_the_interval_lies_within_the_margin(points, verdict):
    assert evidence.equal({"points": points, "kl": (1.0, 0.5, 2.0)}) == verdict


def test_a_run_is_better_if_its_interval_says_so():
    def verdict(kl, points):
        return evidence.better({"kl": kl, "points": points})

    none = (0.0, -1.0, 1.0)
    assert verdict((0.5, 0.3, 0.9), none) == evidence.REPRODUCED
    assert verdict((0.5, 0.3, 1.1), (1.0, 0.5, 1.5)) == evidence.REPRODUCED
    assert verdict((0.5, 0.3, 1.1), none) == evidence.NOT


def test_stages_are_compared_on_the_same_seeds():
    rows = [
        {"stage": stage, "seed": seed, "kl": kl * scale, "sampled": sampled}
        for stage, scale, sampled in (("a", 0.5, 0.9), ("b", 1.0, 0.8))
        for seed, kl in enumerate((0.01, 0.1, 1.0))
    ]
    found = evidence.compared(rows, "a", "b")
    assert found["kl"] == pytest.approx((0.5, 0.5, 0.5))
    assert found["points"] == pytest.approx((10.0, 10.0, 10.0))


def test_every_verdict_has_numbers_and_a_command():
    for claim, verdict, found, command in evidence.claims(readme.read_rows):
        assert claim and found
        assert (command == "") == (verdict == evidence.UNKNOWN)
