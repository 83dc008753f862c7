"""Offline against a live teacher: ends, seconds by part, and drift from the rollouts' policy.

Each cell distils the demo's student twice on the same prompts in the same order, offline and with a
teacher that renews the rollouts every step, and counts seconds: those of the clock, and the CPU
seconds of the process, which other work on the machine disturbs less. Offline includes its rollouts
and scores. The teacher's training and the fine-tuning precede both and are not counted.

Drift is that of the offline student p from the policy r that sampled its rollouts: the ratio p / r
of each token, on the rollouts that it was trained on and on new ones of r, where its mean is 1
whatever p is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean

from benchmarks.evidence.frame import Measure, Part, Row, quality_measures
from benchmarks.evidence.intervals import (
    FEWEST,
    IN_PART,
    NO_ROWS,
    NOT,
    REPRODUCED,
    Comparison,
    Interval,
    columns,
    combine,
    compare,
    judge,
    ratio,
    shown,
)
from benchmarks.evidence.live_cells import OBJECTIVES, PARTS, cells

DRIFT = ("mean", "within a quarter", "ess", "kl")  # the columns of its table


def of(rows: Sequence[Row], objective: str) -> list[Row]:
    """The rows of an objective, by seed."""
    return sorted((r for r in rows if r["objective"] == objective), key=lambda row: row["seed"])


def ends(rows: Sequence[Row], objective: str, one: str, other: str) -> Comparison | None:
    """One of start, offline, live and control against another; None if seeds are too few."""
    chosen = of(rows, objective)
    first, second = ({r["seed"]: r["quality"][name] for r in chosen} for name in (one, other))
    return compare(first, second)


def times(rows: Sequence[Row], objective: str, seconds: str) -> Interval | None:
    """How many times as long the live run takes as all of the offline one."""
    return ratio([r["live"][seconds] / _total(r, seconds) for r in of(rows, objective)])


def _total(row: Row, seconds: str) -> float:
    return sum(part[seconds] for part in row["offline"].values())


def alone(row: Row) -> float:
    """CPU seconds of the live run over those of the offline run's training."""
    return float(row["live"]["processor"] / row["offline"]["training"]["processor"])


def measures(row: Row) -> dict[str, Measure]:
    """Ends and costs of the runs, and the drift."""
    found: dict[str, Measure] = {}
    for run, quality in row["quality"].items():
        found |= quality_measures(quality, f"{run}: ")
    for seconds in ("processor", "clock"):
        name = f"live / offline, {seconds}"
        found[name] = Measure(row["live"][seconds] / _total(row, seconds), geometric=True)
    found["live / training alone"] = Measure(alone(row), geometric=True)
    for rollouts, drift in row["drift"].items():
        found |= {f"drift, {rollouts}: {key}": Measure(drift[key]) for key in DRIFT}
    return found


def cost_table(rows: list[Row]) -> str:
    """Markdown: shares of the offline run's parts, and ratios of the live run."""
    lines = [
        "| objective | generation | scoring | training | live / offline, CPU "
        "| live / offline, clock | live / training alone | seeds |",
        f"| --- |{' ---: |' * 7}",
    ]
    for objective in OBJECTIVES:
        chosen = of(rows, objective)
        if len(chosen) < FEWEST:
            continue
        shares = [
            mean(r["offline"][part]["processor"] / _total(r, "processor") for r in chosen)
            for part in PARTS
        ]
        found = [times(rows, objective, seconds) for seconds in ("processor", "clock")]
        cells = [
            objective,
            *(f"{share:.0%}" for share in shares),
            *(shown(each, ".2f") for each in (*found, ratio([alone(r) for r in chosen]))),
            str(len(chosen)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if len(lines) == 2:
        return NO_ROWS
    cold = sum("first" not in row for row in rows)
    if cold:  # rows of before the warm-up
        note = f"In {cold} of {len(rows)} runs the offline run came first, and without a warm-up:"
        lines += ["", note, "its generation includes imports, which makes a live run look cheaper."]
    return "\n".join(lines)


def ends_table(rows: list[Row]) -> str:
    """Markdown: where the runs end, and offline against the others on the same seeds."""
    lines = [
        "| objective | run | KL | pass@1 | KL ratio, offline / it | offline minus it, points "
        "| seeds |",
        f"| --- | --- |{' ---: |' * 5}",
    ]
    for objective in OBJECTIVES:
        chosen = of(rows, objective)
        if len(chosen) < FEWEST:
            continue
        for run in chosen[0]["quality"]:
            compared = ends(rows, objective, "offline", run)
            kl = math.exp(mean(math.log(row["quality"][run]["kl"]) for row in chosen))
            sampled = mean(row["quality"][run]["sampled"] for row in chosen)
            cells = [objective, run, f"{kl:.4f}", f"{sampled:.3f}"]
            if run == "offline":
                cells += ["1", "0"]
            else:
                cells += columns(compared)
            cells.append(str(len(chosen)))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else NO_ROWS


def drift_table(rows: list[Row]) -> str:
    """Markdown: the ratio p / r of tokens after offline training, mean and range over seeds."""
    lines = [
        "| objective | rollouts | mean of p / r | tokens within a quarter of 1 | ESS of tokens "
        "| E[log r - log p] | seeds |",
        f"| --- | --- |{' ---: |' * 5}",
    ]
    for objective in OBJECTIVES:
        chosen = of(rows, objective)
        for rollouts in chosen[0]["drift"] if len(chosen) >= FEWEST else ():
            cells = [objective, rollouts]
            for key in DRIFT:
                values = [row["drift"][rollouts][key] for row in chosen]
                cells.append(f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
            cells.append(str(len(chosen)))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else NO_ROWS


def cheaper(found: Interval | None, factor: float) -> str:
    """Whether the live run takes `factor` times as long; in part if less, but longer."""
    verdict = judge(found, low=factor)
    return IN_PART if verdict == NOT and judge(found, low=1.0) == REPRODUCED else verdict


def near(means: Interval | None, within: Interval | None) -> str:
    """Whether the mean ratio is within 0.1 of 1, and nine tokens of ten within a quarter of it."""
    return combine(judge(means, 0.9, 1.1), judge(within, low=0.9))


PART = Part(
    "live",
    cells,
    tables={"live cost": cost_table, "live ends": ends_table, "drift": drift_table},
    figures={},
    measures=measures,
)
