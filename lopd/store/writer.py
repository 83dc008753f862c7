"""Writers of shard folders: resumable, one process or several per folder."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from lopd.errors import ConfigError, DataError, ShardError
from lopd.provenance import (
    VOCAB_FILES,
    CacheManifest,
    Manifest,
    manifest_digest,
    read_manifest,
    write_manifest,
)
from lopd.store.arrays import index_digest, rollout_arrays, rollout_counts, score_arrays
from lopd.store.codec import CODECS, Codec, check_storable
from lopd.store.folders import examine_shard_folder, writing_to
from lopd.store.lists import to_columns
from lopd.store.locks import FolderLock, ShardLock, start_lock
from lopd.store.shards import check_hash, read_receipt, write_shard
from lopd.store.types import Rollout, TeacherScores, name_of
from lopd.store.validate import check_rollout, check_scores
from lopd.store.workers import Worker

Writer = TypeVar("Writer", bound="_ShardWriter")


class _ShardWriter:
    """Base of the writers. Holds the folder's lock until `finish` or `close`.

    A single writer locks the whole folder. One of several workers shares the folder, writes the
    shards that `claims` yields, and locks the one that it is writing.
    """

    kinds: tuple[str, ...] = ()

    def __init__(self, path: Path, manifest: Manifest, lock: FolderLock, worker: Worker) -> None:
        self.path = path
        self.manifest = manifest
        self._sizes = manifest.shards
        self._recipe = manifest_digest(manifest)
        self._vocab_size = manifest.vocab_size
        self._has_logprobs = manifest.scoring.rollout_logprobs != "absent"
        self._lock = lock
        self._worker = worker
        self._claimed: int | None = None
        # Shards whose receipt matches but whose hash does not, of those assigned to the worker.
        self._altered = {
            shard
            for shard in range(len(self._sizes))
            if worker.owns(shard)
            and self._is_good(shard, hash_too=False)
            and not self._is_good(shard, hash_too=True)
        }

    @classmethod
    def create(
        cls: type[Writer], path: str | Path, manifest: Manifest, *, worker: Worker | None = None
    ) -> Writer:
        """Start the folder, or resume it if it holds the same recipe.

        A recipe without a written shard is replaced. When resuming, the manifest on disk stays
        and finished shards are hashed, so that a torn one counts as missing. One `worker` of
        several shares the folder with the others and hashes the shards assigned to it.

        Raises:
            ConfigError: the folder holds another recipe; the message names what differs.
            DataError: the folder's manifest.json was not written by lopd.
            ShardError: another process is writing there, or the folder holds something else,
                is a file, or cannot be written.
        """
        worker = worker or Worker()
        cls._check(manifest)
        folder = examine_shard_folder(path, manifest).path
        with writing_to(folder), ExitStack() as on_error:
            with start_lock(folder):
                lock = FolderLock(folder, shared=not worker.is_single)
                on_error.callback(lock.release)
                manifest = cls._start(folder, manifest, lock)
                lock.share()
            writer = cls(folder, manifest, lock, worker)
            on_error.pop_all()
        return writer

    @classmethod
    def _check(cls, manifest: Manifest) -> None:
        if manifest.kind not in cls.kinds:
            raise DataError(
                f"manifest has kind {manifest.kind!r}, expected one of {', '.join(cls.kinds)}"
            )

    @staticmethod
    def _start(folder: Path, manifest: Manifest, lock: FolderLock) -> Manifest:
        """Write the manifest, or return the one on disk if it has the same recipe."""
        # Examined again under the lock: another writer may have started since.
        found = examine_shard_folder(folder, manifest, in_use=not lock.is_exclusive)
        if found.state == "unfinished":
            return read_manifest(folder)
        for file in folder.glob(VOCAB_FILES):  # of a recipe that is replaced
            file.unlink(missing_ok=True)
        write_manifest(folder, manifest)
        return manifest

    def missing(self) -> list[int]:
        """Shards, in order, whose receipt is absent or does not match the data."""
        return [shard for shard in range(len(self._sizes)) if self._is_missing(shard)]

    def claims(self) -> Iterator[int]:
        """Yield the shards to write; write each before advancing to the next.

        A worker first gets the shards assigned to it, then any other that no worker has finished
        or claimed, until none is left.
        """
        if self._worker.is_single:
            yield from self.missing()
            return
        progress = True
        while progress:
            progress = False
            for shard in self._worker.order(self.missing()):
                lock = ShardLock.take(self.path, shard)
                if lock is None:
                    continue
                try:
                    if self._is_missing(shard):  # another worker may have written it since
                        progress, self._claimed = True, shard
                        yield shard
                        assert not self._is_missing(shard)
                finally:
                    self._claimed = None
                    lock.release()

    def finish(self) -> bool:
        """Check that every shard of the plan is written, and release the folder.

        Returns:
            Whether all are written; False while other workers write the missing ones.

        Raises:
            ShardError: a shard is missing that no worker is writing; names the first. The writer
                stays open.
        """
        busy = [shard for shard in self.missing() if self._is_claimed_elsewhere(shard)]
        missing = self.missing()
        idle = sorted(set(missing) - set(busy))
        if idle:
            raise ShardError(
                f"{self.path}: {len(idle)} of {len(self._sizes)} shards are missing, the first "
                f"is {idle[0]}; write them before finishing"
            )
        self.close()
        return not missing

    def close(self) -> None:
        """Release the folder; missing shards can be written later."""
        self._lock.release()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _is_missing(self, shard: int) -> bool:
        return shard in self._altered or not self._is_good(shard, hash_too=False)

    def _is_claimed_elsewhere(self, shard: int) -> bool:
        """Whether another worker is writing it."""
        if self._worker.is_single:
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
                sequences=self._sizes[shard],
            )
            if hash_too:
                check_hash(self.path, receipt)
        except ShardError:
            return False
        return True

    def _check_rollouts(self, shard: int, rollouts: Sequence[Rollout]) -> None:
        if not 0 <= shard < len(self._sizes):
            raise DataError(f"shard {shard} is not in the plan of {len(self._sizes)} shards")
        if len(rollouts) != self._sizes[shard]:
            raise DataError(
                f"shard {shard}: found {len(rollouts)} sequences; expected {self._sizes[shard]}, "
                "as planned; write exactly those"
            )
        seen = set()
        for rollout in rollouts:
            check_rollout(rollout, self._vocab_size, has_logprobs=self._has_logprobs)
            if (rollout.prompt_id, rollout.sample) in seen:
                raise DataError(
                    f"{name_of(rollout)} is twice in shard {shard}; number the samples of a prompt"
                )
            seen.add((rollout.prompt_id, rollout.sample))

    def _store(
        self, shard: int, arrays: Mapping[str, np.ndarray], counts: Mapping[str, Any]
    ) -> None:
        if not self._worker.is_single and shard != self._claimed:
            raise ShardError(
                f"{self.path}: shard {shard} is not claimed; a worker writes what claims() yields"
            )
        counts = {**counts, "index_sha256": index_digest(arrays)}
        write_shard(
            self.path, shard, arrays, kind=self.manifest.kind, recipe=self._recipe, counts=counts
        )
        self._altered.discard(shard)


class RolloutWriter(_ShardWriter):
    """Writes a `rollouts` or `sft_data` folder."""

    kinds = ("rollouts", "sft_data")

    def write(self, shard: int, records: Sequence[Rollout]) -> None:
        """Write one shard: the planned number of sequences, in order.

        Raises:
            DataError: names the sequence and the fault; nothing is written.
            ShardError: the shard cannot be written; finished shards are intact.
        """
        self._check_rollouts(shard, records)
        arrays = rollout_arrays(records, None, self._vocab_size)
        self._store(shard, arrays, rollout_counts(records))


class CacheWriter(_ShardWriter):
    """Writes a `cache` folder: rollouts with the teacher's scores.

    Columns that the manifest's `scoring` declares absent must be NaN. The manifest's `model` is the
    teacher: its `vocab_size` bounds the ids and sets their bits in `packed` and `compact`.
    """

    kinds = ("cache",)
    manifest: CacheManifest

    @classmethod
    def _check(cls, manifest: Manifest) -> None:
        super()._check(manifest)
        assert isinstance(manifest, CacheManifest)
        _check_settings(manifest)

    def write(self, shard: int, records: Sequence[tuple[Rollout, TeacherScores]]) -> None:
        """Cut the lists at `top_p`, encode and write one shard.

        Raises:
            DataError: names the sequence, the response token and the fault; nothing is written.
            ShardError: the shard cannot be written; finished shards are intact.
        """
        rollouts = [rollout for rollout, _ in records]
        self._check_rollouts(shard, rollouts)
        self._store(shard, *encode_records(self.manifest, records))


def encode_records(
    manifest: CacheManifest, records: Sequence[tuple[Rollout, TeacherScores]]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and counts of a cache shard that holds these records.

    Raises:
        DataError: names the sequence, the response token and the fault.
    """
    codec, rows = _check_settings(manifest), manifest.vocab_size
    rollouts = [rollout for rollout, _ in records]
    expected: dict[str, bool] = {
        "has_entropy": manifest.scoring.entropy != "absent",
        "calibrated": manifest.scoring.is_calibrated,
    }
    columns = []
    for rollout, scores in records:
        check_scores(rollout, scores, rows, manifest.teacher_k, **expected)
        columns.append(to_columns(scores, manifest.top_p))
        logprobs = (rollout.rollout_logprobs, rollout.rollout_logprobs_raw)
        check_storable(name_of(rollout), codec, columns[-1], *logprobs)
    arrays = rollout_arrays(rollouts, codec, rows)
    more, counts = score_arrays(rollouts, columns, codec, rows)
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
