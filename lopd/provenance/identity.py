"""Run identity: which settings and inputs decide what an artefact holds."""

from collections.abc import Mapping
from typing import Any

from lopd.provenance.io import json_digest

# How a run is carried out and where things are; inputs count by their digests.
NOT_IN_TRAINING_RECIPE = frozenset(
    {
        "out",
        "model",
        "data",
        "student",
        "teacher",
        "cache",
        "device",
        "log_every",
        "save_every",
        "save_total_limit",
        "report_to",
        "verify",
        "workspace_bytes",  # this and the next five: memory and rounding
        "gradient_checkpointing",
        "attention",
        "max_tokens_per_batch",
        "batch_size",  # but for its product with the next
        "gradient_accumulation_steps",
        "stale_ess",
        "stale_every",
    }
)


def training_recipe_of(settings: dict[str, Any]) -> dict[str, Any]:
    """What of a run's settings decides its result, but for rounding."""
    micro_batches = settings.get("batch_size", 0), settings.get("gradient_accumulation_steps", 0)
    kept = {key: value for key, value in settings.items() if key not in NOT_IN_TRAINING_RECIPE}
    return {**kept, "sequences_per_step": micro_batches[0] * micro_batches[1]}


# How and when a stage was called; everything else is the recipe.
NOT_RECIPE = frozenset({"config", "created", "environment", "seconds"})


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """sha256 of the recipe: the manifest without paths, times, environment and `config`."""
    return json_digest(recipe_of(manifest))


def recipe_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a manifest that decides what the artefact holds."""
    recipe = {key: value for key, value in manifest.items() if key not in NOT_RECIPE}
    return _without_paths(recipe)


def _without_paths(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_paths(item) for key, item in value.items() if key != "path"}
    if isinstance(value, list | tuple):
        return [_without_paths(item) for item in value]
    return value
