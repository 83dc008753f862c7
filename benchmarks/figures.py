"""PNGs from rows: `python -m benchmarks.figures ROWS.jsonl --out DIR`.

Figures without rows are skipped.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.criteria import Row, read

COLOURS = {"ours": "#0b6e4f", "peer": "#9a6324", "floor": "#555555", "piece": "#555555"}


def shape_of(row: Row) -> str:
    return "N={rows} D={hidden} V={vocab} K={topk}, {dtype}, {device}".format(**row)


def ok(rows: list[Row], *parts: str) -> list[Row]:
    return [row for row in rows if row["status"] == "ok" and row["part"] in parts]


def time_memory(rows: list[Row], axes: Any) -> bool:
    """Extra memory against time over the floor, for every setting and every peer."""
    selected = [
        row
        for row in ok(rows, "fused_loss", "memory_curve")
        if row.get("floor_ratio") is not None and row.get("extra_mib") is not None
    ]
    for row in selected:
        filled = row["part"] == "fused_loss"
        axes.plot(
            max(row["extra_mib"], 1.0), row["floor_ratio"], marker="s" if filled else "o",
            color=COLOURS[row["kind"]], markersize=6 if filled else 4,
        )  # fmt: skip
        if filled:
            axes.annotate(
                row["variant"], (max(row["extra_mib"], 1.0), row["floor_ratio"]), fontsize=5
            )
    if selected:
        axes.set(xscale="log", yscale="log", xlabel="extra memory, MiB", ylabel="time / bare GEMMs")
        axes.set_title(shape_of(selected[0]), fontsize=8)
    return bool(selected)


def times(rows: list[Row], axes: Any) -> bool:
    """Median with 10th to 90th percentile; the dashed line is the floor."""
    selected = sorted(ok(rows, "fused_loss"), key=lambda row: row["median_ms"])
    for place, row in enumerate(selected):
        spread = [[row["median_ms"] - row["p10_ms"]], [row["p90_ms"] - row["median_ms"]]]
        axes.barh(place, row["median_ms"], xerr=spread, color=COLOURS[row["kind"]])
    if selected:
        axes.set_yticks(
            range(len(selected)), [f"{r['variant']}: {r['loss']}" for r in selected], fontsize=5
        )
        floors = [
            row["median_ms"] for row in selected if row["kind"] == "floor" and row["gemms"] == 3
        ]
        if floors:
            axes.axvline(min(floors), linestyle="--", color="black", linewidth=0.8)
        axes.set(xscale="log", xlabel="ms, forward and backward")
        axes.set_title(shape_of(selected[0]), fontsize=8)
    return bool(selected)


def gradient_error(rows: list[Row], axes: Any) -> bool:
    selected = [row for row in ok(rows, "accuracy") if row.get("dweight_error") is not None]
    names = list(dict.fromkeys(row["variant"] for row in selected))
    for row in selected:
        far = row["regime"] == "far"
        place = names.index(row["variant"]) + (0.2 if far else -0.2)
        colour = COLOURS[row["kind"]]
        axes.barh(place, row["dweight_error"], 0.4, color=colour, alpha=0.4 if far else 1.0)
    if selected:
        axes.set_yticks(range(len(names)), names, fontsize=5)
        axes.set(xscale="log", xlabel="error of dW against fp64 (pale: far from the teacher)")
        axes.set_title(shape_of(selected[0]), fontsize=8)
    return bool(selected)


def shapes(rows: list[Row], axes: Any) -> bool:
    """Our time over the floor of the same shape."""
    selected = [
        row for row in ok(rows, "shapes") if row["variant"] == "ours" and row["floor_ratio"]
    ]
    labels = ["N={rows} D={hidden} V={vocab} K={topk}".format(**row) for row in selected]
    for place, row in enumerate(selected):
        axes.barh(place, row["floor_ratio"], color=COLOURS["ours"])
    if selected:
        axes.set_yticks(range(len(selected)), labels, fontsize=5)
        axes.axvline(1.0, linestyle="--", color="black", linewidth=0.8)
        axes.set(xlabel="time / three bare GEMMs")
        axes.set_title(selected[0]["device"], fontsize=8)
    return bool(selected)


FIGURES: dict[str, Callable[[list[Row], Any], bool]] = {
    "time_memory": time_memory,
    "times": times,
    "gradient_error": gradient_error,
    "shapes": shapes,
}


def draw(rows: list[Row], out: Path) -> list[Path]:
    from matplotlib.figure import Figure

    made = []
    for name, plot in FIGURES.items():
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        if plot(rows, figure.subplots()):
            made.append(out / f"{name}.png")
            figure.savefig(made[-1], dpi=160)
    return made


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    print(*draw(read(args.rows), args.out), sep="\n")


if __name__ == "__main__":
    main()
