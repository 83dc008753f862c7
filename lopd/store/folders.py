"""Output folders: whether a stage may write into a folder or continue the run in it."""

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lopd.errors import ConfigError, LopdError, ShardError
from lopd.provenance import (
    MANIFEST_NAME,
    VOCAB_FILES,
    Manifest,
    difference,
    read_manifest,
    recipe_of,
)
from lopd.provenance.io import TEMP_SUFFIX, make_folder
from lopd.store.locks import LOCK_NAME, START_LOCK_NAME, FolderLock

State = Literal["new", "unfinished", "finished", "other recipe", "foreign", "file", "read-only"]
REASONS = {
    "finished": "holds a finished run; choose another --out, or remove it",
    "other recipe": "holds another recipe ({}); restore that, choose another --out, or remove the "
    "folder to start over",
    "foreign": "holds {}; choose a new or empty folder",
    "file": "{} is a file; choose another --out, a folder",
    "read-only": "{} cannot be written to; choose another --out",
}


@dataclass(frozen=True)
class OutputFolder:
    """An output folder and its state.

    A `new` folder is empty, or its recorded recipe has no results yet. In an `unfinished` one, a
    run with the same identity can be continued.
    """

    path: Path
    state: State
    detail: str = ""

    def require_writable(self, error: type[LopdError] = ConfigError) -> "OutputFolder":
        """Refuse a folder that is neither new nor unfinished.

        Args:
            error: the exception for a path that is no folder of this stage; a finished run or
                another recipe is a ConfigError.
        """
        if self.state in ("new", "unfinished"):
            return self
        cause = ConfigError if self.state in ("finished", "other recipe") else error
        raise cause(f"{self.path}: {REASONS[self.state].format(self.detail)}")


def examine_folder(
    path: str | Path,
    *,
    final: str | None = None,
    record: str | None = None,
    differs: Callable[[], str] = str,
    has_results: Callable[[], bool] = lambda: True,
    allowed_files: Collection[str] | None = (),
    kind: str | None = None,
) -> OutputFolder:
    """The state of a stage's output folder; writes nothing.

    Args:
        final: name of the file that a run writes last.
        record: name of the file in which a run records its identity when it starts.
        differs: describes how the recorded identity differs from this run's; empty if it does not.
        has_results: whether another recipe must not replace the recorded one.
        allowed_files: names of other files that a run of the stage may have left; None admits any.
        kind: what the stage's manifests describe; a folder of another kind is foreign.

    Raises:
        DataError: `kind` is given, and the folder's manifest is damaged.
    """
    folder = Path(path)
    # Listed first: another worker may make the record at any time, and then it is looked at below.
    names = _names(folder) if allowed_files is not None else []
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not existing.is_dir():
        return OutputFolder(folder, "file", str(existing))
    if kind is not None and (folder / MANIFEST_NAME).exists():
        found = read_manifest(folder)
        if found.kind != kind:
            return OutputFolder(folder, "foreign", f"'{found.kind}' of 'lopd {found.stage}'")
    if final is not None and (folder / final).exists():
        return OutputFolder(folder, "finished")
    if not os.access(existing, os.W_OK):
        return OutputFolder(folder, "read-only", str(existing))
    if record is not None and (folder / record).exists():
        if not (words := differs()):
            return OutputFolder(folder, "unfinished")
        return OutputFolder(folder, "other recipe" if has_results() else "new", words)
    if allowed_files is not None:
        known = {LOCK_NAME, START_LOCK_NAME, *allowed_files}
        if foreign := [name for name in names if name not in known]:
            return OutputFolder(folder, "foreign", f"{foreign[0]} and no {record or final}")
    return OutputFolder(folder, "new")


def examine_shard_folder(
    path: str | Path, manifest: Manifest, *, in_use: bool = False
) -> OutputFolder:
    """The state of a folder of shards; refuses one that its writer must not change.

    Args:
        in_use: whether other workers are writing there, so that the recipe must not change.

    Raises:
        ConfigError: the folder holds another recipe; names what differs.
        DataError: its manifest was not written by lopd, or is damaged.
        ShardError: it is a file, cannot be written, or holds something else.
    """
    folder = Path(path)

    def differs() -> str:
        return difference(recipe_of(read_manifest(folder)), recipe_of(manifest))

    def has_results() -> bool:
        return in_use or any(folder.glob("shard-*"))

    return examine_folder(
        folder,
        record=MANIFEST_NAME,
        differs=differs,
        has_results=has_results,
        allowed_files={file.name for file in folder.glob(VOCAB_FILES)},
        kind=manifest.kind,
    ).require_writable(ShardError)


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Create the folder; file system errors, here and in the block, become ShardErrors."""
    try:
        make_folder(folder)
        yield
    except LopdError:
        raise
    except OSError as error:
        raise ShardError(
            f"{folder}: cannot be made or written ({error.strerror or error}); choose another --out"
        ) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create the folder and hold its lock, for a writer that excludes all others.

    Raises:
        ShardError: another process writes there, or the folder cannot be written.
    """
    with writing_to(folder):
        lock = FolderLock(folder)
    try:
        yield
    finally:
        lock.release()


def _names(folder: Path) -> list[str]:
    """The entries of a folder, without temporary ones; empty if it is no folder yet."""
    if not folder.is_dir():
        return []
    return sorted(
        item.name
        for item in folder.iterdir()
        if not (item.name[0] == "." and item.suffix == TEMP_SUFFIX)
    )
