"""On the real model: each objective at learning rates of its own, and a live teacher.

The models are those of `lopd demo --task smollm2`, whose own runs are the ones at the demo's
learning rate; `benchmarks.real_demo` has their rows.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp
from statistics import mean
from typing import Any

from benchmarks import real_demo
from benchmarks.evidence.frame import (
    RESULTS,
    Cell,
    Measure,
    Part,
    Row,
    Shared,
    measure_of,
    quality_measures,
    read,
)
from benchmarks.evidence.intervals import (
    NO_ROWS,
    Comparison,
    Values,
    columns,
    compare,
    mean_log_kl,
)
from benchmarks.evidence.markdown import grid
from benchmarks.evidence.rates import (
    EXPLAINED,
    Curves,
    Rates,
    arms_of,
    best,
    best_rate,
    tried,
    tuned_alike,
)
from benchmarks.evidence.runs import more_fine_tuning
from benchmarks.recorder import ROOT
from lopd.stages.demo.real import DISTILLED, OPD_STEPS, TASK, TOP_K, RealDemo
from lopd.stages.demo.report import MORE_SFT, SAMPLED

SEEDS = (0, 1, 2)
LISTS, TOKEN, CONTROL, LIVE = "lists", "sampled", "control", "live"
OBJECTIVES: dict[str, dict[str, Any]] = {
    LISTS: {},
    TOKEN: {"objective": "policy_gradient"},
    LIVE: {"refresh_every": 1},
}
RATES: Rates = {
    LISTS: (1.0, 0.5, 2.0, 0.25),
    TOKEN: (0.5, 0.25, 0.125, 0.0625, 1.0),  # the demo's is far too high for it
    CONTROL: (1.0, 0.5, 2.0, 0.25),
}
ENDS: Rates = {LISTS: (1.0,), LIVE: (1.0,), CONTROL: (1.0,)}  # what is compared with a live teacher
OFFLINE = ("student's rollouts", "teacher's scores", DISTILLED)  # stages of the offline run
OF_THE_DEMO = {DISTILLED: LISTS, SAMPLED: TOKEN, MORE_SFT: CONTROL}  # its runs, by arm
WORDS = {
    LISTS: f"lists of {TOP_K}",
    TOKEN: "sampled token",
    CONTROL: "control: more fine-tuning",
    LIVE: f"live teacher, lists of {TOP_K}",
}
MEASURES = ("kl", "kl_interval", "held_out_kl", "held_out_kl_interval")
MEASURES += ("sampled", "sampled_interval", "greedy", "greedy_interval")


class RealShared(Shared):
    """What the cells of one seed share: the models and stored answers of `lopd demo`."""

    kind = RealDemo
    prefix = "real-seed"
    shared_until = "teacher"  # the first model that is evaluated
    distilled = DISTILLED
    minutes = 9.0


@dataclass(frozen=True)
class Run:
    """The student after one objective at one learning rate, or with a live teacher."""

    arm: str
    factor: float  # of the demo's learning rate
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm}/lr{self.factor:g}/seed{self.seed}"

    @property
    def folder(self) -> str:
        return f"real-{self.arm}-lr{self.factor:g}"

    @property
    def minutes(self) -> float:
        return 10.0 if self.arm == LIVE else 5.5

    @property
    def results(self) -> Sequence[str]:
        return [self.folder]

    def measure(self, shared: Shared) -> Row:
        began = time.process_time()
        if self.arm == CONTROL:
            more_fine_tuning(shared, self.folder, self.factor)
        else:
            settings: dict[str, Any] = {"learning_rate": self.factor * TASK.opd["learning_rate"]}
            settings |= OBJECTIVES[self.arm]
            if "refresh_every" in settings:
                settings["teacher"] = shared.demo.path("teacher")
            shared.train(self.folder, **settings)
        seconds = time.process_time() - began
        found = shared.demo.evaluate(self.folder)
        row = {"arm": self.arm, "factor": self.factor, "steps": OPD_STEPS, "cpu_seconds": seconds}
        return row | {name: found[name] for name in MEASURES}


def cells() -> Sequence[Cell]:
    """Seed by seed; the runs at the demo's learning rate are the demo's own."""
    runs = [(arm, factor) for arm, factors in RATES.items() for factor in factors if factor != 1.0]
    return [Run(arm, factor, seed) for seed in SEEDS for arm, factor in [*runs, (LIVE, 1.0)]]


def with_the_demo(rows: list[Row]) -> list[Row]:
    """The rows of the part, and those of the demo's own runs, which have the demo's rate."""
    own = [
        {**row, "arm": OF_THE_DEMO[row["stage"]], "factor": 1.0}
        for row in _demo()
        if row["stage"] in OF_THE_DEMO
    ]
    return [*own, *rows] if rows else []


def measures(row: Row) -> dict[str, Measure]:
    """The quality of a run, and its KL on held-out answers."""
    return quality_measures(row) | {"held-out KL": measure_of(row, "held_out_kl", geometric=True)}


def table(rows: list[Row]) -> str:
    """Markdown: lists and the sampled token against the control, each at the best of its rates."""
    head = [
        "objective", "its rates", "best", "the control's rates", "best", "seeds",
        "KL / the control's", "held-out KL / the control's", "right, minus the control's, points",
    ]  # fmt: skip
    body = []
    for arm in (LISTS, TOKEN):
        arms = alike(rows, arm, CONTROL)
        if len(arms) < 2:
            continue
        ours, control = (arms[each][best(arms[each])] for each in (arm, CONTROL))
        new, points = columns(compare(ours, control))
        held_out, _ = columns(compare(held(ours), held(control)))
        tuning = [part for each in arms.values() for part in (tried(each), best_rate(each))]
        body.append([WORDS[arm], *tuning, f"{len(ours)}", new, held_out, points])
    if not body:
        return NO_ROWS
    paired = f"{OPD_STEPS} steps each; paired by seed, with 95 % intervals."
    return "\n".join([grid(head, body), "", *EXPLAINED, paired])


def grid_table(rows: list[Row]) -> str:
    """Markdown: the KL of every run on each seed, with its interval over questions."""
    found: dict[tuple[str, float], Values] = {}
    for row in with_the_demo(rows):
        found.setdefault((row["arm"], row["factor"]), {})[row["seed"]] = row
    if not found:
        return NO_ROWS
    head = ["objective", "rate", *(f"KL, seed {seed}" for seed in SEEDS)]
    body = []
    for arm in WORDS:
        for factor in sorted(factor for name, factor in found if name == arm):
            runs = found[arm, factor]
            kls = [real_demo.with_interval(runs[s], "kl") if s in runs else "" for s in SEEDS]
            body.append([WORDS[arm], f"{factor:g}", *kls])
    return "\n".join(
        [
            grid(head, body),
            "",
            "KL in nat per token on new answers, with 95 % intervals over questions; rates are",
            f"factors of the demo's. {OPD_STEPS} steps each.",
        ]
    )


def held(runs: Values) -> Values:
    """Runs with the KL on held-out answers in the place of that on new ones."""
    return {seed: row | {"kl": row["held_out_kl"]} for seed, row in runs.items()}


def live_table(rows: list[Row]) -> str:
    """Markdown: offline and with a live teacher, at the demo's rate; and what either costs."""
    ends = {arm: curves[1.0] for arm, curves in alike(rows, *ENDS, rates=ENDS).items()}
    if not {LISTS, LIVE} <= ends.keys():
        return NO_ROWS
    head = ["run", "seeds", "KL, new answers", "of each seed", "KL, offline / it"]
    head += ["held-out KL, offline / it", "right, sampled", "offline minus it, points"]
    body = []
    for arm, runs in ends.items():
        new, points = columns(compare(ends[LISTS], runs))
        held_out, _ = columns(compare(held(ends[LISTS]), held(runs)))
        cells = [
            f"{WORDS[arm]}, offline" if arm == LISTS else WORDS[arm],
            f"{len(runs)}",
            f"{exp(mean_log_kl(runs)):.2f}",
            " / ".join(f"{row['kl']:.2f}" for row in runs.values()),
            *(("1", "1") if arm == LISTS else (new, held_out)),
            f"{mean(row['sampled'] for row in runs.values()):.2f}",
            "0" if arm == LISTS else points,
        ]
        body.append(cells)
    lines = [grid(head, body)]
    costs = [f"{found:.2f} (seed {seed})" for seed, found in live_costs(rows).items()]
    if costs:
        lines += [
            "",
            "CPU seconds of the live run over those of rollouts, scores and training offline: "
            f"{', '.join(costs)}.",
        ]
    return "\n".join(lines)


