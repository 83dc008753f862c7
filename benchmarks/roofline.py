"""Lower bounds of the time: operations and bytes of one forward and backward of the loss.

    python -m benchmarks.roofline [--tflops X] [--tb-per-s X] [--rows N] [--hidden D] [--vocab V]

The default rates are assumptions for an H200. The `environment` part of the GPU suite measures the
actual rates, and its summary uses them.
"""

from __future__ import annotations

import argparse

from benchmarks.problems import Shape

TARGET = Shape(rows=8192, hidden=4096, vocab=151936, topk=64)
TFLOPS, TB_PER_S = 790.0, 4.3
CHUNKS = (512, 1024, 2048, 4096, 8192)


def gemm_ms(shape: Shape, tflops: float, gemms: int = 1) -> float:
    """Milliseconds of GEMMs with 2 N D V operations each."""
    return 2.0 * gemms * shape.rows * shape.hidden * shape.vocab / tflops * 1e-9


def move_ms(count: float, tb_per_s: float) -> float:
    """Milliseconds to read or write `count` bytes."""
    return count / tb_per_s * 1e-9


def row_bytes(shape: Shape) -> float:
    """The row kernel reads fp32 logits twice and writes 16-bit gradients: 10 N V."""
    return 10.0 * shape.rows * shape.vocab


def weight_bytes(shape: Shape, itemsize: int = 2) -> float:
    return float(itemsize) * shape.hidden * shape.vocab


def gathered_bytes(shape: Shape) -> float:
    """A renormalised loss gathers K rows of W per row and adds K rows to dW: 3 passes."""
    return 3.0 * 2.0 * shape.rows * shape.topk * shape.hidden


def accumulate_bytes(shape: Shape, chunk: int) -> float:
    """dW in fp32 over chunks of rows: the first chunk writes it, the others read and write it."""
    chunks = -(-shape.rows // chunk)
    return (2 * chunks - 1) * weight_bytes(shape, 4)


def reread_bytes(shape: Shape, chunk: int) -> float:
    """W in 16 bits, read by GEMMs 1 and 2 of every chunk."""
    return 2.0 * -(-shape.rows // chunk) * weight_bytes(shape)


def table(shape: Shape = TARGET, tflops: float = TFLOPS, tb_per_s: float = TB_PER_S) -> str:
    """Markdown."""
    n, v = shape.rows, shape.vocab
    floor = gemm_ms(shape, tflops, 3)
    row, gathered = move_ms(row_bytes(shape), tb_per_s), move_ms(gathered_bytes(shape), tb_per_s)
    lines = [
        f"{shape}, bf16, at {tflops:g} TFLOP/s and {tb_per_s:g} TB/s:",
        "",
        "| part | work | ms | of three GEMMs |",
        "| --- | --- | ---: | ---: |",
    ]
    for name, work, ms in (
        ("one GEMM", f"{2e-12 * n * shape.hidden * v:.2f} TFLOP", floor / 3),
        ("three GEMMs: gradient in the forward", "6 N D V", floor),
        ("four GEMMs: logits computed twice", "8 N D V", floor * 4 / 3),
        ("row kernel, not overlapped", "10 N V bytes", row),
        ("renormalised top-k, no LM-head GEMM", "6 N K D bytes", gathered),
    ):  # fmt: skip
        lines.append(f"| {name} | {work} | {ms:.1f} | {ms / floor:.2f} |")
    lines += [
        "",
        "| rows of a chunk | fp32 logits, MiB | dW accumulated in fp32, ms | W read again, ms |",
        "| ---: | ---: | ---: | ---: |",
    ]
    for chunk in CHUNKS:
        moved = accumulate_bytes(shape, chunk), reread_bytes(shape, chunk)
        accumulate, reread = (move_ms(count, tb_per_s) for count in moved)
        mib = 4 * chunk * v / 2**20
        lines.append(f"| {chunk} | {mib:.0f} | {accumulate:.1f} | {reread:.1f} |")
    held = {
        "dW in bf16": weight_bytes(shape),
        "an fp32 accumulator of dW": weight_bytes(shape, 4),
        "dH in fp32": 4.0 * n * shape.hidden,
        "[N, V] in bf16": 2.0 * n * v,
    }
    sizes = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in held.items())
    return "\n".join([*lines, "", f"Memory: {sizes}."])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tflops", type=float, default=TFLOPS)
    parser.add_argument("--tb-per-s", type=float, default=TB_PER_S)
    for name in ("rows", "hidden", "vocab", "topk"):
        parser.add_argument(f"--{name}", type=int, default=getattr(TARGET, name))
    args = parser.parse_args(arguments)
    shape = Shape(args.rows, args.hidden, args.vocab, args.topk)
    print(table(shape, args.tflops, args.tb_per_s))


if __name__ == "__main__":
    main()
