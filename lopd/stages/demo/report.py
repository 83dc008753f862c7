"""What the demo shows at its end: one table, one sentence, one figure."""

import json
from pathlib import Path
from typing import Any

from lopd.training.logging import LOG_NAME

FINE_TUNED = "student, fine-tuned"
DISTILLED = "distilled, top-8 + tail"
SAMPLED = "distilled, sampled token"
CLIPPED = "distilled, sampled token, clip 1"
MORE = "control: more fine-tuning"
ONLINE = "online, live teacher, top-8"


def format_table(rows: list[dict[str, Any]]) -> str:
    """The demo's one table, as aligned Markdown."""
    header = ["stage", "pass@1 greedy", "pass@1 sampled", "KL to teacher", "seconds"]
    formats = {"greedy": ".3f", "sampled": ".3f", "kl": ".4f", "seconds": ".0f"}
    lines = [
        [
            row["stage"],
            *("" if row.get(k) is None else format(row[k], f) for k, f in formats.items()),
        ]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]

    def line(cells: list[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        padded = [f"{first[0]:<{first[1]}}", *(f"{cell:>{width}}" for cell, width in rest)]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(line(cells) for cells in [header, rule, *lines])


def conclusion(rows: list[dict[str, Any]], steps: int) -> str:
    """What the reader has just seen, from the numbers of this run."""
    by_name = {row["stage"]: row for row in rows}
    start, end = by_name[FINE_TUNED], by_name[DISTILLED]
    plain, clipped, more = by_name[SAMPLED], by_name[CLIPPED], by_name[MORE]
    return (
        f"A student fine-tuned to {start['sampled']:.3f} sampled pass@1 was distilled on its own "
        f"answers, scored once, to {end['sampled']:.3f} (KL to the teacher {start['kl']:.4f} -> "
        f"{end['kl']:.4f}) with no teacher in memory; {steps} more steps of fine-tuning give "
        f"{more['sampled']:.3f} ({more['kl']:.4f}). The sampled-token objective is fragile on one "
        f"frozen set of rollouts, where it is a squared log-ratio fit that a few unlikely tokens "
        f"dominate: {plain['sampled']:.3f} plain, {clipped['sampled']:.3f} with its advantage "
        "clipped."
    )


def draw_curves(out: Path) -> None:
    """Training curves of every run, from their logs, as `curves.png`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    panels = [
        (left, "cross-entropy, nat/token", "loss", ["teacher", "sft", "more-sft"]),
        (middle, "reverse KL, nat/token", "loss", ["distill", "online"]),
        (right, "-advantage: log p - log q", "advantage", ["distill-sampled", "distill-clipped"]),
    ]
    for axes, title, key, names in panels:
        for name in names:
            file = out / name / LOG_NAME
            if file.is_file():
                lines = file.read_text(encoding="utf-8").splitlines()
                log = [record for line in lines if key in (record := json.loads(line))]
                sign = -1 if key == "advantage" else 1
                axes.plot([r["step"] for r in log], [sign * r[key] for r in log], label=name)
        axes.set(title=title, xlabel="step")
        if axes.lines:
            axes.legend()
    left.set_yscale("log")
    middle.set_yscale("log")
    figure.savefig(out / "curves.png", dpi=120)
