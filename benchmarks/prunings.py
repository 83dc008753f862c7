"""Which layers should the student of the real-model demo lack?

    python -m benchmarks.prunings --out benchmarks/results [--steps 24]

Each pruning of the demo's teacher is fine-tuned for the same number of steps on the same answers of
the teacher, and its KL to the teacher is measured on its own new answers to held-out questions.
One row per pruning, in `prunings.jsonl`; the demo takes the one with the lowest KL.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.recorder import Recorder
from lopd.stages.demo import real, smollm2

NAME = "prunings.jsonl"
LAYERS = range(30)
PRUNINGS = {
    "every third layer": [layer for layer in LAYERS if layer % 3 == 1],
    "every third of layers 4 to 25": [
        layer for layer in LAYERS if layer % 3 == 1 and 4 <= layer < 26
    ],
    "layers 14 to 19": list(range(14, 20)),
}


class PruningDemo(real.RealDemo):
    """The demo's teacher and its answers; students are pruned in `compare`."""

    task = replace(real.TASK, held_out=None)

    def write_models(self) -> None:
        self.build("teacher", self._write_teacher)


def compare(recorder: Recorder, folder: Path, steps: int) -> None:
    demo = PruningDemo(folder, seed=0)
    demo.answers("teacher's answers", "sft-data", "sft").run()
    for number, (name, dropped) in enumerate(PRUNINGS.items()):
        smollm2.write_pruned(folder / "teacher", folder / f"student-{number}", dropped)
        data = {"model": demo.path(f"student-{number}"), "data": demo.path("sft-data")}
        settings = {**demo.task.sft, "max_steps": steps}
        demo.training(name, f"sft-{number}", **data, **settings).run()
        measured: dict[str, Any] = demo.evaluate(f"sft-{number}")
        recorder.emit(
            "prunings", name, "ok", steps=steps, dropped=dropped,
            layers=len(LAYERS) - len(dropped), **measured,
        )  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: what each pruning leaves, and how near to the teacher it comes."""
    lines = [
        "| layers dropped | layers left | KL to the teacher, nat/token | right answers, sampled |",
        "| --- | ---: | ---: | ---: |",
    ]
    for row in rows:
        low, high = row["kl_interval"]
        lines.append(
            f"| {row['variant']} | {row['layers']} | {row['kl']:.3f} [{low:.3f}, {high:.3f}] "
            f"| {row['sampled']:.3f} |"
        )
    return "\n".join([*lines, "", f"After {rows[0]['steps']} steps of fine-tuning each."])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--folder", type=Path, help="keep the models here")
    args = parser.parse_args(arguments)
    command = f"python -m benchmarks.prunings --steps {args.steps}"
    record = Recorder(args.out / NAME, torch.device("cpu"), command)
    with tempfile.TemporaryDirectory() as temporary:
        compare(record, args.folder or Path(temporary), args.steps)
    print(table(record.rows))


if __name__ == "__main__":
    main()
