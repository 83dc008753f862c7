"""What does a live teacher cost, and what does it gain? Offline against live at equal settings.

    python -m benchmarks.offline_live [--quick] [--size toy|0.6b] [--every R ...] [--seeds N ...]
                                      [--device cpu|cuda] [--threads N] [--out DIR]

One student is distilled for the same number of steps on the same prompts in the same order. In live
runs the teacher renews the rollouts every R steps (`lopd distill --refresh_every R`; 1 is standard
on-policy distillation). The offline run uses only its cache (never: Lightning OPD; `lopd rollout`
and `lopd score` are included). Seconds are wall-clock time from the start of the first command to
the end of the last one, in three parts:

* generation, scoring: in live runs, from the run's manifest; offline, the two commands, which also
  load a model and write a store;
* training: the rest of `lopd distill`. `update_seconds` is the time between a step's first forward
  and its update, where it is logged: in live runs.

Live runs also read a cache, for its prompts and settings; making it is not counted for them. Each
seed has its own models, prompts and samples. Runs alternate, in another order for each seed. A
ratio compares runs of one seed; the median is reported. Quality is measured after the last step.

Correctness first: with greedy rollouts, a run with a single window must end with the weights of the
offline run, and a run with R = 1 must not. A failed gate, or a live run whose parts do not add up,
ends the benchmark with exit code 1. One JSON row per R is printed and, with --out, all rows are
written to DIR/offline_live.jsonl.

`toy` trains the two models of the demo first. `0.6b` and `--quick` use random weights, so their
quality is meaningless.
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
# Relative to the size of the update. A GPU's backward may add in another order each time, and
# Adam's first steps have the same size for any small gradient.
GATE_BOUND = {"cpu": 1e-5, "cuda": 0.2}
GATE: dict[str, Any] = {
    "max_steps": GATE_STEPS,
    "learning_rate": 1e-2,  # enough for greedy answers to change within the steps
    "warmup_steps": 0,
    "lr_scheduler_type": "constant",
    "min_lr_ratio": 0.0,
}


def gate(bench: Bench) -> dict[str, float]:
    """Check with greedy rollouts that R has the documented effect.

    Returns |run - offline| / |offline - start| over all weights, for a run with one window and for
    R = 1.

    Raises:
        InvalidResult: a run with one window differs from the offline run, or R = 1 does not.
    """
    rollouts = bench.roll_out("gate-rollouts", GATE_STEPS * bench.size.batch, temperature=0.0)
    cache = bench.score(rollouts, "gate-cache")
    start = weights_of(bench.student)
    offline = weights_of(bench.distill(cache, "gate-offline", None, **GATE))
    update = distance(offline, start)
    one_window, every_step = (
        distance(weights_of(bench.distill(cache, f"gate-{every}", every, **GATE)), offline) / update
        for every in (GATE_STEPS, 1)
    )
    bound = GATE_BOUND[bench.device]
    if not one_window <= bound:
        raise InvalidResult(
            f"one window of all steps differs from the offline run by {one_window:.1e}"
        )
    if not every_step > 2 * bound:
        raise InvalidResult(
            f"R = 1 is within {every_step:.1e} of the offline run: nothing was renewed"
        )
    return {"one_window": one_window, "every_step": every_step}


def weights_of(folder: str) -> dict[str, torch.Tensor]:
    return load_model(folder, dtype="float32", device="cpu").state_dict()


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return float(sum((value - b[name]).double().square().sum() for name, value in a.items())) ** 0.5


def measure(
    folder: Path, size: Size, device: str, every: list[int], seeds: list[int]
) -> Iterator[dict[str, Any]]:
    """One row for the offline run and one for each R."""
    kinds: list[int | None] = [None, *every]
    runs: dict[int | None, list[Run]] = {kind: [] for kind in kinds}
    quality: dict[Any, list[dict[str, float]]] = {kind: [] for kind in ["start", *kinds]}
    gates = []
    for number, seed in enumerate(seeds):
        bench = Bench(folder / str(seed), size, device, seed)
        gates.append(gate(bench))
        cache = bench.score(bench.roll_out("rollouts", size.prompts), "cache")
        shift = number % len(kinds)
        for kind in kinds[shift:] + kinds[:shift]:
            runs[kind].append(bench.run(cache, f"run-{kind}", kind))
        quality["start"].append(bench.quality(bench.student, "start"))
        for kind in kinds:
            quality[kind].append(bench.quality(runs[kind][-1].out, str(kind)))
    setting = {key: value for key, value in asdict(size).items() if key not in ("seeds", "every")}
    for kind in kinds:
        yield {
            "every": kind,
            "seeds": seeds,
            **setting,
            "renewed": runs[kind][0].renewed,
            **timing(runs[kind], runs[None], size.steps),
            "quality": by_name(quality[kind]),
            "start": by_name(quality["start"]),
            "gate": by_name(gates),
        }


def by_name(results: list[dict[str, float]]) -> dict[str, list[float]]:
    """The values of all seeds, by name."""
    return {name: [each[name] for each in results] for name in results[0]}


def timing(runs: list[Run], offline: list[Run], steps: int) -> dict[str, Any]:
    """Medians over seeds; a ratio compares a run with the offline run of the same seed."""
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
    parser.add_argument(
        "--every", nargs="+", type=int, help="R of the live runs; default: those of the size"
    )
    parser.add_argument("--seeds", nargs="+", type=int, help="default: those of the size")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder whose offline_live.jsonl is written")
    args = parser.parse_args(arguments)
    args.size = "quick" if args.quick else args.size
    size = SIZES[args.size]
    args.every = list(size.every) if args.every is None else args.every
    args.seeds = list(size.seeds) if args.seeds is None else args.seeds
    if min(args.every) < 1 or min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        parser.error("expected --every of at least 1, and distinct --seeds")
    if uneven := [r for r in args.every if size.epoch % r and r % size.epoch]:
        parser.error(
            f"--every: found {uneven[0]}; expected a divisor or a multiple of the {size.epoch} "
            "steps of an epoch, so that no window spans two epochs"
        )
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    flags = ["--quick"] if args.quick else ["--size", args.size]
    flags += ["--every", *args.every, "--seeds", *args.seeds]
    flags += ["--device", args.device, "--threads", args.threads]
    environment = {
        "question": "offline_live",
        "size": args.size,
        "transformers": transformers.__version__,
        **identity(torch.device(args.device), None),
        "command": " ".join(["python -m benchmarks.offline_live", *map(str, flags)]),
    }
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        run_settings = (Path(folder), SIZES[args.size], args.device, args.every, args.seeds)
        try:
            rows = [{**environment, **row} for row in measure(*run_settings)]
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
