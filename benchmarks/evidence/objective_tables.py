"""Tables and the verdict of `benchmarks.objectives`, from its rows."""

import math
from collections.abc import Callable
from statistics import mean

from benchmarks.evidence.frame import RESULTS, SEEDS, Measure, Row, quality_measures, read
from benchmarks.evidence.intervals import (
    NOT,
    REPRODUCED,
    Comparison,
    Values,
    better,
    columns,
    compare,
    mean_log_kl,
    words,
)
from benchmarks.evidence.objective_cells import (
    EXACT,
    FACTORS,
    FORMS,
    LEFT_OUT,
    LISTS,
    SAMPLED,
    STEPS,
    WHOLE,
)
from benchmarks.recorder import ROOT

BASE = "bucket"
ABLATIONS = "ablations.jsonl"  # whose control has the steps, the start and the seeds of the grid


class Runs:
    """The measured cells of the grid; a setting counts only if every seed has it."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = [row for row in rows if "factor" in row]
        self.seeds = sorted({row["seed"] for row in self.rows})
        self.factors = sorted({row["factor"] for row in self.rows})
        self._found: dict[tuple[str, int, float], Values] = {}
        for row in self.rows:
            setting = row["form"], row["k"], row["factor"]
            self._found.setdefault(setting, {})[row["seed"]] = row

    def complete(self, form: str, k: int, factor: float) -> Values | None:
        found = self._found.get((form, k, factor), {})
        return found if len(found) == len(self.seeds) else None

    def best(self, form: str, k: int, beside: str | None = None) -> Values | None:
        """The rows of the learning rate with the lowest KL, of those that `beside` has too."""
        found = [
            self.complete(form, k, factor)
            for factor in self.factors
            if self.complete(beside or form, k, factor) is not None
        ]
        return min((rows for rows in found if rows is not None), key=mean_log_kl, default=None)

    def against_base(self, form: str, k: int) -> Comparison | None:
        """A form against the bucket, each at the best of the learning rates that both have."""
        ours, base = self.best(form, k, BASE), self.best(BASE, k, form)
        return None if ours is None or base is None else compare(ours, base)


def measures(row: Row) -> dict[str, Measure]:
    """Bias and noise of each form, or the quality of a run."""
    if "gradients" not in row:
        return quality_measures(row)
    return {
        f"{key}, {form}": Measure(found[key])
        for form, found in row["gradients"].items()
        for key in ("bias", "noise")
    }


def _cells(comparison: Comparison | None, rows: Values | None) -> list[str]:
    """Cells: KL / the base's, pass@1, and the difference in points."""
    if comparison is None or rows is None:
        return ["", "", ""]
    ratio, points = columns(comparison)
    return [ratio, f"{mean(row['sampled'] for row in rows.values()):.3f}", points]


def control(runs: Runs) -> str:
    """The fair control of the grid in words, from the rows of the ablations; empty without them."""
    rows = [row for row in read(ROOT / RESULTS / ABLATIONS) if row["variant"] == "control"]
    fine_tuned = {row["seed"]: row for row in rows if row["factor"] == 1.0}
    bucket = runs.complete(BASE, LISTS[-1], 1.0)
    if bucket is None or (found := compare(fine_tuned, bucket)) is None:
        return ""
    said = "As many steps of more fine-tuning, the fair control, against the bucket at k = "
    return f"{said}{LISTS[-1]},\neach at the demo's rate: {words(found)}."


