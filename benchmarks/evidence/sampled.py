"""Lists against the sampled token: steps to a given KL, each at learning rates of its own.

An arm is an objective. It trains at a constant learning rate after the warm-up, as in the paper, so
that a step means the same in a run of any length, and the student is evaluated on the way.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any, ClassVar

from benchmarks.evidence.frame import SEEDS, Cell, Measure, Part, Row, Shared, quality_measures
from benchmarks.evidence.intervals import (
    FEWEST,
    NO_ROWS,
    Comparison,
    Values,
    columns,
    compare,
    ratio,
    shown,
)
from benchmarks.evidence.rates import (
    EXPLAINED,
    arms_of,
    best,
    best_rate,
    tried,
    tuned_alike,
    with_held_out_rates,
)
from benchmarks.evidence.runs import more_fine_tuning, quality
from lopd.stages.demo.toy import OPD_SETTINGS, TOP_K

STEPS = (25, 50, 100, 200, 400)  # after which the student is evaluated
LISTS, CONTROL = "lists", "control"
OBJECTIVES: dict[str, dict[str, Any]] = {
    LISTS: {},
    "sampled": {"objective": "policy_gradient"},
    "clipped": {"objective": "policy_gradient", "advantage_clip": 1.0},
}
# Factors of the demo's learning rate, as many for each; a comparison of few takes the first ones.
RATES = {
    LISTS: (1.0, 0.5, 2.0, 0.25),
    "sampled": (0.5, 0.25, 1.0, 2.0),
    "clipped": (1.0, 0.5, 2.0, 0.25),
    CONTROL: (1.0, 0.5, 2.0, 0.25),
}
WORDS = {
    LISTS: f"lists of {TOP_K}",
    "sampled": "sampled token",
    "clipped": "sampled token, advantage clipped to 1",
    CONTROL: "control: more fine-tuning",
}
SHARES = (0.5, 0.1)  # of the start's KL, the columns of the table
CONSTANT: dict[str, Any] = {"lr_scheduler_type": "constant_with_warmup", "min_lr_ratio": 0.0}


@dataclass(frozen=True)
class Curve:
    """The student's KL on the way of one run."""

    arm: str
    factor: float  # of the demo's learning rate
    seed: int
    minutes: ClassVar[float] = 0.5

    @property
    def name(self) -> str:
        return f"{self.arm}/lr{self.factor:g}/seed{self.seed}"

    @property
    def folder(self) -> str:
        return f"curve-{self.arm}-lr{self.factor:g}"

    @property
    def results(self) -> Sequence[str]:
        return [self.folder, *(f"{self.folder}-step{step}" for step in STEPS[:-1])]

    def measure(self, shared: Shared) -> Row:
        *between, last = STEPS
        settings = {"max_steps": last, "save_every": STEPS[0], "save_total_limit": last, **CONSTANT}
        if self.arm == CONTROL:
            more_fine_tuning(shared, self.folder, self.factor, **settings)
        else:
            rate = self.factor * OPD_SETTINGS["learning_rate"]
            settings |= {"learning_rate": rate, **OBJECTIVES[self.arm]}
            shared.distil(self.folder, cache=shared.cache(TOP_K), **settings)
        found = [quality(shared, "sft")]
        found += [quality(shared, exported(shared, self.folder, step)) for step in between]
        found.append(quality(shared, self.folder))
        curve = {key: [each[key] for each in found] for key in ("kl", "sampled")}
        for checkpoint in Path(shared.demo.path(self.folder)).glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        return {"arm": self.arm, "factor": self.factor, "steps": [0, *STEPS], **curve}


def exported(shared: Shared, folder: str, step: int) -> str:
    """A checkpoint of a finished run as a model's folder; returns its name."""
    run = Path(shared.demo.path(folder))

    def write(target: Path) -> None:
        target.mkdir(exist_ok=True)
        for name in ("config", "generation_config", "tokenizer", "tokenizer_config"):
            shutil.copy(run / f"{name}.json", target)
        shutil.copy(run / f"checkpoint-{step}" / "model.safetensors", target)

    shared.demo.build(f"{folder}-step{step}", write)
    return f"{folder}-step{step}"


def cells() -> Sequence[Cell]:
    return [
        Curve(arm, factor, seed)
        for seed in SEEDS
        for arm, factors in RATES.items()
        for factor in factors
    ]


def steps_to(row: Row, share: float) -> float:
    """Steps until the KL is this share of the start's, log KL being linear between evaluations.

    Infinite if the run does not get there.
    """
    logs = [math.log(kl / row["kl"][0] / share) for kl in row["kl"]]
    points = list(zip(row["steps"], logs, strict=True))
    for (begin, above), (end, below) in pairwise(points):
        if below <= 0.0:
            return float(begin + (end - begin) * above / (above - below))
    return math.inf


