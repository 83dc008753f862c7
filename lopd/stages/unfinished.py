"""What `lopd inspect` prints of the folder of a training run that is not finished."""

from pathlib import Path
from typing import Any

from lopd.provenance.io import parse_json
from lopd.provenance.manifest import RECIPE_NAME
from lopd.training.checkpoints import checkpoints, step_of, unusable
from lopd.training.logging import LOG_NAME
from lopd.training.run import read_recipe


def describe_run(folder: Path) -> dict[str, Any]:
    """The model that the run began from, its checkpoints, and its last log.

    Raises:
        DataError: its recipe is damaged.
    """
    recipe = read_recipe(folder / RECIPE_NAME)
    rows: dict[str, Any] = {"kind": "checkpoint", "state": "unfinished: rerun its command"}
    base = recipe.get("base")
    if isinstance(base, dict) and base.get("weights"):
        rows["base"] = str(base["weights"])[:12]
    if recipe.get("cache"):
        rows["cache"] = str(recipe["cache"])[:12]
    faults = {item: unusable(item) for item in checkpoints(folder)}
    last = next((item for item, fault in faults.items() if not fault), None)
    rows["continues from"] = "the start" if last is None else f"step {step_of(last)}"
    for item, fault in faults.items():
        rows[item.name] = fault or "whole"
    if (file := folder / LOG_NAME).is_file():
        records = [parse_json(line) for line in file.read_bytes().splitlines()]
        losses = [record for record in records if "loss" in record]
        if losses:
            rows["last log"] = f"step {losses[-1]['step']}, loss {losses[-1]['loss']:.4g}"
    return rows
