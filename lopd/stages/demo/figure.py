"""The picture of the demo: accuracy and KL before and after, and how the KL falls in training."""

import json
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from lopd.provenance.io import write_atomic
from lopd.stages.demo.report import FINE_TUNED, TEACHER
from lopd.training.logging import LOG_NAME

NAME = "curves.png"
DECADE = 10.0
BEFORE, AFTER, LIVE = "#8c8c8c", "#0b6e4f", "#9a6324"


class Titles(NamedTuple):
    """What the panels of the picture say."""

    accuracy: str
    distance: str
    models: Mapping[str, str]  # stages, in words for those who have not read the code


def draw(
    out: Path, rows: list[dict[str, Any]], titles: Titles, curves: Mapping[str, str], live: str
) -> None:
    """Draw `curves.png` from the rows of the demo and the logs of its runs.

    Args:
        out: the demo's folder.
        rows: of `results.json`; those without an evaluation are left out.
        titles: of the first two panels, and names of the models.
        curves: stages whose objective is the reverse KL, and their folders.
        live: the stage with a live teacher.
    """
    from matplotlib.figure import Figure

    measured = {row["stage"]: row for row in rows if row.get("sampled") is not None}
    figure = Figure(figsize=(15, 4.8))
    figure.set_layout_engine("constrained", wspace=0.04)
    accuracy, distance, training = figure.subplots(1, 3)
    before_after(
        accuracy, measured, "sampled", titles.accuracy,
        "share of right answers, sampled\n(line: 95 % interval)", live, titles.models,
    )  # fmt: skip
    before_after(
        distance, measured, "kl", titles.distance,
        "KL to the teacher on new answers, nat per token\n(further left is closer)",
        live, titles.models,
    )  # fmt: skip
    distance.set_yticklabels([])
    kls = [row["kl"] for name, row in measured.items() if name != TEACHER]
    if kls and not set_scale(distance, "x", kls):  # a logarithmic axis has no place for 0
        level(distance, 0.0, "teacher", "black", "--", "left")
    training_curves(training, out, curves, live)
    drawn = BytesIO()
    figure.savefig(drawn, dpi=120)
    write_atomic(out / NAME, drawn.getvalue())


def before_after(
    axes: Any,
    measured: dict[str, dict[str, Any]],
    key: str,
    title: str,
    label: str,
    live: str,
    names: Mapping[str, str],
) -> None:
    """A line for each model, from the fine-tuned student to what became of it."""
    trained = [name for name in measured if name not in (TEACHER, FINE_TUNED)]
    start = measured[FINE_TUNED][key] if FINE_TUNED in measured else None
    for place, name in enumerate(trained):
        value = measured[name][key]
        colour = LIVE if name == live else AFTER
        if start is not None:
            axes.plot([start, value], [place, place], color=colour, alpha=0.35, linewidth=3)
        axes.plot(value, place, "o", color=colour)
        if interval := measured[name].get(f"{key}_interval"):
            axes.plot(interval, [place, place], color=colour, linewidth=1.2)
        text, side = (f"{value:.3f}", "right") if key == "sampled" else (f"{value:.2g}", "left")
        axes.annotate(text, (value, place), (3, 8), textcoords="offset points", ha=side, fontsize=8)
    axes.set_yticks(range(len(trained)), [names.get(name, name) for name in trained])
    axes.set_ylim(len(trained) - 0.4, -1.4)
    if start is not None:
        level(
            axes,
            start,
            "student,\nfine-tuned",
            BEFORE,
            ":",
            "left" if key == "sampled" else "right",
            line=1,
        )
    if key == "sampled" and TEACHER in measured:
        level(axes, measured[TEACHER][key], "teacher", "black", "--", "right")
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(label)


def set_scale(axes: Any, name: str, values: Sequence[float]) -> bool:
    """Make an axis logarithmic if the values span a decade, otherwise linear.

    Both have few round labels: the minor ones of a logarithmic axis would cover each other.

    Args:
        name: of the axis, x or y.

    Returns:
        Whether it is logarithmic.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axis = getattr(axes, f"{name}axis")
    known = [value for value in values if value > 0]
    wide = bool(known) and max(known) >= DECADE * min(known)
    if wide:
        getattr(axes, f"set_{name}scale")("log")
        axis.set_major_locator(LogLocator(numticks=6))
        axis.set_minor_formatter(NullFormatter())
    else:
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return wide


def level(
    axes: Any, value: float, name: str, colour: str, style: str, side: str, line: int = 0
) -> None:
    """A vertical line, with its name beside its upper end.

    Args:
        line: of text below the upper edge, so that the names of near levels do not overlap.
    """
    axes.axvline(value, color=colour, linestyle=style)
    axes.annotate(
        name, (value, 1), (4 if side == "left" else -4, -4 - 14 * line),
        xycoords=("data", "axes fraction"), textcoords="offset points", ha=side, va="top",
        fontsize=9, color=colour, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
    )  # fmt: skip


def training_curves(axes: Any, out: Path, curves: Mapping[str, str], live: str) -> None:
    """The loss of the runs whose objective is the reverse KL.

    On stored answers it ends higher than the KL on new ones: the student no longer gives them.
    """
    for name, folder in curves.items():
        how = "teacher running, on new answers" if name == live else "no teacher, on stored answers"
        file = out / folder / LOG_NAME
        if file.is_file():
            lines = file.read_text(encoding="utf-8").splitlines()
            log = [record for line in lines if "loss" in (record := json.loads(line))]
            steps, losses = [r["step"] for r in log], [r["loss"] for r in log]
            axes.plot(steps, losses, color=LIVE if name == live else AFTER, label=how)
    if axes.lines:
        set_scale(axes, "y", [value for line in axes.lines for value in line.get_ydata()])
        axes.legend(loc="upper right", frameon=False, fontsize=9)
    axes.set_title("The distance falls during training", fontsize=11)
    axes.set(xlabel="optimizer step", ylabel="KL to the teacher in training, nat per token")
