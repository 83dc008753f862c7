"""Optimizer steps, and their split over processes and into micro-batches.

The sequences of a step depend only on seed, epoch and number of processes; the split into
micro-batches affects memory and rounding. Each process computes the split of all of them, so no
communication is needed.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from lopd.errors import ConfigError

LOG = logging.getLogger(__name__)

MicroBatches = list[list[int]]  # indices into the dataset, by micro-batch


def split(
    lengths: Sequence[int],  # of a step's sequences on one process
    batch_size: int,
    max_tokens: int | None = None,
    at_least: int = 1,
) -> MicroBatches:
    """Split a step's sequences into micro-batches.

    Args:
        lengths: tokens of each sequence.
        batch_size: sequences per micro-batch without `max_tokens`, grouped by similar length.
        max_tokens: tokens per pack (first fit, longest first); None for padded micro-batches.
        at_least: lowest number of micro-batches.

    Returns:
        Indices into `lengths`, by micro-batch.

    Raises:
        ConfigError: a sequence is longer than max_tokens.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    if max_tokens is None:
        if len(lengths) <= batch_size:
            order = [*range(len(lengths))]
        parts = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    else:
        if lengths[order[0]] > max_tokens:
            raise ConfigError(
                f"max_tokens_per_batch: found {max_tokens}, but a sequence has "
                f"{lengths[order[0]]} tokens; expected at least that many"
            )
        parts, free = [], list[int]()
        for i in order:
            fits = next((b for b, room in enumerate(free) if lengths[i] <= room), None)
            if fits is None:
                parts.append([])
                free.append(max_tokens)
                fits = len(parts) - 1
            parts[fits].append(i)
            free[fits] -= lengths[i]
    while len(parts) < at_least:
        most = max(range(len(parts)), key=lambda b: len(parts[b]))
        assert len(parts[most]) > 1, "fewer sequences than micro-batches"
        parts[most : most + 1] = [parts[most][::2], parts[most][1::2]]
    return parts


def share(lengths: Sequence[int], world_size: int) -> list[list[int]]:
    """Indices into `lengths` by process: the same number for each, with similar token counts."""
    if world_size == 1:
        return [[*range(len(lengths))]]
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    shares: list[list[int]] = [[] for _ in range(world_size)]
    for turn, start in enumerate(range(0, len(order), world_size)):
        row = order[start : start + world_size]
        for rank, i in enumerate(row if turn % 2 == 0 else row[::-1]):
            shares[rank].append(i)
    return shares


class StepSampler(torch.utils.data.Sampler[MicroBatches]):
    """Batch sampler of a DataLoader: this process's micro-batches of each optimizer step.

    A step has `batch_size * accumulation` sequences per process, in an order drawn from
    (seed, epoch). The last step of an epoch has the remaining ones, the same number per process. If
    the processes do not divide the number of sequences, each epoch leaves out the rest.

    Args:
        lengths: tokens of each sequence of the dataset.
        batch_size, max_tokens: as in `split`.
        accumulation: micro-batches of `batch_size` per step and process.
        rank: number of this process.
        world_size: number of processes.
        seed: of the order.

    Raises:
        ConfigError: a sequence is longer than max_tokens, or there are more processes than
            sequences.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        accumulation: int = 1,
        *,
        max_tokens: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
    ) -> None:
        self.lengths = np.asarray(lengths)
        self.batch_size, self.accumulation, self.max_tokens = batch_size, accumulation, max_tokens
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.epoch = 0
        self.step_size = batch_size * accumulation * world_size
        self.used = len(lengths) // world_size * world_size
        if not self.used:
            raise ConfigError(
                f"{world_size} processes for {len(lengths)} sequences; start at most that many "
                "processes"
            )
        split([int(self.lengths.max())], 1, max_tokens)
        if (left := len(lengths) - self.used) and rank == 0:
            LOG.warning(
                f"each epoch leaves out {left} of {len(lengths)} sequences at random, so that "
                f"{world_size} processes have the same number"
            )

    def __len__(self) -> int:
        return -(-self.used // self.step_size)

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose steps come next."""
        self.epoch = epoch

    def steps(self, epoch: int) -> list[list[int]]:
        """The sequences of each step of an epoch, over all processes."""
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()[: self.used]
        return [order[i : i + self.step_size] for i in range(0, len(order), self.step_size)]

    def micro_batches(self, sequences: Sequence[int]) -> MicroBatches:
        """This process's share of a step, in the same number of micro-batches as on the others."""
        lengths = self.lengths[np.asarray(sequences)].tolist()
        shares = share(lengths, self.world_size)
        by_rank = [[lengths[i] for i in part] for part in shares]
        most = max(len(split(part, self.batch_size, self.max_tokens)) for part in by_rank)
        parts = split(by_rank[self.rank], self.batch_size, self.max_tokens, most)
        return [[sequences[shares[self.rank][i]] for i in part] for part in parts]

    def __iter__(self) -> Iterator[MicroBatches]:
        for sequences in self.steps(self.epoch):
            yield self.micro_batches(sequences)


class StepDataset(torch.utils.data.Dataset):
    """Reads the items of a step together and groups them by micro-batch."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, micro_batches: MicroBatches) -> list[list[Any]]:
        items = iter(self.dataset.__getitems__([i for part in micro_batches for i in part]))
        return [[next(items) for _ in part] for part in micro_batches]
