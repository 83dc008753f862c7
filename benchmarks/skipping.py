"""What does a backward cost that forms the gradient outside the lists for some of the rows only?

    python -m benchmarks.skipping [--quick] [--hidden D ...] [--sample MODEL AT K] [--turns N]
                                  [--out DIR]

It measures one forward and backward of the reverse KL with a tail bucket in fp32 on a CPU:
`dense_share` at several shares, two tolerances and the renormalised loss, each against the exact
gradient of every row in the same run. The rows are drawn from a sample of those that
`benchmarks.offlist` measured, by default SmolLM2's; it decides how many a tolerance keeps. The time
of a share does not depend on the rows.

First the gradients at a share of one half are compared with fp64 at the same seed on a small
problem; a failed gate ends the run. Times are medians of the process's CPU time on one thread, in
alternation, so that other processes disturb them little. One JSON row per hidden size is printed
and, with --out, appended to DIR/skipping_cpu.jsonl, and the curve is drawn. The exit code is 1 if a
limit is missed: 0.60 of the exact gradient's time at a share of 0.15, 0.68 at 0.25, and 0.2 for the
renormalised loss.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Variant, exceeded, gradient_bound
from benchmarks.measured_rows import NAME as OFFLIST
from benchmarks.measured_rows import measured_problem, measured_sample
from benchmarks.problems import RENORMALIZED, REVERSE_KL, Problem, Shape, oracle, relative_error
from benchmarks.recorder import identity
from benchmarks.variants import ours, sparse

NAME = "skipping_cpu.jsonl"
SAMPLED = "reverse KL, sampled rows"
SHARES = (0.05, 0.15, 0.25, 0.5, 0.75, 0.85)
TOLERANCES = (1e-2, 1e-3)
LIMITS = {"share 0.15": 0.60, "share 0.25": 0.68, "renormalised": 0.2}
Sample = tuple[str, str, int]  # model, time and length of the list
SAMPLE: Sample = ("SmolLM2-135M, pruned", "start", 64)
FULL = Shape(rows=2048, hidden=512, vocab=151936, topk=64)
QUICK = Shape(rows=64, hidden=128, vocab=8192, topk=16)
GATE = 1e-5


def bound(share: float) -> float:
    """Of the time of three GEMMs: the first on all rows, the others on a share of them."""
    return (1.0 + 2.0 * share) / 3.0


def variants(shares: tuple[float, ...]) -> dict[str, Any]:
    return {
        "exact": ours("exact"),
        **{f"share {x}": ours(f"share {x}", dense_share=x, seed=0) for x in shares},
        **{f"tolerance {x:g}": ours(f"tolerance {x:g}", tolerance=x) for x in TOLERANCES},
        "renormalised": ours("renormalised", RENORMALIZED),
    }


def sampled(share: float) -> Variant:
    """`dense_share`, for the GPU suite; its gate compares with fp64 at the same seed."""
    options = {"dense_share": share, "seed": 0}

    def check(problem: Problem) -> dict[str, Any]:
        sides = [gradients(problem, dtype, **options) for dtype in (problem.dtype, torch.float64)]
        found = (relative_error(a, b) for a, b in zip(*sides, strict=True))
        errors: dict[str, Any] = dict(zip(("dhidden_error", "dweight_error"), found, strict=True))
        rounding = max(oracle(problem, REVERSE_KL).rounding)
        bound = gradient_bound(problem.dtype, rounding)
        return {**errors, "red": exceeded(errors, dict.fromkeys(errors, bound))}

    variant = ours(f"ours, dense_share={share}", **options)
    return replace(variant, loss=SAMPLED, check=check)


def gradients(problem: Problem, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """(dH, dW) with hidden states and weight in `dtype`, and the teacher in fp64 where that is."""
    teacher = {key: getattr(problem, key) for key in ("logprobs", "tail")}
    if dtype == torch.float64:
        teacher = {key: value.double() for key, value in teacher.items()}
    leaves = [x.detach().to(dtype).requires_grad_() for x in (problem.hidden, problem.weight)]
    value = sparse(replace(problem, **teacher), *leaves, **options)
    return list(torch.autograd.grad(value, leaves))


def gate_error() -> float:
    """The largest relative error of dH and dW at a share of one half, against fp64."""
    problem, options = problem_of(QUICK), {"dense_share": 0.5, "seed": 0}
    sides = [gradients(problem, dtype, **options) for dtype in (torch.float32, torch.float64)]
    return max(relative_error(a, b) for a, b in zip(*sides, strict=True))


def problem_of(shape: Shape, sample: Sample = SAMPLE) -> Problem:
    return measured_problem(shape, measured_sample(*sample))


def cpu_times(steps: dict[str, Any], turns: int) -> dict[str, list[float]]:
    """Seconds of CPU time of each step, in another order each turn."""
    order, times = random.Random(0), {name: [] for name in steps}
    for _ in range(turns):
        for name, step in order.sample(sorted(steps.items()), len(steps)):
            start = time.process_time()
            step()
            times[name].append(time.process_time() - start)
    return times


@torch.no_grad()
def rows_kept(problem: Problem) -> dict[str, Any]:
    """The share of rows that each tolerance keeps, and that of dL/dz outside the lists in L1."""
    kept = {}
    for tolerance in TOLERANCES:
        _, stats = sparse(
            problem, problem.hidden, problem.weight, tolerance=tolerance, return_stats=True
        )
        kept[f"{tolerance:g}"] = round(float(stats.skipping.share), 4)
    listed, unlisted = (
        float(stats.skipping.listed_l1.sum()),
        float(stats.skipping.unlisted_l1.sum()),
    )
    return {"kept": kept, "off_list_share": round(unlisted / (listed + unlisted), 4)}


def measure(shape: Shape, sample: Sample, shares: tuple[float, ...], turns: int) -> dict[str, Any]:
    problem = problem_of(shape, sample)
    steps = {name: variant.prepare(problem).step for name, variant in variants(shares).items()}
    times = cpu_times(steps, turns)
    exact = np.median(times["exact"])
    ratios = {name: round(float(np.median(each) / exact), 4) for name, each in times.items()}
    pairs = {
        name: [round(a / b, 4) for a, b in zip(each, times["exact"], strict=True)]
        for name, each in times.items()
    }
    return {
        "question": "skipping_cpu", "dtype": "float32", **asdict(shape), "turns": turns,
        "sample": list(sample), **rows_kept(problem),
        "ratios": ratios, "pairs": pairs,
        "shares": list(shares), "bounds": [round(bound(x), 4) for x in shares],
        **identity(torch.device("cpu"), None),
    }  # fmt: skip


def sample_flags(sample: Sample) -> str:
    return f"--sample {shlex.join(map(str, sample))}"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the newest row of each hidden size."""
    newest = {row["hidden"]: row for row in rows}
    shares = sorted({x for row in newest.values() for x in row["shares"]})
    columns = [*(f"share {x}" for x in shares), *(f"tolerance {x:g}" for x in TOLERANCES)]
    columns.append("renormalised")
    lines = [
        f"| D | {' | '.join(columns)} |",
        f"| ---: |{' ---: |' * len(columns)}",
        f"| bound | {' | '.join(f'{bound(x):.2f}' for x in shares)} | | | |",
    ]
    for hidden, row in sorted(newest.items()):
        kept = {f"tolerance {x}": f" ({share:.0%})" for x, share in row["kept"].items()}
        cells = ((row["ratios"].get(name), kept.get(name, "")) for name in columns)
        texts = ["" if x is None else f"{x:.2f}{share}" for x, share in cells]
        lines.append(f"| {hidden} | {' | '.join(texts)} |")
    row = newest[min(newest)]
    outside = ", ".join(f"{newest[d]['off_list_share']:.0%}" for d in sorted(newest))
    samples = {tuple(row["sample"]) for row in newest.values()}
    assert len(samples) == 1, samples  # a table is of one sample
    flags = sample_flags(*samples)
    text = (
        "Forward and backward at N={rows}, K={topk}, V={vocab} in {dtype} on one thread of a CPU,",
        "over the time with every row's gradient; in brackets the share of rows that a tolerance",
        "keeps. The bound counts GEMMs: (1 + 2 f) / 3. Outside the lists is this much of the L1",
        f"norm of dL/dz: {outside}. The rows are drawn from the sample",
        f"`{flags}` of `results/{OFFLIST}`.",
    )
    return "\n".join([*(line.format(**row) for line in text), "", *lines])


