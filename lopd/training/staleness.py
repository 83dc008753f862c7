"""Warnings if a low effective sample size (ESS) shows that the cache has gone stale.

The ESS of one step is noisy: a single token can decide it. Warnings therefore go by the median over
a window of steps. The warnings, the window and the lowest ESS are entries of the log history in the
Trainer's state. Checkpoints contain it, so a resumed run continues with them.
"""

import logging
import statistics
from typing import Any

from transformers import TrainerCallback

from lopd.training.holdout import History
from lopd.training.metrics import MetricsAccumulator

LOG = logging.getLogger(__name__)
WINDOW = 20  # steps over which the median is taken


class StalenessMonitor(TrainerCallback):
    """Tracks the lowest ESS of a step, and warns if the median of the last steps is below a limit.

    Args:
        metrics: of the run.
        limit: lowest median without a warning.
        every: steps between two warnings, at least.
    """

    def __init__(self, metrics: MetricsAccumulator, limit: float, every: int) -> None:
        self.metrics, self.limit, self.every = metrics, limit, every

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the step's effective sample size, and warn if the window's is low."""
        ess, step, history = self.metrics.step_ess(), state.global_step, state.log_history
        if ess is not None:
            _update_lowest(history, ess, step)
            window = _update_window(history, ess, step)
            ess = statistics.median(window)
            if len(window) < WINDOW or ess >= self.limit:
                return
        warned = [entry["step"] for entry in history if "stale_ess" in entry]
        if warned and (ess is None or step - warned[-1] < self.every):
            return
        history.append({"stale_ess": ess, "step": step})
        if ess is None:
            text = (
                "the log-ratio to the rollout policy is unknown, so a stale cache will not be "
                "noticed; set --stale-ess 0 to disable this check"
            )
        else:
            text = (
                f"the student has moved away from the rollouts: as samples of the student, the "
                f"tokens of a step are worth {100 * ess:.3g} % of their number (median of the last "
                f"{WINDOW} steps), below --stale-ess {self.limit:g}. Whether it still improves, "
                "--holdout shows; if it does not, roll out and score again with this student, or "
                "lower the learning rate"
            )
        LOG.warning(f"step {step}: {text}")


def _update_window(history: Any, ess: float, step: int) -> list[float]:
    """The ESS of the last steps, this one included."""
    entry = next((entry for entry in history if "ess_window" in entry), None)
    if entry is None:
        entry = {"ess_window": []}
        history.append(entry)
    entry.update(ess_window=[*entry["ess_window"], ess][-WINDOW:], step=step)
    return list(entry["ess_window"])


def _update_lowest(history: Any, ess: float, step: int) -> None:
    entry = next((entry for entry in history if "lowest_ess" in entry), None)
    if entry is None:
        history.append({"lowest_ess": ess, "step": step})
    elif ess < entry["lowest_ess"]:
        entry.update(lowest_ess=ess, step=step)


def stale_summary(limit: float, history: History) -> dict[str, Any]:
    """The manifest's `stale`: the warnings, and the lowest ESS of all steps.

    Args:
        limit: the `limit` of the monitor; 0 if there was none.
        history: log history of the Trainer's state.
    """
    entries = [(entry["stale_ess"], entry["step"]) for entry in history if "stale_ess" in entry]
    warnings = [(ess, step) for ess, step in entries if ess is not None]
    # A checkpoint of an earlier version has no lowest ESS, only warnings.
    lows = [(entry["lowest_ess"], entry["step"]) for entry in history if "lowest_ess" in entry]
    lowest = min(lows + warnings, default=None)
    return {
        "limit": limit,
        "watched": bool(limit) and len(warnings) == len(entries),
        "warnings": len(warnings),
        "first": {"ess": warnings[0][0], "step": warnings[0][1]} if warnings else None,
        "lowest": {"ess": lowest[0], "step": lowest[1]} if lowest else None,
    }
