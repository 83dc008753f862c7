"""Tables, figure and verdicts of the part `consistency`, from its rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from benchmarks.evidence.consistency_cells import (
    CALIBRATED,
    CONTROL,
    LISTS,
    LONG,
    PAIRS,
    SAMPLED,
    SHORT,
)
from benchmarks.evidence.frame import Measure, Row, quality_measures
from benchmarks.evidence.intervals import (
    FEWEST,
    IN_PART,
    NEGLIGIBLE,
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
    part_of,
    sorted_by,
    worse,
)
from benchmarks.evidence.markdown import grid


@dataclass(frozen=True)
class Setting:
    """How a student is distilled; at no steps it is not."""

    objective: str
    live: bool
    steps: int

    @property
    def path(self) -> str:
        """How the names of its cells go on after the pair of teachers."""
        return f"{self.objective}/{'live' if self.live else 'frozen'}/{self.steps}"

    def __str__(self) -> str:
        if self.objective == CONTROL:
            return f"control: fine-tuning, {self.steps} steps"
        return f"{self.objective}, {'live' if self.live else 'frozen'}, {self.steps} steps"


# In the order of the tables; the first four are the curves of the figure.
SETTINGS = (
    Setting(LISTS, False, SHORT),
    Setting(LISTS, False, LONG),
    Setting(LISTS, True, SHORT),
    Setting(LISTS, True, LONG),
    Setting(SAMPLED, False, SHORT),
    Setting(SAMPLED, False, LONG),
    Setting(SAMPLED, True, SHORT),
    Setting(CALIBRATED, False, SHORT),
    Setting(CALIBRATED, False, LONG),
)
CONTROLS = (Setting(CONTROL, False, SHORT), Setting(CONTROL, False, LONG))
TEACHERS = {  # of A's student, and what the dose table says of them
    "A": "",
    "same": "`same` was trained on other demonstrations in A's shares.",
    "half": "`half` writes half of its answers in each habit.",
    "B": "",
}
DIAGONALS = ((("A", "B"), ("B", "A")), (("A", "A"), ("B", "B")))  # of the grid: crossed, and own


def found(rows: Sequence[Row], sft: str, opd: str, setting: Setting | None) -> Values:
    """By seed, the rows of a pair of teachers; without a setting, those before distillation."""
    chosen = [row for row in rows if (row["sft"], row["opd"]) == (sft, opd)]
    if setting is None:
        return {row["seed"]: row for row in chosen if not row["steps"]}
    return {
        row["seed"]: row
        for row in chosen
        if row["steps"] and Setting(row["objective"], row["live"], row["steps"]) == setting
    }


def measures(row: Row) -> dict[str, Measure]:
    """The quality of a run; before distillation also the disagreement of the teachers."""
    apart = {} if row["steps"] else {"KL(A ‖ teacher)": Measure(row["disagreement"])}
    return quality_measures(row) | apart


def own(setting: Setting) -> Setting:
    """What a student is distilled with from its own teacher: there is nothing to calibrate."""
    objective = SAMPLED if setting.objective == CALIBRATED else setting.objective
    return Setting(objective, setting.live, setting.steps)


def sides(rows: Sequence[Row], own_of: str, setting: Setting) -> tuple[Values, Values]:
    """A's student distilled from B, and the student of A or of B distilled from its own teacher."""
    return found(rows, "A", "B", setting), found(rows, own_of, own_of, own(setting))


def gap(rows: Sequence[Row], own_of: str, setting: Setting) -> Comparison | None:
    """The first of the two sides against the second."""
    return compare(*sides(rows, own_of, setting))


def crossed_sides(rows: Sequence[Row], setting: Setting) -> tuple[Values, Values]:
    """Both crossed students together, and both students of their own teachers together.

    Between these, neither how hard a teacher is to imitate nor how good a student is differs.
    """
    one, other = (pooled(*(found(rows, *pair, setting) for pair in pairs)) for pairs in DIAGONALS)
    return one, other


def pooled(one: Values, other: Values) -> Values:
    """Geometric mean of the KLs and mean pass@1 of two runs, on the seeds that both have."""
    return {
        seed: {
            "kl": math.sqrt(one[seed]["kl"] * other[seed]["kl"]),
            "sampled": mean((one[seed]["sampled"], other[seed]["sampled"])),
        }
        for seed in both(one, other)
    }


