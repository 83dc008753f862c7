"""What does distillation gain on a real model? `lopd demo --task smollm2` as rows.

    python -m benchmarks.real_demo --folder runs/demo-real [--quick] [--seed N] [--out DIR]

It runs or continues the demo in the folder and writes one JSON line per stage to
DIR/real_demo.jsonl, with the greedy answers of its models to the first questions in the last one.
Rows of other seeds stay; those of the quick form stay only until there are whole ones.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.evidence.intervals import interval, ratio, shown
from benchmarks.recorder import identity
from lopd.config.demo import DemoConfig
from lopd.stages import demo as demos
from lopd.stages.demo.real import DISTILLED, SAMPLED, SHOWN, UNBIASED
from lopd.stages.demo.report import FINE_TUNED, MORE_SFT, TEACHER, kl_difference

NAME = "real_demo.jsonl"
TASK = "smollm2"
QUESTIONS = 6
MODELS = (TEACHER, FINE_TUNED, DISTILLED, UNBIASED, SAMPLED, MORE_SFT)
ANSWERS = "answers"


def rows_of(config: DemoConfig) -> list[dict[str, Any]]:
    """The rows of a finished demo."""
    folder = Path(config.out)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    quick = " --quick" if config.quick else ""
    shared = {
        "command": f"lopd demo --task {TASK}{quick} --seed {config.seed}",
        "seed": config.seed, "quick": config.quick, "steps": results["steps"],
        "eval_prompts": results["eval_prompts"],
        **identity(torch.device("cpu"), None), "threads": results["threads"],
    }  # fmt: skip
    demo = (demos.QUICK if config.quick else demos.TASKS)[TASK](folder, config.seed)
    lines = demo.prompts["eval"].read_text(encoding="utf-8").splitlines()[:QUESTIONS]
    answers = {name: demo.answers_of(name) for name in SHOWN}
    asked = [
        {
            "question": json.loads(line)["messages"][-1]["content"],
            "expected": json.loads(line)["answer"],
            **{name: answers[name][number]["text"] for name in SHOWN},
        }
        for number, line in enumerate(lines)
    ]
    return [{**row, **shared} for row in [*results["rows"], {"stage": ANSWERS, "answers": asked}]]


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a demo beside those of other seeds, ordered by seed; quick ones yield."""
    form, seed = new[0]["quick"], new[0]["seed"]
    kept = [row for row in old if row["quick"] == form and row["seed"] != seed]
    return sorted([*kept, *new], key=lambda row: row["seed"])


