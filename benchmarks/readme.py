"""Write the generated blocks of the documents: `python -m benchmarks.readme`.

Results come from the committed rows, the roofline from its formulas, the parts from the GPU suite.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import (
    demo_seeds,
    fused_loss,
    gpu_suite,
    gradients,
    offline_live,
    offlist,
    plans,
    prunings,
    real_demo,
    real_model,
    roofline,
    skipping,
)
from benchmarks.evidence import claims
from benchmarks.evidence.frame import read
from benchmarks.evidence.parts import PARTS
from lopd.stages.demo.report import DISTILLED, FINE_TUNED, ONLINE
from lopd.stages.demo.toy import OPD_STEPS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def read_rows(name: str) -> list[dict[str, Any]]:
    return read(RESULTS / name)


def short_block() -> str:
    """One line for each of: the loss, the cache, the whole pipeline."""
    loss = {(r["vocab"], r["threads"]): r for r in read_rows("fused_loss_cpu.jsonl")}[151936, 2]
    cached = [
        row
        for row in read_rows("cache.jsonl")
        if (row["codec"], row["top_p"], row["ids"]) == ("compact", 0.999, "zipf")
    ][-1]
    rows = demo_seeds.by_stage(read_rows(demo_seeds.NAME))
    start, end, live = (
        {key: np.mean([row[key] for row in rows[name]]) for key in ("sampled", "kl")}
        for name in (FINE_TUNED, DISTILLED, ONLINE)
    )
    every_step = next(row for row in read_rows(offline_live.NAME) if row["every"] == 1)
    return "\n".join(
        [
            f"* **Loss:** {loss['memory_ratio']:.0%} of the extra memory and "
            f"{loss['time_ratio']:.0%} of the time of eager PyTorch, at {loss['vocab']:,}",
            "  tokens of vocabulary, with exact gradients (CPU, float32, two threads).",
            f"* **Cache:** {cached['bytes_per_token']:.0f} bytes per token of an answer, at a mean "
            f"list of {cached['mean_list_length']:.1f} tokens; the error is "
            f"{cached['error_nat']:.0e} nat",
            "  (made-up teacher).",
            f"* **Pipeline:** sampled pass@1 rises from {start['sampled']:.2f} to "
            f"{end['sampled']:.2f} and the KL to the teacher falls from {start['kl']:.2f}",
            f"  to {end['kl']:.3f} with no teacher in memory. With a live teacher these are "
            f"{live['sampled']:.2f} and {live['kl']:.3f},",
            f"  and the same steps take {every_step['ratio']:.1f} times as long (toy models, means "
            "of three seeds).",
        ]
    )


def demo_block() -> str:
    table = demo_seeds.table(read_rows(demo_seeds.NAME))
    return f"{table} Every run from the fine-tuned student on took {OPD_STEPS} steps."


def fused_block() -> str:
    """The newest row of each vocabulary size and number of threads."""
    rows = [row for row in read_rows("fused_loss_cpu.jsonl") if row["vocab"] in fused_loss.VOCABS]
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


def small_block() -> str:
    """The newest row of each vocabulary that is smaller than the standard sizes."""
    rows = read_rows("fused_loss_cpu.jsonl")
    newest = {(r["vocab"], r["topk"]): r for r in rows if r["vocab"] not in fused_loss.VOCABS}
    lines = [
        "| V | K | time, fused / eager | peak extra memory, fused / eager |",
        "| ---: | ---: | ---: | ---: |",
    ]
    for (vocab, topk), row in sorted(newest.items()):
        lines.append(f"| {vocab} | {topk} | {row['time_ratio']:.2f} | {row['memory_ratio']:.2f} |")
    return "\n".join(lines)


def parts_block() -> str:
    rows = [
        f"| `{name}` | {(function.__doc__ or '').strip().splitlines()[0]} | {seconds:.0f} |"
        for name, (seconds, function) in gpu_suite.PARTS.items()
    ]
    total = sum(gpu_suite.PARTS[name][0] for name in gpu_suite.DEFAULT)
    *others, last = (f"`{name}`" for name in gpu_suite.ON_REQUEST)
    return "\n".join(
        [
            "| part | what | planned seconds on an H200 |",
            "| --- | --- | ---: |",
            *rows,
            f"| all but {', '.join(others)} and {last} | without `--only` | {total:.0f} |",
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
    """Parts and totals as shares of the offline run's total, and quality after training."""
    offline, *live = read_rows(offline_live.NAME)
    rows = [*live, offline]
    epochs = offline["steps"] * offline["batch"] / offline["prompts"]
    seeds = ", ".join(map(str, offline["seeds"]))
    lines = [
        f"{offline['steps']} steps of {offline['batch']} sequences, {epochs:g} passes over "
        f"{offline['prompts']} prompts, on a CPU with threads: {offline['threads']}. Seconds are",
        f"shares of the offline run's total, medians over seeds {seeds}; quality is the mean, and",
        "that of each seed.",
        "",
        "| rollouts renewed | generation | scoring | training | updates in it | total | each seed "
        "| total / training alone |",
        f"| --- |{' ---: |' * 7}",
        *map(_live_times, rows),
        "",
        "| rollouts renewed | pass@1 sampled | each seed | KL to teacher, nat/token | each seed |",
        f"| --- |{' ---: |' * 4}",
        _live_quality("before training", offline["start"]),
        *(_live_quality(_renewed(row), row["quality"]) for row in rows),
    ]
    return "\n".join(lines)


