"""Write the tables of README.md from the committed rows: `python -m benchmarks.readme`."""

import json
import re
from pathlib import Path
from typing import Any

from benchmarks import demo_seeds
from lopd.demo import OPD_STEPS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def read_rows(name: str) -> list[dict[str, Any]]:
    text = (RESULTS / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def demo_block() -> str:
    table = demo_seeds.table(read_rows(demo_seeds.NAME))
    return f"{table} Every run from the fine-tuned student on took {OPD_STEPS} steps."


def fused_block() -> str:
    """The newest row of each number of threads."""
    newest = {row["threads"]: row for row in read_rows("fused_loss_cpu.jsonl")}
    lines = [
        "| threads | time, fused / eager | peak extra memory, fused / eager | gradient error |",
        "| ---: | ---: | ---: | ---: |",
    ]
    for threads, row in sorted(newest.items()):
        cells = [f"{row['time_ratio']:.2f}", f"{row['memory_ratio']:.2f}"]
        lines.append(f"| {threads} | {' | '.join(cells)} | {row['gradient_error']:.0e} |")
    shape = "N={rows}, V={vocab}, D={hidden}, K={topk}, {dtype}".format(**row)
    return "\n".join(
        [
            f"One forward and backward on a CPU at {shape}, against eager PyTorch in",
            "the same run; the error is that of the gradients against fp64, on a smaller problem.",
            "",
            *lines,
        ]
    )


def rendered(readme: str) -> str:
    """README.md with every generated block replaced."""
    blocks = {"demo table": demo_block(), "fused loss": fused_block()}
    for name, block in blocks.items():
        pattern = re.compile(rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- end -->)", re.DOTALL)
        readme, count = pattern.subn(lambda m, block=block: f"{m[1]}{block}\n{m[2]}", readme)
        assert count == 1, f"README.md has {count} blocks '{name}'"
    return readme


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(rendered(path.read_text(encoding="utf-8")), encoding="utf-8")
