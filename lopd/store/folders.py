"""Whose a folder is: which recipe it holds, and whether another may take its place."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lopd.errors import ConfigError, ShardError
from lopd.provenance import MANIFEST_NAME, VOCAB_NAME, manifest_digest, read_manifest, recipe_of
from lopd.provenance.io import TEMP_SUFFIX
from lopd.store.locks import LOCK_NAME, START_LOCK_NAME


def require_ours(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse a folder with another recipe, or that something else has filled."""
    if (folder / MANIFEST_NAME).exists():
        if not is_unused(folder, manifest):
            require_same_recipe(folder, manifest)
        return
    ours = {LOCK_NAME, START_LOCK_NAME, VOCAB_NAME}
    stray = sorted(
        item
        for item in folder.iterdir()
        if item.name not in ours and not (item.name[0] == "." and item.suffix == TEMP_SUFFIX)
    )
    shards = [item for item in stray if item.match("shard-*")]
    if shards:
        raise ShardError(
            f"{shards[0]}: a shard in a folder without {MANIFEST_NAME}; restore the manifest, or "
            "name an empty folder"
        )
    if stray:
        raise ShardError(
            f"{folder}: holds {stray[0].name} and no {MANIFEST_NAME}, so it is not of this stage; "
            "name a new or empty folder"
        )


def holds(folder: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether the folder has this very recipe."""
    if not (folder / MANIFEST_NAME).exists():
        return False
    return manifest_digest(read_manifest(folder)) == manifest_digest(manifest)


def is_unused(folder: str | Path, manifest: Mapping[str, Any]) -> bool:
    """Whether a run of this kind left a recipe and no shard, so that another may take its place."""
    same_kind = read_manifest(folder)["kind"] == manifest["kind"]
    return same_kind and not any(Path(folder).glob("shard-*"))


def require_same_recipe(folder: str | Path, manifest: Mapping[str, Any]) -> None:
    """Refuse a folder whose manifest has another recipe than `manifest`.

    Raises:
        ConfigError: names what differs.
    """
    found = read_manifest(folder)
    if manifest_digest(found) == manifest_digest(manifest):
        return
    ours, theirs = recipe_of(manifest), recipe_of(found)
    keys = ours.keys() | theirs.keys()
    differing = sorted(key for key in keys if ours.get(key) != theirs.get(key))
    raise ConfigError(
        f"{folder} holds another recipe (it differs in {', '.join(differing)}); name another "
        "folder, or remove this one to redo it"
    )
