"""Write the generated blocks of the documents: `python -m benchmarks.readme`.

Results come from the committed rows, the roofline from its formulas, the suite's parts from it.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import demo_seeds, gpu_suite, offline_live, roofline
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
    """The newest row of each size of vocabulary and number of threads."""
    rows = read_rows("fused_loss_cpu.jsonl")
    newest = {(row["vocab"], row["threads"]): row for row in rows}
    lines = [
        "| V | threads | time, fused / eager | peak extra memory, fused / eager | gradient error |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    for (vocab, threads), row in sorted(newest.items()):
        ratios = f"{row['time_ratio']:.2f} | {row['memory_ratio']:.2f}"
        lines.append(f"| {vocab} | {threads} | {ratios} | {row['gradient_error']:.0e} |")
    shape = "N={rows}, D={hidden}, K={topk}, {dtype}".format(**row)
    return "\n".join(
        [
            f"One forward and backward on a CPU at {shape}, against eager PyTorch in",
            "the same run; the error is that of the gradients against fp64, on a smaller problem.",
            "",
            *lines,
        ]
    )


def parts_block() -> str:
    rows = [
        f"| `{name}` | {(function.__doc__ or '').strip().splitlines()[0]} | {seconds:.0f} |"
        for name, (seconds, function) in gpu_suite.PARTS.items()
    ]
    total = sum(seconds for seconds, _ in gpu_suite.PARTS.values())
    return "\n".join(
        [
            "| part | what | planned seconds on an H200 |",
            "| --- | --- | ---: |",
            *rows,
            f"| all | | {total:.0f} |",
        ]
    )


def cache_block() -> str:
    """Bytes and error of each codec, for ids as tokenizers number them."""
    rows = [row for row in read_rows("cache.jsonl") if row["ids"] == "zipf"]
    lines = [
        "| codec | top_p | mean list | covered mass | bytes per response token | error, nat |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        cells = [
            row["codec"],
            f"{row['top_p']}",
            f"{row['mean_list_length']:.1f}",
            f"{row['mean_covered_mass']:.4f}",
            f"{row['bytes_per_token']:.1f}",
            f"{row['error_nat']:.1e}" if row["error_nat"] else "0",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    entropy = f"{rows[0]['mean_entropy_nat']:.2f}"
    return "\n".join(
        [
            f"A made-up teacher of mean entropy {entropy} nat, k = {rows[0]['k']}, "
            f"V = {rows[0]['vocab']}; everything in the files is",
            "counted. The error is the mean KL divergence between exact and decoded.",
            "",
            *lines,
        ]
    )


def live_block() -> str:
    """Parts and totals as shares of the offline run's total, and what the steps came to."""
    offline, *live = rows = read_rows(offline_live.NAME)
    epochs = offline["steps"] * offline["batch"] / offline["prompts"]
    lines = [
        "| rollouts renewed | generation | scoring | training | updates in it | total | each seed "
        "| total / training alone | pass@1 sampled | each seed | KL, nat/token |",
        f"| --- |{' ---: |' * 10}",
        _live_line("before training", " | " * 6, offline["start"]),
    ]
    for row in [*live, offline]:
        name = "never: offline" if row["every"] is None else f"R = {row['every']}"
        parts = [f"{row['parts'][part]:.2f}" for part in offline_live.PARTS]
        updates = row["update_seconds_per_step"]
        times = [
            *parts,
            f"{updates / row['seconds_per_step']['training']:.0%}" if updates else "not logged",
            f"{row['ratio']:.2f}",
            " / ".join(f"{ratio:.2f}" for ratio in row["ratios"]),
            f"{row['ratio_to_training']:.2f}",
        ]
        lines.append(_live_line(name, " | ".join(times), row["quality"]))
    return "\n".join(
        [
            f"{offline['steps']} steps of {offline['batch']} sequences, {epochs:g} passes over "
            f"{offline['prompts']} prompts, on {offline['threads']} thread of a CPU. Seconds",
            "are shares of the offline run's total, medians over seeds "
            f"{', '.join(map(str, rows[0]['seeds']))}; quality is their mean.",
            "",
            *lines,
        ]
    )


def _live_line(name: str, times: str, quality: dict[str, list[float]]) -> str:
    sampled, kl = quality["sampled"], quality["kl"]
    each = " / ".join(f"{value:.3f}" for value in sampled)
    return f"| {name} | {times} | {np.mean(sampled):.3f} | {each} | {np.mean(kl):.4f} |"


def rendered(text: str) -> str:
    """A document with each of its generated blocks replaced."""
    blocks = {
        "demo table": demo_block,
        "fused loss": fused_block,
        "cache": cache_block,
        "roofline": roofline.table,
        "parts": parts_block,
        "offline live": live_block,
    }
    for name in re.findall(r"^<!-- ([a-z ]+)(?::[^\n]*)? -->$", text, re.MULTILINE):
        if name == "end":
            continue
        pattern = re.compile(rf"(<!-- {name}[^\n]*-->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = pattern.subn(lambda m, name=name: f"{m[1]}{blocks[name]()}\n{m[2]}", text)
        assert count == 1, f"{count} blocks '{name}'"
    return text


DOCUMENTS = [ROOT / name for name in ("README.md", "benchmarks/README.md", "benchmarks/NOTES.md")]

if __name__ == "__main__":
    for path in DOCUMENTS:
        path.write_text(rendered(path.read_text(encoding="utf-8")), encoding="utf-8")
