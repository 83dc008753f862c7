"""Print what an artefact folder holds and, on demand, check its hashes (`lopd inspect`)."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from lopd.config.inspect import InspectConfig
from lopd.errors import ConfigError, ProvenanceError
from lopd.evaluation.agreement import by_teacher, low_coverage, measure
from lopd.provenance import (
    MANIFEST_NAME,
    CacheManifest,
    Manifest,
    ModelIdentity,
    chat_template_digest,
    eos_ids_of,
    fingerprint_weights,
    read_manifest,
    vocab_size_of,
)
from lopd.provenance.folder import read_config
from lopd.provenance.folder_receipt import RECEIPT_NAME, check_receipt
from lopd.provenance.found import is_model_folder
from lopd.provenance.manifest import RECIPE_NAME, check_digest, short
from lopd.provenance.typed_json import value_at
from lopd.stages.table import print_fields
from lopd.store import RolloutStore, TeacherCache

MOST_FAULTS = 5
NO_HASHES = "is a model that lopd did not write, which has no recorded hashes"
LOG = logging.getLogger(__name__)


def main(config: InspectConfig) -> None:
    """Print the totals of the folder; with `verify`, hash its shards, files or weights first.

    Raises:
        ConfigError: `verify`, and the folder has no hashes.
        ProvenanceError: the weights are not those that the manifest describes.
        ShardError: a shard or file is unfinished or altered.
    """
    folder = Path(config.path)
    has_manifest = (folder / MANIFEST_NAME).exists()
    if not has_manifest and (folder / RECIPE_NAME).is_file():
        if config.verify:
            raise ConfigError(f"{folder}: is unfinished, and has no hashes; leave --verify out")
        from lopd.stages.unfinished import describe_run  # imports transformers

        rows = describe_run(folder)
    elif not has_manifest and is_model_folder(folder):
        if config.verify:
            raise ConfigError(f"{folder}: {NO_HASHES}; leave --verify out")
        rows = _describe_model_folder(folder)
    else:
        rows = _describe_artefact(folder, config.verify)
    if config.json:
        print(json.dumps(rows, indent=1, default=str))
    else:
        print_fields(rows)


def _describe_artefact(folder: Path, verify: bool) -> dict[str, Any]:
    """What the manifest of a stage's folder says, and what the folder holds."""
    manifest = read_manifest(folder)
    if verify:
        check_digest(manifest, folder)
    rows, kind = _describe_manifest(manifest), manifest.kind
    store: RolloutStore | TeacherCache | None = None
    if kind == "cache":
        store = TeacherCache.open(folder, support="list", allow_incomplete=True)
    elif kind in ("rollouts", "sft_data"):
        store = RolloutStore.open(folder, kind=kind, allow_incomplete=True)
    if store is not None:
        _warn_of_faults(store)
        rows |= store.summary() | _describe_weights(store)
    if isinstance(store, TeacherCache):
        rows |= _describe_cache(store)
    if verify:
        rows["verified"] = (
            _verify_files(folder, manifest) if store is None else _verify_shards(store)
        )
    if kind == "evaluation":
        from lopd.stages.evaluate import results_of  # imports torch and transformers

        rows |= results_of(folder)
    return rows


def _describe_manifest(manifest: Manifest) -> dict[str, Any]:
    """The models of an artefact, how they end answers, and how they were sampled."""
    rows: dict[str, Any] = {"kind": manifest.kind, "stage": manifest.stage}
    for role, model in _models(manifest).items():
        rows[role] = f"{model.hub or model.path} ({model.weights[:12]})"
        rows[f"{role} ends answers with"] = _describe_eos(model)
    if isinstance(manifest, CacheManifest):
        rows["rollouts end with"] = _describe_eos(manifest.rollouts.model)
        if (own := manifest.teacher_prompts) is not None:
            rows["teacher's own prompts"] = f"template {own.file} ({short(own.template)})"
    elif template := value_at(manifest.inputs, "cache.teacher_template"):
        rows["teacher's own prompts"] = f"template {short(template)}"
    if manifest.raw.get("end_of_turn") is not None:
        rows["chat template ends a turn with"] = _describe_turn(manifest.raw["end_of_turn"])
    if manifest.sampling is not None:
        settings = manifest.sampling.raw.items()
        rows["sampling"] = ", ".join(f"{name} {value}" for name, value in settings)
    if manifest.overrides:
        rows["overrides"] = ", ".join(override.name for override in manifest.overrides)
    return rows


def _describe_model_folder(folder: Path) -> dict[str, Any]:
    """A model that no stage of lopd wrote, from its small files; its weights are not hashed."""
    raw = read_config(folder)
    ends = eos_ids_of(folder)
    files = [*folder.glob("*.safetensors")]
    return {
        "kind": "a model that lopd did not write",
        "model": str(folder.resolve()),
        "architecture": ", ".join(raw.get("architectures") or [str(raw["model_type"])]),
        "weights": f"{len(files)} files, {sum(file.stat().st_size for file in files)} bytes",
        "vocabulary": vocab_size_of(folder),
        "ends answers with": "unknown" if ends is None else f"id {' or '.join(map(str, ends))}",
        "chat template": short(digest) if (digest := chat_template_digest(folder)) else "none",
        "fine-tuned on": "unknown; lopd declare records it",
    }