def _by_seed(rows: list[dict[str, Any]]) -> dict[int, dict[str, dict[str, Any]]]:
    """Rows by seed and stage."""
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["seed"], {})[row["stage"]] = row
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a table for each seed, with 95 % intervals."""
    return "\n\n".join(_table_of(stages) for stages in _by_seed(rows).values())


def short_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: KL and right answers of each model on each seed, and its KL over the control's."""
    stages = [found for _, found in sorted(_by_seed(rows).items())]
    lines = [
        "| model | KL to the teacher, each seed | KL / the control's | right, sampled, each seed |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name in (TEACHER, FINE_TUNED, DISTILLED, SAMPLED, MORE_SFT):
        kl, right = (
            " / ".join(f"{each[name][key] + 0.0:.2f}".replace("-0.00", "0.00") for each in stages)
            for key in ("kl", "sampled")
        )
        against = "" if name in (TEACHER, MORE_SFT) else _over_control(stages, name)
        lines.append(f"| {name} | {kl} | {against} | {right} |")
    return "\n".join(lines)


def _over_control(stages: list[dict[str, dict[str, Any]]], name: str) -> str:
    """KL of a model over that of the control, with its interval over seeds if they suffice."""
    return shown(ratio([each[name]["kl"] / each[MORE_SFT]["kl"] for each in stages]), ".2f")


def _table_of(stages: dict[str, dict[str, Any]]) -> str:
    """Markdown: KLs and right answers of each model."""
    lines = [
        "| model | KL to the teacher, new answers | KL, held-out answers | right, sampled | right, "
        "greedy |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name in MODELS:
        row = stages[name]
        cells = [with_interval(row, key) for key in ("kl", "held_out_kl", "sampled", "greedy")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    row = stages[FINE_TUNED]
    return "\n".join(
        [
            *lines,
            "",
            f"Seed {row['seed']}, {row['eval_prompts']} held-out questions, one sampled answer "
            f"each; {row['steps']} steps from the",
            "fine-tuned student for each model below it. KL in nat per token, with 95 % intervals. "
            f"`{row['command']}`",
        ]
    )


def against_control(rows: list[dict[str, Any]]) -> str:
    """Markdown: KLs of the distilled models minus that of as many steps of more fine-tuning."""
    seeds = _by_seed(rows)
    head = ["model", "answers", *(f"seed {seed}" for seed in seeds), "mean over seeds"]
    lines = [f"| {' | '.join(head)} |", f"| --- | --- |{' ---: |' * (len(seeds) + 1)}"]
    for name in (DISTILLED, UNBIASED, SAMPLED):
        for kind, key in (("new", "kl"), ("held-out", "held_out_kl")):
            found = [kl_difference(each[name], each[MORE_SFT], key) for each in seeds.values()]
            assert None not in found, f"{name} has no interval"
            differences = [each for each in found if each is not None]
            over_seeds = interval([middle for middle, *_ in differences])
            cells = [shown(each, "+.2f") for each in (*differences, over_seeds)]
            lines.append(f"| {name} | {kind} | {' | '.join(cells)} |")
    return "\n".join(
        [
            *lines,
            "",
            "KL minus the control's, nat per token; below 0 is better. Intervals of a seed are",
            "those over questions, and those of the mean are over seeds.",
        ]
    )


def with_interval(row: dict[str, Any], key: str) -> str:
    """A value of a row with its 95 % interval over questions."""
    low, high = row[f"{key}_interval"]
    return f"{row[key] + 0.0:.2f} [{low:.2f}, {high:.2f}]".replace("-0.00", "0.00")


def first_seed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the first seed."""
    first = min(row["seed"] for row in rows)
    return [row for row in rows if row["seed"] == first]


def parts(rows: list[dict[str, Any]]) -> str:
    """Markdown: share of the processor's time and peak memory of each part.

    Of the last demo, which need not have run in one go: parts that were interrupted are left out.
    """
    last = max(row["seed"] for row in rows)
    rows = [row for row in rows if row["seed"] == last]
    timed = [row for row in rows if row.get("cpu_seconds") is not None]
    evaluation = sum(row.get("eval_cpu_seconds", 0.0) for row in rows)
    total = evaluation + sum(row["cpu_seconds"] for row in timed)
    lines = ["| part | share of the time | peak memory, GiB |", "| --- | ---: | ---: |"]
    for row in timed:
        peak = "" if row["peak_mib"] is None else f"{row['peak_mib'] / 1024:.1f}"
        lines.append(f"| {row['stage']} | {row['cpu_seconds'] / total:.0%} | {peak} |")
    return "\n".join([*lines, f"| evaluations | {evaluation / total:.0%} | |"])


def answers(rows: list[dict[str, Any]]) -> str:
    """Markdown: greedy answers before and after, of the first seed."""
    (row,) = (row for row in first_seed(rows) if row["stage"] == ANSWERS)
    names = dict(zip(SHOWN, ("teacher", "fine-tuned", "distilled", "control"), strict=True))
    lines = [f"| question | {' | '.join(names.values())} |", f"| --- |{' --- |' * len(names)}"]
    for each in row["answers"]:
        cells = [" ".join(each[name].split()).replace("|", "\\|") for name in names]
        lines.append(f"| {each['question']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/demo-real"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args(arguments)
    settings = DemoConfig(out=str(args.folder), task=TASK, quick=args.quick, seed=args.seed)
    demos.main(settings)
    record = args.out / NAME
    lines = record.read_text(encoding="utf-8").splitlines() if record.exists() else []
    rows = merged([json.loads(line) for line in lines], rows_of(settings))
    record.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
