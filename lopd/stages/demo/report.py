"""The report of a demo: its table, some answers, and a conclusion."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lopd.stages.table import align

Interval = tuple[float, float, float]  # value, low, high

TEACHER = "teacher"
FINE_TUNED = "student, fine-tuned"
DISTILLED = "distilled, top-8 + tail"
SAMPLED = "distilled, sampled token"
CLIPPED = "distilled, sampled token, clip 1"
MORE_SFT = "control: more fine-tuning"
ONLINE = "online, live teacher, top-8"
# The models for those who have not read the code.
IN_WORDS = {
    DISTILLED: "distilled on the teacher's\nmost probable tokens",
    SAMPLED: "distilled on one\nlog-prob per token",
    CLIPPED: "distilled on one log-prob\nper token, clipped",
    MORE_SFT: "not distilled,\nfine-tuned for longer",
    ONLINE: "distilled with the\nteacher running",
}
COLUMNS = (  # key of a row, header, format
    ("greedy", "pass@1 greedy", ".3f"),
    ("sampled", "pass@1 sampled", ".3f"),
    ("kl", "KL to teacher", ".4f"),
    ("held_out_kl", "held-out KL", ".4f"),
    ("seconds", "seconds", ".0f"),
    ("eval_seconds", "evaluation", ".0f"),
    ("peak_mib", "peak MiB", ".0f"),
)


def format_table(rows: list[dict[str, Any]]) -> str:
    """The rows of a demo as an aligned Markdown table, with 95 % intervals.

    Columns that no row has a value for are left out.
    """
    columns = [column for column in COLUMNS if any(row.get(column[0]) is not None for row in rows)]
    header = ["stage", *(name for _, name, _ in columns)]
    cells = [[row["stage"], *(_cell(row, key, form) for key, _, form in columns)] for row in rows]
    padded = align([header, *cells], right=range(1, len(header)))
    first, *others = map(len, padded[0])
    rule = ["-" * first, *("-" * (width - 1) + ":" for width in others)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [padded[0], rule, *padded[1:]])


def _cell(row: dict[str, Any], key: str, form: str) -> str:
    """A value, and how far the farther end of its interval is; empty if it was not measured."""
    if (value := row.get(key)) is None:
        return ""
    value = round(value, 6) + 0.0  # no -0.0000
    if (interval := row.get(f"{key}_interval")) is None:
        return format(value, form)
    return f"{value:{form}} ± {max(value - interval[0], interval[1] - value):{form}}"


def toy_conclusion(rows: list[dict[str, Any]], steps: int) -> str:
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


def kl_difference(row: Mapping[str, Any], base: Mapping[str, Any], key: str) -> Interval | None:
    """The KL of a model minus another's, and its 95 % interval, as if they were independent.

    Both were measured on the same questions, so the interval is rather too wide. None if a row has
    no interval: it is that of a single answer, or an earlier version's.

    Args:
        key: `kl` or `held_out_kl`.
    """
    if any(f"{key}_interval" not in each for each in (row, base)):
        return None
    middle = row[key] - base[key]
    # The lower end of an interval may have been cut at 0.
    half = math.hypot(*(each[f"{key}_interval"][1] - each[key] for each in (row, base)))
    return middle, middle - half, middle + half


def real_conclusion(rows: list[dict[str, Any]], steps: int) -> str:
    """The KLs of a demo on a real model, and whether distillation beat more fine-tuning."""
    by_name = {row["stage"]: row for row in rows if "kl" in row}
    start, control = by_name[FINE_TUNED], by_name[MORE_SFT]
    others = [name for name in by_name if name not in (TEACHER, FINE_TUNED, MORE_SFT)]
    best = min(others, key=lambda name: by_name[name]["kl"])
    difference = kl_difference(by_name[best], control, "kl")
    if difference is None:
        verdict, interval = "not compared, for want of intervals, with", ""
    else:
        _, low, high = difference
        verdict = "below" if high < 0 else "above" if low > 0 else "not distinguishable from"
        interval = f" (difference within [{low:+.3f}, {high:+.3f}])"
    return (
        f"{steps} steps took the KL to the teacher from {start['kl']:.3f} nat per token to "
        f"{by_name[best]['kl']:.3f} ({best}), which is {verdict} the {control['kl']:.3f} of as "
        f"many steps of more fine-tuning{interval}. Right answers, sampled: "
        f"{start['sampled']:.3f} before, {by_name[best]['sampled']:.3f} after, "
        f"{control['sampled']:.3f} for the control."
    )


def format_examples(
    asked: Sequence[str], answers: Mapping[str, Sequence[Mapping[str, Any]]], count: int
) -> str:
    """The first questions, each with the answers of some models; a tick marks right ones.

    Args:
        answers: records of `answers.jsonl` by model, in the order of the questions.
    """
    width = max(map(len, answers))
    blocks = []
    for number, question in enumerate(asked[:count]):
        lines = [question]
        for name, records in answers.items():
            record = records[number]
            mark = "+" if record["correct"] else "-"
            lines.append(f"  {mark} {name:<{width}}  {' '.join(record['text'].split())}")
        blocks.append("\n".join(lines))
    return "Greedy answers (+ right, - wrong or cut off)\n\n" + "\n".join(blocks)
