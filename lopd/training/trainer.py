"""A `transformers.Trainer` around `lopd.training.step`.

It adds micro-batches, the schedule, logging, checkpoints, resuming and several processes.
`lopd.training.loop.train_loop` does the same training in a plain loop.
"""

import contextlib
import copy
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerCallback, TrainerControl
from transformers.trainer_utils import IntervalStrategy

from lopd.config.objective import Objective
from lopd.errors import ConfigError, DataError, Interrupted, ModelError
from lopd.models.flops import FlopsMeter
from lopd.models.head import plain_model
from lopd.training.batch import Batch, Collator, lengths_of
from lopd.training.checkpoints import METRICS_NAME, STAGING, finish, rotate, saving
from lopd.training.holdout import Holdout, evaluations, exhausted, holdout_kl
from lopd.training.interrupt import StopSignals
from lopd.training.logging import LogAtEnds, Reporter
from lopd.training.objective_trainer import ObjectiveTrainer
from lopd.training.sampler import StepDataset, StepSampler
from lopd.training.step import check_finite

LOG = logging.getLogger(__name__)


def local_tensor(value: torch.Tensor) -> torch.Tensor:
    """This process's part of a sharded tensor; other tensors as they are."""
    return value.to_local() if isinstance(value, DTensor) else value


# What `accelerate launch` sets, which the arguments do not show.
_LAUNCHED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism",
}


def check_parallelism(
    args: TrainingArguments, remedy: str = "start with torchrun, with or without fsdp"
) -> None:
    """Refuse ways to use several GPUs in which the loss cannot be run inside the model.

    Args:
        remedy: how to use several GPUs instead, for the error message.

    Raises:
        ConfigError: DataParallel, DeepSpeed, or what accelerate's settings set up.
    """
    used = {"DataParallel": args.n_gpu > 1, "DeepSpeed": args.deepspeed}
    for variable, name in _LAUNCHED.items():
        used[f"{name} by accelerate's settings"] = parse_flag_from_env(variable)
    for name, is_used in used.items():
        if is_used:
            raise ConfigError(f"{name}: expected one process per GPU; {remedy}")


