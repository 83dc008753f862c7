"""File locks: who may write into a folder, and who a shard."""

import contextlib
import fcntl
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lopd.errors import ShardError

LOCK_NAME = ".lock"


START_LOCK_NAME = ".start.lock"


class FolderLock:
    """Right to write into a folder, given back when released or at process end.

    It excludes all others, or with `shared` those that do not share. A sharer that finds the
    folder free holds it `alone` until `settle`, which lets the others in; whoever shares takes
    the lock and settles under a `start_lock`.

    Raises:
        ShardError: another writer has it, or the file system has no locks.
    """

    def __init__(self, folder: Path, *, shared: bool = False) -> None:
        path = folder / LOCK_NAME
        descriptor = _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.alone = descriptor is not None
        if descriptor is None and shared:
            descriptor = _lock(path, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if descriptor is None:
            raise ShardError(
                f"{folder}: another process is writing there; wait for it, name another folder, or "
                "give every process its part with --worker"
            )
        self._descriptor, self._shared = descriptor, shared
        self._release = weakref.finalize(self, os.close, descriptor)

    def settle(self) -> None:
        """Share the folder from here on, if that was asked for."""
        if self._shared:
            fcntl.flock(self._descriptor, fcntl.LOCK_SH)

    def release(self) -> None:
        """Give the folder back; a second call does nothing."""
        self._release()


@contextmanager
def start_lock(folder: Path) -> Iterator[None]:
    """One at a time may start writing into a folder; the others wait for the moment it takes."""
    descriptor = _lock(folder / START_LOCK_NAME, fcntl.LOCK_EX)
    assert descriptor is not None
    try:
        yield
    finally:
        os.close(descriptor)


class ShardLock:
    """Right to write one shard, given back when released or at process end."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._close = weakref.finalize(self, os.close, descriptor)

    @classmethod
    def take(cls, folder: Path, shard: int) -> "ShardLock | None":
        """The lock, or None while another worker has it."""
        path = folder / f".shard-{shard:05d}.lock"
        while True:
            descriptor = _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if descriptor is None:
                return None
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return cls(path, descriptor)
            os.close(descriptor)  # its last owner has removed the file since it was opened

    def release(self) -> None:
        """Give the shard back; a second call does nothing."""
        if self._close.alive:
            with contextlib.suppress(OSError):
                self._path.unlink()
            self._close()


def remove_shard_locks(folder: Path) -> None:
    """Remove those that killed workers left; call it only where no other writer can be."""
    for lock in folder.glob(".shard-*.lock"):
        lock.unlink(missing_ok=True)


def _lock(path: Path, operation: int) -> int | None:
    """A descriptor of `path` that holds the lock, or None where another process does."""
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
