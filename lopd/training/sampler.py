"""Which sequences make which optimizer step, and which of them go through the model together.

A step's sequences depend on seed, epoch and number of processes alone; how they are cut into
micro-batches changes memory and rounding. Every process plans for all of them, so that none
has to ask.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from lopd.errors import ConfigError

MicroBatches = list[list[int]]  # places in the dataset, by micro-batch


def split(
    lengths: Sequence[int],  # of a step's sequences on one process
    batch_size: int,
    max_tokens: int | None = None,
    at_least: int = 1,
) -> MicroBatches:
    """Positions in `lengths` by micro-batch, `at_least` so many of them.

    Without `max_tokens` each has at most `batch_size` sequences, of similar length where there
    are several; with it they are packs of at most so many tokens (first fit, the longest first).

    Raises:
        ConfigError: a sequence alone is longer than max_tokens.
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
    """Positions in `lengths` by process: as many to each, of like tokens together."""
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
    """Batch sampler of a DataLoader: for each optimizer step this process's micro-batches.

    A step has `batch_size * accumulation` sequences on each process, in an order drawn from
    (seed, epoch); an epoch's last step has what is left, as many on each process. Fewer than there
    are processes wait for the next epoch, which is said once.

    Raises:
        ConfigError: a sequence is longer than max_tokens, or there are fewer than processes.
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
                f"{world_size} processes for {len(lengths)} sequences; start no more than there are"
            )
        split([int(self.lengths.max())], 1, max_tokens)
        if (left := len(lengths) - self.used) and rank == 0:
            print(
                f"each epoch leaves out {left} of {len(lengths)} sequences, by chance, so that "
                f"{world_size} processes have as many",
                file=sys.stderr,
            )

    def __len__(self) -> int:
        return -(-self.used // self.step_size)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def steps(self, epoch: int) -> list[list[int]]:
        """The sequences of every step of an epoch, over all processes."""
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()[: self.used]
        return [order[i : i + self.step_size] for i in range(0, len(order), self.step_size)]

    def micro_batches(self, sequences: Sequence[int]) -> MicroBatches:
        """This process's part of a step, in as many micro-batches as every other has."""
        lengths = self.lengths[np.asarray(sequences)].tolist()
        shares = share(lengths, self.world_size)
        by_rank = [[lengths[i] for i in part] for part in shares]
        most = max(len(split(own, self.batch_size, self.max_tokens)) for own in by_rank)
        own = shares[self.rank]
        parts = split(by_rank[self.rank], self.batch_size, self.max_tokens, most)
        return [[sequences[own[i]] for i in part] for part in parts]

    def __iter__(self) -> Iterator[MicroBatches]:
        for sequences in self.steps(self.epoch):
            yield self.micro_batches(sequences)


class StepDataset(torch.utils.data.Dataset):
    """Reads a step's items together, grouped as the sampler groups them."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, micro_batches: MicroBatches) -> list[list[Any]]:
        items = iter(self.dataset.__getitems__([i for part in micro_batches for i in part]))
        return [[next(items) for _ in part] for part in micro_batches]


class StepLoader(torch.utils.data.DataLoader):
    """Items of one optimizer step at a time, read at the moment it begins."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
