"""Records of data files (JSON lines, JSON arrays, parquet, gzip, folders), each with its place."""

import gzip
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lopd.errors import ConfigError, DataError, MissingFileError
from lopd.provenance import describe_file
from lopd.provenance.found import artefact_kind, found_at, is_model_folder
from lopd.provenance.io import json_digest, parse_json

PARQUET_SUFFIX = ".parquet"
JSON_LINES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")
JSON_ARRAYS = (".json", ".json.gz")
MAX_RECORD = 1 << 30  # bytes of a JSON line; the scores of a long sequence take many
MAX_ARRAY = 1 << 28  # bytes of a JSON array, which is parsed as a whole
_ROWS_TOGETHER = 4  # a row of scores can hold 10^5 log-probs, each a Python object
_METADATA = re.compile(r"(dataset_infos?|dataset_dict|state|config)\.json")  # beside data files
_SPLIT = re.compile(r"(train|test|validation|valid|val|dev)(?![a-z])")
_UNREADABLE = (EOFError, OSError, zlib.error)  # what gzip raises for a damaged file

Skip = Callable[[DataError], None]  # takes the error of a record that is left out


def read_records(
    path: str | Path, *, max_bytes: int = MAX_RECORD, skip: Skip | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield `(place, record)` for every record of a file, or of the data files of a folder.

    The name decides: `.parquet`; `.json`, an array of objects or JSON lines; every other file holds
    JSON lines. `.gz` is decompressed. Null columns of parquet are left out of a record.

    Args:
        max_bytes: longest record that is read, so that no file can exhaust the memory.
        skip: takes the error of each line that cannot be read; raised if None.

    Raises:
        MissingFileError: the file does not exist.
        DataError: a record or the file cannot be read, or a folder's data files are ambiguous.
        ConfigError: pyarrow is needed and not installed.
    """
    for file in data_files(path):
        name = file.name.lower()
        if name.endswith(PARQUET_SUFFIX):
            yield from _read_parquet(file)
        elif name.endswith(JSON_ARRAYS) and _starts_with(file, b"["):
            yield from _read_array(file)
        else:
            yield from _read_lines(file, max_bytes, skip)


def data_files(path: str | Path) -> list[Path]:
    """The file itself, or the data files of a folder in the order of their names.

    Raises:
        MissingFileError: there is no such file, or the folder holds no data files.
        DataError: the folder holds files of several formats or of several splits.
    """
    path = Path(path)
    if not path.is_dir():
        if not path.is_file():
            raise MissingFileError(f"{path}: {found_at(path)}; expected JSONL or parquet")
        return [path]
    if artefact_kind(path) or is_model_folder(path):
        raise MissingFileError(
            f"{path}: {found_at(path)}; expected a JSONL, JSON or parquet file, or a folder of them"
        )
    names = sorted(item.name for item in path.iterdir() if item.is_file())
    names = [n for n in names if not n.startswith(".") and not _METADATA.fullmatch(n)]
    formats = {}
    for suffixes in ((PARQUET_SUFFIX,), JSON_LINES, JSON_ARRAYS):
        if found := [name for name in names if name.lower().endswith(suffixes)]:
            formats[suffixes[0]] = found
    if not formats:
        arrow = any(name.endswith(".arrow") for name in names)
        below = sorted({item.parent.name for item in path.glob(f"*/*{PARQUET_SUFFIX}")})
        hint = "expected .parquet, .jsonl or .json files, also .gz"
        if arrow or (path / "dataset_dict.json").exists():
            hint = (
                "it was written by datasets' save_to_disk; convert it: datasets.load_from_disk("
                f"'{path}').to_parquet('data.parquet'), for one split"
            )
        elif below:
            hint = f"name a folder inside it, such as {path / below[0]}"
        raise MissingFileError(f"{path}: a folder without data files; {hint}")
    if len(formats) > 1:
        raise DataError(
            f"{path}: holds {' and '.join(formats)} files; expected one format; name one file"
        )
    (files,) = formats.values()
    splits = {match[1] for name in files if (match := _SPLIT.match(name.lower()))}
    if len(splits) > 1:
        raise DataError(
            f"{path}: holds the splits {', '.join(sorted(splits))}; name one file, or put the "
            "files of one split into a folder of their own"
        )
    return [path / name for name in files]


def describe_data(path: str | Path) -> dict[str, Any]:
    """A data file or folder for a manifest: its path, size and sha256.

    The digest of a folder is that of the names and digests of its data files.
    """
    if not Path(path).is_dir():
        return describe_file(path)
    files = [describe_file(file) for file in data_files(path)]
    digest = json_digest([[Path(file["path"]).name, file["sha256"]] for file in files])
    return {
        "path": str(Path(path).resolve()),
        "bytes": sum(file["bytes"] for file in files),
        "files": len(files),
        "sha256": digest,
    }


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")


def _starts_with(path: Path, wanted: bytes) -> bool:
    try:
        with _open(path) as file:
            return bool(file.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == wanted)
    except _UNREADABLE as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: cannot be read ({error}); restore it, or decompress it")


def _read_lines(
    path: Path, max_bytes: int, skip: Skip | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    try:
        with _open(path) as lines:
            while line := lines.readline(max_bytes + 1):
                number += 1
                where = f"{path}:{number}"
                if len(line) > max_bytes:
                    raise DataError(
                        f"{where}: longer than {max_bytes} bytes, the most that is read; remove "
                        "the record, or split its text"
                    )
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if not line.strip():
                    continue
                try:
                    record = _record(_parse(line, where, path), where)
                except DataError as error:
                    if skip is None:
                        raise
                    skip(error)
                    continue
                yield where, record
    except _UNREADABLE as error:
        raise _damaged(path, error) from error


def _read_array(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with _open(path) as file:
            data = file.read(MAX_ARRAY + 1)
    except _UNREADABLE as error:
        raise _damaged(path, error) from error
    if len(data) > MAX_ARRAY:
        raise DataError(
            f"{path}: an array of more than {MAX_ARRAY} bytes; write JSON lines instead: "
            f"jq -c '.[]' {path} > data.jsonl"
        )
    values = _parse(data.removeprefix(b"\xef\xbb\xbf"), str(path), path)
    for number, value in enumerate(values, 1):
        where = f"{path}: record {number}"
        yield where, _record(value, where)


def _parse(text: bytes, where: str, path: Path) -> Any:
    try:
        return parse_json(text.strip(), finite=False)
    except ValueError as error:
        raise DataError(
            f"{where}: not JSON in UTF-8 ({error}); expected one object per line{_hint(text, path)}"
        ) from None


def _hint(text: bytes, path: Path) -> str:
    """What to do with a file whose beginning or name shows another format."""
    suffix = path.suffix.lower()
    if text.startswith(b"PAR1"):
        return "; it is parquet: give it a name that ends in .parquet"
    if text.startswith(b"\x1f\x8b"):
        return "; it is compressed: give it a name that ends in .gz"
    if suffix in (".csv", ".tsv", ".xlsx", ".arrow"):
        kind = {".tsv": "csv", ".xlsx": "xlsx"}.get(suffix, suffix[1:])
        return f"; convert {kind} files with datasets or pandas: .to_parquet('data.parquet')"
    if suffix in (".zst", ".bz2", ".xz", ".zip", ".tar", ".tgz"):
        return "; decompress it first"
    if text.strip() in (b"{", b"["):
        return ", or an array of objects in a file whose name ends in .json"
    return ""


def _record(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: found a {type(value).__name__}; expected an object")
    return value


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Null columns and null fields of structs are left out of a record."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ConfigError(
            f"{path}: reading parquet needs pyarrow; pip install 'lopd[parquet]'"
        ) from error
    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS_TOGETHER):
                rows = batch.to_pylist()
                for row in rows:
                    number += 1
                    yield f"{path}: row {number}", _without_nulls(row)
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: not a complete parquet file ({' '.join(str(error).split())}); write it again"
        ) from error


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        first = next((item for item in value if item is not None), None)
        if isinstance(first, dict | list):  # not lists of numbers, which can be long
            return [_without_nulls(item) for item in value]
    return value
