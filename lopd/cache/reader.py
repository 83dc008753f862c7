"""Readers of shard folders: random access by sequence, shards opened when first needed."""

from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lopd.cache.codec import CODECS, Lists, add_sampled, build_lists, drop_ids, pad_lists
from lopd.cache.layout import Scored, ShardView
from lopd.cache.records import FINISH_REASONS, Rollout, TeacherScores, TeacherSequence
from lopd.cache.shards import check_hash, head_rows, open_shard, plan_of, read_receipt, shard_path
from lopd.errors import ConfigError, DataError, ShardError
from lopd.files import json_digest
from lopd.provenance import manifest_digest, read_manifest

Support = Literal["list+sampled", "list"]
SUPPORTS: tuple[Support, ...] = ("list+sampled", "list")


class _ShardReader:
    """What readers of all kinds share: receipts up front, shards on demand."""

    _codec: Any = None

    def __init__(self, path: Path, manifest: dict[str, Any], *, allow_incomplete: bool) -> None:
        self.path = path
        self.manifest = manifest
        self.num_shards = len(plan_of(manifest))
        self._vocab_size = head_rows(manifest)
        self._receipts: dict[int, dict[str, Any]] = {}
        self.missing_shards: list[int] = []
        recipe = manifest_digest(manifest)
        for shard, sequences in enumerate(plan_of(manifest)):
            try:
                self._receipts[shard] = read_receipt(
                    path, shard, kind=manifest["kind"], recipe=recipe, sequences=sequences
                )
            except ShardError:
                if not allow_incomplete:
                    raise
                self.missing_shards.append(shard)
        self._present = list(self._receipts)
        self._ends = list(accumulate(r["sequences"] for r in self._receipts.values()))
        self._views: dict[int, ShardView] = {}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getstate__(self) -> dict[str, Any]:
        # Mapped files do not travel to worker processes; each opens its own.
        return {**self.__dict__, "_views": {}}

    def verify(self) -> None:
        """Hash and read every shard but those in `missing_shards`.

        Raises:
            ShardError: names the first shard that is altered.
        """
        for shard, receipt in self._receipts.items():
            check_hash(self.path, receipt)
            view = self._view(shard)
            for index in range(view.sequences):
                self._read(view, index)

    def digest(self) -> str:
        """sha256 of the content: the recipe's digest and every shard's, in order."""
        shards = [self._receipts[shard]["sha256"] for shard in self._present]
        return json_digest({"recipe": manifest_digest(self.manifest), "shards": shards})

    def used_ids(self) -> np.ndarray:  # [n] int64, ascending
        """The distinct token ids of the data, list entries included; reads everything."""
        used = np.zeros(self._vocab_size, bool)
        for view, index in self._positions():
            used[self._ids(view, index)] = True
        return np.flatnonzero(used)

    def summary(self) -> dict[str, Any]:
        """Totals from the receipts, without opening a shard."""
        receipts = list(self._receipts.values())
        totals = {
            key: sum(r[key] for r in receipts)
            for key in ("sequences", "tokens", "response_tokens", "bytes")
        }
        return {
            "kind": self.manifest["kind"],
            "shards": self.num_shards,
            "missing_shards": len(self.missing_shards),
            **totals,
            "bytes_per_response_token": _ratio(totals["bytes"], totals["response_tokens"]),
            "finish_reasons": {
                reason: sum(r["finish_reasons"][reason] for r in receipts)
                for reason in FINISH_REASONS
            },
        }

    def _view(self, shard: int) -> ShardView:
        if shard not in self._views:
            receipt = self._receipts[shard]
            arrays = open_shard(self.path, receipt)
            path = shard_path(self.path, shard)
            self._views[shard] = ShardView(path, arrays, receipt, self._codec, self._vocab_size)
        return self._views[shard]

    def _locate(self, index: int) -> tuple[ShardView, int]:
        total = len(self)
        if not -total <= index < total:
            raise IndexError(f"sequence {index} of {total} in {self.path}")
        index %= total
        which = bisect_right(self._ends, index)
        start = self._ends[which - 1] if which else 0
        return self._view(self._present[which]), index - start

    def _positions(self) -> Iterator[tuple[ShardView, int]]:
        for shard in self._present:
            view = self._view(shard)
            for index in range(view.sequences):
                yield view, index

    def _read(self, view: ShardView, index: int) -> Any:
        return view.rollout(index)

    def _ids(self, view: ShardView, index: int) -> np.ndarray:
        return view.rollout(index).tokens


class RolloutStore(_ShardReader):
    """Sequences of a `rollouts` or `sft_data` folder; `store[i]` is a `Rollout`."""

    @classmethod
    def open(
        cls, path: str | Path, kind: Literal["rollouts", "sft_data"] = "rollouts"
    ) -> "RolloutStore":
        """Open a finished folder.

        Raises:
            MissingFileError: no such folder. ConfigError: a folder of another kind.
            ShardError: names the shard or receipt that is missing, truncated or foreign.
        """
        return cls(Path(path), read_manifest(path, kind=kind), allow_incomplete=False)

    def __getitem__(self, index: int) -> Rollout:
        return self._read(*self._locate(index))

    def __iter__(self) -> Iterator[Rollout]:
        return (self._read(*position) for position in self._positions())

    def shard(self, index: int) -> list[Rollout]:
        """All sequences of one shard, in order."""
        if index not in self._receipts:
            raise IndexError(f"shard {index} of {self.num_shards} in {self.path}")
        view = self._view(index)
        return [view.rollout(position) for position in range(view.sequences)]


