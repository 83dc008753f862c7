"""Models and settings at the edge of arithmetic: a refusal in one line, or finite results."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from torture import harness
from torture.interruptions import unexpected
from torture.mistakes import shortened
from torture.pipeline import Pipeline, clear
from torture.table import Table

FAULT = "numbers at the edge"


def _spoil(value: float, name: str) -> Callable[[dict[str, np.ndarray]], None]:
    """Set one entry of a tensor."""
    return lambda tensors: tensors[name].reshape(-1).__setitem__(7, value)


def _scale(factor: float) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        for values in tensors.values():
            values *= np.float32(factor)

    return change


NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"
MODELS = {
    "NaN in a norm": _spoil(np.nan, NORM),
    "infinity in a norm": _spoil(np.inf, NORM),
    "NaN in one row of the embedding": _spoil(np.nan, EMBEDDING),
    "weights of 1e30": _scale(1e30),
    "weights of 1e-30": _scale(1e-30),
}
USES = {  # of a spoilt model: the stage that reads it, and its flag
    "sft-data": "--teacher",
    "sft": "--model",
    "rollout": "--student",
    "score": "--teacher",
    "eval": "--model",
}
SETTINGS = {
    "learning rate of 1e30": ("distill", ("--learning-rate", "1e30")),
    "learning rate of 1e-30": ("distill", ("--learning-rate", "1e-30")),
    "clipping at 1e-30": ("sft", ("--max-grad-norm", "1e-30")),
    "sampling at temperature 1e-6": ("rollout", ("--temperature", "1e-6")),
    "sampling at temperature 1e6": ("rollout", ("--temperature", "1e6")),
    "sampling at top_p 1e-9": ("rollout", ("--top-p", "1e-9")),
    "scoring at temperature 1e-6": ("score", ("--temperature", "1e-6")),
    "scoring at temperature 1e6": ("score", ("--temperature", "1e6")),
    "lists cut at 1e-9": ("score", ("--top-p", "1e-9")),
    "scoring in float16": ("score", ("--dtype", "float16")),
    "scoring in bfloat16": ("score", ("--dtype", "bfloat16")),
}


def attack_all(pipeline: Pipeline, table: Table) -> list[tuple[str, str, str]]:
    """Run every stage on every spoilt model, and with every extreme setting.

    Returns:
        For each: what was extreme, the stage, and its error; empty if it wrote a result.
    """
    rows = []

    def attack(name: str, stage: str, argv: list[object]) -> None:
        problem, error = _attack(argv, out)
        table.add(FAULT, f"{stage}: {name}", problem)
        rows.append((name, stage, error))

    out, spoilt = pipeline.root / "attacked", pipeline.root / "spoilt"
    for name, change in MODELS.items():
        for stage, flag in USES.items():
            argv = pipeline.stages[stage].argv(out)
            place = argv.index(flag) + 1
            clear(spoilt)
            shutil.copytree(argv[place], spoilt, ignore=shutil.ignore_patterns("manifest.json"))
            tensors = {k: v.copy() for k, v in load_file(spoilt / "model.safetensors").items()}
            change(tensors)
            save_file(tensors, spoilt / "model.safetensors", metadata={"format": "pt"})
            argv[place] = spoilt
            attack(name, stage, argv)
    for name, (stage, flags) in SETTINGS.items():
        argv = pipeline.stages[stage].argv(out)
        for flag, value in zip(flags[::2], flags[1::2], strict=True):
            if flag in argv:
                argv[argv.index(flag) + 1] = value
            else:
                argv += [flag, value]
        attack(name, stage, argv)
    return rows


def _attack(argv: list[object], out: Path) -> tuple[str, str]:
    """What is wrong with a run, and its error: it is refused, or its result passes."""
    clear(out)
    end = harness.run(argv)
    if (problem := unexpected(end, {0, 2})) or end.code == 2:
        return problem, end.error
    checked = harness.run(["verify", "--path", out])
    if checked.code != 0:
        return f"wrote what verify refuses: {checked.error}", ""
    for file in out.glob("model*.safetensors"):
        for name, values in load_file(file).items():
            if not np.isfinite(values).all():
                return f"wrote {name} that is not finite", ""
    return "", ""


def markdown(rows: list[tuple[str, str, str]]) -> str:
    """What was extreme, the stage, and what it said."""
    lines = ["| extreme | stage | outcome |", "| --- | --- | --- |"]
    for name, stage, error in rows:
        lines.append(f"| {name} | {stage} | {shortened(error) or 'a finite result'} |")
    return "\n".join(lines)
