"""Time that a run with refreshed rollouts spends on generation, scoring and updates."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import TrainerCallback

TIMINGS = ("generation_seconds", "scoring_seconds", "update_seconds")


def now(device: torch.device) -> float:
    """The time in seconds, after the work queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class UpdateTimer(TrainerCallback):
    """Records the seconds from a step's first forward to its update, every `every` steps."""

    def __init__(self, every: int) -> None:
        self.every, self.seconds, self.steps = every, 0.0, 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.began = now(args.device)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock; at the end of a window, record it."""
        self.seconds, self.steps = self.seconds + now(args.device) - self.began, self.steps + 1
        if state.global_step % self.every == 0:
            self._record(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record an unfinished window."""
        if self.steps:
            self._record(state)

    def _record(self, state: Any) -> None:
        seconds, steps = {"update_seconds": self.seconds}, {"update_steps": self.steps}
        state.log_history.append({**seconds, **steps, "step": state.global_step})
        self.seconds, self.steps = 0.0, 0


def refresh_summary(every: int, history: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The manifest's `refresh` and `seconds`.

    Updates between the last record before an interruption and the checkpoint are not counted.

    Args:
        every: optimizer steps per window.
        history: log history of the Trainer's state.
    """

    def total(name: str) -> Any:
        return sum(entry.get(name, 0) for entry in history)

    windows = sum("generation_seconds" in entry for entry in history)
    renewed = {"sequences": total("renewed_sequences"), "tokens": total("renewed_tokens")}
    return {
        "refresh": {"every": every, "windows": windows, **renewed},
        "seconds": {name.removesuffix("_seconds"): total(name) for name in TIMINGS},
    }
