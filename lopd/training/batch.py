"""Datasets and batches of stored sequences.

A batch is right-padded, or one row of sequences end to end. The collator selects the rows with
loss on the CPU, as an index into the flattened `[B * T]` hidden states. Prompts, padding and
masked tokens never reach the LM head.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from lopd.data.alignment import predicting_rows
from lopd.data.demonstrations import Demonstration
from lopd.data.skipped import Skipped
from lopd.errors import ConfigError, DataError
from lopd.models.limits import ModelLimits
from lopd.store import Rollout, TeacherSequence, TopKLists
from lopd.store.types import prompt_name
from lopd.store.validate import check_weights
from lopd.training.metrics import POSITIONS
from lopd.training.topk_overlap import is_overlap_position

LOG = logging.getLogger(__name__)

LOSS_AGGREGATIONS = ("token_mean", "sequence_mean")

Item = Rollout | Demonstration | TeacherSequence
Batch = dict[str, Any]


class Source(Protocol):
    """A TeacherCache, a RolloutStore or a list of items."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@runtime_checkable
class BatchedSource(Source, Protocol):
    """A source that reads several items at once, and sequences without their scores."""

    def read(self, indices: Sequence[int], /) -> list[Any]:
        """The items at these positions."""
        ...

    def rollouts(self) -> Iterator[Rollout]:
        """Every sequence in order."""
        ...


def sequence_of(item: Item) -> Rollout | Demonstration:
    """The sequence of an item, scored or not."""
    return item.rollout if isinstance(item, TeacherSequence) else item


def sequence_name(item: Item) -> str:
    """The name of an item in messages."""
    sequence = sequence_of(item)
    return f"{sequence.prompt_id}/{sequence.sample}"


class WeightShare:
    """The effective share of the tokens with loss, by the weights that came with the rollouts.

    (sum w)^2 / (N sum w^2) with w the weight of the sequence times that of the token.
    """

    def __init__(self) -> None:
        self.given = False  # whether any weight is not 1
        self._moments = np.zeros(3)

    def add(self, rollout: Rollout) -> None:
        """Count a sequence."""
        weights = np.full(int(rollout.loss_mask.sum()), rollout.weight)
        if rollout.token_weights is not None:
            weights = weights * rollout.token_weights[rollout.loss_mask[rollout.prompt_length :]]
        self.given = self.given or bool((weights != 1).any())
        self._moments += [len(weights), weights.sum(), np.square(weights).sum()]

    @property
    def value(self) -> float:
        """The share; 1 where all weights are equal."""
        count, total, squares = self._moments.tolist()
        return total**2 / (count * squares) if squares else 1.0


class SequenceDataset(torch.utils.data.Dataset):
    """Map-style dataset over a source, checked once against the model that reads it.

    Args:
        context: longest sequence that the model reads; None for no limit.
        vocab_size: rows of the model's embedding; None for no limit.
        drop_truncated: leave out sequences whose finish reason is "length"; prints their share.
        skip_bad: leave out sequences that the model cannot read; prints them. None where no
            setting asks for it.

    Raises:
        DataError: a sequence is longer than the context or holds an id beyond the vocabulary,
            or nothing is left to train on.
    """

    def __init__(
        self,
        source: Source,
        *,
        context: int | None = None,
        vocab_size: int | None = None,
        drop_truncated: bool = False,
        skip_bad: bool | None = None,
    ) -> None:
        self.source = source
        self.indices: list[int] = []
        self.names: list[str] = []
        self.prompts: list[str] = []  # their names
        self.lengths: list[int] = []  # tokens
        sequences: Iterator[Rollout | Demonstration]
        if isinstance(source, BatchedSource):
            sequences = source.rollouts()
        else:
            sequences = (sequence_of(source[index]) for index in range(len(source)))
        limits = ModelLimits(
            "the model",
            vocab_size,
            context,
            length_remedy="use a model with a longer context, or roll out with fewer "
            "--max-new-tokens",
            id_remedy="use the model and tokenizer that the data were made with"
            + (
                "; an id that stands for no token comes from an unused row of the head of the "
                "model that sampled it"
                if skip_bad is not None
                else ""
            ),
        )
        skipped = Skipped("training data", bool(skip_bad), offered=skip_bad is not None)
        self.truncated = 0  # sequences that were cut off, dropped or not
        self.weight_share = WeightShare()
        for index, sequence in enumerate(sequences):
            self.truncated += sequence.finish_reason == "length"
            if drop_truncated and sequence.finish_reason == "length":
                continue
            name = sequence_name(sequence)
            try:
                limits.check(f"sequence {name}", sequence.tokens)
                if not sequence.loss_mask.any():
                    raise DataError(
                        f"sequence {name}: no token bears loss; expected at least one; leave the "
                        "sequence out, or mend its mask"
                    )
                if isinstance(sequence, Rollout):
                    check_weights(sequence)
                    self.weight_share.add(sequence)
            except DataError as error:
                skipped.handle(error)
                continue
            skipped.kept += 1
            self.indices.append(index)
            self.names.append(name)
            self.prompts.append(prompt_name(sequence.prompt_id))
            self.lengths.append(len(sequence.tokens))
        skipped.report()
        self.dropped_share = 1.0 - len(self.indices) / max(len(source), 1)
        if drop_truncated:
            LOG.info(
                f"drop_truncated: left out {len(source) - len(self.indices)} of {len(source)} "
                f"sequences ({100 * self.dropped_share:.1f} %)"
            )
        if not self.indices:
            dropped = self.dropped_share > 0 and drop_truncated
            left = " is left once truncated ones are dropped" if dropped else " can be used"
            raise DataError(
                f"training data: no sequence of {len(source)}{left}; expected at least one"
            )

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Item:
        return self.source[self.indices[index]]

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        """The items of a batch, for a DataLoader; a store reads them together."""
        wanted = [self.indices[index] for index in indices]
        if isinstance(self.source, BatchedSource):
            return [*self.source.read(wanted)]
        return [self.source[index] for index in wanted]


