"""The report of the demo: a table, a conclusion and a figure."""

import json
from pathlib import Path
from typing import Any

from lopd.stages.table import align
from lopd.training.logging import LOG_NAME

FINE_TUNED = "student, fine-tuned"
DISTILLED = "distilled, top-8 + tail"
SAMPLED = "distilled, sampled token"
CLIPPED = "distilled, sampled token, clip 1"
MORE_SFT = "control: more fine-tuning"
ONLINE = "online, live teacher, top-8"


def format_table(rows: list[dict[str, Any]]) -> str:
    """The rows of the demo as an aligned Markdown table."""
    header = ["stage", "pass@1 greedy", "pass@1 sampled", "KL to teacher", "seconds"]
    formats = {"greedy": ".3f", "sampled": ".3f", "kl": ".4f", "seconds": ".0f"}
    cells = [
        [
            row["stage"],
            *("" if row.get(k) is None else format(row[k], f) for k, f in formats.items()),
        ]
        for row in rows
    ]
    padded = align([header, *cells], right=range(1, len(header)))
    first, *others = map(len, padded[0])
    rule = ["-" * first, *("-" * (width - 1) + ":" for width in others)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [padded[0], rule, *padded[1:]])


def conclusion(rows: list[dict[str, Any]], steps: int) -> str:
    """The result in words, with the numbers of this run; `steps` is the control's."""
    by_name = {row["stage"]: row for row in rows}
    start, end = by_name[FINE_TUNED], by_name[DISTILLED]
    plain, clipped, more = by_name[SAMPLED], by_name[CLIPPED], by_name[MORE_SFT]
    return (
        f"A student fine-tuned to {start['sampled']:.3f} sampled pass@1 was distilled on its own "
        f"answers, scored once, to {end['sampled']:.3f} (KL to the teacher {start['kl']:.4f} -> "
        f"{end['kl']:.4f}) with no teacher in memory; {steps} more steps of fine-tuning give "
        f"{more['sampled']:.3f} ({more['kl']:.4f}). The sampled-token objective is fragile on one "
        f"frozen set of rollouts, where it fits squared log-ratios that a few unlikely tokens "
        f"dominate: {plain['sampled']:.3f} plain, {clipped['sampled']:.3f} with its advantage "
        "clipped."
    )


def draw_curves(out: Path) -> None:
    """Draw the training curves of all runs from their logs into `curves.png`."""
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