def draw(rows: dict[int, dict[str, Any]], path: Path) -> None:
    """Time over the share, by hidden size, with the bound of the GEMMs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.5, 3.6), layout="constrained")
    for hidden, row in sorted(rows.items()):
        curve = [(x, row["ratios"][f"share {x}"]) for x in row["shares"]]
        axes.plot(*zip(*curve, strict=True), marker="o", label=f"D = {hidden}")
    ends = [0.0, 1.0]
    axes.plot(ends, [bound(x) for x in ends], "k--", lw=1, label="(1 + 2 f) / 3")
    axes.axhline(1.0, color="grey", lw=0.8)
    axes.set(xlabel="f, share of the rows", ylabel="time / that of the exact gradient")
    axes.set(xlim=(0, 1), ylim=(0, 1.15))
    axes.legend()
    figure.savefig(path)
    pyplot.close(figure)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a toy size without limits")
    parser.add_argument("--hidden", nargs="+", type=int, default=[512, 1024])
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES)
    parser.add_argument(
        "--sample", nargs=3, metavar=("MODEL", "AT", "K"), default=SAMPLE, help="rows to draw from"
    )
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, help=f"folder whose {NAME} gets the rows")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    torch.set_num_threads(1)
    sample: Sample = (args.sample[0], args.sample[1], int(args.sample[2]))
    error = gate_error()
    if not error < GATE:
        print(f"the gradient's error is {error:.1e}, above {GATE:.0e}", file=sys.stderr)
        return 1
    shapes = [QUICK] if args.quick else [replace(FULL, hidden=d) for d in args.hidden]
    rows = []
    for shape in shapes:
        size = "--quick" if args.quick else f"--hidden {shape.hidden}"
        shares = " ".join(map(str, args.shares))
        settings = f"--shares {shares} {sample_flags(sample)} --turns {args.turns}"
        command = f"python -m benchmarks.skipping {size} {settings}"
        row = {
            **measure(shape, sample, tuple(args.shares), args.turns),
            "gradient_error": float(f"{error:.2e}"),
        }
        rows.append({**row, "command": command})
        print(json.dumps(rows[-1]), flush=True)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            with (args.out / NAME).open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    if args.out:
        lines = (args.out / NAME).read_text(encoding="utf-8").splitlines()
        draw({row["hidden"]: row for row in map(json.loads, lines)}, args.out / "skipping.svg")
    missed = [n for row in rows for n, limit in LIMITS.items() if row["ratios"].get(n, 0.0) > limit]
    return int(bool(missed) and not args.quick)


if __name__ == "__main__":
    sys.exit(main())
