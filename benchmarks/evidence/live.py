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
    Values,
    both,
    columns,
    combine,
    compare,
    judge,
    mean_log_kl,
    ratio,
    shown,
)
from benchmarks.evidence.live_cells import LISTS, OBJECTIVES, PARTS, cells
from benchmarks.evidence.markdown import grid

DRIFT = ("mean", "within a quarter", "ess", "kl")  # the columns of its table


def of(rows: Sequence[Row], objective: str) -> list[Row]:
    """The rows of an objective, by seed."""
    return sorted((r for r in rows if r["objective"] == objective), key=lambda row: row["seed"])


def quality(rows: Sequence[Row], objective: str, run: str) -> Values:
    """By seed, the KL and pass@1 of one of start, offline, live and control.

    The control has no objective; it stands in the rows of lists.
    """
    chosen = of(rows, LISTS if run == "control" else objective)
    return {row["seed"]: row["quality"][run] for row in chosen if run in row["quality"]}


def ends(rows: Sequence[Row], objective: str, one: str, other: str) -> Comparison | None:
    """One of start, offline, live and control against another; None if seeds are too few."""
    return compare(*(quality(rows, objective, name) for name in (one, other)))


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


def enough(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each objective that has rows of enough seeds for an interval."""
    return {name: of(rows, name) for name in OBJECTIVES if len(of(rows, name)) >= FEWEST}


def cost_table(rows: list[Row]) -> str:
    """Markdown: shares of the offline run's parts, and ratios of the live run."""
    head = ["objective", *PARTS, "live / offline, CPU", "live / offline, clock"]
    body = []
    for objective, chosen in enough(rows).items():
        shares = [
            mean(r["offline"][part]["processor"] / _total(r, "processor") for r in chosen)
            for part in PARTS
        ]
        found = [times(rows, objective, seconds) for seconds in ("processor", "clock")]
        found.append(ratio([alone(row) for row in chosen]))
        ratios = [shown(each, ".2f") for each in found]
        body.append([objective, *(f"{x:.0%}" for x in shares), *ratios, str(len(chosen))])
    return grid([*head, "live / training alone", "seeds"], body) if body else NO_ROWS


def ends_table(rows: list[Row]) -> str:
    """Markdown: where the runs end, and offline against the others on the same seeds."""
    head = ["objective", "run", "KL", "pass@1", "KL ratio, offline / it"]
    body = []
    for objective in enough(rows):
        offline = quality(rows, objective, "offline")
        for run in ("start", "offline", "live", "control"):
            found = quality(rows, objective, run)
            if (compared := compare(offline, found)) is None:
                continue
            shared = {seed: found[seed] for seed in both(offline, found)}
            kl, sampled = math.exp(mean_log_kl(shared)), mean(r["sampled"] for r in shared.values())
            differences = ["1", "0"] if run == "offline" else columns(compared)
            cells = [objective, run, f"{kl:.4f}", f"{sampled:.3f}", *differences]
            body.append([*cells, str(len(shared))])
    head += ["offline minus it, points", "seeds"]
    return grid(head, body, words=2) if body else NO_ROWS


def drift_table(rows: list[Row]) -> str:
    """Markdown: the ratio p / r of tokens after offline training, mean and range over seeds."""
    head = ["objective", "rollouts", "mean of p / r", "tokens within a quarter of 1"]
    body = []
    for objective, chosen in enough(rows).items():
        for rollouts in chosen[0]["drift"]:
            cells = [objective, rollouts]
            for key in DRIFT:
                values = [row["drift"][rollouts][key] for row in chosen]
                cells.append(f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
            body.append([*cells, str(len(chosen))])
    head += ["ESS of tokens", "E[log r - log p]", "seeds"]
    return grid(head, body, words=2) if body else NO_ROWS


def cheaper(found: Interval | None, factor: float) -> str:
    """Whether the live run takes `factor` times as long; in part if less, but longer."""
    verdict = judge(found, low=factor)
    return IN_PART if verdict == NOT and judge(found, low=1.0) == REPRODUCED else verdict


def near(means: Interval | None, within: Interval | None, ess: Interval | None) -> str:
    """Whether the mean ratio is within 0.1 of 1, and nine tokens of ten within a quarter of it.

    And at least half of the tokens must count by their ratios: a few large ones, which the others
    make up for, would leave the mean at 1 and the share near it.
    """
    return combine(judge(means, 0.9, 1.1), judge(within, low=0.9), judge(ess, low=0.5))


PART = Part(
    "live",
    cells,
    tables={"live cost": cost_table, "live ends": ends_table, "drift": drift_table},
    figures={},
    measures=measures,
)
