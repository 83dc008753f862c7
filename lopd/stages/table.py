"""Aligned tables on stdout."""

import shutil
import sys
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

NARROWEST = 30  # of the values, if names are long


def align(rows: Iterable[Sequence[Any]], right: Collection[int] = ()) -> list[list[str]]:
    """Pad the cells of a table so that each column has one width.

    Args:
        rows: cells of equal number; floats are written with four significant digits.
        right: indices of the columns that are aligned to the right.
    """
    cells = [[f"{x:.4g}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        [
            f"{cell:{'>' if column in right else '<'}{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in cells
    ]


def print_rows(rows: Iterable[Sequence[Any]], right: Collection[int] = ()) -> None:
    """Print a table, its columns two spaces apart. The arguments are those of `align`."""
    for row in align(rows, right):
        print("  ".join(row).rstrip())


def print_fields(fields: Mapping[str, Any]) -> None:
    """Print each name and its value, on a terminal in lines that fit into it.

    Elsewhere each is one line, for grep. A value `x` with a standard error `x_error` is one row; so
    is a mapping of numbers.
    """
    means = [name for name in fields if isinstance(fields[name], float)]
    errors = {f"{name}_error" for name in means if f"{name}_error" in fields}
    rows = []
    for name, value in fields.items():
        if name in errors:
            continue
        words = _words(value)
        error = fields.get(f"{name}_error") if f"{name}_error" in errors else None
        if error is not None:
            words += f", standard error {_words(error)}"
        rows.append((name, words))
    columns = terminal_columns()
    width = max((len(name) for name, _ in rows), default=0)
    for name, words in rows:
        lines = [words] if columns is None else _lines(words, columns - width - 2)
        for first, line in zip((name, *[""] * len(lines)), lines, strict=False):
            print(f"{first:<{width}}  {line}".rstrip())


def terminal_columns() -> int | None:
    """The width of the terminal that stdout writes to; None if it is a file or a pipe."""
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    return shutil.get_terminal_size().columns if is_terminal else None


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_words(each)}" for name, each in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _lines(words: str, width: int) -> list[str]:
    """A value in lines of this width; a short one keeps its spaces."""
    if len(words) <= width:
        return [words]
    return textwrap.wrap(
        words, max(width, NARROWEST), break_long_words=False, break_on_hyphens=False
    )
