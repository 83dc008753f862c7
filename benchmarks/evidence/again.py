"""Committed rows measured once more: each new value beside the committed one.

A check measures into a folder of its own, models and rollouts included, and never writes to the
committed rows. Seeds fix everything, so on the same kind of machine, with the same versions, a cell
gives the same numbers to the digit, apart from seconds; elsewhere rounding differs, and training
amplifies it. So a value is held against two intervals: its row's own, over new prompts, and that of
the mean over seeds, in which the new value takes the place of the committed one.
"""

from __future__ import annotations

import difflib
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.evidence.frame import Cell, Measure, Part, Row, read
from benchmarks.evidence.intervals import Interval, interval, ratio, shown
from benchmarks.evidence.markdown import grid

# What may explain that numbers differ.
SURROUNDINGS = (
    "commit",
    "dirty",
    "device",
    "instructions",
    "threads",
    "python",
    "torch",
    "transformers",
)
Picked = tuple[Part, Cell]
Pair = tuple[Row, Row]  # the committed row of a cell, and the new one


def folder(work: Path, commit: str | None) -> Path:
    """The folder of a check by the code of a commit: its rows, and the models of each seed."""
    return work / f"again-{(commit or 'unknown')[:12]}"


def sampled(cells: list[Picked], size: int | None, draw: int) -> list[Picked]:
    """A random sample of cells, in their order; all if no size is given.

    Args:
        size: how many; all if there are fewer.
        draw: the seed of the sample.
    """
    if size is None or size >= len(cells):
        return cells
    picked = random.Random(draw).sample(range(len(cells)), size)
    return [cells[number] for number in sorted(picked)]


def report(picked: Sequence[Picked], out: Path, fresh: Path) -> str:
    """Markdown: what was measured once more of some cells, against the committed rows.

    Args:
        picked: the cells; those without a new row are left out.
        out: the folder of the committed rows.
        fresh: the folder of the new ones.
    """
    blocks: list[str] = []
    for part in {part.name: part for part, _ in picked}.values():
        names = {cell.name for each, cell in picked if each.name == part.name}
        old = read(out / part.file)
        new = {row["cell"]: row for row in read(fresh / part.file) if row["cell"] in names}
        if new:
            blocks += [f"## {part.name}", compared(part, old, new)]
    return "\n\n".join(blocks) or "No cell was measured once more."


def compared(part: Part, old: Sequence[Row], new: Mapping[str, Row]) -> str:
    """Markdown: some new rows, by cell, against all committed ones of a part."""
    pairs = [(row, new[row["cell"]]) for row in old if row["cell"] in new]
    rows = [new.get(row["cell"], row) for row in old]
    blocks = [_surroundings(pairs), _values(part, pairs), _means(part, old, rows, pairs)]
    return "\n\n".join(block for block in (*blocks, _tables(part, old, rows)) if block)


def _surroundings(pairs: Sequence[Pair]) -> str:
    """What differs between the calls that made the rows, other than their dates."""
    lines = []
    for name in SURROUNDINGS:
        changes = {
            f"{_short(old[name])} → {_short(new[name])}"
            for old, new in pairs
            if name in old and old[name] != new[name]
        }
        if changes:
            lines.append(f"* {name}: {', '.join(sorted(changes))}")
    return "\n".join(["Committed → again:", "", *lines]) if lines else ""


def _short(value: object) -> str:
    """A value of a row's surroundings; commits by their first digits."""
    text = str(value)
    return text[:12] if len(text) == 40 else text


def _values(part: Part, pairs: Sequence[Pair]) -> str:
    """Each value, committed and new, and whether the new one lies in the row's own interval."""
    body, same = [], 0
    for old, new in pairs:
        again = part.measures(new)
        for name, was in part.measures(old).items():
            now, own, inside = again[name], "", ""
            if was.interval is not None:
                own, inside = "[{:.4g}, {:.4g}]".format(*was.interval), _within(now, was.interval)
            same += now.value == was.value
            cells = [old["cell"], name, f"{was.value:.6g}", f"{now.value:.6g}", _change(was, now)]
            body.append([*cells, own, inside])
    head = ["cell", "value", "committed", "again", "change", "the row's interval", "within"]
    insides = [inside for *_, inside in body]
    counts = f"{len(body)} values of {len(pairs)} cells: {same} the same to the digit; of those "
    counts += f"with an interval in the row {insides.count('yes')} within, {insides.count('no')} "
    return f"{grid(head, body, words=2)}\n\n{counts}outside."


def _means(part: Part, old: Sequence[Row], rows: Sequence[Row], pairs: Sequence[Pair]) -> str:
    """Means over seeds of the measured cells' groups, and whether the new ones are in the old's."""
    body = []
    for group in dict.fromkeys(_group(row) for row, _ in pairs):
        before, after = (_of_group(part, group, of) for of in (old, rows))
        for name, values in before.items():
            was, now = _mean(values), _mean(after[name])
            if was is None or now is None:
                continue
            inside = _within(Measure(now[0]), was[1:])
            body.append([group, name, f"{len(values)}", shown(was, ".4g"), f"{now[0]:.4g}", inside])
    head = ["cells", "value", "seeds", "mean over seeds, committed", "with the new rows", "within"]
    return grid(head, body, words=2) if body else ""


def _tables(part: Part, old: Sequence[Row], rows: Sequence[Row]) -> str:
    """The lines of the documents' tables that the new rows change."""
    lines: list[str] = []
    for name, table in part.tables.items():
        before, after = (table(list(each)).splitlines() for each in (old, rows))
        sides = (f"{name}, committed", f"{name}, with the new rows")
        lines += difflib.unified_diff(before, after, *sides, lineterm="", n=0)
    if not lines:
        return "No table of the documents changes by a digit."
    return "\n".join(["Lines of the documents' tables that change:", "", "```diff", *lines, "```"])


def _group(row: Row) -> str:
    """The cells of a row on all seeds."""
    return str(row["cell"]).removesuffix(f"/seed{row['seed']}")


def _of_group(part: Part, group: str, rows: Sequence[Row]) -> dict[str, list[Measure]]:
    """The measures of a group's rows, by name."""
    found: dict[str, list[Measure]] = {}
    for row in rows:
        for name, measure in part.measures(row).items() if _group(row) == group else ():
            found.setdefault(name, []).append(measure)
    return found


def _mean(measures: Sequence[Measure]) -> Interval | None:
    """The mean over seeds, as the tables take it; None of too few, or if it has none."""
    values, geometric = [measure.value for measure in measures], measures[0].geometric
    if not all(map(math.isfinite, values)) or (geometric and min(values) <= 0.0):
        return None
    return ratio(values) if geometric else interval(values)


def _within(measure: Measure, bounds: tuple[float, float]) -> str:
    return "yes" if bounds[0] <= measure.value <= bounds[1] else "no"


def _change(was: Measure, now: Measure) -> str:
    """From the committed value to the new one: a factor where means are geometric."""
    if now.value == was.value:
        return "none"
    if was.geometric and was.value > 0.0 and math.isfinite(was.value + now.value):
        apart = now.value / was.value - 1.0
        return f"x {1.0 + apart:.4f}" if abs(apart) > 1e-4 else f"x 1{apart:+.1e}"
    return f"{now.value - was.value:+.3g}"
