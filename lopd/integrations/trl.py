"""Offline distillation as a TRL trainer: `SFTTrainer` on a teacher cache, without a teacher.

PEFT, schedules, callbacks, checkpoints and the hub are TRL's; the loss, its batches and its
statistics are those of `lopd distill`.
"""

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from lopd.config.distill import DistillConfig
from lopd.config.objective import Objective
from lopd.errors import ConfigError
from lopd.integrations.datasets import from_dataset
from lopd.models.admission import check_model
from lopd.models.architecture import context_of_config, embedding_rows_of
from lopd.models.head import plain_model
from lopd.stages.distill import objective_of
from lopd.store import TeacherCache
from lopd.training.batch import Batch, Collator, SequenceDataset, Source
from lopd.training.metrics import MetricsAccumulator
from lopd.training.step import check_finite, step
from lopd.training.trainer import check_parallelism

__all__ = ["OfflineDistillationConfig", "OfflineDistillationTrainer"]

# Settings of `SFTConfig` that would do nothing here, with what does instead.
_UNUSED = {
    "packing": "sequences are padded; 'lopd distill --max-tokens-per-batch' packs them",
    "eval_packing": "sequences are padded",
    "padding_free": "sequences are padded; 'lopd distill --max-tokens-per-batch' packs them",
    "max_length": "sequences stay whole; roll out with fewer --max-new-tokens",
    "completion_only_loss": "the loss mask of a sequence decides",
    "assistant_only_loss": "the loss mask of a sequence decides",
    "dataset_kwargs": "sequences are tokens already",
    "loss_type": "objective is the loss",
    "label_smoothing_factor": "objective is the loss",
    "average_tokens_across_devices": "the loss is a mean over the tokens of all processes",
    "remove_unused_columns": "the data collator reads all columns",
}


def _of_distill(name: str) -> Any:
    """A field with the default and the help of `lopd distill`'s."""
    found = next(each for each in fields(DistillConfig) if each.name == name)
    return field(default=found.default, metadata={"help": found.metadata["help"]})