def training_table(rows: list[Row]) -> str:
    """Markdown: KL by learning rate, and the comparison with the bucket at the best one."""
    runs = Runs(rows)
    lines = [
        f"| k | form | {' | '.join(f'KL, {x:g} x rate' for x in runs.factors)} "
        "| KL / the bucket's | pass@1 | minus the bucket's, points |",
        f"| ---: | --- |{' ---: |' * (len(runs.factors) + 3)}",
    ]
    for k in LISTS:
        for form in FORMS:
            found = [runs.complete(form, k, factor) for factor in runs.factors]
            kls = [f"{math.exp(mean_log_kl(x)):.4f}" if x else "" for x in found]
            cells = _cells(runs.against_base(form, k), runs.best(form, k, BASE))
            if form == BASE:
                cells = ["1", cells[1], "0"]
            lines.append(f"| {' | '.join([str(k), f'`{form}`', *kls, *cells])} |")
    starts = [row for row in rows if row["cell"].startswith("start/")]
    kl = math.exp(mean(math.log(row["kl"]) for row in starts))
    sampled = mean(row["sampled"] for row in starts)
    whole = len(FORMS) * len(LISTS) * len(FACTORS) * len(SEEDS)
    measured = sum(row["form"] in FORMS for row in runs.rows)
    seeds = ", ".join(map(str, runs.seeds))
    return "\n".join(
        [
            *lines,
            "",
            f"{STEPS} steps, seeds {seeds}; {measured} of {whole} runs were made, and a cell is",
            "empty if a seed is missing. KL in nat per token, geometric mean over seeds. The last",
            "three columns take form and bucket each at the best of the rates that both have,",
            "chosen on the same seeds, with 95 % intervals over seeds, paired. Before training the",
            f"KL is {kl:.3f} and pass@1 {sampled:.3f}.",
            *filter(None, [control(runs)]),
        ]
    )


def left_out_table(rows: list[Row]) -> str:
    """Markdown: runs that left out gradients outside the lists, against the exact run."""
    runs, k = Runs(rows), LISTS[-1]
    exact = runs.complete(EXACT, k, 1.0)
    lines = [
        "| run | KL | KL / the exact run's | pass@1 | difference, points |",
        f"| --- |{' ---: |' * 4}",
    ]
    for form in (EXACT, *LEFT_OUT):
        found = runs.complete(form, k, 1.0)
        if found is None or exact is None:
            continue
        settings = LEFT_OUT.get(form, {}).items()
        name = ", ".join(f"`{key}={value:g}`" for key, value in settings) or "exact"
        cells = _cells(compare(found, exact), found)
        if form == EXACT:
            cells = ["1", cells[1], "0"]
        lines.append(f"| {name} | {math.exp(mean_log_kl(found)):.4f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def judgement(runs: Runs, form: str) -> dict[int, str]:
    """By list length, whether a form's KL is better or worse than the bucket's, or neither."""
    names, found = {REPRODUCED: "better", NOT: "worse"}, {}
    for k in LISTS:
        if (compared := runs.against_base(form, k)) is not None:
            found[k] = names.get(better(compared), "no clear difference")
    return found


def verdict(rows: list[Row]) -> str:
    """Markdown: each form against the bucket, and whether `unbiased` should be the default.

    It should if its mean KL is at no list length above the bucket's.
    """
    runs, lines = Runs(rows), []
    for form in FORMS:
        if form != BASE:
            found = judgement(runs, form)
            said = [
                f"{word} at k = {', '.join(str(k) for k in found if found[k] == word)}"
                for word in dict.fromkeys(found.values())
            ]
            lines.append(f"* `{form}` against the bucket: {'; '.join(said)}.")
    ratios = {k: runs.against_base("unbiased", k) for k in LISTS}
    above = [str(k) for k, item in ratios.items() if item is not None and item["kl"][0] > 1]
    if above:
        where = f"k = {', '.join(above)}: the bucket stays the default"
        lines += ["", f"`unbiased` has a higher mean KL than the bucket at {where}."]
    else:
        lines += ["", "`unbiased` has at no list length a higher mean KL than the bucket."]
    return "\n".join(lines)


def gradient_table(rows: list[Row]) -> str:
    """Markdown: bias and noise of each form's gradient on the demo's student."""
    measured = [row for row in rows if "gradients" in row]
    blocks = []
    for at, name in (("start", "Before training"), ("end", "After training with the bucket")):
        chosen = [row["gradients"] for row in measured if row["at"] == at]
        if not chosen:
            continue
        seeds = ", ".join(map(str, sorted(row["seed"] for row in measured if row["at"] == at)))

        def cells(key: str, chosen: list[Row] = chosen) -> list[str]:
            value: Callable[[str], float] = lambda x: mean(row[key][x] for row in chosen)  # noqa: E731
            return [f"{value('bias'):.2f} ({value('error'):.2f})", f"{value('noise'):.2f}"]

        lines = [
            f"{name}, mean over seeds {seeds}:",
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
