"""Verdicts on the paper's claims, from intervals."""

import shlex
from fnmatch import fnmatch

import pytest

from benchmarks import readme
from benchmarks.evidence import claims, intervals
from benchmarks.evidence.parts import PARTS


@pytest.mark.parametrize(
    ("points", "verdict"),
    [
        ((0.1, -3.9, 3.9), intervals.REPRODUCED),
        ((0.1, -4.1, 3.9), intervals.UNDECIDED),
        ((-5.0, -9.0, -1.0), intervals.UNDECIDED),
        ((-7.0, -9.0, -4.5), intervals.NOT),
        ((7.0, 4.5, 9.0), intervals.NOT),
    ],
)
def test_runs_are_equal_if_the_interval_lies_within_the_margin(points, verdict):
    assert intervals.equal({"points": points, "kl": (1.0, 0.5, 2.0)}) == verdict


def test_a_run_is_better_if_its_interval_says_so():
    def verdict(kl):
        return intervals.better({"kl": kl, "points": (0.0, -1.0, 1.0)})

    assert verdict((0.5, 0.3, 0.9)) == intervals.REPRODUCED
    assert verdict((0.98, 0.3, 3.15)) == intervals.UNDECIDED
    assert verdict((2.0, 1.1, 3.15)) == intervals.NOT


def test_too_few_seeds_have_no_interval_and_decide_nothing():
    two = {seed: {"kl": 1.0, "sampled": 0.5} for seed in (0, 1)}
    assert intervals.interval([1.0, 2.0]) is None and intervals.ratio([1.0, 2.0]) is None
    found = intervals.compare(two, {**two, 2: two[0]})
    assert found is None and intervals.columns(found) == ["", ""]
    for verdict in (intervals.equal, intervals.better, intervals.worse, intervals.no_worse):
        assert verdict(found) == intervals.UNKNOWN


@pytest.mark.parametrize(
    ("verdicts", "combined"),
    [
        ((intervals.REPRODUCED, intervals.REPRODUCED), intervals.REPRODUCED),
        ((intervals.NOT, intervals.NOT), intervals.NOT),
        ((intervals.REPRODUCED, intervals.NOT), intervals.IN_PART),
        ((intervals.REPRODUCED, intervals.UNDECIDED), intervals.UNDECIDED),
        ((intervals.REPRODUCED, intervals.UNKNOWN), intervals.UNDECIDED),
        ((intervals.UNKNOWN, intervals.UNKNOWN), intervals.UNKNOWN),
    ],
)
def test_a_claim_of_several_conditions_is_in_part_only_if_all_are_decided(verdicts, combined):
    assert intervals.combine(*verdicts) == combined


def test_stages_are_compared_on_the_same_seeds():
    rows = [
        {"stage": stage, "seed": seed, "kl": kl * scale, "sampled": sampled}
        for stage, scale, sampled in (("a", 0.5, 0.9), ("b", 1.0, 0.8))
        for seed, kl in enumerate((0.01, 0.1, 1.0))
    ]
    found = claims.compared(rows, "a", "b")
    assert found["kl"] == pytest.approx((0.5, 0.5, 0.5))
    assert found["points"] == pytest.approx((10.0, 10.0, 10.0))


def test_every_claim_has_words_and_one_that_can_be_tested_a_command():
    found = list(claims.claims(readme.read_rows))
    for claim, verdict, words, command in found:
        assert claim and words
        assert (command == "") == (verdict == intervals.UNTESTABLE)
    nothing = list(claims.claims(lambda name: readme.read_rows(name) if "demo" in name else []))
    assert [each.command for each in nothing] == [each.command for each in found]
    assert {each.verdict for each in nothing} > {intervals.UNKNOWN, intervals.UNTESTABLE}


def test_a_claim_with_too_few_seeds_has_the_command_that_measures_them():
    rows = claims.table(lambda name: readme.read_rows(name) if "demo" in name else [])
    missing = [line for line in rows.splitlines() if "fewer than 3 seeds so far" in line]
    assert missing and all("`python -m" in line for line in missing)
    assert not any("--again" in line for line in missing) and "demo_seeds --again" in rows


def test_the_commands_of_claims_select_the_cells_that_they_need():
    cells = {part.name: [cell.name for cell in part.cells()] for part in PARTS}
    counts = {}
    for _, _, _, command in claims.claims(readme.read_rows):
        line, _, patterns = command.partition(" --only ")
        name = line.removesuffix(" --again").rpartition("--part ")[2].rpartition(".")[2]
        if patterns:
            chosen = [c for c in cells[name] for p in shlex.split(patterns) if fnmatch(c, p)]
            assert all(name[-1].isdigit() for name in chosen)
            counts[f"{name} {patterns}"] = len({name.rpartition("/")[0] for name in chosen})
    assert counts == {
        "live 'lists/*'": 1,
        "live 'sampled/*'": 1,
        "consistency 'A-A/lists/*/600/*'": 2,
        "consistency 'A-A/lists/*/200/*' '?-B/lists/*/200/*'": 6,
        "consistency 'A-A/lists/live/600/*' '?-B/lists/live/600/*' 'A-B/lists/live/200/*'": 4,
        "consistency 'A-A/lists/frozen/600/*' '?-B/lists/frozen/600/*' 'A-B/lists/frozen/200/*'": 4,
        "objectives 'list+sampled/k2/lr1/*' 'list+sampled/k8/lr1/*'": 2,
        "sampled 'lists/*' 'sampled/*'": 8,
        "sampled 'lists/*' 'clipped/*'": 8,
        "sampled 'lists/*' 'control/*'": 8,
        "real 'lists/*' 'control/*'": 6,  # the demo's own rows have its rate
        "real 'sampled/*' 'lists/*'": 7,
        "real 'sampled/*' 'control/*'": 7,
        "real 'live/*'": 1,
    }


def test_intervals_are_those_of_students_t():
    """scipy.stats.t.interval(0.95, 4, loc=3, scale=stdev / sqrt(5)) of 1 to 5."""
    found = intervals.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found == pytest.approx((3.0, 1.03676, 4.96324), abs=1e-3)
    powers = intervals.ratio([2.0**x for x in (1.0, 2.0, 3.0, 4.0, 5.0)])
    assert powers == pytest.approx([2.0**x for x in found])
