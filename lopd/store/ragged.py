"""Ragged arrays: spans of a flat array, and the top-k lists of a run of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np


def offsets_of(lengths: np.ndarray) -> np.ndarray:  # [n + 1] int64
    """Where the parts of these lengths begin, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


@dataclass(frozen=True)
class Spans:
    """The parts starts[i]..stops[i] of a flat array, one after the other."""

    starts: np.ndarray  # [n] int64
    stops: np.ndarray  # [n] int64

    @classmethod
    def of(cls, offsets: np.ndarray, positions: np.ndarray) -> "Spans":
        """The parts at `positions` of an array that `offsets` divides."""
        return cls(offsets[positions], offsets[positions + 1])

    @cached_property
    def lengths(self) -> np.ndarray:  # [n] int64
        """Elements in each span."""
        return self.stops - self.starts

    @cached_property
    def is_one(self) -> bool:
        """Whether each part begins where the one before it ends."""
        return len(self.starts) > 0 and bool((self.starts[1:] == self.stops[:-1]).all())

    def take(self, values: np.ndarray) -> np.ndarray:
        """A view where the parts follow each other, else a copy."""
        if self.is_one:
            return values[int(self.starts[0]) : int(self.stops[-1])]
        parts = zip(self.starts.tolist(), self.stops.tolist(), strict=True)
        return np.concatenate([values[start:stop] for start, stop in parts])

    @cached_property
    def index(self) -> np.ndarray:  # [sum of lengths] int64
        """The positions of all elements."""
        if self.is_one:
            return np.arange(self.starts[0], self.stops[-1])
        before = np.cumsum(self.lengths) - self.lengths
        return np.repeat(self.starts - before, self.lengths) + np.arange(int(self.lengths.sum()))


@dataclass(frozen=True)
class TopKLists:
    """Lists of (id, log-prob), one for each of R tokens, end to end without padding.

    >>> lists = TopKLists.from_padded(np.array([[7, 3], [5, -1]]), np.array([[-1, -2], [-1, 0.0]]))
    >>> lists.ids.tolist(), lists.lengths.tolist()
    ([7, 3, 5], [2, 1])
    >>> lists.padded()[0].tolist()
    [[7, 3], [5, -1]]
    """

    ids: np.ndarray  # [E] int32
    logprobs: np.ndarray  # [E] fp32, nat
    lengths: np.ndarray  # [R] int64, sums to E

    @classmethod
    def from_padded(
        cls,
        ids: np.ndarray,  # [R, K], -1 pads
        logprobs: np.ndarray,  # [R, K]
    ) -> "TopKLists":
        """The lists without their pads."""
        used = ids != -1
        return cls(ids[used], logprobs[used], used.sum(axis=1))

    @classmethod
    def concatenate(cls, parts: Sequence["TopKLists"]) -> "TopKLists":
        """The lists of several runs of tokens as those of one."""
        return cls(
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.logprobs for part in parts]),
            np.concatenate([part.lengths for part in parts]),
        )

    @property
    def width(self) -> int:
        """Entries of the longest list."""
        return int(self.lengths.max(initial=0))

    @cached_property
    def rows(self) -> np.ndarray:  # [E] int64
        """The token that each entry belongs to."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    def take(self, rows: np.ndarray) -> "TopKLists":  # rows [n] int64
        """The lists of these tokens; a view where they follow each other."""
        spans = Spans.of(offsets_of(self.lengths), rows)
        if spans.is_one:
            return TopKLists(spans.take(self.ids), spans.take(self.logprobs), spans.lengths)
        return TopKLists(self.ids[spans.index], self.logprobs[spans.index], spans.lengths)

    def split(self, offsets: np.ndarray) -> list["TopKLists"]:  # offsets [n + 1] int64, of tokens
        """Views of the runs of tokens that the offsets divide them into."""
        tokens = [slice(*pair) for pair in pairwise(offsets)]
        entries = offsets_of(self.lengths)[offsets]
        parts = [slice(*pair) for pair in pairwise(entries)]
        return [
            TopKLists(self.ids[part], self.logprobs[part], self.lengths[run])
            for part, run in zip(parts, tokens, strict=True)
        ]

    def contains(self, tokens: np.ndarray) -> np.ndarray:  # [R] bool
        """Whether the list of row r holds tokens[r]."""
        result = np.zeros(len(tokens), bool)
        result[self.rows[self.ids == tokens[self.rows]]] = True
        return result

    def row_sums(self, values: np.ndarray) -> np.ndarray:  # [R] fp64 of [E]
        """Sums of values of the entries over each list, 0 for an empty list."""
        sums = np.zeros(len(self.lengths))
        filled = self.lengths > 0
        starts = np.cumsum(self.lengths) - self.lengths
        if filled.any():
            sums[filled] = np.add.reduceat(values, starts[filled], dtype=np.float64)
        return sums

    def padded(self, width: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Rectangular copies of ids and log-probs.

        Args:
            width: columns, at least as many as the longest list has entries; None for as many.

        Returns:
            ids [R, width] int32 with -1 as padding, log-probs [R, width] fp32 with -inf.
        """
        width = self.width if width is None else width
        assert width >= self.width, (width, self.width)
        shape = (len(self.lengths), width)
        ids, logprobs = np.full(shape, -1, np.int32), np.full(shape, -np.inf, np.float32)
        starts = np.cumsum(self.lengths) - self.lengths
        first = np.arange(len(self.lengths)) * width - starts
        places = np.repeat(first, self.lengths) + np.arange(len(self.ids))
        ids.reshape(-1)[places], logprobs.reshape(-1)[places] = self.ids, self.logprobs
        return ids, logprobs
