"""What trainers that minimise an objective share: the loss of a step, packs, and statistics."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import Trainer

from lopd.config.objective import Objective
from lopd.models.admission import check_model
from lopd.models.packing import check_packing, pack_attention
from lopd.training.batch import Batch
from lopd.training.metrics import MetricsAccumulator
from lopd.training.step import check_finite, step


class ObjectiveTrainer(Trainer):
    """`transformers.Trainer` whose loss is that of `lopd.training.step`.

    The loss is normalised over all micro-batches and processes of an optimizer step, and its
    statistics are logged with it. An item of the DataLoader is a micro-batch of
    `lopd.training.batch`, or a list of them. Subclasses call `minimise` once the model is there.
    """

    objective: Objective
    metrics: MetricsAccumulator
    attention: str | None = None  # of packs; None for padded micro-batches
    longest: int | None = None  # tokens of a pack's longest sequence
    packs_checked: bool = False

    def minimise(self, objective: Objective) -> None:
        """Train on this objective.

        Raises:
            ModelError: no loss can be run inside the model.
        """
        self.model_accepts_loss_kwargs = True  # losses are already normalised by num_items
        self.objective, self.metrics = objective, MetricsAccumulator(self.gather)
        check_model(self.model, trained=True)

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """Dtype of the activations in mixed precision; None without it."""
        return torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None

    def use_packs(self, attention: str, longest: int) -> None:
        """Set the model's attention for packs; the first training or evaluation checks it.

        Args:
            attention: as in `lopd.models.packing.pack_attention`.
            longest: tokens of the longest sequence, or a bound on it.

        Raises:
            ConfigError, ModelError: there is no such attention for this model or device.
        """
        device, dtype = self.args.device, self.autocast_dtype
        self.attention = pack_attention(self.model, attention, device, dtype)
        self.longest, self.packs_checked = longest, False

    def check_packs(self, model: Any) -> None:
        """Check once that the model keeps the sequences of a pack apart, if it is given packs.

        Raises:
            ModelError: it does not.
        """
        if self.attention is not None and not self.packs_checked:
            with self.accelerator.autocast():
                check_packing(model, self.attention, self.longest)
            self.packs_checked = True

    def gather(self, value: Any) -> list[Any]:
        """The value of each process, in order; all processes must call this."""
        return gather_object([value]) if self.args.world_size > 1 else [value]

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        self.packs_checked = False  # it may be compiled or sharded now
        self.check_packs(prepared[0])
        return prepared

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], float]:
        """The items of a step, and the weight of its rows over all processes."""
        self.metrics.begin_step()
        items = [*islice(epoch_iterator, num_batches)]
        weight = sum(
            batch["row_weights"].sum().item()
            for item in items
            for batch in (item if isinstance(item, list) else [item])
        )
        return items, sum(self.gather(weight))

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: float | None = None,
    ) -> Any:
        """The loss of a micro-batch, so scaled that gradients averaged over processes are right.

        Raises:
            DataError: the loss is not finite; names step and sequences.
        """
        assert num_items_in_batch is not None and not return_outputs
        # `run_with_loss` replaces the forward, which contains accelerate's autocast
        with self.accelerator.autocast():
            loss, stats = step(model, inputs, self.objective, num_items_in_batch)
        check_finite("loss", loss, [inputs], self.state.global_step + 1)
        self.metrics.add({"loss": loss.detach(), **stats}, len(inputs["labels"]))
        return loss * self.args.world_size  # gradients are averaged over processes

    def statistics(self) -> dict[str, float]:
        """Statistics of the steps since the last call."""
        return self.metrics.pop()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the statistics to the loss that is logged."""
        if "loss" in logs:
            logs.update(self.statistics())
        super().log(logs, start_time)