def _renewed(row: dict[str, Any]) -> str:
    return "never: offline" if row["every"] is None else f"R = {row['every']}"


def _live_times(row: dict[str, Any]) -> str:
    updates = row["update_seconds_per_step"]
    share = f"{updates / row['seconds_per_step']['training']:.0%}" if updates else "not logged"
    cells = [
        _renewed(row),
        *(f"{row['parts'][part]:.2f}" for part in offline_live.PARTS),
        share,
        f"{row['ratio']:.2f}",
        " / ".join(f"{ratio:.2f}" for ratio in row["ratios"]),
        f"{row['ratio_to_training']:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def _live_quality(name: str, quality: dict[str, list[float]]) -> str:
    cells = [name]
    for key, form in (("sampled", ".3f"), ("kl", ".4f")):
        cells.append(format(np.mean(quality[key]), form))
        cells.append(" / ".join(format(value, form) for value in quality[key]))
    return f"| {' | '.join(cells)} |"


def rendered(text: str) -> str:
    """The document with each generated block replaced."""
    blocks = {
        "in short": short_block,
        "demo table": demo_block,
        "fused loss": fused_block,
        "small vocabularies": small_block,
        "cache": cache_block,
        "roofline": roofline.table,
        "parts": parts_block,
        "offline live": live_block,
        "gradients": lambda: gradients.table(read_rows(gradients.NAME)),
        "claims": lambda: claims.table(read_rows),
        "skipping": lambda: skipping.table(read_rows(skipping.NAME)),
        "real short": lambda: real_demo.short_table(read_rows(real_demo.NAME)),
        "real demo": lambda: real_demo.table(read_rows(real_demo.NAME)),
        "real first": lambda: real_demo.table(real_demo.first_seed(read_rows(real_demo.NAME))),
        "real against control": lambda: real_demo.against_control(read_rows(real_demo.NAME)),
        "real parts": lambda: real_demo.parts(read_rows(real_demo.NAME)),
        "real answers": lambda: real_demo.answers(read_rows(real_demo.NAME)),
        "real model": lambda: real_model.table(read_rows(real_model.NAME)),
        "plans": lambda: plans.table(read_rows(plans.NAME)),
        "prunings": lambda: prunings.table(read_rows(prunings.NAME)),
        "offlist": lambda: offlist.table(read_rows(offlist.NAME)),
    }
    for part in PARTS:
        rows = read_rows(part.file)
        blocks |= {name: partial(table, rows) for name, table in part.tables.items()}
    for name in re.findall(r"^<!-- ([a-z ]+)(?::[^\n]*)? -->$", text, re.MULTILINE):
        if name == "end":
            continue
        pattern = re.compile(rf"(<!-- {name}[^\n]*-->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = pattern.subn(lambda m, name=name: f"{m[1]}{blocks[name]()}\n{m[2]}", text)
        assert count == 1, f"{count} blocks '{name}'"
    return text


DOCUMENTS = [
    ROOT / name
    for name in (
        "README.md",
        "benchmarks/README.md",
        "benchmarks/NOTES.md",
        "docs/evidence.md",
        "docs/losses.md",
        "docs/scoring.md",
        "docs/training.md",
        "docs/tutorial.md",
    )
]


def main() -> None:
    for path in DOCUMENTS:
        path.write_text(rendered(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