def _models(manifest: Manifest) -> dict[str, ModelIdentity]:
    """The models that a manifest names, by their role in words."""
    found = {
        "model" if name is None else f"model of {name}": model
        for name, model in manifest.models.items()
    }
    if manifest.base is not None:
        found["base"] = manifest.base
    lineage = manifest.lineage
    if lineage is not None and lineage.sft_teachers is not None:
        found |= {f"fine-tuned on {name}": each for name, each in lineage.sft_teachers.items()}
    elif lineage is not None and lineage.sft_teacher is not None:
        found["fine-tuned on"] = lineage.sft_teacher
    return found


def _warn_of_faults(folder: RolloutStore | TeacherCache) -> None:
    """Say which shards cannot be used, why, and which command writes them."""
    if not folder.faults:
        return
    more = len(folder.faults) - MOST_FAULTS
    LOG.warning(
        f"{folder.path}: {len(folder.faults)} of {folder.num_shards} shards are unfinished or "
        f"damaged; 'lopd {folder.manifest.stage} --out {folder.path}' with its other flags as "
        "before writes them"
    )
    for fault in folder.faults[:MOST_FAULTS]:
        LOG.warning(f"  {fault.removeprefix(f'{folder.path}/')}")
    if more > 0:
        LOG.warning(f"  and {more} more")


def _describe_eos(model: ModelIdentity) -> str:
    """The ids that end an answer of a model."""
    return "unknown" if model.eos_ids is None else "id " + " or ".join(map(str, model.eos_ids))


def _describe_turn(end: Any) -> str:
    """The id that ends a turn in the template, or in that of each of several models."""
    if not isinstance(end, dict):
        return f"id {end}"
    return ", ".join(f"id {found} ({name})" for name, found in end.items() if found is not None)


def _describe_weights(store: RolloutStore | TeacherCache) -> dict[str, str]:
    """The rewards and weights that came with the rollouts, if any did."""
    rewards, weights, rows = store.rewards(), store.weights(), {}
    known = rewards[~np.isnan(rewards)]
    if len(known):
        above = (known > 0).mean()
        rows["rewards"] = (
            f"known of {len(known)}, mean {known.mean(dtype=np.float64):.4g}, {above:.1%} above 0"
        )
    if (weights != 1).any():
        rows["sequence weights"] = f"{weights.min():.4g} to {weights.max():.4g}"
    if store.has_token_weights:
        rows["token weights"] = "yes"
    return rows


def _verify_shards(store: RolloutStore | TeacherCache) -> str:
    store.check_complete()
    store.verify()
    return "every shard matches its receipt"


def _verify_files(folder: Path, manifest: Manifest) -> str:
    """Check a model or an evaluation; those of earlier versions have no receipt."""
    found = []
    if manifest.kind == "checkpoint":
        if fingerprint_weights(folder, rehash=True) != manifest.model.weights:
            raise ProvenanceError(
                f"{folder}: its weights are not those that its manifest describes; restore them, "
                "or make the checkpoint again"
            )
        found.append("the weights match the manifest")
    if (folder / RECEIPT_NAME).exists():
        found.append(f"all {len(check_receipt(folder)['files'])} files match their receipt")
    if not found:
        raise ConfigError(
            f"{folder}: holds '{manifest.kind}' of an earlier version, which has no hashes; leave "
            "--verify out"
        )
    return ", ".join(found)


def _describe_cache(cache: TeacherCache) -> dict[str, Any]:
    """The lists, where they come from, and how near the student is; warns of short lists."""
    details = cache.details()
    quantiles = details["list_length_quantiles"].items()
    rows: dict[str, Any] = {
        "list lengths": ", ".join(f"{float(q):.0%} <= {length}" for q, length in quantiles)
    }
    error = cache.summary()["codec_error"]
    rows["codec_error"] = (
        "not measured when the cache was written" if error is None else f"{error:.3g} nat"
    )
    manifest = cache.manifest
    if manifest.declared:
        rows["declared"] = "the models that scored and rolled out are taken on trust"
    rows["temperature"] = manifest.temperature
    words = manifest.scoring.words()
    rows["scoring"] = ", ".join(f"{name} {word}" for name, word in words.items())
    if manifest.scoring.support is not None:
        rows["lists"] = manifest.scoring.support.ids
        rows["lists of"] = manifest.scoring.list_of
    if manifest.scoring.eos_class:
        rows["one token"] = "ids " + ", ".join(map(str, manifest.scoring.eos_class))
    for name, size in details["bytes_per_token_by_array"].items():
        rows[f"bytes/token {name}"] = size
    if (found := measure(cache)) is not None:
        rows |= found.rows() | by_teacher(cache)
    if (warning := low_coverage(cache, found)) is not None:
        LOG.warning(warning)
    return rows
