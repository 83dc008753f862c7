"""Is the fused loss on a CPU as fast as eager PyTorch, at a quarter of its extra memory?

    python -m benchmarks.fused_loss [--quick] [--out DIR]

One forward and backward of the reverse KL with a tail bucket, fused against eager
(logits, log_softmax, gather, tail, autograd). First the gradients of the two are compared
with the fp64 definition on a small problem; a red gate ends the run. Times: the variants
take turns, the median counts. Memory: peak resident size of a fresh process per variant,
less that of the same process just before the call; inputs are not counted, outputs
(gradients) are. One JSON row per run is printed and, with --out, appended to
DIR/fused_loss_cpu.jsonl. The exit code is 1 when a bar is missed; --quick has no bars.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from lopd_kernels import linear_sparse_divergence, reference

TIME_BAR = 1.0
MEMORY_BAR = 0.25
ERROR_BAR = 1e-5


@dataclass(frozen=True)
class Shape:
    rows: int
    vocab: int
    hidden: int
    topk: int

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        torch.manual_seed(0)
        hidden = torch.randn(self.rows, self.hidden)
        weight = torch.randn(self.vocab, self.hidden).mul_(2.0 * self.hidden**-0.5)
        ids = torch.rand(self.rows, self.vocab // 8).topk(self.topk).indices * 8
        logprobs = torch.randn(self.rows, self.topk + 1).log_softmax(1)
        return hidden, weight, ids, logprobs[:, :-1].contiguous(), logprobs[:, -1].contiguous()


FULL = Shape(rows=2048, vocab=151936, hidden=512, topk=64)
QUICK = Shape(rows=64, vocab=8192, hidden=64, topk=16)
GATE = Shape(rows=32, vocab=4096, hidden=64, topk=16)


def fused(hidden: Tensor, weight: Tensor, ids: Tensor, logprobs: Tensor, tail: Tensor) -> Tensor:
    return linear_sparse_divergence(  # type: ignore[return-value]
        hidden, weight, ids, logprobs, tail_logprobs=tail, validate=False
    )


def eager(hidden: Tensor, weight: Tensor, ids: Tensor, logprobs: Tensor, tail: Tensor) -> Tensor:
    student = (hidden @ weight.t()).log_softmax(1).gather(1, ids)
    rest = torch.log1p(-student.exp().sum(1).clamp(max=1.0 - 2.0**-23))
    listed = (student.exp() * (student - logprobs)).sum(1)
    return (listed + rest.exp() * (rest - tail)).sum()


VARIANTS = {"fused": fused, "eager": eager}


def gradients(loss, inputs, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    hidden, weight, *teacher = inputs
    hidden = hidden.to(dtype).requires_grad_()
    weight = weight.to(dtype).requires_grad_()
    loss(hidden, weight, *teacher).backward()
    return hidden.grad, weight.grad


def worst_error() -> float:
    """Largest relative Frobenius error of dH and dW against the fp64 definition."""

    def oracle(hidden, weight, ids, logprobs, tail):
        return reference.linear_sparse_divergence(hidden, weight, ids, logprobs, tail_logprobs=tail)

    inputs = GATE.inputs()
    exact = gradients(oracle, inputs, torch.float64)
    found = gradients(fused, inputs)
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))


def step(variant: str, inputs: tuple[Tensor, ...]) -> tuple[float, float]:
    """(wall, processor) seconds of one forward and backward that leaves fresh gradients."""
    start, busy = time.perf_counter(), time.process_time()
    gradients(VARIANTS[variant], inputs)
    return time.perf_counter() - start, time.process_time() - busy


def peak_mib(variant: str, shape: Shape) -> float:
    """Extra resident memory of one step, measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.fused_loss", "--peak-of", variant]
    if shape == QUICK:
        command.append("--quick")
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout)


def measure_peak(variant: str, shape: Shape) -> float:
    inputs = shape.inputs()
    gradients(VARIANTS[variant], QUICK.inputs())
    before = resident_mib("VmRSS")
    step(variant, inputs)
    return resident_mib("VmHWM") - before


def resident_mib(field: str) -> float:
    """VmRSS, the resident size now, or VmHWM, its maximum so far."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}; the memory is measured on Linux only")


def measure(shape: Shape, repeats: int) -> dict:
    inputs = shape.inputs()
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in VARIANTS}
    for repeat in range(repeats + 1):
        for name in VARIANTS:
            took = step(name, inputs)
            if repeat:
                seconds[name].append(took)
    del inputs
    row: dict = {
        "question": "fused_loss_cpu",
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        **asdict(shape),
        "repeats": repeats,
    }
    for name in VARIANTS:
        wall, busy = zip(*seconds[name], strict=True)
        row[f"{name}_median_s"] = round(statistics.median(wall), 4)
        row[f"{name}_min_s"] = round(min(wall), 4)
        row[f"{name}_cpu_median_s"] = round(statistics.median(busy), 4)
        row[f"{name}_peak_mib"] = round(peak_mib(name, shape), 1)
    row["time_ratio"] = round(row["fused_median_s"] / row["eager_median_s"], 4)
    row["cpu_time_ratio"] = round(row["fused_cpu_median_s"] / row["eager_cpu_median_s"], 4)
    row["memory_ratio"] = round(row["fused_peak_mib"] / row["eager_peak_mib"], 4)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a toy size without bars")
    parser.add_argument("--out", type=Path, help="folder whose fused_loss_cpu.jsonl gets the row")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peak-of", choices=list(VARIANTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    shape = QUICK if args.quick else FULL
    if args.peak_of:
        print(measure_peak(args.peak_of, shape))
        return 0
    error = worst_error()
    if not error <= ERROR_BAR:
        print(f"gradients are off by {error:.2e}, at most {ERROR_BAR} is allowed", file=sys.stderr)
        return 1
    row = {**measure(shape, args.repeats), "gradient_error": float(f"{error:.2e}")}
    print(json.dumps(row))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        with (args.out / "fused_loss_cpu.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    missed = row["time_ratio"] > TIME_BAR or row["memory_ratio"] > MEMORY_BAR
    return int(missed and not args.quick)


if __name__ == "__main__":
    sys.exit(main())
