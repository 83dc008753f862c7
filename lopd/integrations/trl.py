"""Offline distillation as a TRL trainer: `SFTTrainer` on a teacher cache, without a teacher.

PEFT, schedules, callbacks, checkpoints and the hub are TRL's; the loss, its batches, its statistics
and the checks of provenance are those of `lopd distill`.
"""

import copy
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from lopd.errors import ConfigError
from lopd.integrations.datasets import from_dataset
from lopd.integrations.trl_config import OfflineDistillationConfig
from lopd.integrations.trl_data import NumberedSequences, Student
from lopd.models.architecture import context_of_config, embedding_rows_of
from lopd.models.head import plain_model
from lopd.stages.distill import objective_of
from lopd.store import TeacherCache
from lopd.training.batch import Batch, Collator, SequenceDataset, Source
from lopd.training.holdout import HOLDOUT, Holdout, holdout_kl
from lopd.training.objective_trainer import ObjectiveTrainer
from lopd.training.trainer import check_parallelism

__all__ = ["OfflineDistillationConfig", "OfflineDistillationTrainer"]


class OfflineDistillationTrainer(ObjectiveTrainer, SFTTrainer):
    """`trl.SFTTrainer` that minimises an objective of `lopd distill` on stored teacher scores.

    The loss runs inside the model in place of its output head, so the `[N, V]` logits are never in
    memory. It is normalised over all micro-batches and processes of an optimizer step. Logs have
    the statistics of `lopd.training.step`; `eval_loss` is a divergence, as `lopd distill` holds
    out.

    A `TeacherCache` and the folder of the model are compared before the model is built, as
    `lopd distill` does: the teacher must be that of the student's fine-tuning, the student that of
    the rollouts. `save_model` writes the manifest of the result. Datasets, lists and models without
    a folder have no record to compare, which is printed.

    Args:
        model: as in `SFTTrainer`: a folder, a hub id or a model.
        args: an `OfflineDistillationConfig`.
        train_dataset: a `TeacherCache`, a `datasets.Dataset` with the columns of
            `lopd.integrations.datasets`, or a sequence of `TeacherSequence`.
        eval_dataset: the same, or several by name; None for none.
        processing_class: tokenizer; None loads that of the model.
        callbacks, optimizers, optimizer_cls_and_kwargs, quantization_config, peft_config: as in
            `SFTTrainer`.

    Raises:
        ProvenanceError: cache and model do not belong together.
        ConfigError: the cache lacks what the objective needs, or was scored at another temperature;
            a GPU has no process of its own, or the model is sharded.
        DataError: a sequence cannot be used; in training, a loss that is not finite.
        ModelError: no loss can be run inside the model, or `padding_free` is set and its attention
            does not keep packed sequences apart.

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
        _check_parallelism(args)
        self._student = Student(model, args)
        overrides = self._student.check(train_dataset)
        for data in _each(eval_dataset):
            overrides += [each for each in self._student.check(data) if each not in overrides]
        args = copy.copy(args)
        args.dataset_kwargs = {"skip_prepare_dataset": True}
        packed, args.padding_free = args.padding_free, False  # TRL's needs its own collator
        self._collate = NumberedSequences()
        stand_in = Dataset.from_dict({"source": [""], "index": [0], "length": [0]})
        super().__init__(
            model=os.fspath(model) if isinstance(model, os.PathLike) else model,
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
        self.padding_free = self.args.padding_free = packed
        self.minimise(self._objective_on(train_dataset))
        self._student.remember(train_dataset, self.objective, overrides)
        self._collate.collator = Collator(
            args.loss_aggregation, self._tokenizer.pad_token_id or 0, packed
        )
        self.train_dataset = self._numbered("train", train_dataset)
        if eval_dataset is not None:
            self.eval_dataset = self._numbered_all("eval", eval_dataset)
        if packed:
            longest = max(max(each.lengths) for each in self._collate.sources.values())
            self.use_packs(args.attention, longest)

    def _objective_on(self, data: Any) -> Any:
        settings = self._student.settings(data)
        if isinstance(data, TeacherCache):
            return objective_of(settings, data)
        return settings.objective_at(1.0)

    def _numbered_all(self, name: str, data: Any) -> Any:
        if isinstance(data, Mapping):
            return {key: self._numbered(f"{name} {key}", part) for key, part in data.items()}
        return self._numbered(name, data)

    def _numbered(self, name: str, data: Source | Dataset) -> Dataset:
        """The numbers of the sequences, which the collator fetches."""
        rows = embedding_rows_of(plain_model(self.model))
        settings, objective = self._student.settings(data), self._objective_on(data)
        if objective != self.objective:
            raise ConfigError(
                f"{name}: {settings.cache} was scored for {objective}; found {self.objective} in "
                "the training data; score both alike"
            )
        source: Any = data
        if isinstance(data, TeacherCache):
            source = TeacherCache.open(
                data.path, support=settings.lists, vocab_size=rows, allow_incomplete=True
            )
        elif not isinstance(data, Sequence):
            source = from_dataset(data, support=settings.lists, vocab_size=rows)
        sequences = SequenceDataset(
            source,
            context=context_of_config(plain_model(self.model).config),
            vocab_size=rows,
            drop_truncated=self.args.drop_truncated,
        )
        return self._collate.add(name, sequences)

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: float | None = None,
    ) -> Any:
        """As in `ObjectiveTrainer`.

        Raises:
            ConfigError: outputs are asked for; no logits are made.
        """
        if return_outputs:
            raise ConfigError("return_outputs: found True, but no logits are made; leave it out")
        return super().compute_loss(model, inputs, False, num_items_in_batch)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """As `Trainer.evaluate`; `eval_dataset` as in the constructor."""
        if eval_dataset is not None and not self._collate.knows(eval_dataset):
            for data in _each(eval_dataset):
                self._student.check(data)
            eval_dataset = self._numbered_all("given", eval_dataset)
        chosen = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(chosen, dict):  # comes back here for each of them
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        began = time.perf_counter()
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self.metrics.exclude_time(time.perf_counter() - began)
        return metrics

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The held-out divergence, a mean over all tokens whatever the batch size."""
        sequences = self._collate.of(dataloader.dataset)
        self.check_packs(self.model)
        with self.accelerator.autocast():
            found = holdout_kl(
                self.model,
                Holdout(sequences, self.objective.held_out, eval_steps=0),
                self._collate.collator,
                self.args.eval_batch_size,
                self.state.global_step,
                rank=self.args.process_index,
                gather=self.gather,
            )
        metrics = {
            name.replace(HOLDOUT, f"{metric_key_prefix}_loss"): kl for name, kl in found.items()
        }
        return EvalLoopOutput(
            predictions=None, label_ids=None, metrics=metrics, num_samples=len(sequences)
        )

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: there are no logits to predict from.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("predict: no logits are made; use evaluate")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`; a whole model has the manifest of its training beside it.

        Checkpoints have none. `push_to_hub` uploads it: its call is internal and names no folder.
        """
        super().save_model(output_dir, _internal_call)
        if not _internal_call or output_dir is None:
            self._student.write_manifest(output_dir or self.args.output_dir, self.model)


def _each(data: Any) -> list[Any]:
    """The parts of an evaluation set, which may be absent."""
    return [] if data is None else [*data.values()] if isinstance(data, Mapping) else [data]


def _check_parallelism(args: OfflineDistillationConfig) -> None:
    """Refuse ways to use several GPUs that are not tried.

    Raises:
        ConfigError: DataParallel, DeepSpeed, FSDP, or tensor or context parallelism.
    """
    remedy = "start with torchrun, each process with the whole model; 'lopd distill --fsdp' shards"
    check_parallelism(args, remedy)
    for name in ("fsdp", "parallelism_config"):
        if found := getattr(args, name):
            raise ConfigError(f"{name}: found {found!r}; expected one process per GPU; {remedy}")