class EvaluateAtStart(TrainerCallback):
    """Evaluates the held-out sequences before the first step, in every process."""

    def __init__(self, trainer: "LopdTrainer") -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate, unless a checkpoint is continued: its run did so when it began."""
        if state.global_step == 0:
            self.trainer.evaluate()


class LopdTrainer(ObjectiveTrainer):
    """`transformers.Trainer` that minimises an `Objective`.

    An item of its DataLoader is one process's share of an optimizer step, split into micro-batches
    by `lopd.training.sampler`. The loss is normalised by `num_items` over all micro-batches and
    processes, so accumulation, packing and the number of processes affect only memory and
    rounding. Training stops at a loss or gradient that is not finite. The statistics of `step` are
    logged, also as JSON lines in `train_log.jsonl`.

    Args:
        model: as in `lopd.models.head.run_with_loss`.
        args: from `TrainOptions.training_arguments`.
        objective: what to minimise.
        train_dataset: a `lopd.training.batch.SequenceDataset`, or a Subset of one; each of its
            sequences has at least one token with loss.
        data_collator: makes micro-batches; `packed` is set from max_tokens_per_batch.
        holdout: evaluated before the first step, every `eval_steps` and at the end; with
            `keep_best` the checkpoint of the best step is not removed.
        max_tokens_per_batch: tokens per pack; None for padded micro-batches.
        attention: for packs, one of `lopd.config.training.ATTENTION`.
        run_id: identity of the run; of the checkpoints in the output folder, only those with the
            same identity are counted and removed.

    Raises:
        ModelError: `check_model` or `check_packing` refuses the model.
        ConfigError: a sequence is longer than a pack, DataParallel or DeepSpeed is used, or
            accelerate cannot shard as `fsdp` asks.
        ShardError: a checkpoint or the log cannot be written.

    >>> import tempfile
    >>> import numpy as np
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from lopd.config.training import TrainOptions
    >>> from lopd.data.demonstrations import Demonstration
    >>> from lopd.training.batch import SequenceDataset
    >>> sizes = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    >>> model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    >>> tokens, loss_mask = np.arange(6, dtype=np.int32), np.arange(6) >= 2
    >>> dataset = SequenceDataset([Demonstration("prompt", 0, tokens, 2, "stop", loss_mask)])
    >>> options = TrainOptions(max_steps=2, save_every=0, device="cpu")
    >>> with tempfile.TemporaryDirectory() as out:
    ...     args = options.training_arguments(out)
    ...     trainer = LopdTrainer(model, args, Objective("cross_entropy"), dataset)
    ...     result = trainer.train()
    >>> result.global_step
    2
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
        *,
        max_tokens_per_batch: int | None = None,
        attention: str = "auto",
        run_id: str = "",
        **kwargs: Any,
    ) -> None:
        check_parallelism(args)
        args = copy.copy(args)  # for Trainer a step is one batch
        self.accumulation, args.gradient_accumulation_steps = args.gradient_accumulation_steps, 1
        # `rotate` removes checkpoints; Trainer would go by their names and modification times.
        self.save_total_limit, args.save_total_limit = args.save_total_limit, None
        self.run_id = run_id
        if args.device.type == "cpu":  # torch.load refuses the "cpu:0" of several processes
            args.__dict__["_setup_devices"] = torch.device("cpu")
        self.max_tokens = max_tokens_per_batch
        if holdout is not None:
            args.eval_strategy, args.eval_steps = IntervalStrategy.STEPS, holdout.eval_steps
        # Trainer changes it, and it is saved with the result. Multimodal configs have none.
        use_cache = vars(model.config).get("use_cache")
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=None if holdout is None else holdout.dataset,
            data_collator=replace(
                data_collator or Collator(), packed=max_tokens_per_batch is not None
            ),
            **kwargs,
        )
        if args.fsdp:
            self._check_sharding(args)
        vars(model.config).pop("use_cache", None)
        if use_cache is not None:
            model.config.use_cache = use_cache
        self.minimise(objective)
        self.holdout = holdout
        self.meter = FlopsMeter(
            model, args.device, dtype=self.autocast_dtype, devices=args.world_size
        )
        self.pop_callback(PrinterCallback)
        self.signals = StopSignals(self.gather)
        self.add_callback(self.signals)
        self.add_callback(LogAtEnds(0 if holdout is None else holdout.eval_steps))
        self.reporter: Reporter | None = None
        if self.is_world_process_zero():
            held_out = None if holdout is None else holdout.objective
            self.reporter = Reporter(Path(args.output_dir), objective, held_out)
            self.add_callback(self.reporter)
        if holdout is not None:
            self.add_callback(EvaluateAtStart(self))
        if args.gradient_checkpointing and not plain_model(model).supports_gradient_checkpointing:
            raise ModelError(
                f"{type(plain_model(model)).__name__}: does not support gradient checkpointing; "
                "omit --gradient-checkpointing"
            )
        if self.max_tokens is not None:
            self.use_packs(attention, self.max_tokens)

    def _check_sharding(self, args: TrainingArguments) -> None:
        accelerator = self.accelerator
        if not accelerator.is_fsdp2:
            raise ConfigError(
                f"fsdp: found {args.world_size} processes on {args.device.type}; accelerate shards "
                "only over several GPUs: start one process per GPU with torchrun, or omit fsdp"
            )
        if args.bf16:  # accelerate's policy would round the loss and the sums of gradients
            accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32
            )

    def unsharded_state(self) -> dict[str, torch.Tensor]:
        """The weights on the CPU, in the first process; all processes must call this."""
        return self.accelerator.get_state_dict(self.model)

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """The steps of this process, each a list of micro-batches; a step's items are read when
        it begins."""
        self.sampler = StepSampler(
            lengths_of(self.train_dataset),
            self.args.per_device_train_batch_size,
            self.accumulation,
            max_tokens=self.max_tokens,
            rank=self.args.process_index,
            world_size=self.args.world_size,
            seed=self.args.seed,
        )
        return torch.utils.data.DataLoader(
            self.step_dataset(self.sampler),
            batch_sampler=self.sampler,
            collate_fn=lambda parts: [self.data_collator(items) for items in parts],
            generator=torch.Generator(),  # otherwise it draws from the global generator
        )

    def step_dataset(self, sampler: StepSampler) -> StepDataset:
        """The source of each step's items; called once per run."""
        return StepDataset(self.train_dataset)

    def training_step(
        self, model: Any, inputs: Any, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Forward and backward of an optimizer step's micro-batches.

        Sharded gradients are reduced after each micro-batch: to accumulate them first would need
        memory for unsharded ones.
        """
        losses, self.micro_batches = [], inputs
        for number, batch in enumerate(inputs, 1):
            sync = number == len(inputs) or self.is_fsdp_enabled
            with contextlib.nullcontext() if sync else self.accelerator.no_sync(model):
                try:
                    losses.append(super().training_step(model, batch, num_items_in_batch))
                except torch.OutOfMemoryError as error:
                    raise ConfigError(self._out_of_memory(batch)) from error
        return torch.stack(losses).sum()

    def _out_of_memory(self, batch: Batch) -> str:
        rows, length = batch["input_ids"].shape
        return (
            f"step {self.state.global_step + 1}: out of memory in a micro-batch of {rows} x "
            f"{length} tokens; rerun the command with --gradient-checkpointing, a smaller "
            "--max-tokens-per-batch or --workspace-bytes, or a smaller --batch-size and more "
            "--gradient-accumulation-steps; it continues from the last checkpoint (lopd plan shows "
            "which settings fit)"
        )

    def floating_point_ops(self, inputs: list[Batch]) -> float:
        """Model FLOPs of a step."""
        return self.meter.count(inputs)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """`Trainer.train`; from the checkpoint of a run's last step it trains no further.

        Raises:
            DataError: a loss, a gradient or, at a checkpoint and at the end, a weight is not
                finite.
            Interrupted: SIGINT or SIGTERM arrived; a checkpoint was saved, unless a second signal
                stopped the run at once.
        """
        if self.args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.args.device)
        try:
            with self.signals:
                result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            if self.reporter is not None:
                self.reporter.close()
        self._check_weights()
        if self.args.should_save:  # a run killed before it rotated may have nothing left to train
            with saving(self.args.output_dir):
                self._rotate()
        if signum := self.signals.agree():
            self._stop(signum)
        return result

    def _stop(self, signum: int) -> None:
        """Raise Interrupted, unless the last step is done and only the result would keep it."""
        out, step, steps = self.args.output_dir, self.state.global_step, self.state.max_steps
        patience = 0 if self.holdout is None else self.holdout.patience
        done, left = f"step {step} of {steps}", "continue"
        if step >= steps or exhausted(self.state.log_history, patience):
            if not (Path(out) / f"checkpoint-{step}").exists():
                return
            done, left = f"training is complete after {step} steps", "write the result"
        raise Interrupted(
            signum,
            f"{out}: checkpoint-{step} is kept, {done}; rerun the same command to {left}",
            orderly=True,
        )

    def _check_weights(self) -> None:
        """Refuse weights that are not finite; all processes must call this."""
        odd = [
            name
            for name, p in self.model.named_parameters()
            if p.requires_grad and not local_tensor(p.detach()).isfinite().all()
        ]
        if odd := [name for names in self.gather(odd) for name in names]:
            raise DataError(
                f"step {self.state.global_step}: weights are not finite after the update, first "
                f"{odd[0]}; not saved: lower the learning rate, and rerun the same command to "
                "continue from the last checkpoint"
            )

    def _run_epoch(self, *args: Any, epoch: int, **kwargs: Any) -> None:
        # Some versions do not reach the sampler through the loader that skips the steps already
        # made, so that a resumed run would have another order.
        self.sampler.set_epoch(epoch)
        # Trainer looks at max_steps after a step only, so a run resumed at its end would take one.
        state, patience = self.state, 0 if self.holdout is None else self.holdout.patience
        if state.global_step >= state.max_steps or exhausted(state.log_history, patience):
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, epoch=epoch, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Held-out KL of the current model.

        Raises:
            ConfigError: the trainer has no hold-out.
            DataError: the KL is not finite.
        """
        if self.holdout is None:
            raise ConfigError("evaluate: nothing was held out; pass holdout to LopdTrainer")
        began = time.perf_counter()
        self.check_packs(self.model)
        with self.accelerator.autocast():
            metrics = holdout_kl(
                self.model,
                self.holdout,
                self.data_collator,
                self.args.per_device_train_batch_size,
                self.state.global_step,
                max_tokens=self.max_tokens,
                rank=self.args.process_index,
                gather=self.gather,
            )
        self.metrics.exclude_time(time.perf_counter() - began)
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
            LOG.info(
                f"step {self.state.global_step}: stopping early, held-out KL "
                f"{metrics['holdout_kl']:.4g} is no better than {best[0]:.4g} at step {best[1]}, "
                f"{self.holdout.patience} evaluations ago"
            )
        return improved

    def _get_output_dir(self, trial: Any) -> str:
        return str(Path(self.args.output_dir) / STAGING)  # where checkpoints are written

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._check_weights()
        out, state = Path(self.args.output_dir), self.state
        with saving(out):
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # each process writes its random state
            if self.args.should_save:
                finish(out, state.global_step, self.run_id)
                self._rotate()

    def _rotate(self) -> None:
        best = self.state.best_global_step
        rotate(Path(self.args.output_dir), self.save_total_limit, self.run_id, best)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        state = self.metrics.state()
        if self.args.should_save:
            torch.save(state, Path(output_dir) / METRICS_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            state = torch.load(Path(checkpoint) / METRICS_NAME, weights_only=True)
            self.metrics.load(state, first=self.is_world_process_zero())

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        number = self.state.global_step + 1
        check_finite("norm of the gradient", norm, self.micro_batches, number)
        return norm

    def statistics(self) -> dict[str, float]:
        """Statistics of the steps since the last call, and the speed in FLOPs."""
        found = super().statistics()
        return {**found, **self.meter.read(found["tokens_per_second"])}
