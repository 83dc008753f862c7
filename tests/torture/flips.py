"""Flipped bits in every kind of file: shards, receipts, manifests, models and checkpoints."""

import random
import shutil
from pathlib import Path

from torture import harness
from torture.interruptions import compared, unexpected
from torture.pipeline import Pipeline, clear, contents, differences
from torture.table import Table

# What is copied and damaged, and the stage that reads it; `sft` reads `sft-data`, and so on.
READERS = {
    "sft-data": ("sft", "--data"),
    "rollout": ("score", "--rollouts"),
    "score": ("distill", "--cache"),
    "sft": ("rollout", "--student"),
    "distill": ("eval", "--model"),
}
CODES = {0, 2}
SKIPPED = ("train_log.jsonl", ".lock", ".start.lock")  # no command reads them


class Flips:
    """One flipped bit; then the next stage and `lopd verify` run."""

    def __init__(self, pipeline: Pipeline, table: Table, seed: int) -> None:
        self.pipeline, self.table, self.seed = pipeline, table, seed
        self.copy, self.out = pipeline.root / "damaged", pipeline.root / "attacked"
        self.expected = {name: contents(stage.out) for name, stage in pipeline.stages.items()}

    def flip_artefact(self, number: int) -> None:
        """A bit of an artefact: the next stage or `lopd verify` refuses, or nothing changes."""
        rng = random.Random(f"{self.seed} flip_artefact {number}")
        name = list(READERS)[number % len(READERS)]
        source = self.pipeline.stages[name].out
        clear(self.copy)
        shutil.copytree(source, self.copy, ignore=shutil.ignore_patterns("checkpoint-*"))
        files = [p for p in sorted(self.copy.rglob("*")) if p.is_file() and p.name not in SKIPPED]
        file = rng.choice(files)
        detail = _flip(rng, file)
        checked = harness.run(["verify", "--path", self.copy])
        reader, flag = READERS[name]
        clear(self.out)
        used = harness.run(self._with(reader, flag, self.copy))
        problem = unexpected(checked, CODES) or unexpected(used, CODES)
        same = used.code == 0 and not differences(contents(self.out), self.expected[reader])
        if not problem and not same and used.code == 0 and checked.code == 0:
            problem = f"another result of {reader}, without a word"
        self.table.add(f"bit flipped in {_kind(file)}", name, problem, detail)

    def flip_checkpoint(self, number: int) -> None:
        """A bit of a killed run's checkpoint: the run goes on as if uninterrupted, or refuses."""
        rng = random.Random(f"{self.seed} flip_checkpoint {number}")
        name = ("sft", "distill", "distill LoRA", "distill keep_best")[number % 4]
        stage = self.pipeline.stages[name]
        clear(self.out)
        shutil.copytree(stage.out, self.out)
        # The run as it was before its result: checkpoints and the record of its settings.
        for path in self.out.iterdir():
            if path.name != "recipe.json" and not path.name.startswith("checkpoint-"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        files = [p for p in sorted(self.out.glob("checkpoint-*/**/*")) if p.is_file()]
        last = max(int(p.relative_to(self.out).parts[0].split("-")[1]) for p in files)
        # Continued from the last checkpoint there is nothing left to train; from the one before,
        # everything that it holds is used.
        shutil.rmtree(self.out / f"checkpoint-{last}")
        files = [p for p in files if p.exists()]
        file = rng.choice(files)
        detail = _flip(rng, file)
        end = harness.run(stage.argv(self.out))
        problem = unexpected(end, CODES)
        if not problem and end.code == 0:
            aside = [p.name for p in self.out.iterdir() if p.name.startswith("torn-")]
            for folder in aside:  # kept for a look at it, and said
                shutil.rmtree(self.out / folder)
            problem = compared(end, self.out, self.expected[name])
        self.table.add(f"bit flipped in checkpoint: {file.name}", name, problem, detail)

    def _with(self, reader: str, flag: str, folder: Path) -> list[object]:
        argv = self.pipeline.stages[reader].argv(self.out)
        argv[argv.index(flag) + 1] = folder
        return argv


def _kind(file: Path) -> str:
    if file.name.startswith("shard-"):
        return "a shard" if file.suffix == ".safetensors" else "a receipt"
    if file.suffix == ".safetensors":
        return "weights"
    return file.name


def _flip(rng: random.Random, file: Path) -> str:
    data = bytearray(file.read_bytes())
    if not data:
        return f"{file.name} is empty"
    place, bit = rng.randrange(len(data)), rng.randrange(8)
    data[place] ^= 1 << bit
    file.write_bytes(data)
    return f"{file.name} byte {place} bit {bit}"
