"""Run identity: which settings and inputs decide what an artefact holds."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lopd.config.fields import identity_of
from lopd.provenance.io import json_digest


def training_recipe_of(config: Any, stored: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The settings that decide the result of a training run; arguments as for `identity_of`."""
    settings = asdict(config) if stored is None else stored
    micro_batches = settings.get("batch_size", 0), settings.get("gradient_accumulation_steps", 0)
    return {
        **identity_of(config, stored),
        "sequences_per_step": micro_batches[0] * micro_batches[1],
    }


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
