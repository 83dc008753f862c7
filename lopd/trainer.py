"""A thin `transformers.Trainer` over `lopd.step`.

It adds what a run needs: accumulation, schedule, logging, checkpoints, resume.
`lopd.loop.train_loop` is the same in a plain loop.
"""

import contextlib
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerControl, TrainerState
from transformers.trainer_utils import IntervalStrategy

from lopd.data import Batch, Collator
from lopd.errors import ConfigError, DataError, LopdError, ShardError
from lopd.files import write_atomic
from lopd.heads import check_head, check_trainable
from lopd.options import TrainOptions
from lopd.stats import StatsWindow
from lopd.step import Objective, check_finite, step
from lopd.watch import Holdout, evaluations, exhausted, holdout_kl

__all__ = ["LOG_NAME", "LopdTrainer", "Objective", "TrainOptions", "saving", "step"]

LOG_NAME = "train_log.jsonl"


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
        what = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ShardError(
            f"{path}: not written ({what}); finished checkpoints are intact: mend that and run "
            "the same command again"
        ) from error


class LopdTrainer(Trainer):
    """`transformers.Trainer` that minimises an `Objective`.

    Normalises by `num_items` over all micro-batches of an optimizer step, so accumulation
    changes nothing but memory; stops on a loss or gradient that is not finite; logs what
    `step` reports, also as JSON lines in `out/train_log.jsonl`.

    Args:
        args: from `TrainOptions.training_arguments`.
        train_dataset: map-style, items of `lopd.data`.
        holdout: evaluated every `eval_steps` and at the end; the best step gets a checkpoint
            that stays when it says `keep_best`.

    Raises:
        ModelError: `check_head` or `check_trainable` refuses the model.
        ConfigError: more than one process.
        ShardError: a checkpoint or the log cannot be written.
    """

    control: TrainerControl

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        objective: Objective,
        train_dataset: torch.utils.data.Dataset,
        data_collator: Collator | None = None,
        holdout: Holdout | None = None,
        **kwargs: Any,
    ) -> None:
        if args.world_size > 1:
            raise ConfigError(
                f"{args.world_size} processes: training runs in one; launch it without torchrun"
            )
        check_trainable(model)
        if holdout is not None:
            args.eval_strategy, args.eval_steps = IntervalStrategy.STEPS, holdout.eval_steps
        use_cache = model.config.use_cache
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=None if holdout is None else holdout.dataset,
            data_collator=data_collator or Collator(),
            **kwargs,
        )
        model.config.use_cache = use_cache  # Trainer's would be saved with the result
        self.model_accepts_loss_kwargs = True  # losses come normalised by num_items
        self.objective, self.holdout = objective, holdout
        self.window = StatsWindow()
        self.pop_callback(PrinterCallback)
        self.add_callback(_Reporter(Path(args.output_dir)))
        check_head(model)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], float]:
        self.window.begin_step()
        batches = list(itertools.islice(epoch_iterator, num_batches))
        return batches, sum(batch["row_weights"].sum().item() for batch in batches)

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: float | None = None,
    ) -> Any:
        assert num_items_in_batch is not None
        loss, stats = step(model, inputs, self.objective, num_items_in_batch)
        check_finite(loss, inputs, self.state.global_step + 1)
        self.window.add(stats, len(inputs["labels"]))
        return (loss, stats) if return_outputs else loss

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """As Trainer's; a run that had stopped for want of improvement stays as it ended."""
        if resume_from_checkpoint is not None and self.holdout is not None:
            state = TrainerState.load_from_json(f"{resume_from_checkpoint}/trainer_state.json")
            if exhausted(state.log_history, self.holdout.patience):
                self.state = state
                return self._load_from_checkpoint(resume_from_checkpoint)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Held-out KL of the model as it is."""
        if self.holdout is None:
            raise ConfigError("evaluate: nothing was held out; pass holdout to LopdTrainer")
        size, number = self.args.per_device_train_batch_size, self.state.global_step
        began = time.perf_counter()
        kl = holdout_kl(self.model, self.holdout, self.data_collator, size, number)
        self.window.leave_out(time.perf_counter() - began)
        metrics = {"holdout_kl": kl}
        self.log({**metrics})
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        assert self.holdout is not None
        best = min(evaluations(self.state.log_history))
        improved = best[1] == self.state.global_step
        if improved and self.holdout.keep_best:
            self.state.best_metric, self.state.best_global_step = best
            self.control.should_save = True
        if exhausted(self.state.log_history, self.holdout.patience):
            self.control.should_training_stop = True
            tqdm.write(
                f"step {self.state.global_step}: stops, held-out KL {metrics['holdout_kl']:.4g} is "
                f"no better than {best[0]:.4g} at step {best[1]}, {self.holdout.patience} "
                "evaluations on",
                file=sys.stderr,
            )
        return improved

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with saving(self.args.output_dir):
            super()._save_checkpoint(model, trial)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        if not math.isfinite(norm):
            raise DataError(
                f"step {self.state.global_step + 1}: the gradient's norm is {float(norm)} though "
                "the loss is finite; lower the learning rate and resume from the last checkpoint"
            )
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self.window.pop())
        super().log(logs, start_time)


class _Reporter(TrainerCallback):
    """A progress bar on stderr, and the log file."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, unit="step", desc="training"
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update()
        if state.global_step == state.max_steps:
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.4g}", refresh=False)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()
        self._write(state)

    def _write(self, state: Any) -> None:
        wanted = {"loss", "holdout_kl"}
        records = [record for record in state.log_history if wanted & record.keys()]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        with saving(self.out / LOG_NAME):
            write_atomic(self.out / LOG_NAME, lines.encode())
