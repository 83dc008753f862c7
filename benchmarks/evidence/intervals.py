"""Intervals over seeds, and comparisons of two runs on the same seeds, with words for them."""

import math
from collections.abc import Sequence
from statistics import mean, stdev

from benchmarks.evidence.frame import Row

Values = dict[int, Row]  # by seed
Interval = tuple[float, float, float]  # mean, low, high
Comparison = dict[str, Interval]  # of "kl", a ratio, and of "points"
# Student's t, 0.975, by degrees of freedom
QUANTILES = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
MARGIN = 4.0  # points of pass@1 within which two runs count as equal, as in benchmarks.demo_seeds
REPRODUCED, IN_PART, NOT, UNKNOWN = "reproduced", "in part", "not reproduced", "not measured here"
UNTESTABLE = "not testable here"
UNDECIDED = "not decided"  # the interval holds both
NEGLIGIBLE = 1.25  # a ratio of KLs whose whole interval lies below is no gap

FEWEST = 3  # seeds of an interval
NO_ROWS = "Not measured yet."


def interval(values: Sequence[float]) -> Interval:
    """The mean and its 95 % interval, by Student's t."""
    middle, half = mean(values), QUANTILES[len(values) - 1] * stdev(values) / len(values) ** 0.5
    return middle, middle - half, middle + half


def ratio(values: Sequence[float]) -> Interval:
    """The geometric mean of ratios and its 95 % interval, which is that of their logs."""
    middle, low, high = map(math.exp, interval([math.log(value) for value in values]))
    return middle, low, high


def mean_log_kl(rows: Values) -> float:
    return mean(math.log(row["kl"]) for row in rows.values())


def compare(ours: Values, base: Values) -> Comparison:
    """Two runs on the same seeds: KL / the base's, and pass@1 minus the base's in points."""
    assert ours.keys() == base.keys()
    points = [100 * (ours[s]["sampled"] - base[s]["sampled"]) for s in ours]
    kl = ratio([ours[s]["kl"] / base[s]["kl"] for s in ours])
    return {"kl": kl, "points": interval(points)}


def equal(found: Comparison) -> str:
    """Whether the whole interval lies within the margin; in part if it only contains 0."""
    _, low, high = found["points"]
    if low >= -MARGIN and high <= MARGIN:
        return REPRODUCED
    return IN_PART if low <= 0 <= high else NOT


def better(found: Comparison) -> str:
    """Whether the KL is clearly lower, or pass@1 clearly higher."""
    return REPRODUCED if found["kl"][2] < 1 or found["points"][1] > 0 else NOT


def shown(found: Interval, form: str) -> str:
    """An interval in words, such as `1.20 [1.10, 1.31]`."""
    middle, low, high = (format(value, form) for value in found)
    return f"{middle} [{low}, {high}]"


def words(found: Comparison) -> str:
    """Both intervals of a comparison."""
    return f"KL x {shown(found['kl'], '.2f')}, pass@1 {shown(found['points'], '+.1f')} points"
