"""Arms that are each tried at several learning rates: the runs to compare, and the best rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean

from benchmarks.evidence.frame import Row
from benchmarks.evidence.intervals import FEWEST, Values

Rates = Mapping[str, Sequence[float]]  # of each arm, the ones that matter most first
Curves = dict[float, Values]  # runs of an arm, by learning rate, then by seed

EXPLAINED = (
    "Rates are factors of the demo's learning rate. Each arm is at the one that ends",
    "lowest, chosen on the same seeds, and the intervals leave this choice out. At an",
    "edge, a rate beyond those tried may be better; of one rate there is no choice.",
)


def arms_of(rows: list[Row], rates: Rates) -> dict[str, Curves]:
    """The measured runs of each arm."""
    found: dict[str, Curves] = {}
    for row in rows:
        found.setdefault(row["arm"], {}).setdefault(row["factor"], {})[row["seed"]] = row
    return {arm: found[arm] for arm in rates if arm in found}


def tuned_alike(arms: dict[str, Curves], rates: Rates) -> dict[str, Curves]:
    """The runs of each arm at as many rates as every arm has, on the seeds that all of these have.

    The rates are the first ones of each arm, so that none is tuned more than another. Rates and
    arms with too few seeds are left out.
    """
    tried = {
        arm: [rate for rate in rates[arm] if len(curves.get(rate, {})) >= FEWEST]
        for arm, curves in arms.items()
    }
    count = min((len(found) for found in tried.values() if found), default=0)
    kept = {
        arm: {rate: arms[arm][rate] for rate in found[:count]}
        for arm, found in tried.items()
        if found
    }
    runs = [set(by_seed) for curves in kept.values() for by_seed in curves.values()]
    seeds = sorted(set.intersection(*runs)) if runs else []
    return {
        arm: {rate: {seed: by[seed] for seed in seeds} for rate, by in curves.items()}
        for arm, curves in kept.items()
        if seeds
    }


def final_kl(row: Row) -> float:
    """The KL at the end of a run, whose row may have that of each evaluation on the way."""
    kl = row["kl"]
    return float(kl[-1] if isinstance(kl, list) else kl)


def best(curves: Curves) -> float:
    """The rate at which an arm ends with the lowest KL, in the geometric mean over seeds."""
    return min(
        sorted(curves), key=lambda rate: mean(math.log(final_kl(r)) for r in curves[rate].values())
    )


def best_rate(curves: Curves) -> str:
    """The best rate in words, and whether a rate beyond those tried may be better."""
    rate = best(curves)
    edge = len(curves) > 1 and rate in (min(curves), max(curves))
    return f"{rate:g}{' (edge)' if edge else ''}"


def tried(curves: Curves) -> str:
    """The rates of an arm, in words."""
    return ", ".join(f"{rate:g}" for rate in sorted(curves))
