"""File locks on a folder and on single shards."""

import contextlib
import fcntl
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lopd.errors import ShardError
from lopd.provenance.io import remove_temporaries

LOCK_NAME = ".lock"
START_LOCK_NAME = ".start.lock"


class FolderLock:
    """The right to write into a folder, until it is released or the process ends.

    It excludes all other writers or, with `shared`, those that do not share. The first sharing
    writer holds the folder exclusively until it calls `share`. Sharing writers take the lock and
    call `share` under a `start_lock`. A writer that is alone when it takes the lock removes what
    killed ones left: temporary files and the locks of shards.

    Raises:
        ShardError: another writer holds the lock, or the file system has no locks.
    """

    def __init__(self, folder: Path, *, shared: bool = False) -> None:
        path = folder / LOCK_NAME
        descriptor = _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.is_exclusive = descriptor is not None
        if descriptor is None and shared:
            descriptor = _lock(path, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if descriptor is None:
            raise ShardError(
                f"{folder}: another process is writing there; wait for it or name another folder; "
                "several processes can sample or score together, each with its --worker"
            )
        self._descriptor, self._shared = descriptor, shared
        self._release = weakref.finalize(self, os.close, descriptor)
        if self.is_exclusive:
            try:
                remove_temporaries(folder)
                for left in folder.glob(".shard-*.lock"):
                    left.unlink(missing_ok=True)
            except BaseException:
                self.release()
                raise

    def share(self) -> None:
        """Let other sharing writers in; does nothing without `shared`."""
        if self._shared:
            fcntl.flock(self._descriptor, fcntl.LOCK_SH)

    def release(self) -> None:
        """Release the folder; a second call does nothing."""
        self._release()


@contextmanager
def start_lock(folder: Path) -> Iterator[None]:
    """Exclude other processes that start writing into the folder; they wait."""
    descriptor = _lock(folder / START_LOCK_NAME, fcntl.LOCK_EX)
    assert descriptor is not None
    try:
        yield
    finally:
        os.close(descriptor)


class ShardLock:
    """The right to write one shard, until it is released or the process ends."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._close = weakref.finalize(self, os.close, descriptor)

    @classmethod
    def take(cls, folder: Path, shard: int) -> "ShardLock | None":
        """The lock, or None while another worker holds it."""
        path = folder / f".shard-{shard:05d}.lock"
        while True:
            descriptor = _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if descriptor is None:
                return None
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return cls(path, descriptor)
            os.close(descriptor)  # the last owner removed the file after it was opened

    def release(self) -> None:
        """Release the shard; a second call does nothing."""
        if self._close.alive:
            with contextlib.suppress(OSError):
                self._path.unlink()
            self._close()


def _lock(path: Path, operation: int) -> int | None:
    """A descriptor of `path` that holds the lock, or None where another process holds it."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ShardError(f"{path}: cannot be opened ({error.strerror})") from error
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError as error:
        os.close(descriptor)
        raise ShardError(
            f"{path}: cannot be locked ({error.strerror}); use a file system with locks"
        ) from error
    return descriptor
