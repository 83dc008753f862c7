"""Manifests: written once, beside what they describe."""

import dataclasses
import json
import platform
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from lopd.errors import ConfigError, DataError, MissingFileError, ProvenanceError, ShardError
from lopd.provenance.fingerprint import describe_model, fingerprint_weights, read_config
from lopd.provenance.io import pretty_json, write_atomic

MANIFEST_NAME = "manifest.json"
SCHEMA = 1
KINDS = ("sft_data", "checkpoint", "rollouts", "cache", "evaluation")
_MODEL = ("model.path", "model.weights", "model.tokenizer", "model.vocab_size")
# What readers of a kind rely on; "a.b" is key b of the object under a.
REQUIRED = {
    "sft_data": (*_MODEL, "plan.shards"),
    "checkpoint": ("model.weights",),
    "rollouts": (*_MODEL, "plan.shards"),
    "cache": (
        *_MODEL,
        "plan.shards",
        "inputs.rollouts.digest",
        "inputs.rollouts.model.weights",
        "k",
        "top_p",
        "codec",
        "temperature",
    ),
    "evaluation": ("model.weights", "inputs.prompts.sha256"),
}
KEYS = ("config", "model", "base", "sampling", "inputs", "lineage", "overrides", "plan")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_PACKAGES = ("lopd", "torch", "transformers", "numpy", "safetensors")


def build_manifest(
    kind: str,
    *,
    stage: str,
    config: Any,
    model: Mapping[str, Any] | None = None,
    base: Mapping[str, Any] | None = None,
    sampling: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Any] | None = None,
    lineage: Mapping[str, Any] | None = None,
    overrides: Sequence[Mapping[str, Any]] = (),
    plan: Mapping[str, Any] | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """A manifest as a plain JSON object.

    `config` (a dataclass or a mapping) is kept for people to read and is not part of the
    recipe: whatever decides the content of the artefact belongs into `model`, `sampling`,
    `inputs`, `plan` or `extra`, for `manifest_digest` and so resuming look at those alone.
    """
    if kind not in KINDS:
        raise ConfigError(f"manifest kind '{kind}' is unknown; use one of {', '.join(KINDS)}")
    fields = {
        "schema": SCHEMA,
        "kind": kind,
        "stage": stage,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": _environment(),
        "config": _as_dict(config),
        "model": model,
        "base": base,
        "sampling": sampling,
        "inputs": inputs or {},
        "lineage": lineage,
        "overrides": list(overrides),
        "plan": plan,
    }
    clash = sorted(fields.keys() & extra.keys())
    if clash:
        raise ConfigError(f"manifest key '{clash[0]}' is taken; give the extra key another name")
    # Through JSON once, so that what is compared now is what will be read back.
    return json.loads(pretty_json({**fields, **extra}))


def write_manifest(folder: str | Path, manifest: Mapping[str, Any]) -> Path:
    """Write `manifest.json` into `folder`, which is made if need be.

    Raises:
        ShardError: the disk is full, the folder is read-only, and the like.
    """
    file = Path(folder) / MANIFEST_NAME
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, pretty_json(manifest))
    except OSError as error:
        raise ShardError(
            f"{file}: not written ({error.strerror or error}); mend that and run the same "
            "command again"
        ) from error
    return file


def read_manifest(folder: str | Path, kind: str | None = None) -> dict[str, Any]:
    """The manifest of an artefact folder, of the given kind when one is named.

    Raises:
        MissingFileError: no such folder or no manifest in it.
        DataError: not a manifest, one without what its kind needs, or one of a newer version
            of lopd.
        ConfigError: an artefact of another kind.
    """
    file = Path(folder) / MANIFEST_NAME
    if not file.exists():
        what = "does not exist" if not Path(folder).is_dir() else f"has no {MANIFEST_NAME}"
        raise MissingFileError(f"{folder} {what}; name a folder that a lopd stage has written")
    try:
        manifest = json.loads(file.read_bytes())
    except ValueError as error:
        raise DataError(f"{file} is not JSON ({error}); restore it or redo the stage") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}); restore it") from error
    if not isinstance(manifest, dict) or manifest.get("kind") not in KINDS:
        raise DataError(f"{file} is not a lopd manifest; restore it or redo the stage")
    if manifest.get("schema") != SCHEMA:
        raise DataError(
            f"{file} has schema {manifest.get('schema')!r}, expected {SCHEMA}; "
            "read it with the version of lopd that wrote it"
        )
    if kind is not None and manifest["kind"] != kind:
        raise ConfigError(f"{folder} holds '{manifest['kind']}', expected '{kind}'; name another")
    _check_content(file, manifest)
    return manifest


