"""What watches a run: a cache that has gone stale, and sequences kept out of training.

What they find stands in the log history of the Trainer's state, which its checkpoints hold, so
that a resumed run knows what the interrupted one had found.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lopd.training.batch import Collator, Part, lengths_of, to_device
from lopd.training.metrics import Gather, alone
from lopd.training.objective import Objective
from lopd.training.sampler import split
from lopd.training.step import check_finite, step

History = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Holdout:
    """Sequences kept out of training, and what becomes of their KL."""

    dataset: Part
    objective: Objective
    eval_steps: int
    keep_best: bool = False
    patience: int = 0  # evaluations; 0 never stops


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
    gather: Gather = alone,
) -> float:
    """Mean of the objective over the held-out sequences, dropout off; draws no random number.

    Processes share the forward passes in turn. Each makes as many, since a sharded model needs all
    of them; a surplus one is not counted.

    Raises:
        DataError: it is not finite; names the sequences.
    """
    device, training = next(model.parameters()).device, model.training
    parts = split(lengths_of(holdout.dataset), batch_size, max_tokens)
    world_size = len(gather(None))
    total, weight = 0.0, 0.0
    model.eval()
    for place in range(rank, rank + -(-len(parts) // world_size) * world_size, world_size):
        items: Any = holdout.dataset.__getitems__([*parts[place % len(parts)]])
        batch = to_device(collate(items), device)
        loss, _ = step(model, batch, holdout.objective, 1.0)
        check_finite("held-out loss", loss, [batch], step_number)
        if place < len(parts):
            total += loss.item()
            weight += batch["row_weights"].sum().item()
    model.train(training)
    totals, weights = zip(*gather((total, weight)), strict=True)
    return sum(totals) / sum(weights)


def evaluations(history: History) -> list[tuple[float, int]]:
    """(held-out KL, step) of every evaluation, in order."""
    return [(entry["holdout_kl"], entry["step"]) for entry in history if "holdout_kl" in entry]


def exhausted(history: History, patience: int) -> bool:
    """Whether the last `patience` evaluations brought no improvement."""
    found = evaluations(history)
    return bool(patience and found) and len(found) - 1 - found.index(min(found)) >= patience


def holdout_summary(holdout: Holdout, history: History, last_step: int) -> dict[str, Any]:
    """What the manifest says of the held-out sequences."""
    found = evaluations(history)
    best, last = min(found), found[-1]
    return {
        "sequences": len(holdout.dataset),
        "objective": holdout.objective.name,
        "best": {"kl": best[0], "step": best[1]},
        "last": {"kl": last[0], "step": last[1]},
        "result_step": best[1] if holdout.keep_best else last_step,
        "stopped_early": exhausted(history, holdout.patience),
    }
