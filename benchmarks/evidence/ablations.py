"""One setting of distillation changed at a time, against the demo's default."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.evidence.frame import SEEDS, Cell, Part, Row, Shared
from benchmarks.evidence.intervals import (
    FEWEST,
    NO_ROWS,
    Values,
    better,
    both,
    columns,
    compare,
    equal,
    mean_log_kl,
    sorted_by,
)
from benchmarks.evidence.runs import more_fine_tuning, quality, scored
from lopd.provenance.manifest import MANIFEST_NAME
from lopd.stages.demo.toy import OPD_SETTINGS, PROMPTS, TOP_K

STEPS = 200
RATES = (1.0, 2.0)  # factors of the demo's learning rate
SAMPLED: dict[str, Any] = {"objective": "policy_gradient"}
# The packed lists ended higher on all of the first seeds, and the coarser compact ones did not.
MORE_SEEDS, OF_MORE_SEEDS = (5, 6, 7, 8, 9), ("default", "packed", "compact")
FROZEN = 256  # prompts of the small frozen set
HELD_OUT = 64  # of these
LONG: dict[str, Any] = {
    "max_steps": 400,
    "lr_scheduler_type": "constant_with_warmup",
    "min_lr_ratio": 0.0,
    "holdout": HELD_OUT,
    "eval_steps": 20,
}
STOP: dict[str, Any] = {"keep_best": True, "patience": 5}


@dataclass(frozen=True)
class Variant:
    """What one run changes, and the variant that it is compared with."""

    words: str
    distilling: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    scoring: Mapping[str, Any] = field(default_factory=dict)
    rates: tuple[float, ...] = (1.0,)
    minutes: float = 0.2
    base: str = "default"
    fine_tuning: bool = False


def _prompts(count: int, answers: int, **settings: Any) -> Variant:
    total = "as many answers" if count * answers == PROMPTS["opd"] else "fewer answers"
    return Variant(
        f"{count:,} prompts, answers to each: {answers} ({total})",
        sampling={"limit": count, "num_samples": answers},
        minutes=0.3,
        **settings,
    )


def _importance(words: str, **settings: Any) -> Variant:
    return Variant(words, {**SAMPLED, **settings}, base="sampled")


VARIANTS: dict[str, Variant] = {
    "default": Variant(f"default: lists of {TOP_K}, reverse KL, 8,000 frozen answers", rates=RATES),
    "control": Variant(
        "control: as many steps of more fine-tuning", rates=RATES, minutes=0.15, fine_tuning=True
    ),
    "forward": Variant("forward KL", {"objective": "forward_kl"}, rates=RATES),
    "jsd": Variant("JSD", {"objective": "jsd"}, rates=RATES),
    "prompts-2000x4": _prompts(2000, 4),
    "prompts-500x16": _prompts(500, 16),
    "prompts-2000x1": _prompts(2000, 1),
    "prompts-500x1": _prompts(500, 1),
    "temperature-0.7": Variant(
        "rollouts at temperature 0.7", sampling={"temperature": 0.7}, minutes=0.3
    ),
    "temperature-1.3": Variant(
        "rollouts at temperature 1.3", sampling={"temperature": 1.3}, minutes=0.3
    ),
    "refresh-50": Variant("rollouts renewed every 50 steps", {"refresh_every": 50}, minutes=0.45),
    "refresh-1": Variant("live: renewed every step", {"refresh_every": 1}, minutes=0.5),
    "packed": Variant("codec packed", scoring={"codec": "packed"}, minutes=0.25),
    "compact": Variant("codec compact", scoring={"codec": "compact"}, minutes=0.25),
    "sampled": Variant("sampled token", SAMPLED),
    "token": _importance("sampled token, ratio of each token", importance="token"),
    "truncated": _importance(
        "sampled token, ratio of each token, at most 1",
        importance="token_truncated",
        importance_cap=1.0,
    ),
    "sequence": _importance(
        "sampled token, ratio of the answer, at most 2", importance="sequence", importance_cap=2.0
    ),
    "ppo": _importance("sampled token, PPO's clip at 0.2", clip_range=0.2),
    "frozen": Variant(
        f"{FROZEN} frozen answers, {LONG['max_steps']} steps",
        LONG,
        {"limit": FROZEN},
        minutes=0.45,
    ),
    "frozen-stop": Variant(
        "the same, stopped by the held-out KL",
        LONG | STOP,
        {"limit": FROZEN},
        minutes=0.3,
        base="frozen",
    ),
    "frozen-sampled": Variant(
        f"sampled token, {FROZEN} frozen answers, {LONG['max_steps']} steps",
        LONG | SAMPLED,
        {"limit": FROZEN},
        minutes=0.45,
        base="sampled",
    ),
    "frozen-sampled-stop": Variant(
        "the same, stopped by the held-out KL",
        LONG | SAMPLED | STOP,
        {"limit": FROZEN},
        minutes=0.3,
        base="frozen-sampled",
    ),
}


@dataclass(frozen=True)
class Run:
    """The student after one variant at one learning rate."""

    variant: str
    factor: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.variant}/lr{self.factor:g}/seed{self.seed}"

    @property
    def folder(self) -> str:
        return f"ablation-{self.variant}-lr{self.factor:g}"

    @property
    def minutes(self) -> float:
        return VARIANTS[self.variant].minutes

    @property
    def results(self) -> Sequence[str]:
        return [self.folder]

    def measure(self, shared: Shared) -> Row:
        variant = VARIANTS[self.variant]
        row: Row = {"variant": self.variant, "factor": self.factor}
        if variant.fine_tuning:
            more_fine_tuning(shared, self.folder, self.factor, max_steps=STEPS)
            return row | {"steps": STEPS} | quality(shared, self.folder)
        cache = shared.cache(TOP_K)
        if variant.sampling or variant.scoring:
            made = _name(variant.sampling, variant.scoring)
            cache = scored(shared, made, sampling=variant.sampling, scoring=variant.scoring)
        rate = self.factor * OPD_SETTINGS["learning_rate"]
        settings = {"max_steps": STEPS, **variant.distilling}
        if "refresh_every" in settings:
            settings["teacher"] = shared.demo.path("teacher")
        found = shared.distil(self.folder, cache=cache, learning_rate=rate, **settings)
        row |= {"steps": settings["max_steps"], "kl": found["kl"], "sampled": found["sampled"]}
        if "holdout" in settings:
            manifest = Path(shared.demo.path(self.folder)) / MANIFEST_NAME
            row["holdout"] = json.loads(manifest.read_text(encoding="utf-8"))["holdout"]
        return row


def _name(*settings: Mapping[str, Any]) -> str:
    """A folder's name from changed settings, so that variants with the same ones share it."""
    return "-".join(f"{key}-{value}" for each in settings for key, value in each.items())


