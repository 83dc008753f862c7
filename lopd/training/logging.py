"""Training output: progress bar, log lines on stderr, and train_log.jsonl."""

import contextlib
import importlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from lopd.config.objective import Objective
from lopd.provenance.io import write_atomic
from lopd.training.checkpoints import saving
from lopd.training.holdout import evaluation_line, sign

LOG = logging.getLogger(__name__)

LOG_NAME = "train_log.jsonl"
# A record of the log history with one of these is written to the log file.
LOGGED = {"loss", "holdout_kl", "generation_seconds", "update_seconds"}


@contextlib.contextmanager
def own_tracker_run(report_to: str) -> Iterator[None]:
    """End the run that wandb begins within the block, unless the caller had begun one before.

    wandb keeps a run open until the process ends, and would add the curves of the next training to
    it. Other trackers end theirs with the training.
    """
    wandb: Any = importlib.import_module("wandb") if report_to == "wandb" else None
    is_ours, exit_code = wandb is not None and wandb.run is None, 1
    try:
        yield
        exit_code = 0
    finally:
        if is_ours and wandb.run is not None:
            wandb.finish(exit_code=exit_code)


class LogAtEnds(TrainerCallback):
    """Also logs at the last step and at evaluations. Logging needs this in every process."""

    def __init__(self, eval_steps: int) -> None:
        self.eval_steps = eval_steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a log line at evaluations and at the end."""
        evaluated = self.eval_steps and state.global_step % self.eval_steps == 0
        if evaluated or state.global_step == state.max_steps:
            control.should_log = True


class Reporter(TrainerCallback):
    """Progress bar and log lines on stderr, and the log file in the folder `out`.

    Args:
        out: folder of the run.
        objective: that is trained.
        held_out: objective of the evaluations; None without held-out sequences.
    """

    def __init__(self, out: Path, objective: Objective, held_out: Objective | None = None) -> None:
        self.out, self.objective, self.held_out = out, objective, held_out
        self.bar: Any = None

    def close(self) -> None:
        """Remove the progress bar, so that later output does not mix with it."""
        if self.bar is not None:
            self.bar.close()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say what the loss is, and open the bar."""
        if sign(self.objective):
            LOG.info(
                f"loss: {self.objective.name} over the listed ids and one bucket for all others, "
                "at most the whole divergence; read it beside the student's mass outside the lists"
            )
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, unit="step", desc="training"
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        self.bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Log a step or an evaluation, and write the file."""
        if "loss" in logs:
            text = line(state.global_step, state.max_steps, logs, sign(self.objective))
            LOG.info(text)
        if "holdout_kl" in logs and self.held_out is not None:
            text = evaluation_line(state.log_history, self.held_out)
            LOG.info(f"step {state.global_step}: {text}")
        self._write(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the last records."""
        self._write(state)

    def _write(self, state: Any) -> None:
        records = [record for record in state.log_history if LOGGED & record.keys()]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        with saving(self.out / LOG_NAME):
            write_atomic(self.out / LOG_NAME, lines.encode())


def line(step: int, steps: int, logs: Mapping[str, float], before: str = "") -> str:
    """The log line of a step, with those figures that `logs` has; `before` precedes the loss."""
    words = [f"step {step}/{steps}", f"loss {before}{logs['loss']:.4g}"]
    for name, form in (
        ("student_tail", "outside lists {:.1%}"),
        ("share_dense", "dense {:.0%}"),
        ("left_out", "left out {:.2g}"),
        ("grad_norm", "grad {:.3g}"),
        ("learning_rate", "lr {:.3g}"),
        ("tokens_per_second", "{:,.0f} tok/s"),
        ("mfu", "mfu {:.1%}"),
        ("peak_mib", "peak {:,.0f} MiB"),
        ("planned_mib", "planned {:,.0f}"),
    ):
        if name in logs:
            words.append(form.format(logs[name]))
    return "  ".join(words)
