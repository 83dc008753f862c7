"""What a run tells while it trains: a line and a bar on stderr, and its log file."""

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from tqdm import tqdm
from transformers import TrainerCallback

from lopd.errors import LopdError, ShardError
from lopd.provenance.io import write_atomic

LOG_NAME = "train_log.jsonl"
ZIP_WRITER = ("PytorchStreamWriter", "inline_container", "Parent directory")  # in torch's messages


@contextlib.contextmanager
def saving(path: str | Path) -> Iterator[None]:
    """Turn what a full or read-only disk raises into a ShardError that names `path`.

    safetensors and torch.save report it by exceptions of their own.
    """
    try:
        yield
    except LopdError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not any(name in str(error) for name in ZIP_WRITER):
            raise  # a lost process, a GPU without memory
        what = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ShardError(
            f"{path}: not written ({what}); finished checkpoints are intact: mend that and run "
            "the same command again"
        ) from error


class LogAtEnds(TrainerCallback):
    """Logs at the last step and at evaluations too; in every process, for all are asked."""

    def __init__(self, eval_steps: int) -> None:
        self.eval_steps = eval_steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        evaluated = self.eval_steps and state.global_step % self.eval_steps == 0
        if evaluated or state.global_step == state.max_steps:
            control.should_log = True


class Reporter(TrainerCallback):
    """A progress bar on stderr, and the log file."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.bar: Any = None

    def close(self) -> None:
        """Take the bar away; lines after it would go around one that is still drawn."""
        if self.bar is not None:
            self.bar.close()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, unit="step", desc="training"
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            tqdm.write(line(state.global_step, state.max_steps, logs), file=sys.stderr)
        self._write(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write(state)

    def _write(self, state: Any) -> None:
        wanted = {"loss", "holdout_kl", "generation_seconds", "update_seconds"}
        records = [record for record in state.log_history if wanted & record.keys()]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        with saving(self.out / LOG_NAME):
            write_atomic(self.out / LOG_NAME, lines.encode())


def line(step: int, steps: int, logs: Mapping[str, float]) -> str:
    """What is logged of a step, for a reader."""
    words = [f"step {step}/{steps}", f"loss {logs['loss']:.4g}"]
    for name, form in (
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
