"""Do the demo's effects hold on more than one seed?

    python -m benchmarks.demo_seeds [--seeds 0 1 2] [--again] [--out benchmarks/results]

It runs `lopd demo --online` once per seed and writes one JSON line per seed and stage to
`demo_seeds.jsonl`. It fails unless, on every seed, the distilled student (top-8, tail bucket)
samples at least 5 points better than the fine-tuned one and at least 0.93, has at most 0.35 of its
KL to the teacher, and is within 4 points of the online run. With `--again` it writes to
`build/demo_seeds`, judges nothing, and prints each value beside that of the committed rows.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.evidence import again
from benchmarks.evidence.frame import RESULTS, Part, read
from benchmarks.recorder import ROOT, identity
from lopd.config.demo import DemoConfig
from lopd.evaluation.accuracy import mean_with_interval
from lopd.stages import demo
from lopd.stages.demo.report import DISTILLED, FINE_TUNED, ONLINE
from lopd.stages.demo.toy import EVAL_PROMPTS

NAME = "demo_seeds.jsonl"


def run(seeds: list[int], out: Path) -> list[dict[str, Any]]:
    torch.set_num_threads(1)  # as the demo sets it
    environment = {"transformers": transformers.__version__, **identity(torch.device("cpu"), None)}
    rows: list[dict[str, Any]] = []
    out.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            demo.main(DemoConfig(out=f"{folder}/demo", seed=seed, online=True))
            results = json.loads(Path(folder, "demo/results.json").read_text(encoding="utf-8"))
        command = f"python -m benchmarks.demo_seeds --again --seeds {seed}"
        rows += [
            {"seed": seed, **row, **environment, "command": command} for row in results["rows"]
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (out / NAME).write_text(text, encoding="utf-8")
    return rows


def by_stage(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    stages: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        stages.setdefault(row["stage"], []).append(row)
    return stages


def missed(rows: list[dict[str, Any]]) -> list[str]:
    """The criteria that some seed does not meet."""
    stages, failures = by_stage(rows), []
    triples = zip(stages[FINE_TUNED], stages[DISTILLED], stages[ONLINE], strict=True)
    for start, end, online in triples:
        criteria = {
            "5 points above fine-tuned": end["sampled"] >= start["sampled"] + 0.05,
            "at least 0.93": end["sampled"] >= 0.93,
            "at most 0.35 of its KL": end["kl"] <= 0.35 * start["kl"],
            "within 4 points of online": abs(end["sampled"] - online["sampled"]) <= 0.04,
        }
        failures += [f"seed {start['seed']}: {name}" for name, met in criteria.items() if not met]
    return failures


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: means over seeds, the sampled accuracy of each seed, and the range of the KLs."""
    seeds = sorted({row["seed"] for row in rows})
    lines = [
        "| model | pass@1 greedy | pass@1 sampled | of each seed | KL to teacher, nat/token "
        "| range of seeds |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for stage, results in by_stage(rows).items():
        if "sampled" in results[0]:
            means = {
                key: np.mean([row[key] for row in results]) for key in ("greedy", "sampled", "kl")
            }
            distances = [row["kl"] for row in results]
            cells = [
                f"{means['greedy']:.3f}",
                f"{means['sampled']:.3f}",
                " / ".join(map(_with_interval, results)),
                f"{means['kl']:.4f}",
                f"{min(distances):.4f} to {max(distances):.4f}",
            ]
            lines.append(f"| {stage} | {' | '.join(cells)} |")
    about = (
        f"Means over seeds {', '.join(map(str, seeds))}; that of a seed with the farther end of "
        "its 95 % interval over new\nprompts."
    )
    return "\n".join([*lines, "", about])


def _with_interval(row: dict[str, Any]) -> str:
    """The sampled accuracy of a seed, and how far the farther end of its interval is."""
    value = row["sampled"]
    if (interval := row.get("sampled_interval")) is None:  # rows of earlier versions
        right = np.arange(EVAL_PROMPTS) < round(value * EVAL_PROMPTS)
        found = mean_with_interval(right.astype(np.float64))
        interval = [found["low"], found["high"]]
    return f"{value:.3f} ± {max(value - interval[0], interval[1] - value):.3f}"


def against_committed(rows: list[dict[str, Any]]) -> str:
    """Markdown: rows that were measured once more, beside the committed ones."""
    old, new = (
        [{"cell": f"{row['stage']}/seed{row['seed']}", **row} for row in of if "sampled" in row]
        for of in (read(ROOT / RESULTS / NAME), rows)
    )
    part = Part("demo_seeds", cells=tuple, tables={"demo table": table}, figures={})
    return again.compared(part, old, {row["cell"]: row for row in new})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help=f"default: {RESULTS}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--again", action="store_true", help="compare with the committed rows")
    args = parser.parse_args(arguments)
    default = Path("build/demo_seeds") if args.again else RESULTS
    measured = run(args.seeds, args.out or default)
    if args.again:
        print(against_committed(measured))
        return 0
    print(table(measured))
    failures = missed(measured)
    print("\n".join(failures) if failures else "every criterion is met on every seed")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
