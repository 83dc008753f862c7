"""Warnings when the effective sample size says that the cache has gone stale."""

import sys
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from lopd.training.holdout import History
from lopd.training.metrics import StatsWindow


class StaleWatch(TrainerCallback):
    """Warns where a step's tokens are worth less than `limit` of as many fresh ones.

    Once when it happens first, then every `every` steps for as long as it does.
    """

    def __init__(self, window: StatsWindow, limit: float, every: int) -> None:
        self.window, self.limit, self.every = window, limit, every

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        share, number = self.window.step_ess(), state.global_step
        if share is not None and share >= self.limit:
            return
        told = [entry["step"] for entry in state.log_history if "stale_ess" in entry]
        if told and (share is None or number - told[-1] < self.every):
            return
        state.log_history.append({"stale_ess": share, "step": number})
        if share is None:
            text = (
                "the log-ratio to the rollout policy is not known, so a cache that goes stale will "
                "not be noticed; --stale_ess 0 says that this is meant"
            )
        else:
            text = (
                f"the cache has gone stale: as samples of the student its tokens are worth "
                f"{100 * share:.3g} % of their number, below --stale_ess {self.limit:g}; roll out "
                "and score again with this student, or lower the learning rate"
            )
        tqdm.write(f"step {number}: {text}", file=sys.stderr)


def stale_summary(limit: float, history: History) -> dict[str, Any]:
    """What the manifest says of the warnings."""
    found = [(e["stale_ess"], e["step"]) for e in history if "stale_ess" in e]
    warned = [(share, number) for share, number in found if share is not None]
    return {
        "limit": limit,
        "watched": bool(limit) and len(warned) == len(found),
        "warnings": len(warned),
        "first": {"ess": warned[0][0], "step": warned[0][1]} if warned else None,
        "lowest": dict(zip(("ess", "step"), min(warned), strict=True)) if warned else None,
    }