def _steps(ours: Values, lists: Values, share: float) -> str:
    """Median steps to a share of the KL, how many seeds get there, and the ratio to the lists'."""
    steps = {seed: steps_to(row, share) for seed, row in ours.items()}
    reached = sum(map(math.isfinite, steps.values()))
    middle = median(steps.values())
    words = f"{middle:.0f}" if math.isfinite(middle) else f"> {STEPS[-1]}"
    if reached < len(steps):
        words += f", {reached} of {len(steps)} seeds"
    base = {seed: steps_to(row, share) for seed, row in lists.items()}
    if ours is lists or any(map(math.isinf, base.values())):
        return words
    if (found := ratio([min(steps[seed], STEPS[-1]) / base[seed] for seed in steps])) is None:
        return words
    if reached < len(steps):
        return f"{words}; more than {found[0]:.1f} x the lists'"
    return f"{words}; {shown(found, '.1f')} x"


def _ends(runs: Values) -> Values:
    """KL and pass@1 at the last step."""
    return {seed: {key: row[key][-1] for key in ("kl", "sampled")} for seed, row in runs.items()}


def against(rows: list[Row], arm: str, base: str) -> Comparison | None:
    """The end of an arm at its best rate against another's at its own; None of too few seeds."""
    arms = tuned_alike(arms_of(rows, RATES), RATES)
    if arm not in arms or base not in arms:
        return None
    return compare(*(_ends(arms[each][best(arms[each])]) for each in (arm, base)))


def measures(row: Row) -> dict[str, Measure]:
    """The end of a run, and its steps to shares of the start's KL."""
    steps = {f"steps to {x:g} of the KL": Measure(steps_to(row, x), geometric=True) for x in SHARES}
    return quality_measures(_ends({0: row})[0]) | steps


def table(rows: list[Row]) -> str:
    """Markdown: steps to shares of the start's KL, and the end, each at the arm's best rate."""
    arms = tuned_alike(arms_of(rows, RATES), RATES)
    if LISTS not in arms:
        return NO_ROWS
    lines = [
        "| objective | rates tried | rate | seeds | steps to half the KL "
        f"| steps to a tenth of the KL | KL after {STEPS[-1]} steps | KL / the lists' "
        "| pass@1 minus the lists', points |",
        f"| --- | --- |{' ---: |' * 7}",
    ]
    lists = arms[LISTS][best(arms[LISTS])]
    for arm, curves in arms.items():
        ours = curves[best(curves)]
        kl = math.exp(mean(math.log(row["kl"][-1]) for row in ours.values()))
        cells = [
            WORDS[arm],
            tried(curves),
            best_rate(curves),
            f"{len(ours)}",
            *(_steps(ours, lists, share) for share in SHARES),
            f"{kl:.4f}",
            *(("1", "0") if arm == LISTS else columns(compare(_ends(ours), _ends(lists)))),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if few := [WORDS[arm] for arm in RATES if arm not in arms]:
        lines += ["", f"Fewer than {FEWEST} seeds so far: {'; '.join(few)}."]
    return "\n".join(
        [
            *lines,
            "",
            *EXPLAINED,
            *filter(None, [with_held_out_rates(arms, LISTS, WORDS, _ends)]),
            "Steps are medians over seeds, interpolated between the evaluations after",
            f"{', '.join(map(str, STEPS[:-1]))} and {STEPS[-1]} steps; ratios are paired by seed, "
            "with 95 % intervals.",
            f"Where not every seed gets there, the others count as {STEPS[-1]} steps, and the",
            "ratio is a lower bound.",
        ]
    )


def figure(rows: list[Row]) -> Any:
    """KL against steps of each arm at its best final rate: each seed, and their mean."""
    from matplotlib.figure import Figure

    drawn, arms = (
        Figure(figsize=(6, 3.6), layout="constrained"),
        tuned_alike(arms_of(rows, RATES), RATES),
    )
    axes = drawn.subplots()
    for number, (arm, curves) in enumerate(arms.items()):
        factor = best(curves)
        found = list(curves[factor].values())
        for row in found:
            axes.plot(row["steps"], row["kl"], color=f"C{number}", linewidth=0.6, alpha=0.4)
        columns = zip(*(row["kl"] for row in found), strict=True)
        means = [math.exp(mean(map(math.log, column))) for column in columns]
        label = f"{WORDS[arm]}, {factor:g} x rate"
        axes.plot(found[0]["steps"], means, color=f"C{number}", marker="o", label=label)
    axes.set(yscale="log", xlabel="step", ylabel="KL to the teacher, nat per token")
    if arms:
        drawn.legend(loc="outside upper center", ncols=2, fontsize=7, frameon=False)
    return drawn


PART = Part(
    "sampled",
    cells,
    tables={"sampled token": table},
    figures={"sampled": figure},
    measures=measures,
)
