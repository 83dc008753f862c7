"""How much GPU memory does training take? `lopd plan` on models with the shapes of Qwen3.

    python -m benchmarks.plans --out benchmarks/results

Nothing is measured: a plan is computed from the config. One row per model and kind of training, in
`plans.jsonl`.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.qwen3 import MODELS
from benchmarks.recorder import Recorder
from lopd.config.plan import PlanConfig
from lopd.training.dry_run import meta_model
from lopd.training.memory import MemoryPlanner

NAME = "plans.jsonl"
GIB = 1 << 30
SHARED = {"batch_size": 1, "sequence_length": 4096, "gradient_checkpointing": True}
KINDS: dict[str, dict[str, Any]] = {
    "all weights": {},
    "all weights, adafactor": {"optim": "adafactor"},
    "LoRA": {"lora_rank": 32, "dtype": "bfloat16"},
}


def plan(recorder: Recorder, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        MODELS[name].config().save_pretrained(folder)
        for kind, settings in KINDS.items():
            config = PlanConfig(model=folder, gpu_memory="80GB", **SHARED, **settings)
            planned = MemoryPlanner(meta_model(folder, config.dtype, config)).estimate(config)
            recorder.emit(
                "plans", kind, "ok", model=name, settings=SHARED | settings, **vars(planned),
                total=planned.total,
            )  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the peak of each kind of training, by model."""
    totals = {(row["model"], row["variant"]): row["total"] / GIB for row in rows}
    lines = [f"| model | {' | '.join(KINDS)} |", f"| --- |{' ---: |' * len(KINDS)}"]
    for name in dict.fromkeys(row["model"] for row in rows):
        cells = (f"{totals[name, kind]:.1f}" for kind in KINDS)
        lines.append(f"| Qwen3-{name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args(arguments)
    (args.out / NAME).unlink(missing_ok=True)  # plans do not scatter: the rows of one version
    record = Recorder(args.out / NAME, torch.device("cpu"), "python -m benchmarks.plans")
    for name in MODELS:
        plan(record, name)
    print(table(record.rows))


if __name__ == "__main__":
    main()
