"""What does distillation gain on a real model? `lopd demo --task smollm2` as rows.

    python -m benchmarks.real_demo --folder runs/demo-real [--quick] [--seed N] [--out DIR]

It runs or continues the demo in the folder and writes one JSON line per stage to
DIR/real_demo.jsonl, with the greedy answers of its models to the first questions in the last one.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.recorder import identity
from lopd.config.demo import DemoConfig
from lopd.stages.demo import QUICK, TASKS, main
from lopd.stages.demo.real import DISTILLED, SAMPLED, SHOWN, UNBIASED
from lopd.stages.demo.report import FINE_TUNED, MORE_SFT

NAME = "real_demo.jsonl"
TASK = "smollm2"
QUESTIONS = 6
MODELS = ("teacher", FINE_TUNED, DISTILLED, UNBIASED, SAMPLED, MORE_SFT)
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
    demo = (QUICK if config.quick else TASKS)[TASK](folder, config.seed)
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


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: KLs and right answers of each model, with 95 % intervals."""
    found = {row["stage"]: row for row in rows}
    lines = [
        "| model | KL to the teacher, new answers | KL, held-out answers | right, sampled | right, "
        "greedy |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name in MODELS:
        row = found[name]
        cells = [_with_interval(row, key) for key in ("kl", "held_out_kl", "sampled", "greedy")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    row = found[FINE_TUNED]
    return "\n".join(
        [
            *lines,
            "",
            f"{row['eval_prompts']} held-out questions, one sampled answer each, seed "
            f"{row['seed']}; {row['steps']} steps from the fine-tuned",
            "student for each model below it. KL in nat per token, with 95 % intervals. "
            f"`{row['command']}`",
        ]
    )


def _with_interval(row: dict[str, Any], key: str) -> str:
    low, high = row[f"{key}_interval"]
    return f"{row[key] + 0.0:.2f} [{low:.2f}, {high:.2f}]".replace("-0.00", "0.00")


def parts(rows: list[dict[str, Any]]) -> str:
    """Markdown: share of the time and peak memory of each part."""
    timed = [row for row in rows if row.get("seconds") is not None]
    evaluation = sum(row.get("eval_seconds", 0.0) for row in rows)
    total = evaluation + sum(row["seconds"] for row in timed)
    lines = ["| part | share of the time | peak memory, GiB |", "| --- | ---: | ---: |"]
    for row in timed:
        peak = "" if row["peak_mib"] is None else f"{row['peak_mib'] / 1024:.1f}"
        lines.append(f"| {row['stage']} | {row['seconds'] / total:.0%} | {peak} |")
    return "\n".join([*lines, f"| evaluations | {evaluation / total:.0%} | |"])


def answers(rows: list[dict[str, Any]]) -> str:
    """Markdown: greedy answers before and after."""
    (row,) = (row for row in rows if row["stage"] == ANSWERS)
    names = dict(zip(SHOWN, ("teacher", "fine-tuned", "distilled", "control"), strict=True))
    lines = [f"| question | {' | '.join(names.values())} |", f"| --- |{' --- |' * len(names)}"]
    for each in row["answers"]:
        cells = [" ".join(each[name].split()).replace("|", "\\|") for name in names]
        lines.append(f"| {each['question']} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/demo-real"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    settings = DemoConfig(
        out=str(arguments.folder), task=TASK, quick=arguments.quick, seed=arguments.seed
    )
    main(settings)
    text = "".join(json.dumps(row) + "\n" for row in rows_of(settings))
    (arguments.out / NAME).write_text(text, encoding="utf-8")