Subset = torch.utils.data.Subset


def lengths_of(dataset: SequenceDataset | Subset) -> list[int]:
    """Tokens of each sequence.

    Raises:
        ConfigError: it is another data set, in which nothing is known to be trainable.
    """
    if isinstance(dataset, SequenceDataset):
        return dataset.lengths
    if not isinstance(dataset, Subset):
        raise ConfigError(
            f"training data: found a {type(dataset).__name__}; expected a "
            "lopd.training.batch.SequenceDataset of it, or a Subset of one"
        )
    lengths = lengths_of(dataset.dataset)  # type: ignore[arg-type]
    return [lengths[index] for index in dataset.indices]


def split_holdout(dataset: SequenceDataset, amount: float) -> tuple[Subset, Subset]:
    """Split a dataset into training and held-out sequences; the answers to a prompt stay together.

    A hash of the name of a prompt's first answer maps it to [0, 1). The prompts below `amount` are
    held out or, if `amount` is 1 or more, those with the lowest hashes until that many sequences
    are. The split does not depend on order or seed; with a share, a prompt's side does not depend
    on the others.

    Raises:
        ConfigError: one of the parts would be empty.
    """
    answers = Counter(dataset.prompts)
    places = {name: hashlib.sha256(f"{name}/0".encode()).digest() for name in answers}
    if amount < 1:
        bound = amount * 2**48
        out = {name for name in places if int.from_bytes(places[name][:6], "big") < bound}
    else:
        out, count = set(), 0
        for name in sorted(places, key=places.__getitem__):
            if count < amount:
                out.add(name)
                count += answers[name]
    held_out = [index for index, name in enumerate(dataset.prompts) if name in out]
    training = [index for index, name in enumerate(dataset.prompts) if name not in out]
    if not held_out or not training:
        several = " (the answers to a prompt stay together)" if len(answers) < len(dataset) else ""
        raise ConfigError(
            f"holdout: {amount:g} keeps {len(held_out)} of {len(dataset)} sequences out of "
            f"training; expected at least one, and one to train on{several}"
        )
    return Subset(dataset, training), Subset(dataset, held_out)


