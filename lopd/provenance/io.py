"""Canonical JSON, digests and atomic writes."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lopd.errors import ShardError

TEMP_SUFFIX = ".tmp"


def canonical_json(value: Any) -> bytes:
    """The one spelling of a JSON value: sorted keys, no spaces, UTF-8, no NaN."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode("utf-8")


def json_digest(value: Any) -> str:
    """sha256, in hex, of the canonical JSON."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def pretty_json(value: Any) -> bytes:
    """JSON to be read by people: sorted keys, indented, one trailing newline."""
    text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode("utf-8")


def without_keys(value: Any, keys: Collection[str]) -> Any:
    """A JSON value without these keys, at any depth."""
    if isinstance(value, Mapping):
        return {key: without_keys(item, keys) for key, item in value.items() if key not in keys}
    if isinstance(value, list | tuple):
        return [without_keys(item, keys) for item in value]
    return value


def sha256_file(path: Path) -> str:
    """sha256, in hex, of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader or a crash sees all of it or none of it.

    Temporary file in the same folder, fsync, rename over `path`, fsync of the folder.
    The temporary file is removed if that fails.

    Raises:
        OSError: the file cannot be written, e.g. on a full disk; `path` is unchanged.
    """
    temp = path.with_name(f".{path.name}.{os.getpid()}{TEMP_SUFFIX}")
    try:
        descriptor = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temp, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temp.unlink()
        raise
    sync_folder(path.parent)


@contextmanager
def storing(path: Path, note: str = "") -> Iterator[None]:
    """Raise ShardError, with `note` before the remedy, if the file system refuses the write."""
    try:
        yield
    except OSError as error:
        raise ShardError(
            f"{path}: not written ({error.strerror or error}); {note}fix this and rerun the same "
            "command"
        ) from error


def sync_folder(folder: Path) -> None:
    """Make renames and removals in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporaries(folder: Path) -> None:
    """Remove temporary files and folders of killed writers.

    Only safe when no other writer is running.
    """
    for temp in folder.glob(f".*{TEMP_SUFFIX}"):
        if temp.is_dir() and not temp.is_symlink():
            shutil.rmtree(temp)
        else:
            temp.unlink(missing_ok=True)
