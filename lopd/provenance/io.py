"""JSON, read strictly and written canonically; digests and atomic writes."""

import contextlib
import fcntl
import glob
import hashlib
import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from lopd.errors import DataError, ShardError

TEMP_SUFFIX = ".tmp"
MAX_DEPTH = 64  # of nested JSON; a recursive function of Python can go about ten times as deep
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(data: bytes | str, *, finite: bool = True) -> Any:
    """The value of a JSON document, read more strictly than by `json.loads`.

    Args:
        finite: refuse NaN, Infinity, and numbers that overflow to it.

    Raises:
        ValueError: not JSON in UTF-8, nested more than `MAX_DEPTH` deep, a key that occurs twice in
            an object, or half of a surrogate pair in a string, which UTF-8 cannot store.

    >>> parse_json(b'{"k": 8}')
    {'k': 8}
    >>> parse_json('{"k": 8, "k": 9}')
    Traceback (most recent call last):
    ValueError: key 'k' occurs twice
    """
    hooks: dict[str, Any] = {"object_pairs_hook": _unique}
    if finite:
        hooks |= {"parse_constant": _refuse_number, "parse_float": _finite}
    try:
        raw = data.encode("utf-8") if isinstance(data, str) else data
        value = json.loads(raw.decode("utf-8"), **hooks)
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} deep") from None
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH:
        _check_depth(value)
    if _SURROGATE.search(raw):
        _check_text(value)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {twice!a} occurs twice")
    return value


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse_number(text)


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"{text[:40]} is not a finite number")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        items = (v.values() if isinstance(v, dict) else v for v in level)
        level = [item for part in items for item in part if isinstance(item, dict | list)]
        if not level:
            return
    raise ValueError(f"nested more than {MAX_DEPTH} deep")


def _check_text(value: Any) -> None:
    """Refuse text that UTF-8 cannot store; the nesting is bounded."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise ValueError(f"a string holds {half}, half of a surrogate pair") from None


def canonical_json(value: Any) -> bytes:
    """The one spelling of a JSON value: sorted keys, no spaces, UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode("utf-8")


def json_digest(value: Any) -> str:
    """sha256, in hex, of the canonical JSON."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def pretty_json(value: Any) -> bytes:
    """JSON to be read by people: sorted keys, indented, one trailing newline."""
    text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    try:
        return (text + "\n").encode("utf-8")
    except UnicodeEncodeError as error:  # of a path that was resolved
        before = text[: error.end].rpartition("\n")[2].strip()
        raise DataError(
            f"{before!a}...: holds bytes that are not UTF-8; rename that file or folder"
        ) from None


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


def read_json_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file that exists.

    Raises:
        DataError: the file is damaged: not JSON, not an object, or unreadable.
    """
    try:
        # transformers writes Infinity into the config.json of some architectures
        value = parse_json(file.read_bytes(), finite=False)
    except ValueError as error:
        raise DataError(f"{file} is not JSON ({error}); restore it") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}); restore it") from error
    if not isinstance(value, dict):
        raise DataError(f"{file} holds a {type(value).__name__}, expected an object; restore it")
    return value


def read_optional_json(file: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is no such file.

    Raises:
        DataError: the file is damaged, which is not the same as absent.
    """
    return read_json_object(file) if os.path.lexists(file) else None


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader or a crash sees all of it or none of it.

    Temporary file in the same folder, fsync, rename over `path`, fsync of the folder.
    The temporary file is removed if that fails, and locked while its writer lives.

    Raises:
        OSError: the file cannot be written, e.g. on a full disk; `path` is unchanged.
    """
    temp = path.with_name(f".{path.name}.{os.getpid()}{TEMP_SUFFIX}")
    try:
        descriptor = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
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


def remove_dead_writers(path: Path) -> None:
    """Remove what killed processes left of `write_atomic(path)`; for folders without a lock."""
    for temp in path.parent.glob(f".{glob.escape(path.name)}.*{TEMP_SUFFIX}"):
        with contextlib.suppress(OSError), temp.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            temp.unlink()


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


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, durably: a power cut leaves none that is half there.

    Raises:
        OSError: it cannot be created.
    """
    created = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(created):
        sync_folder(path.absolute().parent)


def remove_temporaries(folder: Path) -> None:
    """Remove temporary files and folders of killed writers.

    Only safe when no other writer is running.
    """
    for temp in folder.glob(f".*{TEMP_SUFFIX}"):
        if temp.is_dir() and not temp.is_symlink():
            shutil.rmtree(temp)
        else:
            temp.unlink(missing_ok=True)
