"""Receipts of folders: size and sha256 of every file, written last, when all else is durable."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from lopd.errors import ShardError
from lopd.provenance.io import parse_json, pretty_json, sha256_file, sync_folder, write_atomic

RECEIPT_NAME = "receipt.json"


def files_below(folder: Path) -> list[str]:
    """Paths, relative to `folder`, of all files in it and its folders; without its receipt."""
    files = (item.relative_to(folder).as_posix() for item in folder.rglob("*") if item.is_file())
    return sorted(name for name in files if name != RECEIPT_NAME)


def seal(folder: Path, names: Collection[str], **entries: Any) -> None:
    """Make files durable, then write their receipt.

    Args:
        folder: folder of the receipt.
        names: the files, relative to the folder.
        entries: further values of the receipt.

    Raises:
        OSError: the disk is full or fails.
    """
    paths = [folder / name for name in names]
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    for parent in sorted({path.parent for path in paths} | {folder}):
        sync_folder(parent)
    files = {
        name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for name, path in zip(names, paths, strict=True)
    }
    write_atomic(folder / RECEIPT_NAME, pretty_json({**entries, "files": files}))


def read_receipt(folder: Path) -> dict[str, Any]:
    """The receipt of a folder.

    Raises:
        ShardError: it is missing or damaged.
    """
    path = folder / RECEIPT_NAME
    try:
        receipt = parse_json(path.read_bytes())
        files = {
            str(name): (int(f["bytes"]), str(f["sha256"])) for name, f in receipt["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(f"{path}: missing, torn or altered; restore it") from error
    return {**receipt, "files": files}


def check_receipt(folder: Path) -> dict[str, Any]:
    """Compare the files of a folder with its receipt, which is returned.

    Raises:
        ShardError: a file is missing, truncated or altered, or the receipt is.
    """
    receipt = read_receipt(folder)
    for name, (size, digest) in receipt["files"].items():
        path = folder / name
        if not path.is_file():
            raise ShardError(f"{path}: missing; its receipt lists it; restore it")
        if path.stat().st_size != size:
            found = path.stat().st_size
            raise ShardError(f"{path}: found {found} bytes, the receipt says {size}; restore it")
        if sha256_file(path) != digest:
            raise ShardError(f"{path}: altered, its sha256 is not the receipt's; restore it")
    return receipt
