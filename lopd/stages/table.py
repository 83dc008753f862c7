"""Aligned tables on stdout."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any


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
    """Print one line for each name and its value."""
    print_rows(fields.items())
