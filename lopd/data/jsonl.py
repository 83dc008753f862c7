"""Records of JSONL and parquet files, each with its file and line."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lopd.errors import ConfigError, DataError, MissingFileError
from lopd.provenance.io import parse_json

PARQUET_SUFFIX = ".parquet"
Skip = Callable[[DataError], None]  # takes the error of a record that is left out
_ROWS_TOGETHER = 4  # a row of scores can hold 10^5 log-probs, each a Python object


def read_records(
    path: str | Path, *, skip: Skip | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield `(place, record)`: rows of a `.parquet` file, else the lines of a JSONL file.

    Args:
        skip: takes the error of each line that cannot be read; raised if None.

    Raises:
        MissingFileError: the file does not exist.
        DataError: the file is not of the type that its name implies.
        ConfigError: pyarrow is needed and not installed.
    """
    path = Path(path)
    if path.suffix == PARQUET_SUFFIX:
        return _read_parquet(path)
    return read_jsonl(path, skip=skip)


def read_jsonl(
    path: str | Path, *, skip: Skip | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield `("file:line", record)` for every non-blank line of a JSONL file.

    Raises:
        MissingFileError: the file does not exist. DataError: a line is not a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file; expected a JSONL file, one record per line")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                record = _parse_line(where, line)
            except DataError as error:
                if skip is None:
                    raise
                skip(error)
                continue
            yield where, record


def _parse_line(where: str, line: bytes) -> dict[str, Any]:
    try:
        record = parse_json(line.strip(), finite=False)
    except ValueError as error:
        raise DataError(
            f"{where}: not JSON in UTF-8 ({error}); expected one object per line"
        ) from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: found a {type(record).__name__}; expected an object")
    return record


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Null columns and null fields of structs are left out of a record."""
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file; expected a parquet file")
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
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", _without_nulls(row)
    except (ArrowException, OSError) as error:
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
