"""Safetensors files as read-only arrays on the mapped file, so that processes share one copy."""

import mmap
import os
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from lopd.errors import ShardError
from lopd.provenance.io import parse_json

DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
}


class MappedFile:
    """The arrays of one safetensors file, which takes no memory of its own.

    The header is checked by safetensors and read once. Pages are read from disk when they are
    used, belong to the page cache and can be dropped by the system at any time. A mapping keeps
    one file descriptor; `unmap` gives it back, and the next `arrays` maps the file again.

    Raises:
        ShardError: not a safetensors file, or an array of a type that shards do not have.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._arrays: dict[str, np.ndarray] | None = None
        self._state: tuple[int, ...] | None = None
        try:
            with safe_open(path, framework="numpy"):
                pass  # sizes, offsets and their order are right
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = parse_json(file.read(size))
            self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
            self._specs = {
                name: (DTYPES[spec["dtype"]], spec["shape"], 8 + size + spec["data_offsets"][0])
                for name, spec in header.items()
            }
            self.arrays()
        except KeyError as error:
            raise self._unreadable(f"an array of type {error}") from error
        except (SafetensorError, ValueError) as error:
            raise self._unreadable(str(error)) from error

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name. They stay valid after `unmap`, until they are dropped.

        Raises:
            ShardError: the file is not the one that was opened first.
        """
        if self._arrays is None:
            self._arrays = self._map()
        return self._arrays

    def unmap(self) -> None:
        """Give the mapping back as soon as no array is in use."""
        self._arrays = None

    def _map(self) -> dict[str, np.ndarray]:
        with self.path.open("rb") as file:
            found = os.fstat(file.fileno())
            state = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
            if self._state not in (None, state):
                raise ShardError(
                    f"{self.path}: was replaced or altered while it was read; run the command again"
                )
            self._state = state
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return {
            name: np.ndarray(shape, dtype, data, offset)
            for name, (dtype, shape, offset) in self._specs.items()
        }

    def _unreadable(self, what: str) -> ShardError:
        return ShardError(
            f"{self.path}: truncated or altered ({what}); run the stage again to redo it"
        )
