"""The report of the demo: a table and a conclusion."""

from typing import Any

from lopd.stages.table import align

FINE_TUNED = "student, fine-tuned"
DISTILLED = "distilled, top-8 + tail"
SAMPLED = "distilled, sampled token"
CLIPPED = "distilled, sampled token, clip 1"
MORE_SFT = "control: more fine-tuning"
ONLINE = "online, live teacher, top-8"


def format_table(rows: list[dict[str, Any]]) -> str:
    """The rows of the demo as an aligned Markdown table, accuracies with 95 % intervals."""
    header = ["stage", "pass@1 greedy", "pass@1 sampled", "KL to teacher", "seconds"]
    formats = {"greedy": ".3f", "sampled": ".3f", "kl": ".4f", "seconds": ".0f"}
    cells = [
        [row["stage"], *(_cell(row, key, form) for key, form in formats.items())] for row in rows
    ]
    padded = align([header, *cells], right=range(1, len(header)))
    first, *others = map(len, padded[0])
    rule = ["-" * first, *("-" * (width - 1) + ":" for width in others)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [padded[0], rule, *padded[1:]])


def _cell(row: dict[str, Any], key: str, form: str) -> str:
    """A value, and how far the farther end of its interval is; empty if it was not measured."""
    if (value := row.get(key)) is None:
        return ""
    if (interval := row.get(f"{key}_interval")) is None:
        return format(value, form)
    return f"{value:{form}} ± {max(value - interval[0], interval[1] - value):.3f}"


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
