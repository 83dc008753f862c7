"""When offline loses: the gap to the live run, against how near the start is to the teacher."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import correlation
from typing import Any, ClassVar

from benchmarks.evidence.frame import SEEDS, Cell, Measure, Part, Row, Shared, quality_measures
from benchmarks.evidence.intervals import (
    FEWEST,
    NO_ROWS,
    Interval,
    interval,
    judge,
    ratio,
    shown,
    sorted_by,
)
from benchmarks.evidence.runs import more_fine_tuning, quality, run, scored
from lopd.config.objective import Objective
from lopd.evaluation.agreement import measure
from lopd.models.load import load_model
from lopd.stages.demo.report import FINE_TUNED
from lopd.stages.demo.toy import SFT_STEPS, TOP_K
from lopd.store import TeacherCache
from lopd.training.batch import Collator, SequenceDataset
from lopd.training.step import step

STEPS = 200
STARTS = (SFT_STEPS["student"], 330, 240, 120)  # steps of fine-tuning
SEQUENCES = 1024  # whose lists are compared
PREDICTORS = {
    "topk_overlap": f"share of the teacher's {TOP_K} ids among the student's",
    "shared_probability": "probability that teacher and student share",
    "start_kl": "log of the start's KL",
}


@dataclass(frozen=True)
class Gap:
    """Offline and live runs, and more fine-tuning, from one start."""

    fine_tuning: int  # steps
    seed: int
    minutes: ClassVar[float] = 1.2

    @property
    def name(self) -> str:
        return f"sft{self.fine_tuning}/seed{self.seed}"

    @property
    def start(self) -> str:
        """The folder of the student; the longest fine-tuning is that of the demo."""
        whole = self.fine_tuning == SFT_STEPS["student"]
        return "sft" if whole else f"sft-{self.fine_tuning}"

    @property
    def results(self) -> Sequence[str]:
        own = [f"{run}-{self.start}" for run in ("more", "offline", "live", "rollouts", "cache")]
        return own if self.start == "sft" else [self.start, *own]

    def measure(self, shared: Shared) -> Row:
        path, start = shared.demo.path, self.start
        if start != "sft":
            run(shared, FINE_TUNED, start, max_steps=self.fine_tuning)
        cache = scored(shared, start, student=start)
        settings = {"student": path(start), "cache": cache, "max_steps": STEPS}
        live = {"refresh_every": 1, "teacher": path("teacher")}
        more_fine_tuning(shared, f"more-{start}", model=path(start), max_steps=STEPS)
        shared.distil(f"offline-{start}", **settings)
        shared.distil(f"live-{start}", **settings, **live)
        return {
            "fine_tuning": self.fine_tuning,
            "steps": STEPS,
            **initial_overlap(path(start), cache),
            "start": quality(shared, start),
            "offline": quality(shared, f"offline-{start}"),
            "live": quality(shared, f"live-{start}"),
            "control": quality(shared, f"more-{start}"),
        }


def initial_overlap(student: str, path: str) -> dict[str, float]:
    """How near a student is to the teacher on its own rollouts, as `lopd` measures it."""
    cache = TeacherCache.open(path, support="list")
    batch = Collator()(SequenceDataset(cache).__getitems__(list(range(SEQUENCES))))
    model = load_model(student, dtype="float32", device="cpu").eval()
    _, stats = step(model, batch, Objective("reverse_kl"), 1.0)  # the overlap, as in training
    overlap, weight = stats["topk_overlap"].tolist()
    agreement = measure(cache)
    assert agreement is not None and agreement.shared is not None
    return {"topk_overlap": overlap / weight, "shared_probability": agreement.shared.value}


def cells() -> Sequence[Cell]:
    return [Gap(steps, seed) for seed in SEEDS for steps in STARTS]


def log_gap(row: Row, other: str = "live") -> float:
    """log of the offline run's KL over that of another; positive where offline loses."""
    return math.log(row["offline"]["kl"] / row[other]["kl"])


def predictor(row: Row, name: str) -> float:
    return math.log(row["start"]["kl"]) if name == "start_kl" else float(row[name])


def correlated(x: Sequence[float], y: Sequence[float]) -> Interval:
    """Pearson's r and its 95 % interval by Fisher's z, as if the pairs were independent."""
    r = correlation(x, y)
    half = 1.96 / math.sqrt(len(x) - 3)
    z = math.atanh(r)
    return r, math.tanh(z - half), math.tanh(z + half)


def measures(row: Row) -> dict[str, Measure]:
    """The start's nearness to the teacher, the ends of the runs, and the gaps."""
    found = {name: Measure(row[name]) for name in ("topk_overlap", "shared_probability")}
    for name in ("start", "offline", "live", "control"):
        found |= quality_measures(row[name], f"{name}: ")
    for other in ("live", "control"):
        found[f"KL, offline / {other}"] = Measure(math.exp(log_gap(row, other)), geometric=True)
    return found


