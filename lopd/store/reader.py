"""Readers of shard folders: random access by sequence; shards are opened when needed."""

import math
import resource
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from lopd.errors import ConfigError, ShardError
from lopd.provenance import CacheManifest, Manifest, manifest_digest, read_manifest
from lopd.provenance.io import json_digest
from lopd.store.codec import CODECS
from lopd.store.sequences import SUPPORTS, Support, join_sequences
from lopd.store.shards import check_hash, open_shard, read_receipt
from lopd.store.types import FINISH_REASONS, Rollout, TeacherColumns, TeacherSequence
from lopd.store.view import ShardView

LENGTH_QUANTILES = (0.1, 0.5, 0.9, 0.99, 1.0)
# Response tokens that are decoded together when all are read; they fit into a CPU's cache.
_TOKENS_TOGETHER = 1 << 13
_MOST_MAPPED = 4096
Record = TypeVar("Record")


class _ShardReader(Generic[Record]):
    """Base of the readers: receipts are read at once, shards when they are needed."""

    _codec: Any = None

    def __init__(self, path: Path, manifest: Manifest, *, allow_incomplete: bool) -> None:
        self.path = path
        self.manifest = manifest
        self.num_shards = len(manifest.shards)
        self._vocab_size = manifest.vocab_size
        self._receipts: dict[int, Any] = {}  # a Receipt, or a CacheReceipt in a cache
        self.faults: list[str] = []  # what is wrong with each of `missing_shards`
        self.missing_shards: list[int] = []
        recipe = manifest_digest(manifest)
        for shard, sequences in enumerate(manifest.shards):
            try:
                self._receipts[shard] = read_receipt(
                    path, shard, kind=manifest.kind, recipe=recipe, sequences=sequences
                )
            except ShardError as error:
                if not allow_incomplete:
                    raise
                self.missing_shards.append(shard)
                self.faults.append(str(error))
        self._present = list(self._receipts)
        self._ends = list(accumulate(r.sequences for r in self._receipts.values()))
        self._views: dict[int, ShardView] = {}
        self._mapped: dict[int, ShardView] = {}  # the last one used is last
        self._most_mapped = most_mapped()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Record:
        return self.read([index])[0]

    def __iter__(self) -> Iterator[Record]:
        for view, positions in self._chunks():
            yield from self._read(view, positions)

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes open the shards themselves, since mapped files cannot be sent to them.
        return {**self.__dict__, "_views": {}, "_mapped": {}}

    def verify(self) -> None:
        """Hash and read every shard except those in `missing_shards`.

        Raises:
            ShardError: a shard is altered; names the first.
        """
        for receipt in self._receipts.values():
            check_hash(self.path, receipt)
        for view, positions in self._chunks():
            self._read(view, positions)

    def check_complete(self) -> None:
        """Refuse a folder with missing shards.

        Raises:
            ShardError: how many are missing, and what is wrong with the first.
        """
        if self.faults:
            raise ShardError(
                f"{self.path}: {len(self.faults)} of {self.num_shards} shards are unfinished or "
                f"damaged; the first is {self.faults[0]}"
            )

    def digest(self) -> str:
        """sha256 of the content: the digests of the recipe and of every shard, in order."""
        shards = [self._receipts[shard].sha256 for shard in self._present]
        return json_digest({"recipe": manifest_digest(self.manifest), "shards": shards})

    def used_ids(self, teacher: str | None = None) -> np.ndarray:  # [n] int64, ascending
        """The distinct token ids of the data, list entries included; reads everything.

        Args:
            teacher: the name of a teacher, to read only its sequences.
        """
        used = np.zeros(self._vocab_size, bool)
        for view, positions in self._chunks(teacher):
            for ids in self._ids(view, positions):
                used[ids] = True
        return np.flatnonzero(used)

    def summary(self) -> dict[str, Any]:
        """Totals from the receipts, without opening a shard."""
        totals = self.totals()
        return {
            "kind": self.manifest.kind,
            "shards": self.num_shards,
            "missing_shards": len(self.missing_shards),
            **{name: value for name, value in totals.items() if name != "finish_reasons"},
            "bytes_per_response_token": _ratio(totals["bytes"], totals["response_tokens"]),
            "finish_reasons": totals["finish_reasons"],
        }

    def totals(self, teacher: str | None = None) -> dict[str, Any]:
        """Sums of the receipts: of all shards, or of those of one of several teachers."""
        receipts = [
            receipt
            for shard, receipt in self._receipts.items()
            if teacher in (None, self.manifest.teacher_of(shard))
        ]
        keys = ("sequences", "tokens", "response_tokens", "bytes")
        return {key: sum(getattr(r, key) for r in receipts) for key in keys} | {
            "finish_reasons": {
                reason: sum(r.finish_reasons[reason] for r in receipts) for reason in FINISH_REASONS
            },
        }

    def of_teacher(self, name: str | None) -> np.ndarray:  # [n] int64, ascending
        """The indices of the sequences of one of several teachers; of all if the name is None."""
        names = [self.manifest.teacher_of(shard) for shard in self._present]
        sizes = [self._receipts[shard].sequences for shard in self._present]
        return np.flatnonzero(np.repeat([name in (None, found) for found in names], sizes))

    def rewards(self) -> np.ndarray:  # [len(self)] fp32
        """The reward of every sequence, NaN where it is unknown; decodes nothing."""
        return self._given("reward", math.nan)

    def weights(self) -> np.ndarray:  # [len(self)] fp32
        """The weight of every sequence, as it was given; decodes nothing."""
        return self._given("weight", 1.0)

    @property
    def has_token_weights(self) -> bool:
        """Whether a sequence has weights for its tokens."""
        return any("token_weights" in self._view(shard).arrays for shard in self._present)

    def _given(self, name: str, absent: float) -> np.ndarray:
        parts = [self._view(shard).given(name, absent) for shard in self._present]
        return np.concatenate([np.zeros(0, np.float32), *parts])

    def _view(self, shard: int) -> ShardView:
        """The view of a shard; those that were used last stay mapped."""
        view = self._views.get(shard)
        if view is None:
            receipt = self._receipts[shard]
            file = open_shard(self.path, receipt)
            view = self._views[shard] = ShardView(file, receipt, self._codec, self._vocab_size)
        self._mapped.pop(shard, None)
        self._mapped[shard] = view
        if len(self._mapped) > self._most_mapped:
            self._unmap(next(iter(self._mapped)))
        return view

    def _unmap(self, shard: int) -> None:
        if (view := self._mapped.pop(shard, None)) is not None:
            view.file.unmap()

    def read(self, indices: Sequence[int]) -> list[Record]:
        """`[self[i] for i in indices]`; sequences of the same shard are decoded together."""
        wanted = np.asarray(indices, np.int64)
        total = len(self)
        outside = (wanted < -total) | (wanted >= total)
        if outside.any():
            raise IndexError(f"sequence {wanted[outside][0]} of {total} in {self.path}")
        wanted = wanted % total if total else wanted
        which = np.searchsorted(self._ends, wanted, side="right")
        records: list[Any] = [None] * len(wanted)
        for number in np.unique(which).tolist():
            places = np.flatnonzero(which == number)
            shard = self._present[number]
            start = self._ends[number] - self._receipts[shard].sequences
            decoded = self._read(self._view(shard), wanted[places] - start)
            for place, record in zip(places.tolist(), decoded, strict=True):
                records[place] = record
        return records

    def _chunks(self, teacher: str | None = None) -> Iterator[tuple[ShardView, np.ndarray]]:
        """All positions in order; no shard stays mapped that is read through."""
        for shard in self._present:
            if teacher not in (None, self.manifest.teacher_of(shard)):
                continue
            view = self._view(shard)
            for positions in view.chunks(_TOKENS_TOGETHER):
                yield view, positions
            self._unmap(shard)

    def rollouts(self) -> Iterator[Rollout]:
        """Every sequence in order, without the scores."""
        for view, positions in self._chunks():
            yield from view.rollouts(positions)

    def _read(self, view: ShardView, positions: np.ndarray) -> list[Any]:
        return view.rollouts(positions)

    def _ids(self, view: ShardView, positions: np.ndarray) -> list[np.ndarray]:
        return [rollout.tokens for rollout in view.rollouts(positions)]