def change(rows: Sequence[Row], objective: str, live: bool) -> Interval | None:
    """KL of A's student distilled from B after the long run, over that after the short one."""
    long, short = (found(rows, "A", "B", Setting(objective, live, x)) for x in (LONG, SHORT))
    return part_of(compare(long, short), "kl")


def _cell(values: Values) -> str:
    """KL with its range over seeds, pass@1, and the number of seeds; empty if they are too few."""
    if len(values) < FEWEST:
        return ""
    kls = [row["kl"] for row in values.values()]
    sampled = mean(row["sampled"] for row in values.values())
    return f"{_kl(values)} ({min(kls):.4f} to {max(kls):.4f}), {sampled:.3f}, n = {len(values)}"


def _kl(values: Values) -> str:
    return f"{math.exp(mean_log_kl(values)):.4f}"


def grid_table(rows: list[Row]) -> str:
    """Markdown: KL and pass@1 of every pair of teachers."""
    head = ["setting", *(f"{sft} → {opd}" for sft, opd in PAIRS)]
    body = []
    for setting in (None, *SETTINGS, *CONTROLS):
        cells = [_cell(found(rows, *pair, setting)) for pair in PAIRS]
        if any(cells):
            body.append(["before" if setting is None else str(setting), *cells])
    if not body:
        return NO_ROWS
    return "\n".join(
        [
            grid(head, body),
            "",
            "X → Y: fine-tuned on answers of X, distilled from Y; the control is fine-tuned",
            "further, on Y's answers to the same prompts. KL to Y in nat per token on new answers,",
            "geometric mean over n seeds with their range, and sampled pass@1. Means over unequal",
            f"seeds do not compare; those of fewer than {FEWEST} are left out.",
        ]
    )


def gap_table(rows: list[Row]) -> str:
    """Markdown: crossed students against students of their own teachers, by each base."""
    head = ["distilled with", "crossed", "against", "KL ratio", "pass@1, points", "seeds"]
    body = []
    for setting in (*SETTINGS, *CONTROLS):
        bases = {f"{name} → {name}": sides(rows, name, setting) for name in ("A", "B")}
        crossed = dict.fromkeys(bases, "A → B")
        bases["A → A, B → B"] = crossed_sides(rows, setting)
        crossed["A → A, B → B"] = "A → B, B → A"
        for name, compared in bases.items():
            if (difference := compare(*compared)) is not None:
                seeds = str(len(both(*compared)))
                body.append([str(setting), crossed[name], name, *columns(difference), seeds])
    if not body:
        return NO_ROWS
    return "\n\n".join(filter(None, (grid(head, body, words=3), crossings(rows))))


def crossings(rows: list[Row]) -> str:
    """Both crossed students together against both others, in words."""
    compared = {str(each): compare(*crossed_sides(rows, each)) for each in (*SETTINGS, *CONTROLS)}
    verdicts = {name: worse(each) for name, each in compared.items()}
    said = sorted_by(verdicts, "more than a quarter higher", "at most a quarter higher")
    return f"KL of both crossings together, against both others: {said}." if said else ""


def remedy_table(rows: list[Row]) -> str:
    """Markdown: A's student distilled from B, with one thing changed."""
    head = ["A's student, distilled from B with", "instead", "KL ratio", "pass@1, points", "seeds"]
    body = []
    for steps in (SHORT, LONG):
        lists, token = Setting(LISTS, False, steps), Setting(SAMPLED, False, steps)
        for before, after in (
            (lists, Setting(LISTS, True, steps)),
            (lists, Setting(CONTROL, False, steps)),
            (token, Setting(CALIBRATED, False, steps)),
            (token, lists),
        ):
            ours, base = (found(rows, "A", "B", each) for each in (after, before))
            if (difference := compare(ours, base)) is not None:
                seeds = str(len(both(ours, base)))
                body.append([str(before), str(after), *columns(difference), seeds])
    return grid(head, body, words=2) if body else NO_ROWS


def doses(rows: Sequence[Row], fewest: int = 1) -> list[str]:
    """The teachers of A's student that have rows of so many seeds, by their disagreement with A."""
    known = [name for name in TEACHERS if len(found(rows, "A", name, None)) >= fewest]
    return sorted(known, key=lambda name: _disagreement(rows, name))


