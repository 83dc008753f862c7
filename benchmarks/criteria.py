"""The success criteria of the GPU suite: each met, missed or not measured, computed from rows.

    python -m benchmarks.criteria ROWS.jsonl [ROWS.jsonl ...]

For the loss only rows of the target shape count. Ratios compare variants that were timed in
alternation.
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
GIB = 1024.0  # in MiB


class Criterion(NamedTuple):
    name: str
    measured: str
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


def time_and_memory(
    name: str, rows: list[Row], settings: tuple[str, ...], max_ratio: float, max_mib: float
) -> Criterion:
    """Our fastest variant in these settings within `max_mib` of extra memory."""
    candidates = [
        row
        for row in timed(rows)
        if row["kind"] == "ours"
        and row["loss"] == REVERSE_KL
        and row["setting"] in settings
        and row.get("floor_ratio") is not None
        and row.get("extra_mib") is not None
    ]
    if not candidates:
        return Criterion(name, "", NOT_MEASURED)
    best = fastest((row for row in candidates if row["extra_mib"] <= max_mib), "floor_ratio")
    if best is None:
        least = min(row["extra_mib"] for row in candidates)
        measured = f"no variant within {max_mib:.0f} MiB extra; the least is {least:.0f}"
        return Criterion(name, measured, "missed")
    measured = f"{best['floor_ratio']:.3f} x, {best['extra_mib']:.0f} MiB extra ({best['variant']})"
    return Criterion(name, measured, "met" if best["floor_ratio"] <= max_ratio else "missed")


def faster_than(name: str, rows: list[Row], prefix: str) -> Criterion:
    """Our fastest variant against the fastest peer whose name starts with `prefix`."""
    candidates = timed(rows, "fused_loss")
    ours = fastest(row for row in candidates if row["kind"] == "ours" and is_full(row))
    peer = fastest(
        row for row in candidates if row["kind"] == "peer" and row["variant"].startswith(prefix)
    )
    if ours is None or peer is None:
        return Criterion(name, "", NOT_MEASURED)
    ratio = ours["median_ms"] / peer["median_ms"]
    measured = f"{ratio:.3f} of the time of {peer['variant']} ({peer['loss']})"
    return Criterion(name, measured, "met" if ratio < 1.0 else "missed")


def is_full(row: Row) -> bool:
    return row["loss"] == REVERSE_KL and row["setting"] == "full"


def sampled_rows(name: str, rows: list[Row], share: float, max_ratio: float) -> Criterion:
    row = fastest(
        row
        for row in timed(rows, "skipping")
        if row["variant"] == f"ours, dense_share={share}" and row.get("floor_ratio") is not None
    )
    if row is None:
        return Criterion(name, "", NOT_MEASURED)
    verdict = "met" if row["floor_ratio"] <= max_ratio else "missed"
    return Criterion(name, f"{row['floor_ratio']:.3f} x", verdict)


def accuracy(name: str, rows: list[Row]) -> Criterion:
    candidates = [
        row
        for row in rows
        if row["part"] == "accuracy"
        and row["status"] == "ok"
        and row["regime"] == "near"
        and (row["hidden"], row["vocab"]) == (TARGET.hidden, TARGET.vocab)
    ]
    ours = [row for row in candidates if row["variant"] == "ours"]
    peers = [row for row in candidates if row["kind"] == "peer" and row["logits"] == "bf16"]
    if not ours or not peers:
        return Criterion(name, "", NOT_MEASURED)
    keys = ("dhidden_error", "dweight_error")
    ratio = min(peer[key] / ours[-1][key] for peer in peers for key in keys)
    return Criterion(name, f"{ratio:.1f} times lower", "met" if ratio >= 10.0 else "missed")


def kernel_bandwidth(name: str, rows: list[Row]) -> Criterion:
    by_name = {
        row["variant"]: row for row in rows if row["part"] == "row_kernel" and row["status"] == "ok"
    }
    if not {"row kernel", "copy"} <= set(by_name) or by_name["copy"]["vocab"] != TARGET.vocab:
        return Criterion(name, "", NOT_MEASURED)
    kernel, copy = by_name["row kernel"]["tb_per_s"], by_name["copy"]["tb_per_s"]
    measured = f"{kernel / copy:.2f} of {copy:.2f} TB/s"
    return Criterion(name, measured, "met" if kernel >= 0.8 * copy else "missed")


def planned_memory(name: str, rows: list[Row]) -> Criterion:
    """The planned peak that is furthest from the measured one, over all shapes that ran."""
    candidates = [
        row
        for row in rows
        if row["variant"] == "planned peak" and row.get("difference") is not None
        if row["model"] != "toy"
    ]
    if not candidates:
        return Criterion(name, "", NOT_MEASURED)
    worst = max(candidates, key=lambda row: abs(row["difference"]))
    measured = f"measured {worst['difference']:+.1%} of the plan at worst ({worst['model']})"
    return Criterion(name, measured, "met" if abs(worst["difference"]) <= 0.1 else "missed")


def evaluate(rows: list[Row]) -> list[Criterion]:
    """Every criterion of the suite."""
    full, unlimited = ("full",), float("inf")
    return [
        time_and_memory("fastest setting at most 1.12 x three GEMMs", rows, full, 1.12, unlimited),
        faster_than("faster than eager PyTorch", rows, "eager"),
        faster_than("faster than torch.compile", rows, "torch.compile"),
        faster_than("faster than Liger's nearest loss", rows, "Liger"),
        time_and_memory(
            "at most 1.25 x, 1.3 GiB extra, frozen weight", rows, ("frozen",), 1.25, 1.3 * GIB
        ),
        time_and_memory(
            "at most 1.25 x, 1.3 GiB extra, gradient buffer", rows, ("buffer",), 1.25, 1.3 * GIB
        ),
        time_and_memory("at most 1.25 x, 2.5 GiB extra, otherwise", rows, full, 1.25, 2.5 * GIB),
        time_and_memory("at most 1.5 x, 256 MiB extra", rows, full, 1.5, 256.0),
        sampled_rows("at most 0.6 x at dense_share 0.15", rows, 0.15, 0.6),
        accuracy("gradient error 10 x below any bf16-logits divergence, near the teacher", rows),
        kernel_bandwidth("row kernel at 80 % of the copy bandwidth", rows),
        planned_memory("peak memory of training within 10 % of lopd plan", rows),
    ]


def measured_roofline(rows: list[Row]) -> str:
    """The floor from the ceilings that this run measured, and the time achieved, at the target."""
    ceilings = {row["variant"]: row for row in rows if row["part"] == "environment"}
    tflops = ceilings.get("GEMM ceiling", {}).get("tflops")
    rate = ceilings.get("copy ceiling", {}).get("tb_per_s")
    ours = fastest(row for row in timed(rows) if row["kind"] == "ours" and is_full(row))
    floor = fastest(row for row in timed(rows) if row["kind"] == "floor")
    if not (tflops and rate and ours and floor):
        return "Roofline at the target: not measured."
    gemms, row = gemm_ms(TARGET, tflops, 3), move_ms(row_bytes(TARGET), rate)
    return (
        f"Roofline at the target: ceilings {tflops:.0f} TFLOP/s and {rate:.2f} TB/s give "
        f"{gemms:.1f} ms for three GEMMs and {row:.1f} ms for the row kernel; measured "
        f"{ours['median_ms']:.1f} ms ({ours['variant']}, {ours['tflops']:.0f} TFLOP/s)."
    )


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = ["| criterion | measured | verdict |", "| --- | --- | --- |"]
    lines += [f"| {each.name} | {each.measured} | {each.verdict} |" for each in evaluate(rows)]
    return "\n".join([*lines, "", measured_roofline(rows)])


def read(paths: Iterable[Path]) -> list[Row]:
    return [json.loads(line) for path in paths for line in path.read_text("utf-8").splitlines()]


def main(paths: list[str] | None = None) -> None:
    print(table(read(map(Path, sys.argv[1:] if paths is None else paths))))


if __name__ == "__main__":
    main()
