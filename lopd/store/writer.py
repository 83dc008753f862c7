"""Writers of shard folders: resumable, one or several to a folder, nothing finished is lost."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lopd.errors import ConfigError, DataError, ShardError
from lopd.provenance import (
    VOCAB_NAME,
    CacheManifest,
    Manifest,
    manifest_digest,
    read_manifest,
    write_manifest,
)
from lopd.provenance.io import remove_temporaries
from lopd.store.codec import CODECS, Codec, Scored, check_storable
from lopd.store.folders import examine_shard_folder, writing_to
from lopd.store.layout import index_digest, rollout_arrays, rollout_counts, score_shard
from lopd.store.lists import build_lists
from lopd.store.locks import FolderLock, ShardLock, remove_shard_locks, start_lock
from lopd.store.shards import check_hash, read_receipt, write_shard
from lopd.store.types import Rollout, TeacherScores, name_of
from lopd.store.validate import check_rollout, check_scores
from lopd.store.workers import Worker


class _ShardWriter:
    """What writers of all kinds share. Holds the folder's lock until `finish` or `close`.

    One writer has the folder to itself. A worker of several shares it with the others, holds a
    lock on the shard that it is at, and writes what `claims` gives it.
    """

    kinds: tuple[str, ...] = ()

    def __init__(self, path: Path, manifest: Manifest, lock: FolderLock, worker: Worker) -> None:
        self.path = path
        self.manifest = manifest
        self._plan = manifest.shards
        self._recipe = manifest_digest(manifest)
        self._vocab_size = manifest.vocab_size
        self._has_logprobs = manifest.scoring.rollout_logprobs != "absent"
        self._lock = lock
        self._worker = worker
        self._claimed: int | None = None
        # Those whose receipt hides it; other workers hash the shards of their own numbers.
        self._altered = {
            shard
            for shard in range(len(self._plan))
            if worker.owns(shard)
            and self._is_good(shard, hash_too=False)
            and not self._is_good(shard, hash_too=True)
        }

    @classmethod
    def _open(cls, path: str | Path, manifest: Manifest, worker: Worker) -> Any:
        cls._check(manifest)
        folder = examine_shard_folder(path, manifest).path
        with writing_to(folder):
            with start_lock(folder):
                lock = FolderLock(folder, shared=not worker.alone)
                try:
                    manifest = cls._start(folder, manifest, lock)
                    lock.settle()
                except BaseException:
                    lock.release()
                    raise
            try:
                return cls(folder, manifest, lock, worker)
            except BaseException:
                lock.release()
                raise

    @classmethod
    def _check(cls, manifest: Manifest) -> None:
        if manifest.kind not in cls.kinds:
            raise DataError(
                f"manifest has kind {manifest.kind!r}, expected one of {', '.join(cls.kinds)}"
            )

    @staticmethod
    def _start(folder: Path, manifest: Manifest, lock: FolderLock) -> Manifest:
        """Write the manifest, or return the one on disk if it has the same recipe."""
        if lock.alone:
            remove_temporaries(folder)
            remove_shard_locks(folder)
        # Examined again under the lock: another writer may have started since.
        found = examine_shard_folder(folder, manifest, in_use=not lock.alone)
        if found.state == "unfinished":
            return read_manifest(folder)
        (folder / VOCAB_NAME).unlink(missing_ok=True)  # of a recipe that is replaced
        write_manifest(folder, manifest)
        return manifest

    def missing(self) -> list[int]:
        """Shards, in order, whose receipt is absent or does not match the data."""
        return [shard for shard in range(len(self._plan)) if self._is_missing(shard)]

    def claims(self) -> Iterator[int]:
        """The shards to write, one after another; each is written before the next is asked for.

        A worker gets those of its own number first, then any other that nobody has finished or
        is at, until there is none left.
        """
        if self._worker.alone:
            yield from self.missing()
            return
        found = True
        while found:
            found = False
            for shard in self._worker.order(self.missing()):
                lock = ShardLock.take(self.path, shard)
                if lock is None:
                    continue
                try:
                    if self._is_missing(shard):  # still: another may have written it since
                        found, self._claimed = True, shard
                        yield shard
                        assert not self._is_missing(shard)
                finally:
                    self._claimed = None
                    lock.release()

    def finish(self) -> bool:
        """Check that every shard of the plan is there, and give the folder back.

        Returns whether all are: False where other workers are at those that are missing, the
        last of which will find them all.

        Raises:
            ShardError: names the first shard that is missing and that nobody is at; the writer
                stays open.
        """
        busy = [shard for shard in self.missing() if self._is_taken(shard)]
        missing = self.missing()
        idle = sorted(set(missing) - set(busy))
        if idle:
            raise ShardError(
                f"{self.path}: {len(idle)} of {len(self._plan)} shards are missing, the first "
                f"is {idle[0]}; write them before finishing"
            )
        self.close()
        return not missing

    def close(self) -> None:
        """Give the folder back, finished or not; what is missing can be written later."""
        self._lock.release()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _is_missing(self, shard: int) -> bool:
        return shard in self._altered or not self._is_good(shard, hash_too=False)

    def _is_taken(self, shard: int) -> bool:
        """Whether another worker is writing it."""
        if self._worker.alone:
            return False
        lock = ShardLock.take(self.path, shard)
        if lock is not None:
            lock.release()
        return lock is None

    def _is_good(self, shard: int, *, hash_too: bool) -> bool:
        try:
            receipt = read_receipt(
                self.path,
                shard,
                kind=self.manifest.kind,
                recipe=self._recipe,
                sequences=self._plan[shard],
            )
            if hash_too:
                check_hash(self.path, receipt)
        except ShardError:
            return False
        return True

    def _check_rollouts(self, shard: int, rollouts: Sequence[Rollout]) -> None:
        if not 0 <= shard < len(self._plan):
            raise DataError(f"shard {shard} is not in the plan of {len(self._plan)} shards")
        if len(rollouts) != self._plan[shard]:
            raise DataError(
                f"shard {shard} was given {len(rollouts)} sequences, the plan says "
                f"{self._plan[shard]}; write exactly those"
            )
        seen = set()
        for rollout in rollouts:
            check_rollout(rollout, self._vocab_size, has_logprobs=self._has_logprobs)
            if (rollout.prompt_id, rollout.sample) in seen:
                raise DataError(
                    f"{name_of(rollout)} is twice in shard {shard}; give every sample of a "
                    "prompt its own number"
                )
            seen.add((rollout.prompt_id, rollout.sample))

    def _store(
        self, shard: int, arrays: Mapping[str, np.ndarray], counts: Mapping[str, Any]
    ) -> None:
        if not self._worker.alone and shard != self._claimed:
            raise ShardError(
                f"{self.path}: shard {shard} is not claimed; a worker writes what claims() gives"
            )
        counts = {**counts, "index_sha256": index_digest(arrays)}
        write_shard(
            self.path, shard, arrays, kind=self.manifest.kind, recipe=self._recipe, counts=counts
        )
        self._altered.discard(shard)


class RolloutWriter(_ShardWriter):
    """Writes a `rollouts` or `sft_data` folder."""

    kinds = ("rollouts", "sft_data")

    @classmethod
    def create(
        cls, path: str | Path, manifest: Manifest, *, worker: Worker | None = None
    ) -> "RolloutWriter":
        """Start the folder, or resume it if it holds the same recipe.

        A recipe without any shard is replaced. When resuming, the manifest on disk stays and
        finished shards are hashed, so a torn one counts as missing.

        Args:
            worker: one of several that share the folder; it hashes the shards of its number.

        Raises:
            ConfigError: the folder holds another recipe; the message names what differs.
            DataError: the folder's manifest.json was not written by lopd.
            ShardError: another process is writing there, or the folder holds something else,
                is a file, or cannot be written.
        """
        return cls._open(path, manifest, worker or Worker())

    def write(self, shard: int, records: Sequence[Rollout]) -> None:
        """Write one shard: the sequences that the plan says, in their order.

        Raises:
            DataError: names the sequence and what is wrong with it; nothing is written.
            ShardError: the disk refused; finished shards are intact.
        """
        self._check_rollouts(shard, records)
        arrays = rollout_arrays(records, None, self._vocab_size)
        self._store(shard, arrays, rollout_counts(records))


class CacheWriter(_ShardWriter):
    """Writes a `cache` folder: rollouts with the teacher's scores."""

    kinds = ("cache",)
    manifest: CacheManifest

    @classmethod
    def create(
        cls, path: str | Path, manifest: CacheManifest, *, worker: Worker | None = None
    ) -> "CacheWriter":
        """As `RolloutWriter.create`, after a check of the ranges of `k`, `top_p` and `codec`.

        Columns that the manifest's `scoring` calls absent are NaN in what is written.
        `model` is the teacher: its `vocab_size` bounds the ids and sets their bits in `packed`
        and `compact`.
        """
        return cls._open(path, manifest, worker or Worker())

    @classmethod
    def _check(cls, manifest: Manifest) -> None:
        super()._check(manifest)
        assert isinstance(manifest, CacheManifest)
        _check_settings(manifest)

    def write(self, shard: int, records: Sequence[tuple[Rollout, TeacherScores]]) -> None:
        """Cut the lists at `top_p`, encode and write one shard.

        Raises:
            DataError: names the sequence, the response token and what is wrong with it;
                nothing is written.
            ShardError: the disk refused; finished shards are intact.
        """
        rollouts = [rollout for rollout, _ in records]
        self._check_rollouts(shard, rollouts)
        self._store(shard, *encode_records(self.manifest, records))