@dataclass
class OfflineDistillationConfig(SFTConfig):
    """`trl.SFTConfig`, and the settings of the loss, with the names of `lopd distill`.

    Settings of `SFTConfig` that would have no effect are refused. `learning_rate` and
    `lr_scheduler_type` have the defaults of `lopd distill`.

    Raises:
        ConfigError: a setting has no effect, is out of range or does not belong to the objective.

    >>> OfflineDistillationConfig("out", objective="jsd", beta=0.3, bf16=False).tail
    'bucket'
    """

    objective: str = _of_distill("objective")
    tail: str = _of_distill("tail")
    beta: float | None = _of_distill("beta")
    advantage_clip: float | None = _of_distill("advantage_clip")
    importance: str = _of_distill("importance")
    importance_cap: float | None = _of_distill("importance_cap")
    clip_range: float | None = _of_distill("clip_range")
    delta: float | None = _of_distill("delta")
    entropy_bonus: float | None = _of_distill("entropy_bonus")
    token_weights: str = _of_distill("token_weights")
    weight_beta: float | None = _of_distill("weight_beta")
    weight_share: float | None = _of_distill("weight_share")
    weight_entropy: float | None = _of_distill("weight_entropy")
    dense_share: float | None = _of_distill("dense_share")
    tolerance: float | None = _of_distill("tolerance")
    temperature: float | None = _of_distill("temperature")
    support: str = _of_distill("support")
    loss_aggregation: str = _of_distill("loss_aggregation")
    drop_truncated: bool = _of_distill("drop_truncated")
    workspace_bytes: str | None = _of_distill("workspace_bytes")
    learning_rate: float = _of_distill("learning_rate")
    max_length: int | None = field(
        default=None, metadata={"help": "Not used: sequences stay whole."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Not used: the collator reads all columns."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for each in fields(self):
            if each.name in _UNUSED and getattr(self, each.name) not in (each.default, None):
                raise ConfigError(
                    f"{each.name}: found {getattr(self, each.name)!r}, which has no effect: "
                    f"{_UNUSED[each.name]}; leave it out"
                )
        self.distill_config()

    def distill_config(self, cache: str = "dataset") -> DistillConfig:
        """The settings of the loss as those of `lopd distill` on this cache.

        Raises:
            ConfigError: a setting is out of range or does not belong to the objective.
        """
        ours = {each.name for each in fields(self)} - {each.name for each in fields(SFTConfig)}
        settings = {name: getattr(self, name) for name in ours}
        return DistillConfig(student="model", cache=cache, out="output_dir", **settings)


class OfflineDistillationTrainer(SFTTrainer):
    """`trl.SFTTrainer` that minimises an objective of `lopd distill` on stored teacher scores.

    The loss runs inside the model in place of its output head, so the `[N, V]` logits are never in
    memory. It is normalised over all micro-batches and processes of an optimizer step. Logs have
    the statistics of `lopd.training.step`; `eval_loss` is a divergence, as `lopd distill` holds
    out. Provenance is not checked: `lopd distill` does that, or `lopd.provenance.check_distill`.

    Args:
        model: as in `SFTTrainer`.
        args: an `OfflineDistillationConfig`.
        train_dataset: a `TeacherCache`, a `datasets.Dataset` with the columns of
            `lopd.integrations.datasets`, or a sequence of `TeacherSequence`.
        eval_dataset: the same, or several by name; None for none.
        processing_class: tokenizer; None loads that of the model.
        callbacks, optimizers, optimizer_cls_and_kwargs, quantization_config, peft_config: as in
            `SFTTrainer`.

    Raises:
        ConfigError: the cache lacks what the objective needs, or was scored at another temperature;
            DataParallel or DeepSpeed is used.
        DataError: a sequence cannot be used; in training, a loss that is not finite.
        ModelError: no loss can be run inside the model.

    >>> cache = TeacherCache.open("cache")  # doctest: +SKIP
    >>> args = OfflineDistillationConfig("out", objective="reverse_kl")  # doctest: +SKIP
    >>> OfflineDistillationTrainer("student", args, cache).train()  # doctest: +SKIP
    """

    _tag_names = ("trl", "lopd")
    _name = "offline distillation"

    def __init__(
        self,
        model: Any,
        args: OfflineDistillationConfig,
        train_dataset: Source | Dataset,
        eval_dataset: Source | Dataset | Mapping[str, Source | Dataset] | None = None,
        *,
        processing_class: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None = None,
        quantization_config: Any = None,
        peft_config: Any = None,
    ) -> None:
        if not isinstance(args, OfflineDistillationConfig):
            raise ConfigError(
                f"args: found {type(args).__name__}; expected an OfflineDistillationConfig"
            )
        check_parallelism(args)
        args = copy.copy(args)
        args.dataset_kwargs = {"skip_prepare_dataset": True}
        self._collate = NumberedSequences()
        stand_in = Dataset.from_dict({"source": [""], "index": [0], "length": [0]})
        super().__init__(
            model=model,
            args=args,
            data_collator=self._collate,
            train_dataset=stand_in,  # the sequences are checked against the model, once it is there
            eval_dataset=None if eval_dataset is None else stand_in,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        self.model_accepts_loss_kwargs = True  # losses are already normalised by num_items
        check_model(self.model, trained=True)
        self.objective: Objective | None = None
        self._collate.collator = Collator(args.loss_aggregation, self._tokenizer.pad_token_id or 0)
        self.train_dataset = self._numbered("train", train_dataset)
        if eval_dataset is not None:
            self.eval_dataset = self._numbered_all("eval", eval_dataset)
        self._step_metrics = MetricsAccumulator(self._gather)

    def _numbered_all(self, name: str, data: Any) -> Any:
        if isinstance(data, Mapping):
            return {key: self._numbered(f"{name} {key}", part) for key, part in data.items()}
        return self._numbered(name, data)

    def _numbered(self, name: str, data: Source | Dataset) -> Dataset:
        """The numbers of the sequences, which the collator fetches."""
        rows = embedding_rows_of(plain_model(self.model))
        settings = self.args.distill_config()
        objective = settings.objective_at(1.0)
        source: Any = data
        if isinstance(data, TeacherCache):
            settings = self.args.distill_config(str(data.path))
            data.check_complete()
            objective = objective_of(settings, data)
            source = TeacherCache.open(data.path, support=settings.lists, vocab_size=rows)
        elif not isinstance(data, Sequence):
            source = from_dataset(data, support=settings.lists, vocab_size=rows)
        if self.objective is None:
            self.objective = objective
        elif objective != self.objective:
            raise ConfigError(
                f"{name}: {settings.cache} was scored for {objective}; found {self.objective} in "
                "the training data; score both alike"
            )
        sequences = SequenceDataset(
            source,
            context=context_of_config(plain_model(self.model).config),
            vocab_size=rows,
            drop_truncated=self.args.drop_truncated,
        )
        return self._collate.add(name, sequences)

    def _gather(self, value: Any) -> list[Any]:
        return gather_object([value]) if self.args.world_size > 1 else [value]

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], float]:
        """The micro-batches of a step, and the weight of its rows over all processes."""
        self._step_metrics.begin_step()
        batches = list(islice(epoch_iterator, num_batches))
        weight = sum(batch["row_weights"].sum().item() for batch in batches)
        return batches, sum(self._gather(weight))

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: float | None = None,
    ) -> Any:
        """The loss of a micro-batch, so scaled that gradients averaged over processes are right.

        Without `num_items_in_batch`, in evaluation: the held-out divergence, a mean over the batch.

        Raises:
            ConfigError: outputs are asked for; no logits are made.
            DataError: the loss is not finite; names step and sequences.
        """
        assert self.objective is not None
        if return_outputs:
            raise ConfigError("return_outputs: found True, but no logits are made; leave it out")
        objective, num_items = self.objective, num_items_in_batch
        if num_items is None:
            objective, num_items = objective.held_out, inputs["row_weights"].sum().item()
        with self.accelerator.autocast():  # the forward that contains it is replaced
            loss, stats = step(model, inputs, objective, num_items)
        check_finite("loss", loss, [inputs], self.state.global_step + 1)
        if num_items_in_batch is None:
            return loss
        self._step_metrics.add(stats, len(inputs["labels"]))
        return loss * self.args.world_size

    def prediction_step(
        self,
        model: Any,
        inputs: Batch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """The held-out divergence of a batch; there are no logits to predict from."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            return self.compute_loss(model, inputs), None, None

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """As `Trainer.evaluate`; `eval_dataset` as in the constructor."""
        if eval_dataset is not None and not self._collate.knows(eval_dataset):
            eval_dataset = self._numbered_all("given", eval_dataset)
        chosen = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(chosen, dict):  # comes back here for each of them
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        began = time.perf_counter()
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self._step_metrics.exclude_time(time.perf_counter() - began)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the statistics of the steps since the last call."""
        if "loss" in logs:
            logs.update(self._step_metrics.pop())
        super().log(logs, start_time)


class NumberedSequences:
    """A data collator that fetches the sequences whose numbers it is given.

    TRL asks for a `datasets.Dataset`; this one holds numbers only, so that a cache is neither
    copied nor read before its sequences are needed.
    """

    def __init__(self) -> None:
        self.sources: dict[str, SequenceDataset] = {}
        self.collator = Collator()

    def add(self, name: str, sequences: SequenceDataset) -> Dataset:
        """The numbers of these sequences, and their lengths."""
        self.sources[name] = sequences
        count = len(sequences)
        return Dataset.from_dict(
            {"source": [name] * count, "index": range(count), "length": sequences.lengths}
        )

    def knows(self, data: Any) -> bool:
        """Whether the data are numbers already."""
        if isinstance(data, Mapping):
            return all(self.knows(part) for part in data.values())
        columns = {"source", "index", "length"}
        return isinstance(data, str) or columns == {*getattr(data, "column_names", ())}

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """A batch of the sequences."""
        (name,) = {row["source"] for row in rows}
        collate = self.collator if name == "train" else replace(self.collator, weighted=False)
        return collate(self.sources[name].__getitems__([row["index"] for row in rows]))
