"""Run identity: which settings and inputs decide what an artefact holds."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lopd.config.fields import defaults_of, identity_of
from lopd.provenance.io import json_digest, without_keys
from lopd.provenance.manifest import Manifest
from lopd.provenance.typed_json import plain

# How and when a stage was called; everything else in a manifest is the recipe.
NOT_RECIPE = frozenset({"config", "created", "environment", "seconds"})
# What older artefacts do not record about their models. Unknown equals anything.
MAYBE_UNKNOWN = frozenset({"behaviour", "eos_ids", "hub", "end_of_turn", "list_of"})


def settings_identity(config: Any, stored: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The settings of a training or evaluation run that decide its result, up to rounding.

    Args:
        config, stored: as in `identity_of`; `stored` is the `config` of a finished run's manifest.
    """
    values = asdict(config) if stored is None else {**defaults_of(config), **stored}
    identity = identity_of(config, stored)
    if "gradient_accumulation_steps" in values:  # micro-batches count by their product only
        micro_batches = values["gradient_accumulation_steps"]
        identity["sequences_per_step"] = values["batch_size"] * micro_batches
    return identity


def digests_of(inputs: Mapping[str, Any]) -> dict[str, str | None]:
    """The content digest of everything in the `inputs` of a manifest, by name.

    That of a model is of its weights; `<name>.behaviour` is of what else it computes with.
    """
    digests: dict[str, str | None] = {}
    for name, described in plain(inputs).items():
        keys = ("digest", "sha256", "weights")  # of a folder of shards, a file, a model
        digests[name] = next((described[key] for key in keys if key in described), None)
        if described.get("behaviour") is not None:
            digests[f"{name}.behaviour"] = json_digest(described["behaviour"])
    return digests


def recipe_of(manifest: Manifest) -> dict[str, Any]:
    """The part of a manifest that decides what the artefact holds: no paths, times or `config`."""
    recipe = {key: value for key, value in manifest.raw.items() if key not in NOT_RECIPE}
    return without_keys(recipe, {"path"})


def manifest_digest(manifest: Manifest) -> str:
    """sha256 of the recipe, which receipts and shards repeat."""
    return json_digest(recipe_of(manifest))


def difference(found: Mapping[str, Any], expected: Mapping[str, Any], most: int = 3) -> str:
    """What differs between two identities, in words; empty if nothing does.

    A missing key is equal to None, so that a new version can add settings, and what only one side
    knows of `MAYBE_UNKNOWN` is not compared.

    Args:
        most: number of differences that are named; the others are only counted.

    >>> difference({"k": 8, "model": {"dtype": "float32"}}, {"k": 4, "model": {"dtype": "float32"}})
    'k was 8, is 4'
    """
    was, now = _flat(_known(found, expected)), _flat(_known(expected, found))
    keys = sorted(key for key in was.keys() | now.keys() if was.get(key) != now.get(key))
    words = [f"{key} was {_brief(was.get(key))}, is {_brief(now.get(key))}" for key in keys[:most]]
    more = [f"and {len(keys) - most} more"] if len(keys) > most else []
    return "; ".join([*words, *more])


def _known(value: Mapping[str, Any], other: Any) -> dict[str, Any]:
    """A value without the parts of `MAYBE_UNKNOWN` that `other` does not have."""
    beside = other if isinstance(other, Mapping) else {}
    return {
        key: _known(item, beside.get(key)) if isinstance(item, Mapping) else item
        for key, item in value.items()
        if beside.get(key) is not None or key.rpartition(".")[2] not in MAYBE_UNKNOWN
    }


def _flat(value: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    """The values of nested objects by dotted name."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{at}{key}.") if isinstance(item, Mapping) else {at + key: item}
    return flat


def _brief(value: Any) -> str:
    if isinstance(value, str) and len(value) > 32:
        return repr(f"{value[:12]}...")
    return repr(value)
