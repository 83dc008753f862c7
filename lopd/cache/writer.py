"""Writers of shard folders: resumable, one per folder, nothing finished is ever lost."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lopd.cache.codec import CODECS, build_lists, check_packable
from lopd.cache.layout import Scored, rollout_arrays, rollout_counts, score_arrays, score_counts
from lopd.cache.records import Rollout, TeacherScores, check_rollout, check_scores, name_of
from lopd.cache.shards import (
    LOCK_NAME,
    FolderLock,
    check_hash,
    head_rows,
    plan_of,
    read_receipt,
    require_kind,
    write_shard,
)
from lopd.errors import ConfigError, DataError, LopdError, ShardError
from lopd.files import TEMP_SUFFIX, remove_temporaries
from lopd.provenance import (
    MANIFEST_NAME,
    VOCAB_NAME,
    manifest_digest,
    read_manifest,
    recipe_of,
    write_manifest,
)


class _ShardWriter:
    """What writers of all kinds share. Holds the folder's lock until `finish` or `close`."""

    kinds: tuple[str, ...] = ()

    def __init__(self, path: Path, manifest: Mapping[str, Any], lock: FolderLock) -> None:
        self.path = path
        self.manifest = manifest
        self._kind = require_kind(manifest, self.kinds)
        self._plan = plan_of(manifest)
        self._recipe = manifest_digest(manifest)
        self._vocab_size = head_rows(manifest)
        self._lock = lock
        self._good = {shard for shard in range(len(self._plan)) if self._is_good(shard)}

    @classmethod
    def _open(cls, path: str | Path, manifest: Mapping[str, Any]) -> Any:
        folder = Path(path)
        require_kind(manifest, cls.kinds)
        plan_of(manifest)
        head_rows(manifest)
        what = "made a folder"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            what = "used"
            _require_ours(folder, manifest)
            return cls._claim(folder, manifest)
        except LopdError:
            raise
        except OSError as error:
            raise ShardError(
                f"{folder}: cannot be {what} ({error.strerror or error}); name another folder"
            ) from error

    @classmethod
    def _claim(cls, folder: Path, manifest: Mapping[str, Any]) -> Any:
        lock = FolderLock(folder)
        try:
            remove_temporaries(folder)
            _require_ours(folder, manifest)  # again: another writer may have begun since
            if (folder / MANIFEST_NAME).exists():
                manifest = read_manifest(folder)
            else:
                write_manifest(folder, manifest)
            return cls(folder, manifest, lock)
        except BaseException:
            lock.release()
            raise

    def missing(self) -> list[int]:
        """Shards, in order, whose receipt is absent or does not match the data."""
        return [
            shard
            for shard in range(len(self._plan))
            if shard not in self._good or not self._is_good(shard, hash_too=False)
        ]

    def finish(self) -> None:
        """Check that every shard of the plan is there, and give the folder back.

        Raises:
            ShardError: names the first missing shard; the writer stays open.
        """
        missing = self.missing()
        if missing:
            raise ShardError(
                f"{self.path}: {len(missing)} of {len(self._plan)} shards are missing, the first "
                f"is {missing[0]}; write them before finishing"
            )
        self.close()

    def close(self) -> None:
        """Give the folder back, finished or not; what is missing can be written later."""
        self._lock.release()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _is_good(self, shard: int, *, hash_too: bool = True) -> bool:
        try:
            receipt = read_receipt(
                self.path,
                shard,
                kind=self._kind,
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
            check_rollout(rollout, self._vocab_size)
            if (rollout.prompt_id, rollout.sample) in seen:
                raise DataError(
                    f"{name_of(rollout)} is twice in shard {shard}; give every sample of a "
                    "prompt its own number"
                )
            seen.add((rollout.prompt_id, rollout.sample))

    def _store(
        self, shard: int, arrays: Mapping[str, np.ndarray], counts: Mapping[str, Any]
    ) -> None:
        write_shard(self.path, shard, arrays, kind=self._kind, recipe=self._recipe, counts=counts)
        self._good.add(shard)


class RolloutWriter(_ShardWriter):
    """Writes a `rollouts` or `sft_data` folder."""

    kinds = ("rollouts", "sft_data")

    @classmethod
    def create(cls, path: str | Path, manifest: Mapping[str, Any]) -> "RolloutWriter":
        """Start the folder, or resume it where it holds the same recipe.

        The manifest needs `plan.shards` and `model.vocab_size`. When resuming, the manifest
        on disk stays and finished shards are hashed, so a torn one counts as missing.

        Raises:
            ConfigError: the folder holds another recipe; the message names what differs.
            DataError: its manifest is none of lopd's.
            ShardError: another process is writing there, or the folder holds something else,
                is a file, or cannot be written.
        """
        return cls._open(path, manifest)

    def write(self, shard: int, records: Sequence[Rollout]) -> None:
        """Write one shard: the sequences that the plan says, in their order.

        Raises:
            DataError: names the sequence and what is wrong with it; nothing is written.
            ShardError: the disk refused; finished shards are intact.
        """
        self._check_rollouts(shard, records)
        self._store(shard, rollout_arrays(records), rollout_counts(records))


class CacheWriter(_ShardWriter):
    """Writes a `cache` folder: rollouts with the teacher's scores."""

    kinds = ("cache",)

    def __init__(self, path: Path, manifest: Mapping[str, Any], lock: FolderLock) -> None:
        super().__init__(path, manifest, lock)
        self._k, self._top_p, self._codec = _cache_settings(manifest)

    @classmethod
    def create(cls, path: str | Path, manifest: Mapping[str, Any]) -> "CacheWriter":
        """As `RolloutWriter.create`; the manifest also needs `k`, `top_p` and `codec`.

        `model` is the teacher: its `vocab_size` bounds the ids and sets the bits of `packed`.
        """
        _cache_settings(manifest)
        return cls._open(path, manifest)

    def write(self, shard: int, records: Sequence[tuple[Rollout, TeacherScores]]) -> None:
        """Cut the lists at `top_p`, encode and write one shard.

        Raises:
            DataError: names the sequence, the response token and what is wrong with it;
                nothing is written.
            ShardError: the disk refused; finished shards are intact.
        """
        rollouts = [rollout for rollout, _ in records]
        self._check_rollouts(shard, rollouts)
        scored = [self._cut(rollout, scores) for rollout, scores in records]
        arrays = rollout_arrays(rollouts) | score_arrays(scored, self._codec, self._vocab_size)
        self._store(shard, arrays, rollout_counts(rollouts) | score_counts(rollouts, scored))

    def _cut(self, rollout: Rollout, scores: TeacherScores) -> Scored:
        check_scores(rollout, scores, self._vocab_size, self._k)
        lists, tail = build_lists(scores, self._top_p)
        if self._codec == "packed":
            check_packable(name_of(rollout), lists)
        return Scored(scores.logprobs, scores.entropy, lists, tail)


def _cache_settings(manifest: Mapping[str, Any]) -> tuple[int, float, Any]:
    k, top_p, codec = (manifest.get(key) for key in ("k", "top_p", "codec"))
    rows = head_rows(manifest)
    if not isinstance(k, int) or not 0 <= k <= rows:
        raise ConfigError(f"k is {k!r}, expected an integer in [0, {rows}], the vocabulary")
    if not isinstance(top_p, int | float) or not 0 < top_p <= 1:
        raise ConfigError(f"top_p is {top_p!r}, expected a number in (0, 1]")
    if codec not in CODECS:
        raise ConfigError(f"codec is {codec!r}, expected one of {', '.join(CODECS)}")
    return k, float(top_p), codec


def _require_ours(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse a folder with another recipe, or that something else has filled."""
    if (folder / MANIFEST_NAME).exists():
        _require_same_recipe(folder, manifest)
        return
    ours = {LOCK_NAME, VOCAB_NAME}
    stray = sorted(
        item
        for item in folder.iterdir()
        if item.name not in ours and not (item.name[0] == "." and item.suffix == TEMP_SUFFIX)
    )
    shards = [item for item in stray if item.match("shard-*")]
    if shards:
        raise ShardError(
            f"{shards[0]}: a shard in a folder without {MANIFEST_NAME}; restore the manifest, or "
            "name an empty folder"
        )
    if stray:
        raise ShardError(
            f"{folder}: holds {stray[0].name} and no {MANIFEST_NAME}, so it is not of this stage; "
            "name a new or empty folder"
        )


def _require_same_recipe(folder: Path, manifest: Mapping[str, Any]) -> None:
    found = read_manifest(folder)
    if manifest_digest(found) == manifest_digest(manifest):
        return
    ours, theirs = recipe_of(manifest), recipe_of(found)
    keys = ours.keys() | theirs.keys()
    differing = sorted(key for key in keys if ours.get(key) != theirs.get(key))
    raise ConfigError(
        f"{folder} holds another recipe (it differs in {', '.join(differing)}); name another "
        "folder, or remove this one to redo it"
    )
