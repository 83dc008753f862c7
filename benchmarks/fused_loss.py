"""Is the fused loss on a CPU as fast as eager PyTorch, with a quarter of its extra memory?

    python -m benchmarks.fused_loss [--quick] [--vocab V ...] [--topk K] [--threads N] [--out DIR]

It measures one forward and backward of the reverse KL with a tail bucket in fp32, fused against
eager (logits, log_softmax, gather, tail, autograd), for three vocabulary sizes. First it compares
the gradients of both with the fp64 oracle on a small problem; a failed gate ends the run. Times are
medians of steps in alternation. Memory is the peak resident size of a fresh process per variant,
minus that of the same process just before the call, with the kernel's high-water mark reset in
between. Inputs are not counted; outputs (gradients) are. One JSON row per size is printed and, with
--out, appended to DIR/fused_loss_cpu.jsonl. The exit code is 1 if a limit is exceeded. The limits
apply to V = 151936; --quick has none.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.clock import take_turns
from benchmarks.harness import Variant, gate
from benchmarks.problems import REVERSE_KL, Problem, Shape, oracle
from benchmarks.recorder import identity
from benchmarks.variants import eager, ours, peer

MAX_TIME_RATIO = 1.0
MAX_MEMORY_RATIO = 0.25
LIMITED_VOCAB = 151936
VOCABS = (32000, 128256, LIMITED_VOCAB)
TOP_K = 64
QUICK = Shape(rows=64, hidden=64, vocab=8192, topk=16)
GATE = Shape(rows=32, hidden=64, vocab=4096, topk=16)
VARIANTS = {"fused": ours("fused"), "eager": peer("eager", REVERSE_KL, eager, "fp32")}


def full_shape(vocab: int, topk: int = TOP_K) -> Shape:
    return Shape(rows=2048, hidden=512, vocab=vocab, topk=topk)


def problem(shape: Shape) -> Problem:
    """Random tensors, made without any [N, V] tensor: the peak must be that of the step."""
    torch.manual_seed(0)
    hidden = torch.randn(shape.rows, shape.hidden)
    weight = torch.randn(shape.vocab, shape.hidden).mul_(2.0 * shape.hidden**-0.5)
    ids = torch.rand(shape.rows, shape.vocab // 8).topk(shape.topk).indices * 8
    teacher = torch.randn(shape.rows, shape.topk + 1).log_softmax(1)
    logprobs, tail = teacher[:, :-1].contiguous(), teacher[:, -1].contiguous()
    return Problem(hidden, weight, hidden, ids, logprobs, tail, ids[:, 0], logprobs[:, 0], "random")


def gate_errors(variant: Variant) -> dict[str, Any]:
    """Errors against fp64 on a small problem; `red` lists those that exceed their bounds."""
    small = problem(GATE)
    return gate(variant, small, oracle(small, REVERSE_KL))


def peak_mib(variant: str, shape: Shape) -> float:
    """Extra resident memory of one step, measured in a fresh process."""
    sizes = ",".join(str(size) for size in asdict(shape).values())
    command = [sys.executable, "-m", "benchmarks.fused_loss", "--peak-of", variant, sizes]
    command += ["--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout)


def measure_peak(variant: str, shape: Shape) -> float:
    prepare = VARIANTS[variant].prepare
    prepare(problem(GATE)).step()
    prepared = prepare(problem(shape))
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # VmHWM becomes VmRSS
    before = resident_mib("VmRSS")
    prepared.step()
    return resident_mib("VmHWM") - before


def resident_mib(field: str) -> float:
    """VmRSS, the current resident size, or VmHWM, its maximum so far."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}; the memory is measured on Linux only")


def measure(shape: Shape) -> dict[str, Any]:
    cpu, inputs = torch.device("cpu"), problem(shape)
    ready = {name: variant.prepare(inputs) for name, variant in VARIANTS.items()}
    times, failures = take_turns(ready, cpu, budget_s=1.0)
    for error in failures.values():
        raise error
    del inputs, ready
    row: dict[str, Any] = {"question": "fused_loss_cpu", "dtype": "float32", **asdict(shape)}
    for name, summary in times.items():
        row |= {f"{name}_{key}": value for key, value in summary.items()}
        row[f"{name}_peak_mib"] = round(peak_mib(name, shape), 1)
    row["time_ratio"] = round(row["fused_median_ms"] / row["eager_median_ms"], 4)
    row["memory_ratio"] = round(row["fused_peak_mib"] / row["eager_peak_mib"], 4)
    return {**row, **identity(cpu, None)}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a toy size without limits")
    parser.add_argument("--vocab", nargs="+", type=int, default=VOCABS, help="sizes to measure")
    parser.add_argument("--topk", type=int, default=TOP_K, help="ids in a list")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="folder whose fused_loss_cpu.jsonl gets the rows")
    parser.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    if args.peak_of:
        name, sizes = args.peak_of
        print(measure_peak(name, Shape(*map(int, sizes.split(",")))))
        return 0
    errors = gate_errors(VARIANTS["fused"])
    if errors["red"]:
        print("; ".join(errors["red"]), file=sys.stderr)
        return 1
    error = max(errors["dhidden_error"], errors["dweight_error"])
    shapes = [QUICK] if args.quick else [full_shape(v, args.topk) for v in args.vocab]
    missed = False
    for shape in shapes:
        size = "--quick" if args.quick else f"--vocab {shape.vocab} --topk {shape.topk}"
        command = f"python -m benchmarks.fused_loss {size} --threads {args.threads}"
        row = {**measure(shape), "gradient_error": float(f"{error:.2e}"), "command": command}
        print(json.dumps(row), flush=True)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            with (args.out / "fused_loss_cpu.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        over = row["time_ratio"] > MAX_TIME_RATIO or row["memory_ratio"] > MAX_MEMORY_RATIO
        missed |= over and shape.vocab == LIMITED_VOCAB
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
