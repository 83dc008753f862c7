"""Arms that are each tried at several learning rates: the runs to compare, and the best rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import mean

from benchmarks.evidence.frame import Row
from benchmarks.evidence.intervals import FEWEST, Values, compare, part_of, shown

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


def held_out(curves: Curves) -> Values:
    """Each seed's run at the rate that ends lowest on the other seeds, so not chosen by its end."""

    def others(seed: int) -> Curves:
        return {
            rate: {other: row for other, row in runs.items() if other != seed}
            for rate, runs in curves.items()
        }

    seeds = next(iter(curves.values()))
    return {seed: curves[best(others(seed))][seed] for seed in seeds}


def with_held_out_rates(
    arms: Mapping[str, Curves],
    base: str,
    words: Mapping[str, str],
    ends: Callable[[Values], Values] = lambda runs: runs,
) -> str:
    """KL of each arm over that of `base`, each seed's rate being chosen on the other seeds.

    In words; empty if no arm has a choice of rates.

    Args:
        words: for the arms.
        ends: makes rows of a run's KL and pass@1 from its rows.
    """
    if all(len(curves) == 1 for curves in arms.values()):
        return ""
    chosen = {arm: ends(held_out(curves)) for arm, curves in arms.items()}
    ratios = [
        f"{words[arm]} {shown(part_of(compare(runs, chosen[base]), 'kl'), '.2f')}"
        for arm, runs in chosen.items()
        if arm != base
    ]
    said = "With each seed's rate chosen on the other seeds instead, the ratios of the KLs are: "
    return f"{said}{'; '.join(ratios)}."


def best_rate(curves: Curves) -> str:
    """The best rate in words, and whether a rate beyond those tried may be better."""
    rate = best(curves)
    edge = len(curves) > 1 and rate in (min(curves), max(curves))
    return f"{rate:g}{' (edge)' if edge else ''}"


def tried(curves: Curves) -> str:
    """The rates of an arm, in words."""
    return ", ".join(f"{rate:g}" for rate in sorted(curves))