def within_seeds(rows: list[Row], name: str) -> Interval | None:
    """The mean over seeds of Pearson's r among a seed's starts, of seeds with enough of these."""
    runs: dict[int, list[Row]] = {}
    for row in rows:
        runs.setdefault(row["seed"], []).append(row)
    found = interval(
        [
            correlation([predictor(row, name) for row in each], [log_gap(row) for row in each])
            for each in runs.values()
            if len(each) >= FEWEST
        ]
    )
    return None if found is None else (found[0], max(found[1], -1.0), min(found[2], 1.0))


def table(rows: list[Row]) -> str:
    """Markdown: each start, and offline against live and against the control."""
    lines = [
        "| steps of fine-tuning | seeds | start's KL | overlap | shared | offline's KL | live's "
        "| offline / live | offline / more fine-tuning |",
        f"| ---: |{' ---: |' * 8}",
    ]
    for steps in sorted(STARTS):
        found = rows_of(rows, steps)
        if not found:
            continue

        def middle(values: Sequence[float]) -> str:
            return f"{math.exp(sum(map(math.log, values)) / len(values)):.4f}"

        cells = [
            f"{steps}",
            f"{len(found)}",
            middle([row["start"]["kl"] for row in found]),
            *(
                f"{sum(row[name] for row in found) / len(found):.2f}"
                for name in ("topk_overlap", "shared_probability")
            ),
            *(middle([row[name]["kl"] for row in found]) for name in ("offline", "live")),
            *(shown(_ratio(found, other), ".2f") for other in ("live", "control")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *outcomes(rows)]) if len(lines) > 2 else NO_ROWS


def outcomes(rows: list[Row]) -> Iterator[str]:
    """Offline against the live run and against the control from each start, in words."""
    for other, words in (("live", "the live run's"), ("control", "the control's")):
        verdicts = {
            f"{steps}": judge(_ratio(rows_of(rows, steps), other), high=1.0)
            for steps in sorted(STARTS)
        }
        if said := sorted_by(verdicts, "lower", "higher"):
            yield f"Offline's KL against {words}, by steps of fine-tuning: {said}."


def rows_of(rows: list[Row], steps: int) -> list[Row]:
    """The rows of a start."""
    return [row for row in rows if row["fine_tuning"] == steps]


def _ratio(rows: list[Row], other: str) -> Interval | None:
    return ratio([math.exp(log_gap(row, other)) for row in rows])


def correlations(rows: list[Row]) -> str:
    """Markdown: what at the start goes with the gap at the end."""
    seeds = {row["seed"] for row in rows}
    if len(seeds) < FEWEST or len(rows) < 4:  # Fisher's interval takes four pairs
        return NO_ROWS
    lines = [
        "| at the start | runs | seeds | correlation with log(offline / live) "
        "| within a seed, mean over seeds |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, words in PREDICTORS.items():
        found = correlated([predictor(row, name) for row in rows], [log_gap(row) for row in rows])
        cells = [words, f"{len(rows)}", f"{len(seeds)}", shown(found, "+.2f")]
        lines.append(f"| {' | '.join([*cells, shown(within_seeds(rows, name), '+.2f')])} |")
    return "\n".join(
        [
            *lines,
            "",
            "The first intervals are those of independent runs. The starts of one seed share",
            "their teacher and their data, so the true ones are wider. The last column takes the",
            f"correlation among the starts of a seed that has {FEWEST} as one value; its interval",
            "is over seeds.",
        ]
    )


def figure(rows: list[Row]) -> Any:
    """One point a run: offline / live against each measure of the start."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(8, 3.4), layout="constrained")
    names = ("topk_overlap", "shared_probability")
    for axes, name in zip(drawn.subplots(1, 2, sharey=True), names, strict=True):
        for number, steps in enumerate(sorted(STARTS)):
            found = rows_of(rows, steps)
            if not found:
                continue
            x = [predictor(row, name) for row in found]
            y = [math.exp(log_gap(row)) for row in found]
            axes.scatter(x, y, color=f"C{number}", s=20, label=f"{steps} steps of fine-tuning")
        axes.axhline(1.0, color="grey", linewidth=0.8, linestyle=":")
        axes.set(xlabel=PREDICTORS[name])
    drawn.axes[0].set_ylabel("offline's KL / live's")
    handles = drawn.axes[0].get_legend_handles_labels()
    drawn.legend(*handles, loc="outside upper center", ncols=4, fontsize=7, frameon=False)
    return drawn


PART = Part(
    "overlap",
    cells,
    tables={"starts": table, "predictors": correlations},
    figures={"overlap": figure},
    measures=measures,
)