@dataclass(frozen=True)
class Collator:
    """Collates items of one kind into a batch of CPU tensors, right-padded or packed.

    With B sequences of at most T tokens, N loss tokens and K teacher ids:

        input_ids, attention_mask                                   [B, T] int64, padded
        input_ids, position_ids                             [1, T] int64, packed; T of all items
        sequence_lengths                                            tuple of B numbers, packed
        loss_index, labels, sequence_index                          [N] int64
        parts, of lopd.training.metrics.POSITIONS                   [N] int64
        overlap_rows, rows on which topk_overlap is computed        [P] int64, with a teacher
        unlisted, rows without a list                               [U] int64, with a teacher
        row_weights                                                 [N] fp32
        rewards (where every sequence has one)                      [N] fp32
        rollout_logprobs (where every sequence has them)            [N] fp32
        topk_ids [N, K] int32, topk_logprobs [N, K] fp32            with a teacher
        tail_logprobs, teacher_logprobs                             [N] fp32, with a teacher
        teacher_entropy                                             [N] fp32, where it is known
        sequence_names                                              list of B strings
        teacher_index, of teacher_names                             [N] int64, of named teachers
        teacher_names                                               list of strings, with them

    `row_weights` are 1 (`token_mean`) or one over the sequence's loss tokens (`sequence_mean`);
    a loss is `sum_n row_weights[n] * L[n] / num_items`, with `num_items` the sum of `row_weights`
    over the whole optimizer step.

    With weights that came with the rollouts, s of the sequence and t_n of its tokens, they are
    `s * t_n` or `s * t_n / sum_n t_n`: either way a loss is a weighted mean. Tokens of weight 0 are
    left out, as those outside the loss mask are.

    Args:
        loss_aggregation: `token_mean` or `sequence_mean`.
        pad_token_id: in padded batches.
        packed: whether a batch is one row of sequences end to end.
        weighted: whether the weights that came with the rollouts count.
    """

    loss_aggregation: str = "token_mean"
    pad_token_id: int = 0
    packed: bool = False
    weighted: bool = True

    def __post_init__(self) -> None:
        if self.loss_aggregation not in LOSS_AGGREGATIONS:
            raise ConfigError(
                f"loss_aggregation: found '{self.loss_aggregation}'; expected one of "
                f"{', '.join(LOSS_AGGREGATIONS)}"
            )

    def __call__(self, items: Sequence[Item]) -> Batch:
        """A batch of the items."""
        sequences = [sequence_of(item) for item in items]
        lengths = [len(sequence.tokens) for sequence in sequences]
        batch = self._inputs([sequence.tokens for sequence in sequences], lengths)
        width = batch["input_ids"].shape[1]
        starts = np.cumsum([0, *lengths]) if self.packed else width * np.arange(len(lengths))
        columns: dict[str, list[np.ndarray]] = {
            name: [] for name in ("loss_index", "labels", "row_weights", "sequence_index", "parts")
        }
        offsets = []
        for row, sequence in enumerate(sequences):
            positions, weights = self._weights(sequence)
            offsets.append(positions - sequence.prompt_length)
            columns["loss_index"].append(predicting_rows(positions, starts[row]))
            columns["labels"].append(sequence.tokens[positions].astype(np.int64))
            columns["row_weights"].append(weights.astype(np.float32))
            columns["sequence_index"].append(np.full(len(positions), row, dtype=np.int64))
            columns["parts"].append(np.searchsorted(POSITIONS, offsets[-1], side="right") - 1)
        if all(map(_has_rollout_logprobs, sequences)):
            columns["rollout_logprobs"] = [
                sequence.rollout_logprobs[offset]  # type: ignore[union-attr]
                for sequence, offset in zip(sequences, offsets, strict=True)
            ]
        rewards = [getattr(sequence, "reward", None) for sequence in sequences]
        if None not in rewards:
            columns["rewards"] = [
                np.full(len(offset), reward, np.float32)
                for reward, offset in zip(rewards, offsets, strict=True)
            ]
        arrays = {name: np.concatenate(parts) for name, parts in columns.items()}
        if isinstance(items[0], TeacherSequence):
            arrays.update(_teacher_columns(items, offsets))
        batch |= {name: torch.from_numpy(array) for name, array in arrays.items()}
        batch["sequence_names"] = [sequence_name(item) for item in items]
        teachers = [getattr(item, "teacher_id", None) for item in items]
        if None not in teachers:
            batch["teacher_names"] = names = sorted({*map(str, teachers)})
            places = torch.tensor([names.index(str(name)) for name in teachers])
            batch["teacher_index"] = places[batch["sequence_index"]]
        return batch

    def _weights(self, sequence: Rollout | Demonstration) -> tuple[np.ndarray, np.ndarray]:
        """The positions of a sequence's tokens with loss, and their row weights [N] fp64."""
        positions = np.flatnonzero(sequence.loss_mask)
        given = getattr(sequence, "token_weights", None) if self.weighted else None
        weights = np.ones(len(positions))
        if given is not None:
            weights = given[positions - sequence.prompt_length].astype(np.float64)
            positions, weights = positions[weights > 0], weights[weights > 0]
        if self.loss_aggregation == "sequence_mean":
            weights = weights / weights.sum()
        if self.weighted:
            weights = weights * getattr(sequence, "weight", 1.0)
        return positions, weights

    def _inputs(self, tokens: list[np.ndarray], lengths: list[int]) -> Batch:
        if self.packed:
            return {
                "input_ids": torch.from_numpy(np.concatenate(tokens).astype(np.int64)[None]),
                "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
                "sequence_lengths": tuple(lengths),
            }
        input_ids = np.full((len(tokens), max(lengths)), self.pad_token_id, dtype=np.int64)
        attention_mask = np.zeros_like(input_ids)
        for row, (ids, length) in enumerate(zip(tokens, lengths, strict=True)):
            input_ids[row, :length], attention_mask[row, :length] = ids, 1
        return {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(attention_mask),
        }


def _has_rollout_logprobs(sequence: Rollout | Demonstration) -> bool:
    """Demonstrations have none; those of imported rollouts may be NaN."""
    return isinstance(sequence, Rollout) and not np.isnan(sequence.rollout_logprobs).any()


def _teacher_columns(items: Sequence[Any], offsets: list[np.ndarray]) -> dict[str, np.ndarray]:
    pairs = [*zip(items, offsets, strict=True)]
    names = ["tail_logprobs", "teacher_logprobs"]
    if not any(np.isnan(item.teacher_entropy[0]) for item in items):
        names.append("teacher_entropy")
    arrays = {
        name: np.concatenate([getattr(item, name)[offset] for item, offset in pairs])
        for name in names
    }
    lists = TopKLists.concatenate([item.lists.take(offset) for item, offset in pairs])
    measured = [is_overlap_position(sequence_name(item), offset) for item, offset in pairs]
    arrays["overlap_rows"] = np.flatnonzero(np.concatenate(measured))
    arrays["unlisted"] = np.flatnonzero(lists.lengths == 0)
    ids, logprobs = lists.padded(max(item.lists.width for item in items))
    return {**arrays, "topk_ids": ids, "topk_logprobs": logprobs}


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`; other values are unchanged."""
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }
