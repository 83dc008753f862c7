"""Totals of an artefact folder, and on demand a check of its hashes (`lopd inspect`)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lopd.config.fields import Settings, setting
from lopd.errors import ConfigError, ProvenanceError, ShardError
from lopd.provenance import fingerprint_weights, read_manifest
from lopd.store import RolloutStore, TeacherCache


@dataclass(kw_only=True)
class InspectConfig(Settings):
    """Print what an artefact folder holds (`lopd inspect`)."""

    path: str = setting(help="Folder of answers, rollouts, a cache or a checkpoint.")
    verify: bool = setting(
        False, group="Model and data", help="Check the hashes of every shard, or of the weights."
    )


def main(config: InspectConfig) -> None:
    manifest = read_manifest(Path(config.path))
    kind = manifest.kind
    rows: dict[str, Any] = {"kind": kind, "stage": manifest.stage}
    models = {"model": manifest.model, "base": manifest.base}
    models["fine-tuned on"] = None if manifest.lineage is None else manifest.lineage.sft_teacher
    for role, model in models.items():
        if model is not None:
            rows[role] = f"{model.path} ({model.weights[:12]})"
    if manifest.sampling is not None:
        settings = manifest.sampling.raw.items()
        rows["sampling"] = ", ".join(f"{name} {value}" for name, value in settings)
    if manifest.overrides:
        rows["overrides"] = ", ".join(override.name for override in manifest.overrides)
    store: RolloutStore | TeacherCache | None = None
    if kind == "cache":
        store = TeacherCache.open(config.path, allow_incomplete=True)
    elif kind in ("rollouts", "sft_data"):
        store = RolloutStore.open(config.path, kind=kind)
    if store is None and config.verify:
        if kind != "checkpoint":
            raise ConfigError(f"{config.path}: holds '{kind}', which has no hashes to verify")
        if fingerprint_weights(config.path, rehash=True) != manifest.model.weights:
            raise ProvenanceError(
                f"{config.path}: its weights are not those that its manifest describes; restore "
                "them, or make the checkpoint again"
            )
        rows["verified"] = "the weights are those that the manifest describes"
    if store is not None:
        rows.update(store.summary())
        if isinstance(store, TeacherCache):
            rows.update(_cache_rows(store))
        if config.verify:
            if store.missing_shards:
                raise ShardError(
                    f"{config.path}: {len(store.missing_shards)} of {store.num_shards} shards are "
                    f"unfinished or damaged, the first is shard-{store.missing_shards[0]:05d}; run "
                    f"'lopd {manifest.stage}' again to write them"
                )
            store.verify()
            rows["verified"] = "every shard matches its receipt"
    _print(rows)


def _cache_rows(cache: TeacherCache) -> dict[str, Any]:
    """What the lists cost and lose; the error stands in the receipts, as it was measured."""
    details = cache.details()
    quantiles = details["list_length_quantiles"].items()
    rows: dict[str, Any] = {
        "list lengths": ", ".join(f"{float(q):.0%} <= {length}" for q, length in quantiles)
    }
    error = cache.summary()["codec_error"]
    rows["codec_error"] = (
        "not measured when it was written" if error is None else f"{error:.3g} nat"
    )
    manifest = cache.manifest
    if manifest.declared:
        rows["declared"] = "who scored and who rolled out are taken on trust"
    rows["temperature"] = manifest.temperature
    rows["scoring"] = ", ".join(f"{name} {word}" for name, word in manifest.scoring.words().items())
    if manifest.scoring.support is not None:
        rows["lists"] = manifest.scoring.support.ids
    for name, size in details["bytes_per_token_by_array"].items():
        rows[f"bytes/token {name}"] = size
    return rows


def _print(rows: dict[str, Any]) -> None:
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {f'{value:.4g}' if isinstance(value, float) else value}")