class RolloutStore(_ShardReader[Rollout]):
    """Sequences of a `rollouts` or `sft_data` folder; `store[i]` is a `Rollout`."""

    @classmethod
    def open(
        cls, path: str | Path, kind: str = "rollouts", *, allow_incomplete: bool = False
    ) -> "RolloutStore":
        """Open a folder.

        Args:
            allow_incomplete: skip unfinished shards, as `TeacherCache.open` does.

        Raises:
            MissingFileError: no such folder. ConfigError: a folder of another kind.
            ShardError: a shard or receipt is missing, truncated or foreign; names it.
        """
        manifest = read_manifest(path, kind=kind)
        return cls(Path(path), manifest, allow_incomplete=allow_incomplete)

    def shard(self, index: int) -> list[Rollout]:
        """All sequences of one shard, in order."""
        if index not in self._receipts:
            raise IndexError(f"shard {index} of {self.num_shards} in {self.path}")
        view = self._view(index)
        return view.rollouts(np.arange(view.sequences))


class TeacherCache(_ShardReader[TeacherSequence]):
    """Scored rollouts of a `cache` folder; `cache[i]` is a `TeacherSequence`."""

    manifest: CacheManifest

    def __init__(
        self, path: Path, support: Support, vocab_size: int | None, allow_incomplete: bool
    ) -> None:
        manifest = read_manifest(path, kind="cache")
        self._codec = manifest.codec
        if self._codec not in CODECS:
            raise ConfigError(f"{path}: codec {self._codec!r}, expected one of {', '.join(CODECS)}")
        if support not in SUPPORTS:
            raise ConfigError(f"support is {support!r}, expected one of {', '.join(SUPPORTS)}")
        if vocab_size is not None and vocab_size < 1:
            raise ConfigError(f"vocab_size is {vocab_size}, expected at least 1")
        # No token is added to the lists of calibrated log-probs, which are of no distribution.
        self.support: Support = "list" if manifest.scoring.is_calibrated else support
        self.vocab_size = vocab_size
        super().__init__(path, manifest, allow_incomplete=allow_incomplete)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        support: Support = "list+sampled",
        vocab_size: int | None = None,
        allow_incomplete: bool = False,
    ) -> "TeacherCache":
        """Open a cache.

        Args:
            support: `list` returns the lists as stored. `list+sampled` appends the sampled token,
                with the teacher's exact log-prob, to the lists that lack it, and subtracts it
                from the tail. The remainder is floored at log(2^-20) below the tail, because a
                smaller one is rounding; `summary()["floored_tails"]` counts those rows.
            vocab_size: rows of the student's head. Listed ids beyond it are dropped, and their
                mass is added to the tail; `summary()["dropped_entries"]` counts them.
            allow_incomplete: skip unfinished shards. `missing_shards` lists them, and
                indices count the sequences of finished shards.

        Raises:
            MissingFileError: no such folder. ConfigError: a folder of another kind.
            ShardError: a shard or receipt is missing, truncated or foreign; names it.
        """
        return cls(Path(path), support, vocab_size, allow_incomplete)

    def chunks(self) -> Iterator[TeacherColumns]:
        """All scores as written, end to end, some thousand response tokens at a time.

        The fastest way to read every list. Codec `exact` returns read-only views of the file.
        """
        for view, positions in self._chunks():
            yield view.columns(positions)

    @property
    def has_no_lists(self) -> bool:
        """Whether only the log-probs of the sampled tokens are known."""
        return all(receipt.list_entries == 0 for receipt in self._receipts.values())

    def summary(self) -> dict[str, Any]:
        """Totals from the receipts; reads the lists only if `vocab_size` can drop entries."""
        receipts = list(self._receipts.values())
        totals = super().summary()
        tokens = totals["response_tokens"]
        entropies = [r.entropy for r in receipts]
        return {
            **totals,
            "codec": self._codec,
            "k": self.manifest.k,
            "top_p": self.manifest.top_p,
            "mean_list_length": _ratio(sum(r.list_entries for r in receipts), tokens),
            "mean_covered_mass": _ratio(sum(r.covered_mass for r in receipts), tokens),
            "mean_entropy": None if None in entropies else _ratio(sum(entropies), tokens),
            "floored_tails": sum(r.floored_tails for r in receipts),
            "dropped_entries": self._count_dropped(),
            "codec_error": self._codec_error(tokens),
        }

    def details(self) -> dict[str, Any]:
        """Sizes by array and list lengths; opens every shard.

        `bytes_per_token_by_array` is per response token, largest first; `header` are the file
        headers. `list_length_quantiles` are those of the lists as written.
        """
        sizes: Counter[str] = Counter()
        counts = np.zeros(1, np.int64)
        for shard in self._present:
            view = self._view(shard)
            sizes.update({name: values.nbytes for name, values in view.arrays.items()})
            more = np.bincount(view.list_lengths(), minlength=len(counts))
            more[: len(counts)] += counts
            counts = more
            self._unmap(shard)
        receipts = self._receipts.values()
        sizes["header"] = sum(r.bytes for r in receipts) - sizes.total()
        tokens = sum(r.response_tokens for r in receipts)
        ranks = [math.ceil(q * tokens) for q in LENGTH_QUANTILES]
        lengths = np.searchsorted(np.cumsum(counts), ranks).tolist() if tokens else []
        return {
            "bytes_per_token_by_array": {
                name: size / tokens for name, size in sizes.most_common() if tokens
            },
            "list_length_quantiles": dict(zip(map(str, LENGTH_QUANTILES), lengths, strict=False)),
        }

    def _codec_error(self, tokens: int) -> float | None:
        """Mean over response tokens, in nat; None where a receipt does not have it."""
        if self._codec == "exact":
            return 0.0
        errors = [receipt.codec_error for receipt in self._receipts.values()]
        known = [error for error in errors if error is not None]
        return _ratio(sum(known), tokens) if len(known) == len(errors) else None

    def _count_dropped(self) -> int:
        if self.vocab_size is None or self.vocab_size >= self._vocab_size:
            return 0
        return sum(int((part.lists.ids >= self.vocab_size).sum()) for part in self.chunks())

    def _read(self, view: ShardView, positions: np.ndarray) -> list[TeacherSequence]:
        joined = self._codec == "compact" and self.support == "list+sampled"
        return join_sequences(
            view.rollouts(positions),
            view.columns(positions, with_sampled=joined),
            support="list" if joined else self.support,
            vocab_size=self.vocab_size,
            source=self.path,
            teacher_id=self.manifest.teacher_of(view.shard),
        )

    def _ids(self, view: ShardView, positions: np.ndarray) -> list[np.ndarray]:
        return [*super()._ids(view, positions), view.columns(positions).lists.ids]


def most_mapped() -> int:
    """Shards that a reader keeps mapped: a quarter of the files that the process may open."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (
        _MOST_MAPPED if limit == resource.RLIM_INFINITY else min(_MOST_MAPPED, max(1, limit // 4))
    )


def _ratio(total: float, count: int) -> float | None:
    return total / count if count else None
