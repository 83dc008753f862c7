"""Evaluation on sequences held out of training, early stopping, and the choice of the best step.

The evaluations are entries of the log history in the Trainer's state. Checkpoints contain it, so a
resumed run continues with them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lopd.config.objective import SPARSE, Objective
from lopd.models.head import eval_mode
from lopd.training.batch import Collator, SequenceDataset, Subset, lengths_of, to_device
from lopd.training.metrics import OF_TEACHER, Gather, gather_single
from lopd.training.sampler import split
from lopd.training.step import check_finite, step

HOLDOUT = "holdout_kl"
History = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Holdout:
    """Sequences held out of training, and how they are used."""

    dataset: SequenceDataset | Subset
    objective: Objective
    eval_steps: int  # optimizer steps between evaluations
    keep_best: bool = False  # the checkpoint with the lowest KL is the result of the run
    patience: int = 0  # evaluations without improvement before training stops; 0 disables


@torch.no_grad()
def holdout_kl(
    model: Any,
    holdout: Holdout,
    collate: Collator,
    batch_size: int,
    step_number: int,
    *,
    max_tokens: int | None = None,
    rank: int = 0,
    gather: Gather = gather_single,
) -> dict[str, float]:
    """Means of the objective over the held-out sequences, without dropout or random numbers.

    Weights that came with the rollouts do not count, so that runs can be compared.
    The processes take the micro-batches in turn. All make the same number of forward passes, as a
    sharded model needs; repeated micro-batches are not counted.

    Args:
        model: the model to evaluate.
        holdout: the sequences.
        collate: makes the micro-batches.
        batch_size: sequences per micro-batch.
        step_number: the optimizer step, for error messages.
        max_tokens: tokens per pack; None for padded micro-batches.
        rank: number of this process.
        gather: as in `MetricsAccumulator`.

    Returns:
        `holdout_kl`, and with several teachers `holdout_kl/NAME` over the sequences of each.

    Raises:
        DataError: the mean is not finite; the message names the sequences.
    """
    device, collate = next(model.parameters()).device, replace(collate, weighted=False)
    micro_batches = split(lengths_of(holdout.dataset), batch_size, max_tokens)
    count, world_size = len(micro_batches), len(gather(None))
    sums: dict[str, Any] = {HOLDOUT: torch.zeros(2)}  # of values and of their weights
    with eval_mode(model):
        for number in range(rank, rank + -(-count // world_size) * world_size, world_size):
            items: Any = holdout.dataset.__getitems__([*micro_batches[number % count]])
            batch = to_device(collate(items), device)
            loss, stats = step(model, batch, holdout.objective, 1.0)
            check_finite("held-out loss", loss, [batch], step_number)
            if number < count:
                found = {HOLDOUT: torch.stack([loss, batch["row_weights"].sum().to(loss)])}
                found |= {
                    name.replace(OF_TEACHER, f"{HOLDOUT}/"): pair
                    for name, pair in stats.items()
                    if name.startswith(OF_TEACHER)
                }
                for name, pair in found.items():
                    sums[name] = sums.get(name, 0) + pair.double().cpu()
    every = gather(sums)
    return {
        name: (total / weight).item()
        for name in sorted({name for process in every for name in process})
        for total, weight in [sum(process[name] for process in every if name in process)]
    }


def evaluations(history: History) -> list[tuple[float, int]]:
    """(held-out KL, step) of each evaluation after a step, in order."""
    return [(kl, step) for kl, step in _all_evaluations(history) if step]


def evaluated_at_start(history: History) -> float | None:
    """Held-out KL before the first step; None in a run that an earlier version began."""
    return next((kl for kl, step in _all_evaluations(history) if not step), None)


def _all_evaluations(history: History) -> list[tuple[float, int]]:
    return [(entry["holdout_kl"], entry["step"]) for entry in history if "holdout_kl" in entry]


def evaluation_line(history: History, objective: Objective) -> str:
    """The last evaluation in words, compared with the first and the best."""
    (kl, step), start = _all_evaluations(history)[-1], evaluated_at_start(history)
    words = f"held-out {objective.name} {sign(objective)}{kl:.4g}"
    compared = [] if start is None or not step else [f"{start:.4g} at the start"]
    if results := evaluations(history):
        best, at = min(results)
        if at != step:
            compared.append(f"best {best:.4g} at step {at}")
        elif start is None or kl < start:
            compared.append("the best so far")
    return f"{words} ({', '.join(compared)})" if compared else words


def sign(objective: Objective) -> str:
    """`>=` for values that are lower bounds of the divergence over the whole vocabulary.

    All ids outside a list count as one outcome, which can only lower a divergence.
    """
    return ">= " if objective.name in SPARSE and objective.tail == "bucket" else ""


def exhausted(history: History, patience: int) -> bool:
    """Whether the last `patience` evaluations brought no improvement; never if patience is 0."""
    results = evaluations(history)
    return bool(patience and results) and (
        len(results) - 1 - results.index(min(results)) >= patience
    )


def holdout_summary(holdout: Holdout, history: History, last_step: int) -> dict[str, Any]:
    """The manifest's `holdout`.

    Args:
        holdout: the held-out sequences.
        history: log history of the Trainer's state, with at least one evaluation.
        last_step: the last optimizer step of the run.
    """
    results = evaluations(history)
    best, last = min(results), results[-1]
    return {
        "sequences": len(holdout.dataset),
        "objective": holdout.objective.name,
        "start": evaluated_at_start(history),
        "best": {"kl": best[0], "step": best[1]},
        "last": {"kl": last[0], "step": last[1]},
        "result_step": best[1] if holdout.keep_best else last_step,
        "stopped_early": exhausted(history, holdout.patience),
    }