def _disagreement(rows: Sequence[Row], name: str) -> float:
    return mean(row["disagreement"] for row in found(rows, "A", name, None).values())


def dose_table(rows: list[Row]) -> str:
    """Markdown: the student of A distilled from teachers that disagree with A more and more."""
    settings, names = SETTINGS[:2], doses(rows, FEWEST)
    head = ["teacher", "KL(A ‖ teacher)", "KL before", "seeds"]
    for setting in settings:
        head += [f"KL, {setting.steps} steps", "/ that from A", "points", "seeds"]
    body = []
    for name in names:
        start = found(rows, "A", name, None)
        cells = [name, f"{_disagreement(rows, name):.3f}", _kl(start), str(len(start))]
        for setting in settings:
            values, base = (found(rows, "A", x, setting) for x in (name, "A"))
            if (compared := compare(values, base)) is None:
                cells += [""] * 4
                continue
            shared = {seed: values[seed] for seed in both(values, base)}
            ratios = ["1", "0"] if name == "A" else columns(compared)
            cells += [_kl(shared), *ratios, str(len(shared))]
        body.append(cells)
    notes = [TEACHERS[name] for name in names if TEACHERS[name]]
    return "\n".join([grid(head, body), *(["", *notes] if notes else [])]) if body else NO_ROWS


def figure(rows: list[Row]) -> Any:
    """KL to the teacher of A's student, before and after, against the teachers' disagreement."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = drawn.subplots()
    curves = [
        (None, "before distillation", "0.55", "o"),
        (SETTINGS[0], f"frozen rollouts, {SHORT} steps", "C0", "o"),
        (SETTINGS[1], f"frozen rollouts, {LONG} steps", "C1", "o"),
        (SETTINGS[2], f"live teacher, {SHORT} steps", "C0", "x"),
        (SETTINGS[3], f"live teacher, {LONG} steps", "C1", "x"),
    ]
    for setting, label, colour, marker in curves:
        runs = {name: found(rows, "A", name, setting) for name in doses(rows)}
        runs = {name: values for name, values in runs.items() if values}
        if not runs:
            continue
        if marker == "o":  # live runs have the two ends only
            alike = [name for name in runs if runs[name].keys() == runs.get("A", {}).keys()]
            where = [_disagreement(rows, name) for name in alike]
            kls = [math.exp(mean_log_kl(runs[name])) for name in alike]
            axes.plot(where, kls, color=colour, linewidth=1.2)
        starts = {name: found(rows, "A", name, None) for name in runs}
        points = [
            (starts[name][seed]["disagreement"], values[seed]["kl"])
            for name, values in runs.items()
            for seed in both(values, starts[name])
        ]
        axes.plot(
            *zip(*points, strict=True), marker, color=colour, markersize=4,
            markerfacecolor="none", label=label,
        )  # fmt: skip
    axes.set(
        yscale="log", xlabel="disagreement of the teachers, KL(A ‖ teacher), nat per token",
        ylabel="KL(student ‖ teacher), nat per token",
    )  # fmt: skip
    axes.set_title("A's student, distilled; points are seeds, lines their means", size=9)
    axes.grid(color="0.9", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False)
    return drawn


def irreducible(remains: str, change: Interval | None) -> str:
    """Whether a gap remains after the long run that more steps do not narrow.

    Reproduced: the gap remains, and the KL does not fall from the short run to the long one. In
    part: it remains, but the KL clearly falls. Not reproduced: no gap remains.

    Args:
        remains: the verdict on the gap after the long run.
        change: of the KL, as that of the function `change`.
    """
    if remains != REPRODUCED:
        return remains
    stays = judge(change, low=1 / NEGLIGIBLE)
    return IN_PART if stays == NOT else stays


def suffers(rows: Sequence[Row], *settings: Setting) -> str:
    """Whether A's student distilled from B ends with a higher KL than each base, in each setting.

    Against A's own student the teachers differ, of whom B is harder to imitate; against B's own
    the students do. So both bases have to say it.
    """
    return combine(*(worse(gap(rows, name, each)) for each in settings for name in ("A", "B")))