class TeacherCache(_ShardReader):
    """Scored rollouts of a `cache` folder; `cache[i]` is a `TeacherSequence`."""

    def __init__(
        self,
        path: Path,
        manifest: dict[str, Any],
        *,
        support: Support,
        vocab_size: int | None,
        allow_incomplete: bool,
    ) -> None:
        self._codec = manifest.get("codec")
        if self._codec not in CODECS:
            raise ConfigError(f"{path}: codec {self._codec!r}, expected one of {', '.join(CODECS)}")
        if support not in SUPPORTS:
            raise ConfigError(f"support is {support!r}, expected one of {', '.join(SUPPORTS)}")
        if vocab_size is not None and vocab_size < 1:
            raise ConfigError(f"vocab_size is {vocab_size}, expected at least 1")
        self.support: Support = support
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
            support: `list` leaves every list as stored. `list+sampled` appends the sampled
                token where its list lacks it, with the teacher's exact log-prob, and takes
                it out of the tail, floored at log(2^-20) below the tail: where the token is
                all of the tail within rounding, that is what rounding could hide.
                `summary()["floored_tails"]` counts those rows.
            vocab_size: the student's head rows. Listed ids beyond are dropped and their mass
                goes to the tail; `summary()["dropped_entries"]` counts them.
            allow_incomplete: skip unfinished shards; `missing_shards` lists them, and
                indices count the sequences that are there.

        Raises:
            MissingFileError: no such folder. ConfigError: a folder of another kind.
            ShardError: names the shard or receipt that is missing, truncated or foreign.
        """
        return cls(
            Path(path),
            read_manifest(path, kind="cache"),
            support=support,
            vocab_size=vocab_size,
            allow_incomplete=allow_incomplete,
        )

    def __getitem__(self, index: int) -> TeacherSequence:
        return self._read(*self._locate(index))

    def __iter__(self) -> Iterator[TeacherSequence]:
        return (self._read(*position) for position in self._positions())

    def lists(self, index: int) -> Lists:
        """The lists as stored, end to end: read-only views of the file for codec `exact`."""
        view, position = self._locate(index)
        return view.scored(position).lists

    def summary(self) -> dict[str, Any]:
        """Totals from the receipts; scans the lists only where `vocab_size` can drop some."""
        receipts = list(self._receipts.values())
        totals = super().summary()
        tokens = totals["response_tokens"]
        return {
            **totals,
            "codec": self._codec,
            "k": self.manifest["k"],
            "top_p": self.manifest["top_p"],
            "mean_list_length": _ratio(sum(r["list_entries"] for r in receipts), tokens),
            "mean_covered_mass": _ratio(sum(r["covered_mass"] for r in receipts), tokens),
            "mean_entropy": _ratio(sum(r["entropy"] for r in receipts), tokens),
            "floored_tails": sum(r["floored_tails"] for r in receipts),
            "dropped_entries": self._count_dropped(),
        }

    def _count_dropped(self) -> int:
        if self.vocab_size is None or self.vocab_size >= self._vocab_size:
            return 0
        return sum(
            int((view.scored(index).lists.ids >= self.vocab_size).sum())
            for view, index in self._positions()
        )

    def _read(self, view: ShardView, index: int) -> TeacherSequence:
        return _sequence(
            view.rollout(index),
            view.scored(index),
            support=self.support,
            vocab_size=self.vocab_size,
            source=self.path,
        )

    def _ids(self, view: ShardView, index: int) -> np.ndarray:
        return np.concatenate([view.rollout(index).tokens, view.scored(index).lists.ids])


def _ratio(total: float, count: int) -> float | None:
    return total / count if count else None


def scored_sequence(
    rollout: Rollout,
    scores: TeacherScores,
    *,
    support: Support = "list+sampled",
    vocab_size: int | None = None,
) -> TeacherSequence:
    """Fresh scores as `TeacherCache` would return them from disk (codec `exact`, top_p 1).

    For a teacher that scores while the student trains, and for evaluation. `support` and
    `vocab_size` as in `TeacherCache.open`.

    Raises:
        DataError: the sequence has a token id beyond `vocab_size`.
    """
    lists, tail = build_lists(scores, top_p=1.0)
    scored = Scored(scores.logprobs, scores.entropy, lists, tail)
    return _sequence(rollout, scored, support=support, vocab_size=vocab_size, source="scores")


def _sequence(
    rollout: Rollout,
    scored: Scored,
    *,
    support: Support,
    vocab_size: int | None,
    source: Path | str,
) -> TeacherSequence:
    lists, tail = scored.lists, scored.tail
    if vocab_size is not None:
        if rollout.tokens.max() >= vocab_size:
            raise DataError(
                f"{source}: sequence {rollout.prompt_id}/{rollout.sample} has token id "
                f"{rollout.tokens.max()}, the student has {vocab_size} vocabulary rows; train the "
                "student that made the rollouts"
            )
        lists, tail = drop_ids(lists, tail, vocab_size)
    if support == "list+sampled":
        sampled = rollout.tokens[rollout.prompt_length :]
        lists, tail = add_sampled(lists, tail, sampled, scored.logprobs)
    ids, logprobs = pad_lists(lists)
    return TeacherSequence(
        rollout=rollout,
        teacher_logprobs=scored.logprobs.copy(),
        teacher_entropy=scored.entropy.copy(),
        topk_ids=ids,
        topk_logprobs=logprobs,
        tail_logprobs=tail.copy(),
    )
