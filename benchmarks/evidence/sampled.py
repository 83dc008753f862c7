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

from benchmarks.evidence.frame import SEEDS, Cell, Part, Row, Shared
from benchmarks.evidence.intervals import Interval, Values, interval, ratio
from benchmarks.evidence.runs import more_fine_tuning, quality
from lopd.stages.demo.toy import OPD_SETTINGS, TOP_K

STEPS = (25, 50, 100, 200, 400)  # after which the student is evaluated
LISTS, CONTROL = "lists", "control"
OBJECTIVES: dict[str, dict[str, Any]] = {
    LISTS: {},
    "sampled": {"objective": "policy_gradient"},
    "clipped": {"objective": "policy_gradient", "advantage_clip": 1.0},
}
RATES = {  # factors of the demo's learning rate
    LISTS: (1.0, 0.5, 2.0),
    "sampled": (0.5, 0.25, 1.0),
    "clipped": (1.0, 0.5, 2.0),
    CONTROL: (1.0, 0.5),
}
WORDS = {
    LISTS: f"lists of {TOP_K}",
    "sampled": "sampled token",
    "clipped": "sampled token, advantage clipped to 1",
    CONTROL: "control: more fine-tuning",
}
SHARES = {"half": 0.5, "a tenth": 0.1}  # of the start's KL
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


class Curves:
    """The runs of each arm and learning rate that all seeds have."""

    def __init__(self, rows: list[Row]) -> None:
        self.seeds = sorted({row["seed"] for row in rows})
        found: dict[tuple[str, float], Values] = {}
        for row in rows:
            found.setdefault((row["arm"], row["factor"]), {})[row["seed"]] = row
        self.found = {at: by for at, by in found.items() if len(by) == len(self.seeds)}

    def factors(self, arm: str) -> list[float]:
        return sorted(factor for name, factor in self.found if name == arm)

    def best(self, arm: str, share: float | None) -> float:
        """The rate at which an arm is fastest to a share of the KL, or ends lowest (None).

        A run that does not get there counts as twice its length.
        """

        def cost(factor: float) -> float:
            rows = self.found[arm, factor].values()
            if share is None:
                return mean(math.log(row["kl"][-1]) for row in rows)
            return mean(math.log(min(steps_to(row, share), 2 * STEPS[-1])) for row in rows)

        return min(self.factors(arm), key=cost)


def _steps_cell(curves: Curves, arm: str, share: float) -> str:
    """Median steps at the best rate, how many seeds get there, and the ratio to the lists'."""
    factor = curves.best(arm, share)
    ours = {seed: steps_to(row, share) for seed, row in curves.found[arm, factor].items()}
    reached = sum(math.isfinite(steps) for steps in ours.values())
    middle = median(ours.values())
    words = f"{middle:.0f}" if math.isfinite(middle) else f"> {STEPS[-1]}"
    words += f" at {factor:g} x"
    if reached < len(ours):
        words += f", {reached} of {len(ours)} seeds"
    if arm == LISTS or not curves.factors(LISTS) or len(ours) < 2:
        return words
    base = {
        seed: steps_to(row, share)
        for seed, row in curves.found[LISTS, curves.best(LISTS, share)].items()
    }
    if any(map(math.isinf, base.values())):
        return words
    ratios = [min(ours[seed], STEPS[-1]) / base[seed] for seed in ours]
    if reached < len(ours):
        return f"{words}; more than {ratio(ratios)[0]:.1f} x the lists'"
    return words + "; {:.1f} [{:.1f}, {:.1f}] x".format(*ratio(ratios))


def table(rows: list[Row]) -> str:
    """Markdown: steps to shares of the start's KL, and the end, each at the arm's best rate."""
    curves = Curves(rows)
    arms = [arm for arm in RATES if curves.factors(arm)]
    lines = [
        "| objective | rates tried | steps to half the KL | steps to a tenth of the KL "
        f"| KL after {STEPS[-1]} steps | KL / the lists' | pass@1 minus the lists', points |",
        f"| --- | --- |{' ---: |' * 5}",
    ]
    for arm in arms:
        factor = curves.best(arm, None)
        ends = curves.found[arm, factor]
        kl = math.exp(mean(math.log(row["kl"][-1]) for row in ends.values()))
        cells = [
            WORDS[arm],
            ", ".join(f"{each:g}" for each in curves.factors(arm)),
            *(_steps_cell(curves, arm, share) for share in SHARES.values()),
            f"{kl:.4f} at {factor:g} x",
            *(("1", "0") if arm == LISTS else _against_lists(curves, ends)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    starts = [row["kl"][0] for row in rows if row["arm"] == LISTS]
    seeds = ", ".join(map(str, curves.seeds))
    start = f"{math.exp(mean(map(math.log, starts))):.3f}" if starts else "not measured"
    return "\n".join(
        [
            *lines,
            "",
            f"Seeds {seeds}; the start's KL is {start} nat per token (geometric mean). Rates are",
            "factors of the demo's; each cell is at the arm's best rate for it. Steps are medians",
            f"over seeds, interpolated between the evaluations after {', '.join(map(str, STEPS))}",
            "steps; ratios are paired by seed, with 95 % intervals. Where not every seed gets",
            f"there, the ratio counts {STEPS[-1]} steps for the others and is a lower bound.",
        ]
    )


def _against_lists(curves: Curves, ends: Values) -> tuple[str, str]:
    """KL / the lists' and pass@1 minus the lists', at the last step and the best rates."""
    if not curves.factors(LISTS) or len(ends) < 2:  # one seed has no interval
        return "", ""
    base = curves.found[LISTS, curves.best(LISTS, None)]
    kl: Interval = ratio([row["kl"][-1] / base[seed]["kl"][-1] for seed, row in ends.items()])
    points = interval(
        [100 * (row["sampled"][-1] - base[seed]["sampled"][-1]) for seed, row in ends.items()]
    )
    return "{:.2f} [{:.2f}, {:.2f}]".format(*kl), "{:+.1f} [{:+.1f}, {:+.1f}]".format(*points)


def figure(rows: list[Row]) -> Any:
    """KL against steps of each arm at its best final rate: each seed, and their mean."""
    from matplotlib.figure import Figure

    curves = Curves(rows)
    drawn = Figure(figsize=(6, 3.6), layout="constrained")
    axes = drawn.subplots()
    for number, arm in enumerate(arm for arm in RATES if curves.factors(arm)):
        factor = curves.best(arm, None)
        found = list(curves.found[arm, factor].values())
        for row in found:
            axes.plot(row["steps"], row["kl"], color=f"C{number}", linewidth=0.6, alpha=0.4)
        columns = zip(*(row["kl"] for row in found), strict=True)
        means = [math.exp(mean(map(math.log, column))) for column in columns]
        label = f"{WORDS[arm]}, {factor:g} x rate"
        axes.plot(found[0]["steps"], means, color=f"C{number}", marker="o", label=label)
    axes.set(yscale="log", xlabel="step", ylabel="KL to the teacher, nat per token")
    axes.legend(fontsize=7)
    return drawn


PART = Part("sampled", cells, tables={"sampled token": table}, figures={"sampled": figure})
