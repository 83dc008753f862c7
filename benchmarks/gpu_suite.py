"""All GPU benchmarks in one command.

    python -m benchmarks.gpu_suite --out DIR [--quick] [--only PART ...] [--device cuda|cpu]
                                   [--time-limit SECONDS] [--commit HASH]

It runs the parts of PARTS in order (those of ON_REQUEST only with --only), appends each row to
DIR/rows.jsonl at once, and ends with DIR/summary.md (criteria: met, missed or not measured) and
PNGs. If the time limit interrupts a part, its completed rows remain, and the summary names the
skipped parts. The exit code is 1 if one of our own results is wrong, whatever the speed. `--quick`
runs toy sizes, also on a CPU.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import components, correctness, criteria, figures, skipping, training, variants
from benchmarks.harness import (
    Outcome,
    Prepared,
    free_memory,
    is_red,
    measure,
    one_line,
    take_turns,
)
from benchmarks.problems import Problem, Shape, make_problem, student_tail
from benchmarks.recorder import OutOfTime, Recorder, query_gpu
from benchmarks.roofline import TARGET

QUICK = Shape(rows=64, hidden=32, vocab=509, topk=8)
TIME_LIMIT_S = 520.0
PYTEST_LIMIT_S = 90.0
MIB = 1 << 20
WORKSPACES = [size * MIB for size in (
    128, 192, 256, 384, 512, 768, 1024, 1280, 2048, 2560, 3072, 4096, 6144, 8192
)]  # fmt: skip
SHARES = (0.05, 0.15, 0.25, 0.5, 0.75)
CHUNKS = (1024, 1664, 2048, 3072)  # rows; two of them fill the waves of 132 multiprocessors badly
QUICK_CHUNKS = (16, 48)
QUICK_WORKSPACES = [50_000, 400_000, 800_000]
VARIATIONS = {
    "rows": (1024, 4096, 16384, 32768),
    "hidden": (1024, 2048, 5120),
    "vocab": (32000, 128256, 262208),
    "topk": (1, 8, 256),
}
QUICK_VARIATIONS = {"rows": (16,), "hidden": (16,), "vocab": (211,), "topk": (1,)}


@dataclass
class Suite:
    recorder: Recorder
    quick: bool
    log: Path
    cached: tuple[tuple[Shape, str], Problem] | None = None

    @property
    def shape(self) -> Shape:
        return QUICK if self.quick else TARGET

    @property
    def device(self) -> torch.device:
        return self.recorder.device

    @property
    def budget_s(self) -> float:
        return 0.01 if self.quick else 1.0

    def measure(self, part: str, problem: Problem, variants: list[Any], **rest: Any) -> None:
        rest = {"budget_s": self.budget_s, **rest}
        measure(self.recorder, part, problem, variants, **rest)

    def problem(self, shape: Shape | None = None, regime: str = "near") -> Problem:
        """The last problem is cached and freed before another is made."""
        key = (shape or self.shape, regime)
        if self.cached is None or self.cached[0] != key:
            self.cached = None
            free_memory(self.device)
            self.cached = key, make_problem(key[0], torch.bfloat16, self.device, regime)
        return self.cached[1]


def environment(suite: Suite) -> None:
    """The device, and its two ceilings: a large product, a large copy."""
    device, emit = suite.device, suite.recorder.emit
    cuda = device.type == "cuda"
    facts = torch.cuda.get_device_properties(device) if cuda else None
    fields = ("name", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit",
              "temperature.gpu")  # fmt: skip
    emit(
        "environment", "device", "ok",
        memory_mib=facts.total_memory / MIB if facts else None,
        multiprocessors=facts.multi_processor_count if facts else None,
        l2_mib=getattr(facts, "L2_cache_size", 0) / MIB if facts else None,
        nvidia_smi={name: query_gpu(name) for name in fields} if cuda else None,
    )  # fmt: skip
    side, size = (64, 4096) if suite.quick else (8192, 4 << 30)
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    product = torch.empty_like(a)
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)

    def gemm() -> Outcome:
        torch.mm(a, b, out=product)
        return Outcome()

    def copy() -> Outcome:
        target.copy_(source)
        return Outcome()

    ready = {"GEMM ceiling": Prepared(gemm), "copy ceiling": Prepared(copy)}
    measured, _ = take_turns(ready, device, suite.budget_s)
    work = {"GEMM ceiling": ("tflops", 2.0 * side**3), "copy ceiling": ("tb_per_s", 2.0 * size)}
    for name, times in measured.items():
        unit, amount = work[name]
        rate = {unit: amount / times["median_ms"] * 1e-9}
        emit("environment", name, "ok", **times, **rate)


def check_everything(suite: Suite) -> None:
    """`pytest -m gpu`, then every public loss against fp64."""
    if suite.device.type == "cuda":
        left = suite.recorder.deadline - time.monotonic()
        limit = min(PYTEST_LIMIT_S, max(1.0, left / 2))
        correctness.run_tests(suite.recorder, suite.log, correctness.gpu_tests(), limit)
    else:
        suite.recorder.emit("correctness", "pytest -m gpu", "unavailable", reason="needs a GPU")
    correctness.run_api(suite.recorder, suite.quick)


def fused_loss(suite: Suite) -> None:
    """Every competitor at the target shape, with the gate on all rows."""
    problem = suite.problem()
    tail = student_tail(problem)
    suite.measure("fused_loss", problem, variants.competitors(), student_tail=tail)


def skipped_rows(suite: Suite) -> None:
    """`dense_share` over its range, against the exact gradient and three bare GEMMs."""
    compared = [*variants.floors("three"), variants.ours("ours"), *map(skipping.sampled, SHARES)]
    suite.measure("skipping", suite.problem(), compared, gate_rows=256)


def memory_curve(suite: Suite) -> None:
    """Time over `workspace_bytes`; a bound that is too small is refused, which is a row too."""
    sizes = QUICK_WORKSPACES if suite.quick else WORKSPACES
    compared = [*variants.floors("three"), *variants.curve(sizes)]
    suite.measure("memory_curve", suite.problem(), compared, budget_s=suite.budget_s / 2)


def accuracy(suite: Suite) -> None:
    """Gradients of every divergence against fp64, near the teacher and far from it."""
    for regime in ("near", "far"):
        shape = replace(suite.shape, rows=min(1024, suite.shape.rows))
        problem = suite.problem(shape, regime)
        suite.measure("accuracy", problem, variants.divergences(), timed=False)


def row_kernel(suite: Suite) -> None:
    """Bandwidth of the row kernel against a copy, on a chunk of rows; other launches beside it."""
    problem = suite.problem().rows(slice(0, 2048))
    others = components.launch_sweep() if problem.device.type == "cuda" else []
    compared = [components.row_kernel(), *others, components.copy()]
    suite.measure("row_kernel", problem, compared, gate_rows=256)


def chunks(suite: Suite) -> None:
    """Time over the rows of a chunk, where every chunk adds to dW."""
    problem = suite.problem(replace(suite.shape, hidden=suite.shape.hidden // 2))
    sizes = QUICK_CHUNKS if suite.quick else CHUNKS
    compared = [*variants.floors("three"), variants.ours("ours")]
    compared += map(components.in_chunks_of, sizes)
    suite.measure("chunks", problem, compared, gate_rows=256, budget_s=suite.budget_s / 2)


def one_pass(suite: Suite) -> None:
    """The row pass that reads the logits once, against the one that reads them twice.

    Its tests come first, in a process of their own: a program that waited for ever would end with
    it. Only if all pass are both forms timed, alone and within a call.
    """
    recorder, compared = suite.recorder, [components.row_kernel(), components.copy()]
    problem = suite.problem().rows(slice(0, 2048))
    if suite.device.type == "cuda":
        left = recorder.deadline - time.monotonic()
        tests = correctness.run_tests(
            recorder, suite.log.with_name("pytest_one_pass.log"),
            ["-m", "gpu and not slow", correctness.ON_ITS_OWN],
            min(PYTEST_LIMIT_S, max(1.0, left / 2)), "one_pass",
        )  # fmt: skip
        if tests == "ok":
            compared += [
                components.one_pass(),
                *map(components.one_pass, components.ONE_PASS_SWEEP),
            ]
    else:
        recorder.emit("one_pass", "one pass", "unavailable", reason="needs a GPU")
    suite.measure("one_pass", problem, compared, gate_rows=256)
    if len(compared) > 2:
        ours = variants.ours("ours")
        calls = [*variants.floors("three"), ours, components.in_one_pass(ours)]
        suite.measure("one_pass", suite.problem(), calls, gate_rows=256)


def scoring(suite: Suite) -> None:
    """`linear_topk` against full logits and torch.topk: tokens/s and memory."""
    bound = QUICK_WORKSPACES[1] if suite.quick else 512 * MIB
    suite.measure("scoring", suite.problem(), components.scorers(bound), gate_rows=256)


def ablation(suite: Suite) -> None:
    """The pieces of one call, and the call."""
    compared = [*components.components(), variants.ours("ours")]
    suite.measure("ablation", suite.problem(), compared, gate_rows=256)


def shapes(suite: Suite) -> None:
    """One size at a time away from the target."""
    base = suite.shape
    for name, values in (QUICK_VARIATIONS if suite.quick else VARIATIONS).items():
        for value in values:
            suite.recorder.check_time()
            problem = suite.problem(replace(base, **{name: value}))
            budget = suite.budget_s / 4
            suite.measure("shapes", problem, variants.scaling(), gate_rows=256, budget_s=budget)


def training_of(name: str) -> Callable[[Suite], None]:
    def part(suite: Suite) -> None:
        suite.cached = None  # frees gigabytes
        training.run(suite.recorder, f"training_{name}", name, suite.quick, suite.budget_s)

    part.__doc__ = f"A training step of the shape of Qwen3-{name}, fused against dense logits."
    return part


# name -> (planned seconds on an H200, function), the most important first: what the time limit
# cuts off comes last. The README quotes the docstrings.
PARTS: dict[str, tuple[float, Callable[[Suite], None]]] = {
    "environment": (10, environment),
    "correctness": (110, check_everything),
    "fused_loss": (90, fused_loss),
    "row_kernel": (10, row_kernel),
    "memory_curve": (40, memory_curve),
    "skipping": (30, skipped_rows),
    "accuracy": (30, accuracy),
    "training_1.7B": (50, training_of("1.7B")),
    "training_8B": (85, training_of("8B")),
    "scoring": (20, scoring),
    "ablation": (20, ablation),
    "chunks": (15, chunks),
    "shapes": (55, shapes),
    "one_pass": (40, one_pass),
    "training_0.6B": (45, training_of("0.6B")),
    "training_4B": (70, training_of("4B")),
}
# Run only with --only: no criterion needs them, and the others fill the time limit.
ON_REQUEST = ("shapes", "one_pass", "training_0.6B", "training_4B")
DEFAULT = [name for name in PARTS if name not in ON_REQUEST]


def run_part(suite: Suite, name: str) -> None:
    """Run a part and emit its rows, and one row about the part itself, named `suite`."""
    recorder, (planned, function) = suite.recorder, PARTS[name]
    start, status, fields = time.monotonic(), "ok", {"planned_s": planned}
    if recorder.out_of_time:
        recorder.emit("suite", name, "skipped", reason="the time limit has passed", **fields)
        return
    try:
        free_memory(suite.device)
        function(suite)
    except OutOfTime:
        status, fields["reason"] = "cut off", "the time limit passed during this part"
    except Exception as error:
        traceback.print_exc()
        status, fields["reason"], fields["kind"] = "failed", one_line(error), "ours"
    recorder.emit("suite", name, status, seconds=time.monotonic() - start, **fields)


def write_summary(rows: list[dict[str, Any]], out: Path) -> str:
    """Write the criteria, the wrong results and the incomplete parts; return the text."""
    wrong = [
        f"{r['part']}: {r['variant']}: {r['status']}: {r['reason']}" for r in rows if is_red(r)
    ]
    parts = [r for r in rows if r["part"] == "suite" and r["status"] in ("cut off", "skipped")]
    late = [f"{r['variant']}: {r['status']}, {r['reason']}" for r in parts]
    lines = [criteria.table(rows), "", f"Wrong: {len(wrong)}.", *(f"* {line}" for line in wrong)]
    lines += ["", f"Incomplete parts: {len(late)}.", *(f"* {line}" for line in late)]
    text = "\n".join(lines) + "\n"
    (out / "summary.md").write_text(text, encoding="utf-8")
    return text


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="toy sizes")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=DEFAULT)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--time-limit", type=float, default=TIME_LIMIT_S, help="seconds")
    parser.add_argument("--commit", help="commit of the sources, if they are not a git checkout")
    args = parser.parse_args(arguments)
    if args.device == "cpu" and not args.quick:
        parser.error("the full sizes need a GPU; pass --quick with --device cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; --quick --device cpu runs toy sizes on the CPU")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    flags = " --quick" * args.quick + " --device cpu" * (args.device == "cpu")
    recorder = Recorder(
        args.out / "rows.jsonl",
        torch.device(args.device),
        f"python -m benchmarks.gpu_suite --out DIR --only {{part}}{flags}",
        time.monotonic() + args.time_limit,
        args.commit,
    )
    suite = Suite(recorder, args.quick, args.out / "pytest.log")
    for name in args.only:
        run_part(suite, name)
    figures.draw(recorder.rows, args.out)
    print(write_summary(recorder.rows, args.out))
    return int(any(is_red(row) for row in recorder.rows))


if __name__ == "__main__":
    sys.exit(main())