def encode_records(
    manifest: CacheManifest, records: Sequence[tuple[Rollout, TeacherScores]]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and counts of a cache's shard that holds these records.

    Raises:
        DataError: names the sequence, the response token and what is wrong with it.
    """
    codec, rows = _check_settings(manifest), manifest.vocab_size
    rollouts = [rollout for rollout, _ in records]
    has_entropy = manifest.scoring.entropy != "absent"
    scored = []
    for rollout, scores in records:
        check_scores(rollout, scores, rows, manifest.k, has_entropy=has_entropy)
        lists, tail = build_lists(scores, manifest.top_p)
        cut = Scored(scores.logprobs, scores.entropy, lists, tail)
        own = (rollout.rollout_logprobs, rollout.rollout_logprobs_raw)
        check_storable(name_of(rollout), codec, cut, *own)
        scored.append(cut)
    arrays = rollout_arrays(rollouts, codec, rows)
    more, counts = score_shard(rollouts, scored, codec, rows)
    return arrays | more, rollout_counts(rollouts) | counts


def _check_settings(manifest: CacheManifest) -> Codec:
    """The codec of a cache whose settings are in range."""
    k, top_p, rows = manifest.k, manifest.top_p, manifest.vocab_size
    if not 0 <= k <= rows:
        raise ConfigError(f"k is {k}, expected an integer in [0, {rows}], the vocabulary")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p is {top_p}, expected a number in (0, 1]")
    if manifest.codec not in CODECS:
        raise ConfigError(f"codec is {manifest.codec!r}, expected one of {', '.join(CODECS)}")
    return manifest.codec
