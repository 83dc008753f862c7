"""Cells of `benchmarks.objectives`: one run or one measurement each, on models of the demo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.evidence.frame import SEEDS, Cell, Shared
from lopd.config.objective import Objective
from lopd.models.load import load_model
from lopd.stages.demo.toy import OPD_SETTINGS
from lopd.store import TeacherCache
from lopd.training.batch import Collator, SequenceDataset
from lopd.training.step import step

LISTS = (2, 4, 8)
FACTORS = (1.0, 0.5, 2.0)  # of the demo's learning rate, in the order of the runs
STEPS = 200  # half of the demo's, so that the grid takes half an hour
FORMS: dict[str, dict[str, Any]] = {
    "bucket": {"support": "list"},
    "list+sampled": {"support": "list+sampled"},
    "unbiased": {"tail": "unbiased"},
    "generalized": {"tail": "generalized", "support": "list"},
}
EXACT = "list+sampled"  # the default of `lopd distill`
LEFT_OUT: dict[str, dict[str, Any]] = {  # the same loss, with gradients left out
    "dense-share": {"dense_share": 0.15},
    "tolerance": {"tolerance": 1e-3},
}
SAMPLED = "sampled token"
WHOLE = "whole vocabulary"
BATCHES = 40  # whose gradients are compared


@dataclass(frozen=True)
class Start:
    """The student before it is distilled."""

    seed: int
    minutes: ClassVar[float] = 0.03

    @property
    def name(self) -> str:
        return f"start/seed{self.seed}"

    @property
    def results(self) -> Sequence[str]:
        return ["eval/sft"]

    def measure(self, shared: Shared) -> dict[str, Any]:
        return {"steps": STEPS, **shared.demo.evaluate("sft")}


@dataclass(frozen=True)
class Run:
    """The student distilled with one form, list length and learning rate."""

    form: str
    k: int
    factor: float  # of the demo's learning rate
    seed: int
    minutes: ClassVar[float] = 0.17

    @property
    def name(self) -> str:
        return f"{self.form}/k{self.k}/lr{self.factor:g}/seed{self.seed}"

    @property
    def folder(self) -> str:
        return f"{self.form}-k{self.k}-lr{self.factor:g}".replace(" ", "-")

    @property
    def results(self) -> Sequence[str]:
        return [self.folder]

    def measure(self, shared: Shared) -> dict[str, Any]:
        found = shared.distil(
            self.folder,
            cache=shared.cache(self.k),
            max_steps=STEPS,
            learning_rate=self.factor * OPD_SETTINGS["learning_rate"],
            **{**FORMS, **LEFT_OUT}[self.form],
        )
        setting = {"form": self.form, "k": self.k, "factor": self.factor}
        return {"steps": STEPS, **setting, **found}


@dataclass(frozen=True)
class Gradients:
    """Bias and noise of each form's gradient, at the start or at the end of a run.

    The gradient g of a batch is that of the mean loss with respect to all weights, and G that of
    the KL over the whole vocabulary, from full lists, on the same batch; <> is the mean over
    batches. `bias` is |<g - G>| / |<G>|, and `error` what that is on average for a form without
    bias, because the batches are few. `noise` is sqrt(<|g - <g>|^2>) / |<G>|; that of the whole
    vocabulary comes from the choice of the batch alone.
    """

    at: str
    seed: int
    minutes: ClassVar[float] = 0.9

    @property
    def name(self) -> str:
        return f"gradients/{self.at}/seed{self.seed}"

    @property
    def results(self) -> Sequence[str]:
        return []

    def measure(self, shared: Shared) -> dict[str, Any]:
        folder = "sft"
        if self.at == "end":
            run = Run("bucket", LISTS[-1], 1.0, self.seed)
            run.measure(shared)
            folder = run.folder
        model = load_model(shared.demo.path(folder), dtype="float32", device="cpu").train()

        def gradients(k: int, **options: Any) -> Tensor:
            return _gradients(model, shared.cache(k), options)

        whole = gradients(model.config.vocab_size)
        forms = {
            f"{form}/k{k}": _compared(gradients(k, **options), whole)
            for k in LISTS
            for form, options in FORMS.items()
        }
        forms[SAMPLED] = _compared(gradients(LISTS[0], objective="policy_gradient"), whole)
        forms[WHOLE] = _compared(whole, whole)
        size = float(whole.mean(0).norm())
        return {"steps": STEPS, "at": self.at, "gradients": forms, "norm": size}


def cells() -> Sequence[Cell]:
    """All cells; those at the demo's learning rate come first."""
    grid = [
        [Run(form, k, factor, seed) for seed in SEEDS for k in LISTS for form in FORMS]
        for factor in FACTORS
    ]
    starts = [Start(seed) for seed in SEEDS]
    left_out = [Run(form, LISTS[-1], 1.0, seed) for form in LEFT_OUT for seed in SEEDS]
    gradients = [Gradients(at, seed) for seed in SEEDS for at in ("start", "end")]
    return [*starts, *grid[0], *left_out, *gradients, *grid[1], *grid[2]]


def _compared(gradients: Tensor, whole: Tensor) -> dict[str, float]:
    size, batches = whole.mean(0).norm(), len(whole)
    apart = gradients - whole

    def spread(x: Tensor) -> Tensor:
        return (x - x.mean(0)).square().sum(1).mean().sqrt()

    return {
        "bias": float(apart.mean(0).norm() / size),
        "error": float(spread(apart) / size) / (batches - 1) ** 0.5,
        "noise": float(spread(gradients) / size),
    }


def _gradients(model: Any, path: str, options: dict[str, Any]) -> Tensor:
    """Gradients [batches, weights] of the mean loss; the batches are the same for every form."""
    tail = options.get("tail", "bucket")
    objective = Objective(options.get("objective", "reverse_kl"), tail=tail)
    cache = TeacherCache.open(path, support=options.get("support", "list"))
    data, collate, size = SequenceDataset(cache), Collator(), OPD_SETTINGS["batch_size"]
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    gradients = []
    for part in order[: BATCHES * size].split(size):
        batch = collate(data.__getitems__(part.tolist()))
        model.zero_grad()
        step(model, batch, objective, float(batch["row_weights"].sum()))[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    return torch.stack(gradients)
