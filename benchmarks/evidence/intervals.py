"""Intervals over seeds, and comparisons of two runs on the same seeds, with words for them."""

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from benchmarks.evidence.frame import Row

Values = dict[int, Row]  # by seed
Interval = tuple[float, float, float]  # mean, low, high
Comparison = dict[str, Interval]  # of "kl", a ratio, and of "points"
# Student's t, 0.975, by degrees of freedom
QUANTILES = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
MARGIN = 4.0  # points of pass@1 within which two runs count as equal, as in benchmarks.demo_seeds
REPRODUCED, IN_PART, NOT, UNKNOWN = "reproduced", "in part", "not reproduced", "not measured here"
UNTESTABLE = "not testable here"
UNDECIDED = "not decided"
NEGLIGIBLE = 1.25  # a ratio of KLs below which two runs count as no worse than each other

FEWEST = 3  # seeds of an interval
NO_ROWS = "Not measured yet."


def interval(values: Sequence[float]) -> Interval | None:
    """The mean and its 95 % interval, by Student's t; None of too few values."""
    if len(values) < FEWEST:
        return None
    middle, half = mean(values), QUANTILES[len(values) - 1] * stdev(values) / len(values) ** 0.5
    return middle, middle - half, middle + half


def ratio(values: Sequence[float]) -> Interval | None:
    """The geometric mean of ratios and its 95 % interval, which is that of their logs."""
    if (found := interval([math.log(value) for value in values])) is None:
        return None
    middle, low, high = map(math.exp, found)
    return middle, low, high


def mean_log_kl(rows: Values) -> float:
    return mean(math.log(row["kl"]) for row in rows.values())


def both(ours: Mapping[int, Any], base: Mapping[int, Any]) -> list[int]:
    """The seeds that two runs have."""
    return sorted(ours.keys() & base.keys())


def compare(ours: Values, base: Values) -> Comparison | None:
    """Two runs on the seeds that both have: KL / the base's, and pass@1 minus it in points.

    None if these seeds are too few.
    """
    seeds = both(ours, base)
    kl = ratio([ours[s]["kl"] / base[s]["kl"] for s in seeds])
    points = interval([100 * (ours[s]["sampled"] - base[s]["sampled"]) for s in seeds])
    return None if kl is None or points is None else {"kl": kl, "points": points}


def judge(found: Interval | None, low: float = -math.inf, high: float = math.inf) -> str:
    """Whether a value lies between two bounds, as far as its interval decides that.

    Reproduced only if the whole interval lies between them, and not reproduced only if all of it
    lies outside; not decided otherwise. Without an interval it is not measured.

    >>> judge((2.0, 1.5, 2.5), low=1.0), judge((2.0, 0.5, 3.5), low=1.0)
    ('reproduced', 'not decided')
    """
    if found is None:
        return UNKNOWN
    if found[1] >= low and found[2] <= high:
        return REPRODUCED
    return NOT if found[1] > high or found[2] < low else UNDECIDED


def combine(*verdicts: str) -> str:
    """The verdict on a claim of several conditions.

    In part if every one is decided, and they differ; not decided if one of them is not.
    """
    if len(set(verdicts)) == 1:
        return verdicts[0]
    return IN_PART if set(verdicts) <= {REPRODUCED, IN_PART, NOT} else UNDECIDED


def part_of(of: Comparison | None, name: str) -> Interval | None:
    """One interval of a comparison."""
    return None if of is None else of[name]


def equal(found: Comparison | None) -> str:
    """Whether pass@1 differs by no more than the margin."""
    return judge(part_of(found, "points"), -MARGIN, MARGIN)


def better(found: Comparison | None) -> str:
    """Whether the KL is lower."""
    return judge(part_of(found, "kl"), high=1.0)


def worse(found: Comparison | None) -> str:
    """Whether the KL is higher, by more than is negligible."""
    return judge(part_of(found, "kl"), low=NEGLIGIBLE)


def no_worse(found: Comparison | None) -> str:
    """Whether the KL is not higher, or negligibly so."""
    return judge(part_of(found, "kl"), high=NEGLIGIBLE)


def sorted_by(verdicts: Mapping[str, str], yes: str, no: str) -> str:
    """Names by their verdicts, in words, of which those that are not decided are counted.

    >>> sorted_by({"a": REPRODUCED, "b": UNDECIDED, "c": NOT, "d": REPRODUCED}, "lower", "higher")
    'lower with a; d, higher with c, not decided with 1 more'
    """
    of = {
        verdict: [name for name, each in verdicts.items() if each == verdict]
        for verdict in (REPRODUCED, NOT, UNDECIDED)
    }
    parts = [
        f"{words} with {'; '.join(names)}"
        for words, names in ((yes, of[REPRODUCED]), (no, of[NOT]))
        if names
    ]
    if undecided := len(of[UNDECIDED]):
        parts.append(f"not decided with {undecided}{' more' if parts else ''}")
    return ", ".join(parts)


def shown(found: Interval | None, form: str) -> str:
    """An interval in words, such as `1.20 [1.10, 1.31]`; empty without one."""
    if found is None:
        return ""
    middle, low, high = (format(value, form) for value in found)
    return f"{middle} [{low}, {high}]"


def columns(found: Comparison | None) -> list[str]:
    """Two cells of a table: the ratio of the KLs, and the points."""
    return [shown(part_of(found, "kl"), ".2f"), shown(part_of(found, "points"), "+.1f")]


def words(found: Comparison | None) -> str:
    """Both intervals of a comparison."""
    if found is None:
        return f"fewer than {FEWEST} seeds so far"
    return f"KL x {shown(found['kl'], '.2f')}, pass@1 {shown(found['points'], '+.1f')} points"
