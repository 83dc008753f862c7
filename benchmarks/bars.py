"""The bars of the GPU suite: read from rows, each met, missed or not measured.

    python -m benchmarks.bars ROWS.jsonl [ROWS.jsonl ...]

Of the loss only rows of the target shape count. A ratio is always between variants that took turns.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.problems import REVERSE_KL
from benchmarks.roofline import TARGET, gemm_ms, move_ms, row_bytes

Row = dict[str, Any]
NOT_MEASURED = "not measured"
GIB = 1024.0


class Bar(NamedTuple):
    name: str
    found: str
    verdict: str  # met | missed | not measured


def at_target(row: Row) -> bool:
    return all(row.get(key) == value for key, value in asdict(TARGET).items())


def timed(rows: list[Row], part: str | None = None) -> list[Row]:
    return [
        row
        for row in rows
        if row["status"] == "ok"
        and row.get("median_ms") is not None
        and at_target(row)
        and part in (None, row["part"])
    ]


def fastest(rows: Iterable[Row], key: str = "median_ms") -> Row | None:
    return min(rows, key=lambda row: row[key], default=None)


def ratio_bar(
    name: str, rows: list[Row], settings: tuple[str, ...], ratio: float, mib: float
) -> Bar:
    """The fastest of ours in these settings with at most `mib` extra against `ratio` floors."""
    measured = [
        row
        for row in timed(rows)
        if row["kind"] == "ours"
        and row["loss"] == REVERSE_KL
        and row["setting"] in settings
        and row.get("floor_ratio") is not None
        and row.get("extra_mib") is not None
    ]
    if not measured:
        return Bar(name, "", NOT_MEASURED)
    best = fastest((row for row in measured if row["extra_mib"] <= mib), "floor_ratio")
    if best is None:
        least = min(row["extra_mib"] for row in measured)
        return Bar(name, f"nothing below {mib:.0f} MiB extra; the least is {least:.0f}", "missed")
    found = f"{best['floor_ratio']:.3f} x, {best['extra_mib']:.0f} MiB extra ({best['variant']})"
    return Bar(name, found, "met" if best["floor_ratio"] <= ratio else "missed")


def ahead_bar(name: str, rows: list[Row], start: str) -> Bar:
    """Our fastest against the fastest variant whose name begins with `start`, in one part."""
    here = timed(rows, "fused_loss")
    own = fastest(row for row in here if row["kind"] == "ours" and is_full(row))
    other = fastest(
        row for row in here if row["kind"] == "peer" and row["variant"].startswith(start)
    )
    if own is None or other is None:
        return Bar(name, "", NOT_MEASURED)
    ratio = own["median_ms"] / other["median_ms"]
    found = f"{ratio:.3f} of the time of {other['variant']} ({other['loss']})"
    return Bar(name, found, "met" if ratio < 1.0 else "missed")


def is_full(row: Row) -> bool:
    return row["loss"] == REVERSE_KL and row["setting"] == "full"


def accuracy_bar(name: str, rows: list[Row]) -> Bar:
    here = [
        row
        for row in rows
        if row["part"] == "accuracy"
        and row["status"] == "ok"
        and row["regime"] == "near"
        and (row["hidden"], row["vocab"]) == (TARGET.hidden, TARGET.vocab)
    ]
    own = [row for row in here if row["variant"] == "ours"]
    peers = [row for row in here if row["kind"] == "peer" and row["logits"] == "bf16"]
    if not own or not peers:
        return Bar(name, "", NOT_MEASURED)
    keys = ("dhidden_error", "dweight_error")
    ratio = min(peer[key] / own[-1][key] for peer in peers for key in keys)
    return Bar(name, f"{ratio:.1f} times lower", "met" if ratio >= 10.0 else "missed")


def kernel_bar(name: str, rows: list[Row]) -> Bar:
    here = {
        row["variant"]: row for row in rows if row["part"] == "row_kernel" and row["status"] == "ok"
    }
    if not {"row kernel", "copy"} <= set(here) or here["copy"]["vocab"] != TARGET.vocab:
        return Bar(name, "", NOT_MEASURED)
    kernel, copy = here["row kernel"]["tb_per_s"], here["copy"]["tb_per_s"]
    found = f"{kernel / copy:.2f} of {copy:.2f} TB/s"
    return Bar(name, found, "met" if kernel >= 0.8 * copy else "missed")


def plan_bar(name: str, rows: list[Row]) -> Bar:
    """The plan that is furthest from the peak that was measured, of the shapes that ran."""
    here = [
        row
        for row in rows
        if row["variant"] == "planned peak" and row.get("difference") is not None
        if row["model"] != "toy"
    ]
    if not here:
        return Bar(name, "", NOT_MEASURED)
    worst = max(here, key=lambda row: abs(row["difference"]))
    found = f"measured {worst['difference']:+.1%} of the plan at worst ({worst['model']})"
    return Bar(name, found, "met" if abs(worst["difference"]) <= 0.1 else "missed")


def bars(rows: list[Row]) -> list[Bar]:
    everything = float("inf")
    return [
        ratio_bar("fastest setting at most 1.12 x three GEMMs", rows, ("full",), 1.12, everything),
        ahead_bar("ahead of eager PyTorch", rows, "eager"),
        ahead_bar("ahead of torch.compile", rows, "torch.compile"),
        ahead_bar("ahead of Liger's nearest loss", rows, "Liger"),
        ratio_bar(
            "at most 1.25 x, 1.3 GiB extra, frozen weight", rows, ("frozen",), 1.25, 1.3 * GIB
        ),
        ratio_bar(
            "at most 1.25 x, 1.3 GiB extra, gradient buffer", rows, ("buffer",), 1.25, 1.3 * GIB
        ),
        ratio_bar("at most 1.25 x, 2.5 GiB extra, otherwise", rows, ("full",), 1.25, 2.5 * GIB),
        ratio_bar("at most 1.5 x, 256 MiB extra", rows, ("full",), 1.5, 256.0),
        accuracy_bar(
            "gradient error 10 x below any bf16-logits divergence, near the teacher", rows
        ),
        kernel_bar("row kernel at 80 % of the copy bandwidth", rows),
        plan_bar("peak memory of training within 10 % of lopd plan", rows),
    ]


def measured_roofline(rows: list[Row]) -> str:
    """Floor from this run's ceilings, and what was achieved, at the target."""
    ceilings = {row["variant"]: row for row in rows if row["part"] == "environment"}
    tflops = ceilings.get("GEMM ceiling", {}).get("tflops")
    rate = ceilings.get("copy ceiling", {}).get("tb_per_s")
    full = [row for row in timed(rows) if row["kind"] == "ours" and is_full(row)]
    own, floor = fastest(full), fastest(row for row in timed(rows) if row["kind"] == "floor")
    if not (tflops and rate and own and floor):
        return "Roofline at the target: not measured."
    gemms, row = gemm_ms(TARGET, tflops, 3), move_ms(row_bytes(TARGET), rate)
    return (
        f"Roofline at the target: ceilings {tflops:.0f} TFLOP/s and {rate:.2f} TB/s give "
        f"{gemms:.1f} ms for three GEMMs and {row:.1f} ms for the row kernel; measured "
        f"{own['median_ms']:.1f} ms ({own['variant']}, {own['tflops']:.0f} TFLOP/s)."
    )


def table(rows: list[Row]) -> str:
    lines = ["| bar | found | verdict |", "| --- | --- | --- |"]
    lines += [f"| {bar.name} | {bar.found} | {bar.verdict} |" for bar in bars(rows)]
    return "\n".join([*lines, "", measured_roofline(rows)])


def read(paths: Iterable[Path]) -> list[Row]:
    return [json.loads(line) for path in paths for line in path.read_text("utf-8").splitlines()]


if __name__ == "__main__":
    print(table(read(map(Path, sys.argv[1:]))))
