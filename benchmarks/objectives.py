"""Which form of the reverse KL trains best? A grid of runs on the demo's task.

    python -m benchmarks.objectives [--plan] [--only PATTERN ...] [--work DIR] [--out DIR]

For each seed, the demo's teacher and fine-tuned student are trained, the student is rolled out
once, and the teacher scores these rollouts at every length of list. A cell distils the student with
one form, one length and one learning rate, and evaluates it on prompts that no stage has seen:
sampled pass@1, and the exact KL to the teacher over the whole vocabulary, on the model's own
answers. Other cells leave out gradients outside the lists, or measure bias and noise of each form's
gradient with respect to the weights.

Each cell is one JSON line, appended to `objectives.jsonl` when it is measured. Run again, the
command continues with the cells that have no line. `--only` selects cells by name, such as
`unbiased/k4/*` or `*/seed0`; `--plan` lists the missing cells and their minutes on one quiet core.
"""

import argparse
import fnmatch
import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.objective_cells import (
    FACTORS,
    FORMS,
    LEFT_OUT,
    LISTS,
    SEEDS,
    STEPS,
    Cell,
    Gradients,
    Run,
    Shared,
    Start,
)
from benchmarks.recorder import identity

NAME = "objectives.jsonl"


def cells() -> list[Cell]:
    """All cells; those at the demo's learning rate come first."""
    grid = [
        [Run(form, k, factor, seed) for seed in SEEDS for k in LISTS for form in FORMS]
        for factor in FACTORS
    ]
    starts = [Start(seed) for seed in SEEDS]
    left_out = [Run(form, LISTS[-1], 1.0, seed) for form in LEFT_OUT for seed in SEEDS]
    gradients = [Gradients(at, seed) for seed in SEEDS for at in ("start", "end")]
    return [*starts, *grid[0], *left_out, *gradients, *grid[1], *grid[2]]


def planned(todo: list[Cell]) -> float:
    """Minutes of these cells and of what they share."""
    seeds = {cell.seed for cell in todo}
    return sum(cell.minutes for cell in todo) + Shared.minutes * len(seeds)


def run(todo: list[Cell], work: Path, path: Path) -> None:
    """Measure cells and append their rows to a file."""
    torch.set_num_threads(1)  # as the demo sets it
    environment = {"transformers": transformers.__version__, **identity(torch.device("cpu"), None)}
    shared: dict[int, Shared] = {}
    for number, cell in enumerate(todo, start=1):
        if cell.seed not in shared:
            shared[cell.seed] = Shared(work, cell.seed)
        began = time.process_time()
        measured = cell.measure(shared[cell.seed])
        row = {"cell": cell.name, "seed": cell.seed, "steps": STEPS, **measured}
        row["minutes"] = round((time.process_time() - began) / 60, 3)
        row["command"] = f"python -m benchmarks.objectives --only '{cell.name}'"
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**row, **environment}) + "\n")
        print(f"[{number}/{len(todo)}] {cell.name}: {row['minutes']:.2f} minutes", flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of names of cells")
    parser.add_argument("--plan", action="store_true", help="list the cells, and run none")
    parser.add_argument("--work", type=Path, default=Path("build/objectives"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args(arguments)
    path = args.out / NAME
    done = {row["cell"] for row in read(path)}
    todo = [
        cell
        for cell in cells()
        if any(fnmatch.fnmatch(cell.name, pattern) for pattern in args.only)
        and cell.name not in done
    ]
    if args.plan:
        for cell in todo:
            print(f"{cell.minutes:5.2f}  {cell.name}")
    print(f"{len(todo)} cells, {planned(todo):.0f} minutes on one quiet core")
    if not args.plan:
        args.out.mkdir(parents=True, exist_ok=True)
        run(todo, args.work, path)


if __name__ == "__main__":
    main()
