"""What a path is, in words for messages: nothing, a file, a model, or what a stage wrote."""

import difflib
from pathlib import Path

from lopd.provenance.io import parse_json

MANIFEST_NAME = "manifest.json"
RECIPE_NAME = "recipe.json"  # what a training run has from its beginning
# What writes an artefact of each kind.
WRITERS = {
    "sft_data": "'lopd sft-data'",
    "checkpoint": "'lopd sft' or 'lopd distill'",
    "rollouts": "'lopd rollout' or 'lopd import'",
    "cache": "'lopd score' or 'lopd import'",
    "evaluation": "'lopd eval'",
}


def found_at(path: str | Path) -> str:
    """What is at a path that something else was expected at.

    >>> found_at("/nowhere/at/all")
    'no such file or folder'
    """
    path = Path(path)
    if path.is_file():
        return "is a file"
    if path.exists() and not path.is_dir():
        return "is a pipe or a device, which can be read only once"
    if not path.is_dir():
        return f"no such file or folder{_near(path)}"
    if kind := artefact_kind(path):
        return f"holds '{kind}' of {WRITERS[kind]}"
    if (path / RECIPE_NAME).is_file():
        return "holds a training run that is not finished"
    if is_model_folder(path):
        return "is a model folder"
    return "is an empty folder" if not any(path.iterdir()) else "is a folder of something else"


def artefact_kind(path: str | Path) -> str | None:
    """The kind of artefact in a folder, by its manifest; None if it holds none."""
    try:
        raw = parse_json((Path(path) / MANIFEST_NAME).read_bytes())
    except (OSError, ValueError):
        return None
    kind = raw.get("kind") if isinstance(raw, dict) else None
    return kind if isinstance(kind, str) and kind in WRITERS else None


def is_model_folder(path: str | Path) -> bool:
    """Whether a folder has the config.json of a model."""
    try:
        raw = parse_json((Path(path) / "config.json").read_bytes(), finite=False)
    except (OSError, ValueError):
        return False
    return isinstance(raw, dict) and "model_type" in raw


def _near(path: Path) -> str:
    """The neighbour whose name is nearest to one that does not exist."""
    try:
        names = [item.name for item in path.parent.iterdir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.75)
    return f", did you mean '{path.with_name(near[0])}'?" if near else ""
