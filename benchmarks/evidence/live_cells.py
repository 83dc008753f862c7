"""Cells of the part `live`: one student distilled offline and with a live teacher, timed."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np

from benchmarks.evidence.frame import SEEDS, Cell, Row, Shared
from benchmarks.evidence.runs import more_fine_tuning
from lopd.provenance import read_manifest
from lopd.stages import distill, rollout, score
from lopd.stages.demo.driver import DemoStage
from lopd.store import TeacherCache

STEPS = 250  # two passes over the 8000 prompts; the paper's runs make 2.2
PARTS = ("generation", "scoring", "training")
LISTS, SAMPLED = "lists", "sampled"
NEW, CONTROL, WARM_UP = "timed-new", "timed-control", "timed-warm-up"  # folders
OBJECTIVES: dict[str, dict[str, Any]] = {LISTS: {}, SAMPLED: {"objective": "policy_gradient"}}


@dataclass(frozen=True)
class Ends:
    """Offline and live with one objective: seconds and quality of both, and drift.

    A short live run, which is not timed, comes first; then the offline run on even seeds, and the
    live one on odd seeds.
    """

    objective: str
    seed: int
    minutes: ClassVar[float] = 1.4

    @property
    def name(self) -> str:
        return f"{self.objective}/seed{self.seed}"

    @property
    def names(self) -> list[str]:
        """The folders of what is timed: the parts of the offline run, and the live one."""
        return [f"timed-{self.objective}-{part}" for part in (*PARTS, "live")]

    @property
    def results(self) -> Sequence[str]:
        rollouts, *_, trained, _ = self.names
        drifts = [f"{trained}-on-{each}" for each in (rollouts, NEW)]
        control = [CONTROL] if self.objective == LISTS else []
        return [*self.names, *drifts, *control, WARM_UP]

    def measure(self, shared: Shared) -> Row:
        demo, names = shared.demo, self.names
        rollouts = demo.rollouts("", names[0], "opd").config
        scores = replace(shared.scores.config, rollouts=rollouts.out, out=demo.path(names[1]))
        offline = replace(
            shared.distillation.config,
            cache=scores.out,
            out=demo.path(names[2]),
            max_steps=STEPS,
            **OBJECTIVES[self.objective],
        )
        teacher = demo.path("teacher")
        # The live run takes its prompts from a cache: one like `scores`, which may come later.
        cache = shared.cache(scores.k)
        live = replace(
            offline, cache=cache, out=demo.path(names[3]), refresh_every=1, teacher=teacher
        )
        distill.main(replace(live, out=demo.path(WARM_UP), max_steps=2))  # imports, caches
        works: dict[str, tuple[Any, Any]] = {
            "generation": (rollout, rollouts), "scoring": (score, scores),
            "training": (distill, offline), "live": (distill, live),
        }  # fmt: skip
        order = list(works) if self.seed % 2 == 0 else ["live", *PARTS]
        seconds = {name: timed(partial(works[name][0].main, works[name][1])) for name in order}
        whole = seconds.pop("live")
        logged = read_manifest(live.out).raw["seconds"]
        drift = {
            "trained on": _drift(shared, names[2], names[0]),
            "new": _drift(shared, names[2], NEW, prompts="eval"),
        }
        quality = {
            "start": demo.evaluate("sft"),
            "offline": demo.evaluate(names[2]),
            "live": demo.evaluate(names[3]),
        }
        if self.objective == LISTS:
            more_fine_tuning(shared, CONTROL, max_steps=STEPS)
            quality["control"] = demo.evaluate(CONTROL)
        return {
            "objective": self.objective,
            "steps": STEPS,
            "first": order[0],
            "offline": {part: seconds[part] for part in PARTS},
            "live": {**whole, "parts": logged},
            "drift": drift,
            "quality": quality,
        }


def timed(work: Callable[[], object]) -> dict[str, float]:
    """Seconds of the clock, and CPU seconds of this process."""
    gc.collect()  # trainers are reference cycles
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return {
        "clock": round(time.perf_counter() - clock, 3),
        "processor": round(time.process_time() - processor, 3),
    }


def _drift(shared: Shared, model: str, rollouts: str, prompts: str | None = None) -> Row:
    """p / r over tokens: mean, deviation, share within 1/4 of 1, ESS; and E[log r - log p]."""
    demo = shared.demo
    if prompts is not None:
        DemoStage("", "", rollout, demo.rollouts("", rollouts, prompts).config).run()
    config = replace(
        shared.scores.config,
        teacher=demo.path(model),
        rollouts=demo.path(rollouts),
        out=demo.path(f"{model}-on-{rollouts}"),
    )
    shutil.rmtree(config.out, ignore_errors=True)
    score.main(config)
    scored = TeacherCache.open(config.out, support="list")
    logs = np.concatenate(
        [each.teacher_logprobs - each.rollout.rollout_logprobs for each in scored]
    ).astype(np.float64)
    weights = np.exp(logs)
    return {
        "mean": float(weights.mean()),
        "deviation": float(weights.std()),
        "within a quarter": float((np.abs(weights - 1.0) <= 0.25).mean()),
        "ess": float(weights.mean() ** 2 / np.square(weights).mean()),
        "kl": float(-logs.mean()),
        "tokens": len(logs),
    }


def cells() -> Sequence[Cell]:
    """All cells, seed by seed."""
    return [Ends(objective, seed) for seed in SEEDS for objective in OBJECTIVES]
