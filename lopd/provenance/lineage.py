"""Lineage: whose answers a checkpoint was fine-tuned on."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path

from lopd.errors import ProvenanceError
from lopd.provenance.behaviour import behaviour_of
from lopd.provenance.fingerprint import describe_model, fingerprint_weights
from lopd.provenance.folder import read_config
from lopd.provenance.identity import difference
from lopd.provenance.io import remove_dead_writers
from lopd.provenance.manifest import (
    MANIFEST_NAME,
    Lineage,
    Manifest,
    ModelIdentity,
    build_manifest,
    read_manifest,
    short,
    write_manifest,
)
from lopd.provenance.teachers import lineage_entries

LOG = logging.getLogger(__name__)

_DIGEST = re.compile(r"[0-9a-f]{64}")
_UNKNOWN = {"sft_teacher": None, "declared": False, "initial_student": None}


def lineage_of(checkpoint: str | Path) -> Lineage:
    """The lineage in a checkpoint's manifest; a folder without a manifest has none.

    Raises:
        ProvenanceError: the manifest describes other weights than the folder holds.
    """
    if not (Path(checkpoint) / MANIFEST_NAME).exists():
        return Lineage(raw=_UNKNOWN)
    manifest = read_manifest(checkpoint, kind="checkpoint")
    found = fingerprint_weights(checkpoint)
    if manifest.model.weights != found:
        raise ProvenanceError(
            f"{checkpoint}: its manifest describes weights {short(manifest.model.weights)}, the "
            f"folder holds {short(found)}; remove {MANIFEST_NAME} and say whose answers it was "
            "fine-tuned on with 'lopd declare'"
        )
    return manifest.lineage or Lineage(raw=_UNKNOWN)


def warn_if_edited(checkpoint: str | Path) -> None:
    """Warn of a checkpoint whose config, tokenizer or template its manifest does not describe.

    Such an edit may be meant, so the files count as they are; a flipped bit looks the same.
    """
    if not (Path(checkpoint) / MANIFEST_NAME).exists():
        return
    recorded = read_manifest(checkpoint, kind="checkpoint").model.behaviour
    if recorded is not None and (changed := difference(recorded, behaviour_of(checkpoint))):
        LOG.warning(
            f"{checkpoint}: {changed} since its {MANIFEST_NAME} was written; it is used as it is"
        )


def declare(model: str | Path, *, teacher: str | Path | Mapping[str, str]) -> Manifest:
    """Write the manifest of a checkpoint that was fine-tuned elsewhere.

    Args:
        teacher: folder of the model whose answers it was fine-tuned on, or the 64 hex digits of
            that model's weights fingerprint; a mapping of names to such, for several teachers.

    Returns:
        The manifest. Its lineage is marked as declared, as is that of every later manifest.

    Raises:
        ProvenanceError: a stage of lopd has recorded whose answers they were.
    """
    if (Path(model) / MANIFEST_NAME).exists():
        known = read_manifest(model, kind="checkpoint").lineage
        if known is not None and known.sft_teacher is not None and not known.declared:
            raise ProvenanceError(
                f"{model} already has a {MANIFEST_NAME} that a stage wrote, which records "
                "more than a declaration; remove it first if it is wrong"
            )
    config = read_config(model)
    dtype = config.get("dtype") or config.get("torch_dtype") or "unspecified"
    manifest = build_manifest(
        "checkpoint",
        stage="declare",
        config={
            "model": str(model),
            "teacher": teacher if isinstance(teacher, Mapping) else str(teacher),
        },
        model=describe_model(model, dtype=str(dtype), engine="unspecified"),
        lineage={**_UNKNOWN, **lineage_entries(_identify(teacher)), "declared": True},
    )
    remove_dead_writers(Path(model) / MANIFEST_NAME)
    write_manifest(model, manifest)
    return manifest


def _identify(teacher: str | Path | Mapping[str, str]) -> dict[str | None, ModelIdentity]:
    if isinstance(teacher, Mapping):
        return {name: _identify(item)[None] for name, item in teacher.items()}
    if _DIGEST.fullmatch(str(teacher)):
        return {None: ModelIdentity.from_json({"weights": str(teacher)})}
    return {None: describe_model(teacher, dtype="unspecified", engine="unspecified")}