def live_costs(rows: list[Row]) -> dict[int, float]:
    """CPU seconds of the live run over those of the whole offline run, by seed.

    Seeds whose demo did not record them are left out.
    """
    demo = {(row["seed"], row["stage"]): row.get("cpu_seconds") for row in _demo()}
    costs = {}
    for row in rows:
        parts = [demo.get((row["seed"], name)) for name in OFFLINE]
        if row["arm"] == LIVE and None not in parts:
            costs[row["seed"]] = row["cpu_seconds"] / sum(parts)
    return costs


def against(rows: list[Row], arm: str, base: str, rates: Rates = RATES) -> Comparison | None:
    """An arm at its best rate against another at its own; None if the seeds are too few."""
    arms = alike(rows, arm, base, rates=rates)
    if len(arms) < 2:
        return None
    return compare(*(arms[each][best(arms[each])] for each in (arm, base)))


def alike(rows: list[Row], *arms: str, rates: Rates = RATES) -> dict[str, Curves]:
    """The runs of some arms, at as many rates each, whatever the others have."""
    chosen = {arm: rates[arm] for arm in arms}
    return tuned_alike(arms_of(with_the_demo(rows), chosen), chosen)


def _demo() -> list[Row]:
    """The rows of whole demos."""
    return [row for row in read(ROOT / RESULTS / real_demo.NAME) if not row["quick"]]


PART = Part(
    "real",
    cells,
    tables={"real grid": grid_table, "real rates": table, "real live": live_table},
    figures={},
    shared=RealShared,
    measures=measures,
)
