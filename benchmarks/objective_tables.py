"""Tables and the verdict of `benchmarks.objectives`, from its rows."""

import math
from collections.abc import Callable
from statistics import mean, stdev
from typing import Any

from benchmarks.objective_cells import FORMS, LISTS, SAMPLED, WHOLE

Row = dict[str, Any]
Values = dict[int, Row]  # by seed
BASE = "bucket"
# Student's t, 0.975, by degrees of freedom
QUANTILES = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class Runs:
    """The measured cells of the grid; a setting counts only if every seed has it."""

    def __init__(self, rows: list[Row]) -> None:
        runs = [row for row in rows if "factor" in row]
        self.seeds = sorted({row["seed"] for row in runs})
        self.factors = sorted({row["factor"] for row in runs})
        self.measured = len(runs)
        self._found: dict[tuple[str, int, float], Values] = {}
        for row in runs:
            setting = row["form"], row["k"], row["factor"]
            self._found.setdefault(setting, {})[row["seed"]] = row

    def complete(self, form: str, k: int, factor: float) -> Values | None:
        found = self._found.get((form, k, factor), {})
        return found if len(found) == len(self.seeds) else None

    def best(self, form: str, k: int) -> tuple[float, Values] | None:
        """The learning rate of the lowest KL, and its rows."""
        found = {factor: self.complete(form, k, factor) for factor in self.factors}
        whole = {factor: rows for factor, rows in found.items() if rows is not None}
        if not whole:
            return None
        return min(whole.items(), key=lambda item: _mean_log_kl(item[1]))

    def ratio(self, form: str, k: int) -> tuple[float, float, float] | None:
        """KL / the bucket's, each at its best learning rate, with its 95 % interval."""
        ours, base = self.best(form, k), self.best(BASE, k)
        if ours is None or base is None:
            return None
        differences = [math.log(ours[1][s]["kl"] / base[1][s]["kl"]) for s in self.seeds]
        return tuple(math.exp(x) for x in interval(differences))  # type: ignore[return-value]


def _mean_log_kl(rows: Values) -> float:
    return mean(math.log(row["kl"]) for row in rows.values())


def interval(values: list[float]) -> tuple[float, float, float]:
    """The mean and its 95 % interval, by Student's t."""
    middle, half = mean(values), QUANTILES[len(values) - 1] * stdev(values) / len(values) ** 0.5
    return middle, middle - half, middle + half


def training_table(rows: list[Row]) -> str:
    """Markdown: KL by learning rate, and the comparison with the bucket at the best one."""
    runs = Runs(rows)
    whole = len(FORMS) * len(LISTS) * len(runs.factors) * len(runs.seeds)
    lines = [
        f"| k | form | {' | '.join(f'KL, {x:g} x rate' for x in runs.factors)} "
        "| KL / the bucket's | pass@1 | against the bucket, points |",
        f"| ---: | --- |{' ---: |' * (len(runs.factors) + 3)}",
    ]
    for k in LISTS:
        lines += [_training_line(runs, form, k) for form in FORMS]
    starts = [row for row in rows if row["cell"].startswith("start/")]
    kl, sampled = (mean(row[key] for row in starts) for key in ("kl", "sampled"))
    seeds = ", ".join(map(str, runs.seeds))
    return "\n".join(
        [
            *lines,
            "",
            f"{runs.measured} of {whole} runs; an empty cell was not run on every seed ({seeds}). "
            f"KL in nat per token, geometric mean over",
            "seeds. The last three columns take each form at its best rate of those; brackets are "
            "95 % intervals over seeds, paired. Before",
            f"training the mean KL is {kl:.3f} and pass@1 {sampled:.3f}.",
        ]
    )


def _training_line(runs: Runs, form: str, k: int) -> str:
    cells = [str(k), f"`{form}`"]
    for factor in runs.factors:
        found = runs.complete(form, k, factor)
        cells.append(f"{math.exp(_mean_log_kl(found)):.4f}" if found else "")
    best, base, ratio = runs.best(form, k), runs.best(BASE, k), runs.ratio(form, k)
    if best is None or base is None or ratio is None:
        return f"| {' | '.join([*cells, '', '', ''])} |"
    points = [100 * (best[1][s]["sampled"] - base[1][s]["sampled"]) for s in runs.seeds]
    is_base = form == BASE
    cells += [
        "1" if is_base else "{:.2f} [{:.2f}, {:.2f}]".format(*ratio),
        f"{mean(row['sampled'] for row in best[1].values()):.3f}",
        "0" if is_base else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*interval(points)),
    ]
    return f"| {' | '.join(cells)} |"


def judgement(runs: Runs, form: str) -> dict[int, str]:
    """By list length, whether a form's KL is better or worse than the bucket's, or neither."""
    found = {k: runs.ratio(form, k) for k in LISTS}
    return {
        k: "worse" if ratio[1] > 1 else "better" if ratio[2] < 1 else "equal within the interval"
        for k, ratio in found.items()
        if ratio is not None
    }


def verdict(rows: list[Row]) -> str:
    """Markdown: each form against the bucket, and whether `unbiased` should be the default."""
    runs, lines = Runs(rows), []
    for form in FORMS:
        if form != BASE:
            words = ", ".join(f"{word} at k = {k}" for k, word in judgement(runs, form).items())
            lines.append(f"* `{form}` against the bucket: {words}.")
    worse = [k for k, word in judgement(runs, "unbiased").items() if word == "worse"]
    if worse:
        lists = ", ".join(map(str, worse))
        lines.append(f"\n`unbiased` is worse at k = {lists}, so the default stays `bucket`.")
    else:
        lines.append("\n`unbiased` is at no list length worse than `bucket`.")
    return "\n".join(lines)


def gradient_table(rows: list[Row]) -> str:
    """Markdown: bias and noise of each form's gradient on the demo's student."""
    measured = [row for row in rows if "gradients" in row]
    blocks = []
    for at, name in (("start", "Before training"), ("end", "After training with the bucket")):
        chosen = [row["gradients"] for row in measured if row["at"] == at]
        if not chosen:
            continue

        def cells(key: str, chosen: list[Row] = chosen) -> list[str]:
            value: Callable[[str], float] = lambda x: mean(row[key][x] for row in chosen)  # noqa: E731
            return [f"{value('bias'):.2f} ({value('error'):.2f})", f"{value('noise'):.2f}"]

        lines = [
            f"{name}, mean of {len(chosen)} seeds:",
            "",
            f"| form | {' | '.join(f'bias, k = {k} | noise' for k in LISTS)} |",
            f"| --- |{' ---: |' * (2 * len(LISTS))}",
        ]
        for form in FORMS:
            each = [cell for k in LISTS for cell in cells(f"{form}/k{k}")]
            lines.append(f"| `{form}` | {' | '.join(each)} |")
        for form in (SAMPLED, WHOLE):
            lines.append(f"| {form} | {' | '.join(cells(form) * len(LISTS))} |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)
