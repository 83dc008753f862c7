"""Tables, figure and verdicts of the part `consistency`, from its rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from benchmarks.evidence.consistency_cells import (
    CALIBRATED,
    CONTROL,
    DOSES,
    LISTS,
    LONG,
    PAIRS,
    SAMPLED,
    SHORT,
)
from benchmarks.evidence.frame import Row
from benchmarks.evidence.intervals import (
    FEWEST,
    IN_PART,
    NEGLIGIBLE,
    NO_ROWS,
    NOT,
    REPRODUCED,
    UNDECIDED,
    Comparison,
    Interval,
    Values,
    compare,
    mean_log_kl,
    shown,
)


@dataclass(frozen=True)
class Setting:
    """How a student is distilled; at no steps it is not."""

    objective: str
    live: bool
    steps: int

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


def paired(ours: Values, base: Values) -> Comparison | None:
    """Two runs on the seeds that both have; None if these are too few."""
    seeds = both(ours, base)
    if len(seeds) < FEWEST:
        return None
    return compare({s: ours[s] for s in seeds}, {s: base[s] for s in seeds})


def both(ours: Mapping[int, Any], base: Mapping[int, Any]) -> list[int]:
    """The seeds that two runs have."""
    return sorted(ours.keys() & base.keys())


def own(setting: Setting) -> Setting:
    """What a student is distilled with from its own teacher: there is nothing to calibrate."""
    objective = SAMPLED if setting.objective == CALIBRATED else setting.objective
    return Setting(objective, setting.live, setting.steps)


def sides(rows: Sequence[Row], own_of: str, setting: Setting) -> tuple[Values, Values]:
    """A's student distilled from B, and the student of A or of B distilled from its own teacher."""
    return found(rows, "A", "B", setting), found(rows, own_of, own_of, own(setting))


def gap(rows: Sequence[Row], own_of: str, setting: Setting) -> Comparison | None:
    """The first of the two sides against the second."""
    return paired(*sides(rows, own_of, setting))


def change(rows: Sequence[Row], objective: str, live: bool) -> Interval | None:
    """KL of A's student distilled from B after the long run, over that after the short one."""
    long, short = (found(rows, "A", "B", Setting(objective, live, x)) for x in (LONG, SHORT))
    compared = paired(long, short)
    return None if compared is None else compared["kl"]


def _cell(values: Values) -> str:
    """KL and pass@1, each with its range over seeds."""
    if not values:
        return ""
    kls = [row["kl"] for row in values.values()]
    sampled = mean(row["sampled"] for row in values.values())
    return f"{math.exp(mean_log_kl(values)):.4f} ({min(kls):.4f} to {max(kls):.4f}), {sampled:.3f}"


def _table(head: Sequence[str], body: Sequence[Sequence[str]], *, words: int = 1) -> list[str]:
    rule = ["---"] * words + ["---:"] * (len(head) - words)
    return [f"| {' | '.join(line)} |" for line in (head, rule, *body)]


def _seeds(rows: Sequence[Row]) -> str:
    return ", ".join(map(str, sorted({row["seed"] for row in rows})))


def grid_table(rows: list[Row]) -> str:
    """Markdown: KL and pass@1 of every pair of teachers."""
    if not rows:
        return NO_ROWS
    head = ["setting", *(f"{sft} → {opd}" for sft, opd in PAIRS)]
    settings = [None, *(each for each in (*SETTINGS, *CONTROLS) if found(rows, "A", "B", each))]
    body = [
        ["before" if each is None else str(each), *(_cell(found(rows, *p, each)) for p in PAIRS)]
        for each in settings
    ]
    return "\n".join(
        [
            *_table(head, body),
            "",
            "X → Y: fine-tuned on answers of X, distilled from Y; the control is fine-tuned",
            "further, on Y's answers to the same prompts. KL to Y in nat per token on new answers,",
            "geometric mean over seeds with their range, and sampled pass@1. Seeds "
            f"{_seeds(rows)}.",
        ]
    )


def gap_table(rows: list[Row]) -> str:
    """Markdown: the crossed student against the same student of its own teacher, and B's own."""
    head = ["distilled with", "A → B against", "KL / its", "pass@1, points", "seeds"]
    body = []
    for setting in (*SETTINGS, *CONTROLS):
        for name in ("A", "B"):
            if (compared := gap(rows, name, setting)) is None:
                continue
            cells = [shown(compared["kl"], ".2f"), shown(compared["points"], "+.1f")]
            seeds = len(both(*sides(rows, name, setting)))
            body.append([str(setting), f"{name} → {name}", *cells, str(seeds)])
    return "\n".join(_table(head, body, words=2)) if body else NO_ROWS


def doses(rows: Sequence[Row]) -> list[str]:
    """The teachers of A's student that have rows, by their disagreement with A."""
    known = [name for name in ("A", *DOSES, "B") if found(rows, "A", name, None)]
    return sorted(known, key=lambda name: _disagreement(rows, name))


def _disagreement(rows: Sequence[Row], name: str) -> float:
    return mean(row["disagreement"] for row in found(rows, "A", name, None).values())


def dose_table(rows: list[Row]) -> str:
    """Markdown: the student of A distilled from teachers that disagree with A more and more."""
    settings = SETTINGS[:2]
    head = ["teacher", "KL(A ‖ teacher)", "KL before"]
    for setting in settings:
        head += [f"KL, {setting.steps} steps", "/ that from A", "points"]
    body = []
    for name in doses(rows):
        start = found(rows, "A", name, None)
        cells = [name, f"{_disagreement(rows, name):.3f}", f"{math.exp(mean_log_kl(start)):.4f}"]
        for setting in settings:
            values = found(rows, "A", name, setting)
            compared = paired(values, found(rows, "A", "A", setting))
            if compared is None:
                cells += ["", "", ""]
                continue
            cells.append(f"{math.exp(mean_log_kl(values)):.4f}")
            if name == "A":
                cells += ["1", "0"]
            else:
                cells.append(shown(compared["kl"], ".2f"))
                cells.append(shown(compared["points"], "+.1f"))
        body.append(cells)
    return "\n".join(_table(head, body)) if body else NO_ROWS


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
            where = [_disagreement(rows, name) for name in runs]
            kls = [math.exp(mean_log_kl(values)) for values in runs.values()]
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


def irreducible(gap_long: Interval, change: Interval) -> str:
    """Whether a gap remains after the long run that more steps do not narrow.

    Reproduced: the gap remains, and the KL does not fall from the short run to the long one. In
    part: it remains, but the KL clearly falls. Not reproduced: no gap remains.
    """
    if gap_long[1] <= 1:
        return NOT if gap_long[2] < NEGLIGIBLE else UNDECIDED
    if change[2] < 1:
        return IN_PART
    return REPRODUCED if change[1] > 1 / NEGLIGIBLE else UNDECIDED


def both_suffer(frozen: Comparison, live: Comparison) -> str:
    """Whether another teacher leaves a higher KL offline and live; in part if only in one."""
    kls = [each["kl"] for each in (frozen, live)]
    worse, fine = ([f(kl) for kl in kls] for f in (_worse, _fine))
    if all(worse):
        return REPRODUCED
    if all(fine):
        return NOT
    return IN_PART if any(worse) else UNDECIDED


def _worse(kl: Interval) -> bool:
    return kl[1] > 1


def _fine(kl: Interval) -> bool:
    return kl[2] < NEGLIGIBLE