def cells() -> Sequence[Cell]:
    every = [
        Run(name, factor, seed)
        for seed in SEEDS
        for name, variant in VARIANTS.items()
        for factor in variant.rates
    ]
    return [*every, *(Run(name, 1.0, seed) for seed in MORE_SEEDS for name in OF_MORE_SEEDS)]


class Runs:
    """The measured runs; a variant is compared on the seeds that it and its base share."""

    def __init__(self, rows: list[Row]) -> None:
        self._found: dict[tuple[str, float], Values] = {}
        for row in rows:
            self._found.setdefault((row["variant"], row["factor"]), {})[row["seed"]] = row

    def pairs(self, name: str, base: str) -> tuple[Values, Values] | None:
        """Rows of a variant and of its base, each at the best of the rates that both have.

        Only rates that the most seeds have are compared, on the seeds that all of these have.
        """
        seeds_of = {
            factor: set(both(*(self._found.get((of, factor), {}) for of in (name, base))))
            for factor in set(VARIANTS[name].rates) & set(VARIANTS[base].rates)
        }
        most = max(map(len, seeds_of.values()), default=0)
        factors = [factor for factor in sorted(seeds_of) if len(seeds_of[factor]) == most]
        seeds = set.intersection(*(seeds_of[factor] for factor in factors)) if most else set()
        if not seeds:
            return None

        def best(of: str) -> Values:
            chosen = [{s: self._found[of, factor][s] for s in sorted(seeds)} for factor in factors]
            return min(chosen, key=mean_log_kl)

        return best(name), best(base)


def table(rows: list[Row]) -> str:
    """Markdown: each variant against its base, at their best common rate, on common seeds."""
    runs = Runs(rows)
    lines = [
        "| variant | against | seeds | KL | KL ratio | pass@1 | minus the other's, points "
        "| again with `--again --only` |",
        f"| --- | --- |{' ---: |' * 5} --- |",
    ]
    for name, variant in VARIANTS.items():
        found = runs.pairs(name, variant.base)
        if found is None:
            continue
        ours, base = found
        cells = ["1", "0"] if name == variant.base else columns(compare(ours, base))
        base_name = "" if name == variant.base else variant.base
        lines.append(
            f"| {variant.words}{_result_steps(variant, ours)} | {base_name} | {len(ours)} "
            f"| {math.exp(mean_log_kl(ours)):.4f} | {cells[0]} "
            f"| {mean(row['sampled'] for row in ours.values()):.3f} | {cells[1]} "
            f"| `'{name}/*'` |"
        )
    return "\n".join([*lines, "", outcomes(runs)]) if len(lines) > 2 else NO_ROWS


def outcomes(runs: Runs) -> str:
    """Every variant against its base, by the rule of the claims, in words."""
    compared = {
        f"`{name}`": compare(*found)
        for name, variant in VARIANTS.items()
        if name != variant.base and (found := runs.pairs(name, variant.base)) is not None
    }
    kl = sorted_by({name: better(each) for name, each in compared.items()}, "lower", "higher")
    same = {name: equal(each) for name, each in compared.items()}
    points = sorted_by(same, "equal within the margin", "unequal")
    if not kl:
        return f"Fewer than {FEWEST} seeds so far, so that nothing is decided."
    return (
        f"By the whole interval, KL is {kl}. Pass@1 is {points}. These are {len(compared)} "
        "comparisons, each by itself: of twenty intervals one is expected to miss."
    )


def _result_steps(variant: Variant, rows: Values) -> str:
    """The steps whose weights are the results of runs that keep the best ones."""
    if "keep_best" not in variant.distilling:
        return ""
    steps = sorted(row["holdout"]["result_step"] for row in rows.values())
    return f" (result of step {steps[0]} to {steps[-1]})"


PART = Part("ablations", cells, tables={"ablations": table}, figures={})