def lineage_of(checkpoint: str | Path) -> dict[str, Any]:
    """Whose answers a checkpoint was fine-tuned on, from its manifest.

    `sft_teacher` ({"weights", "tokenizer", "path"} or None where nothing says), `declared`
    (True when a person said so), `initial_student` (weights that the distillation in
    progress began from, or None). A folder without a manifest has no lineage.

    Raises:
        ProvenanceError: the manifest describes other weights than the folder holds.
    """
    empty = {"sft_teacher": None, "declared": False, "initial_student": None}
    if not (Path(checkpoint) / MANIFEST_NAME).exists():
        return empty
    manifest = read_manifest(checkpoint, kind="checkpoint")
    described = (manifest.get("model") or {}).get("weights")
    found = fingerprint_weights(checkpoint)
    if described != found:
        raise ProvenanceError(
            f"{checkpoint}: its manifest describes weights {short(described)}, the folder holds "
            f"{short(found)}; remove {MANIFEST_NAME} and say whose answers it was fine-tuned on "
            "with 'lopd declare'"
        )
    return {**empty, **(manifest.get("lineage") or {})}


def declare(model: str | Path, *, teacher: str | Path) -> dict[str, Any]:
    """Write the manifest of a checkpoint that was fine-tuned elsewhere; return it.

    `teacher` is the folder of the model whose answers it was fine-tuned on, or the 64 hex
    digits of that model's weights fingerprint. The lineage is marked as declared: it is a
    person's word, which every later manifest repeats.

    Raises:
        ProvenanceError: a stage of lopd has written whose answers they were.
    """
    if (Path(model) / MANIFEST_NAME).exists():
        known = read_manifest(model, kind="checkpoint").get("lineage") or {}
        if known.get("sft_teacher") and not known.get("declared"):
            raise ProvenanceError(
                f"{model} already has a {MANIFEST_NAME} that a stage wrote; it says more than "
                "a declaration could, so remove it first if it is wrong"
            )
    config = read_config(model)
    dtype = config.get("dtype") or config.get("torch_dtype") or "unspecified"
    manifest = build_manifest(
        "checkpoint",
        stage="declare",
        config={"model": str(model), "teacher": str(teacher)},
        model=describe_model(model, dtype=str(dtype), engine="unspecified"),
        lineage={
            "sft_teacher": _describe_teacher(teacher),
            "declared": True,
            "initial_student": None,
        },
    )
    write_manifest(model, manifest)
    return manifest


def short(digest: Any) -> str:
    """The first 12 hex digits, which is what messages show."""
    return str(digest)[:12] if digest else "unknown"


def _check_content(file: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse a manifest without what readers of its kind rely on."""
    absent = [key for key in KEYS if key not in manifest]
    absent += [key for key in REQUIRED[manifest["kind"]] if _at(manifest, key) is None]
    lineage = manifest.get("lineage")
    if lineage is not None and not isinstance(lineage, dict):
        absent.append("lineage.sft_teacher")
    teacher = _at(manifest, "lineage.sft_teacher")
    if teacher is not None and not isinstance(_at(teacher, "weights"), str):
        absent.append("lineage.sft_teacher.weights")
    if absent:
        raise DataError(
            f"{file} has no {absent[0]}, which a manifest of '{manifest['kind']}' needs; restore "
            "it or redo the stage"
        )


def _at(value: Any, key: str) -> Any:
    """The value under a dotted key, None where there is none."""
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _describe_teacher(teacher: str | Path) -> dict[str, Any]:
    if _DIGEST.fullmatch(str(teacher)):
        return {"weights": str(teacher), "tokenizer": None, "path": None}
    described = describe_model(teacher, dtype="unspecified", engine="unspecified")
    return {key: described[key] for key in ("weights", "tokenizer", "path")}


def _as_dict(config: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return dataclasses.asdict(config)
    return dict(config)


def _environment() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
