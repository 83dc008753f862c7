"""What does a live teacher cost, and what does it buy? Offline against live at equal settings.

    python -m benchmarks.offline_live [--quick] [--size toy|0.6b] [--every R ...] [--seeds N ...]
                                      [--device cpu|cuda] [--threads N] [--out DIR]

One student is distilled for the same steps on the same prompts in the same order, with its
rollouts renewed every R steps by a live teacher (`lopd distill --refresh_every R`; 1 is standard
on-policy distillation) and with those of its cache alone (never: Lightning OPD, `lopd rollout`
and `lopd score` counted). Seconds are of the wall clock, from the first command's start to the last
one's end, in three parts:

* generation, scoring: live, what the run's manifest says; offline, the two commands, which load
  a model and write a store besides;
* training: all the rest of `lopd distill`. `update_seconds` is what of it passes between a step's
  first forward and its update, where that is logged: in live runs.

The live runs also read a cache, for its prompts and settings; its making is not counted for them.
Each seed has models, prompts and samples of its own. Runs take turns, in another order each seed;
a ratio is between runs of one seed, and the median counts. Quality is that after the last step.

Correctness first: with greedy rollouts, a run whose one window is all of it must end with the
offline run's weights, and one with R = 1 must not. A red gate, or a live run whose parts do not
add up, ends it with exit code 1. One JSON row per R is printed and, with --out, all of them are
written to DIR/offline_live.jsonl.

`toy` trains the demo's two models first; `0.6b` and `--quick` have random weights, so that their
quality says nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.live_runs import PARTS, SIZES, Bench, InvalidResult, Run, Size
from benchmarks.recorder import identity
from lopd.models.load import load_model

NAME = "offline_live.jsonl"
GATE_STEPS = 4
# Relative to how far training moves. A GPU's backward may add in another order each time, and
# Adam's first steps are of one size however small a gradient is.
GATE_BOUND = {"cpu": 1e-5, "cuda": 0.2}
GATE: dict[str, Any] = {
    "max_steps": GATE_STEPS,
    "learning_rate": 1e-2,  # enough for greedy answers to change within the steps
    "warmup_steps": 0,
    "lr_scheduler_type": "constant",
    "min_lr_ratio": 0.0,
}


def gate(bench: Bench) -> dict[str, float]:
    """Distances of weights with greedy rollouts, where R does what it says.

    |run - offline| / |offline - start| over all weights, of a run of one window and of R = 1.

    Raises:
        InvalidResult: a run of one window is not the offline run, or R = 1 is.
    """
    rollouts = bench.roll_out("gate-rollouts", GATE_STEPS * bench.size.batch, temperature=0.0)
    cache = bench.score(rollouts, "gate-cache")
    start = weights_of(bench.student)
    offline = weights_of(bench.distill(cache, "gate-offline", None, **GATE))
    moved = distance(offline, start)
    once, each = (
        distance(weights_of(bench.distill(cache, f"gate-{every}", every, **GATE)), offline) / moved
        for every in (GATE_STEPS, 1)
    )
    bound = GATE_BOUND[bench.device]
    if not once <= bound:
        raise InvalidResult(f"one window of all steps is off the offline run by {once:.1e}")
    if not each > 2 * bound:
        raise InvalidResult(f"R = 1 is within {each:.1e} of the offline run: nothing was renewed")
    return {"one_window": once, "every_step": each}


def weights_of(folder: str) -> dict[str, torch.Tensor]:
    return load_model(folder, dtype="float32", device="cpu").state_dict()


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return float(sum((value - b[name]).double().square().sum() for name, value in a.items())) ** 0.5


def measure(
    folder: Path, size: Size, device: str, every: list[int], seeds: list[int]
) -> Iterator[dict[str, Any]]:
    """One row for never and for each R."""
    kinds: list[int | None] = [None, *every]
    runs: dict[int | None, list[Run]] = {kind: [] for kind in kinds}
    found: dict[Any, list[dict[str, float]]] = {kind: [] for kind in ["start", *kinds]}
    gates = []
    for number, seed in enumerate(seeds):
        bench = Bench(folder / str(seed), size, device, seed)
        gates.append(gate(bench))
        cache = bench.score(bench.roll_out("rollouts", size.prompts), "cache")
        shift = number % len(kinds)
        for kind in kinds[shift:] + kinds[:shift]:
            runs[kind].append(bench.run(cache, f"run-{kind}", kind))
        found["start"].append(bench.quality(bench.student, "start"))
        for kind in kinds:
            found[kind].append(bench.quality(runs[kind][-1].out, str(kind)))
    setting = {key: value for key, value in asdict(size).items() if key not in ("seeds", "every")}
    for kind in kinds:
        yield {
            "every": kind,
            "seeds": seeds,
            **setting,
            "renewed": runs[kind][0].renewed,
            **timing(runs[kind], runs[None], size.steps),
            "quality": by_name(found[kind]),
            "start": by_name(found["start"]),
            "gate": by_name(gates),
        }


def by_name(found: list[dict[str, float]]) -> dict[str, list[float]]:
    """Values of each seed."""
    return {name: [each[name] for each in found] for name in found[0]}


def timing(runs: list[Run], offline: list[Run], steps: int) -> dict[str, Any]:
    """Medians over seeds; ratios are between a run and the offline run of its seed."""
    pairs = list(zip(runs, offline, strict=True))

    def median(values: Iterable[float]) -> float:
        return round(float(np.median(list(values))), 4)

    ratios = [round(run.total / base.total, 4) for run, base in pairs]
    updates = [run.update_seconds / steps for run in runs if run.update_seconds is not None]
    peaks = [run.peak_mib for run in runs if run.peak_mib is not None]
    return {
        "seconds": median(run.total for run in runs),
        "seconds_per_step": {
            part: median(run.seconds[part] / steps for run in runs) for part in PARTS
        },
        "update_seconds_per_step": median(updates) if updates else None,
        "ratio": median(ratios),
        "ratios": ratios,
        "ratio_to_training": median(run.total / base.seconds["training"] for run, base in pairs),
        "parts": {
            part: median(run.seconds[part] / base.total for run, base in pairs) for part in PARTS
        },
        "peak_mib": max(peaks, default=None),
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="random models of toy size, seconds")
    parser.add_argument("--size", choices=("toy", "0.6b"), default="toy")
    parser.add_argument("--every", nargs="+", type=int, help="R of the live runs; None: the size's")
    parser.add_argument("--seeds", nargs="+", type=int, help="None: the size's")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder whose offline_live.jsonl is written")
    args = parser.parse_args(arguments)
    args.size = "quick" if args.quick else args.size
    size = SIZES[args.size]
    args.every = list(size.every) if args.every is None else args.every
    args.seeds = list(size.seeds) if args.seeds is None else args.seeds
    if min(args.every) < 1 or min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        parser.error("expected --every of at least 1, and --seeds that differ")
    if uneven := [r for r in args.every if size.epoch % r and r % size.epoch]:
        parser.error(
            f"--every: found {uneven[0]}; expected a divisor or a multiple of the {size.epoch} "
            "steps of an epoch, so that no window holds parts of two"
        )
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    flags = ["--quick"] if args.quick else ["--size", args.size]
    flags += ["--every", *args.every, "--seeds", *args.seeds]
    flags += ["--device", args.device, "--threads", args.threads]
    about = {
        "question": "offline_live",
        "size": args.size,
        "transformers": transformers.__version__,
        **identity(torch.device(args.device), None),
        "command": " ".join(["python -m benchmarks.offline_live", *map(str, flags)]),
    }
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        given = (Path(folder), SIZES[args.size], args.device, args.every, args.seeds)
        try:
            rows = [{**about, **row} for row in measure(*given)]
        except InvalidResult as error:
            print(f"benchmarks.offline_live: {error}", file=sys.stderr)
            return 1
    text = "".join(json.dumps(row) + "\n" for row in rows)
    print(text, end="")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / NAME).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
