"""Teacher caches as `datasets.Dataset`, and back, without loss.

A row is a sequence. Its columns are those of `lopd import --format topk`, and more, so that the
scores are exactly those of the cache:

    id, sample            string and int: the prompt's id and the number of its answer
    prompt_token_ids      list of ids
    response_token_ids    list of ids, R of them
    loss_mask             list of R booleans
    finish_reason         "stop" or "length"
    topk_ids              list of R lists of ids
    topk_logprobs         list of R lists of log-probs, not renormalised
    teacher_logprobs      list of R log-probs, of the response tokens
    tail_logprobs         list of R logs of the mass outside the list; not read by `lopd import`
    teacher_entropy       list of R entropies, nat, if known; not read by `lopd import`
    rollout_logprobs      list of R log-probs of the sampling distribution, if known
    rollout_logprobs_raw  the same at temperature 1, if known; not read by `lopd import`
    weight, reward        floats, if the rollouts came with them; a reward of NaN is unknown
    token_weights         list of R floats, if the rollouts came with them
    teacher_id            the name of the teacher, if the cache has several
"""

import math
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from lopd.errors import ConfigError, ShardError
from lopd.integrations.dataset_columns import COLUMNS, SCORES, usable_columns
from lopd.integrations.dataset_rows import Rows, check_scores, rollouts_of
from lopd.store import Rollout, TeacherCache, TeacherSequence, TopKLists
from lopd.store.ragged import offsets_of
from lopd.store.sequences import Support, join_sequences

__all__ = ["ScoredDataset", "from_dataset", "to_dataset"]

_TOGETHER = 256  # sequences of an Arrow record batch, and of one read


def to_dataset(cache: TeacherCache, file: str | Path | None = None) -> Dataset:
    """The sequences of a cache with the teacher's scores, as the cache was opened.

    Args:
        cache: from `TeacherCache.open`; its `support` and `vocab_size` decide what the lists hold.
        file: an Arrow file to write and to map; None keeps the rows in memory.

    Returns:
        One row per sequence, with the columns of this module. `teacher_entropy` and
        `rollout_logprobs` are left out where the cache does not have them.

    Raises:
        ConfigError: the cache is calibrated, or its lists were renormalised.
        ShardError: a shard is altered, or the file cannot be written.

    >>> cache = TeacherCache.open("cache")  # doctest: +SKIP
    >>> to_dataset(cache).to_parquet("scores.parquet")  # doctest: +SKIP
    """
    if cache.manifest.scoring.is_calibrated:
        raise ConfigError(
            f"{cache.path}: its log-probs are calibrated, which a dataset cannot say, so that a "
            "loss over lists would take them for the teacher's; use the cache itself"
        )
    if cache.manifest.scoring.tail == "renormalized":
        raise ConfigError(
            f"{cache.path}: its lists were renormalised before they were imported, which a dataset "
            "cannot say, so that a loss would take them for the teacher's; use the cache itself"
        )
    absent = _absent_columns(cache)
    schema = pa.schema({name: kind for name, kind in COLUMNS.items() if name not in absent})
    if file is None:
        return Dataset(pa.Table.from_batches(_batches(cache, schema), schema))
    path = Path(file)
    part = path.with_name(f".{path.name}.part")
    try:
        with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
            for batch in _batches(cache, schema):
                stream.write_batch(batch)
        os.replace(part, path)
    except ShardError:
        raise
    except OSError as error:
        raise ShardError(f"{path}: cannot be written ({error}); choose another file") from error
    finally:
        part.unlink(missing_ok=True)
    return Dataset.from_file(str(path))


def _absent_columns(cache: TeacherCache) -> set[str]:
    scoring = cache.manifest.scoring
    absent = {
        "teacher_entropy": scoring.entropy == "absent",
        "rollout_logprobs": scoring.rollout_logprobs == "absent",
        "rollout_logprobs_raw": scoring.rollout_logprobs == "absent",
        "weight": bool((cache.weights() == 1).all()),
        "reward": bool(np.isnan(cache.rewards()).all()),
        "token_weights": not cache.has_token_weights,
        "teacher_id": cache.manifest.teachers is None,
    }
    return {name for name, is_absent in absent.items() if is_absent}


def _batches(cache: TeacherCache, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    items = iter(cache)
    while rows := list(islice(items, _TOGETHER)):
        yield _batch(rows, schema)


def _batch(items: Sequence[TeacherSequence], schema: pa.Schema) -> pa.RecordBatch:
    rollouts = [item.rollout for item in items]
    lists = TopKLists.concatenate([item.lists for item in items])
    responses = [rollout.tokens[rollout.prompt_length :] for rollout in rollouts]
    rows = offsets_of(np.array([*map(len, responses)]))
    entries = offsets_of(lists.lengths)

    def nested(values: np.ndarray) -> pa.Array:
        return _list(rows, _list(entries, pa.array(values)))

    columns = {
        "id": pa.array([rollout.prompt_id for rollout in rollouts]),
        "sample": pa.array([rollout.sample for rollout in rollouts], pa.int32()),
        "finish_reason": pa.array([rollout.finish_reason for rollout in rollouts]),
        "prompt_token_ids": _ragged([r.tokens[: r.prompt_length] for r in rollouts]),
        "response_token_ids": _ragged(responses),
        "loss_mask": _ragged([rollout.loss_mask[rollout.prompt_length :] for rollout in rollouts]),
        "topk_ids": nested(lists.ids),
        "topk_logprobs": nested(lists.logprobs),
        **{
            name: _ragged([getattr(item, name) for item in items])
            for name in ("teacher_logprobs", "tail_logprobs", "teacher_entropy")
        },
        **{
            name: _ragged([getattr(rollout, name) for rollout in rollouts])
            for name in ("rollout_logprobs", "rollout_logprobs_raw")
        },
        "weight": pa.array([rollout.weight for rollout in rollouts], pa.float32()),
        "reward": pa.array(
            [math.nan if rollout.reward is None else rollout.reward for rollout in rollouts],
            pa.float32(),
        ),
        "token_weights": _ragged([_token_weights(rollout) for rollout in rollouts]),
        "teacher_id": pa.array([item.teacher_id for item in items], pa.string()),
    }
    return pa.record_batch([columns[name] for name in schema.names], schema=schema)


def _token_weights(rollout: Rollout) -> np.ndarray:  # [R] fp32
    if rollout.token_weights is None:
        return np.ones(len(rollout.rollout_logprobs), np.float32)
    return rollout.token_weights


def _list(offsets: np.ndarray, values: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)


def _ragged(parts: Sequence[np.ndarray]) -> pa.Array:
    return _list(offsets_of(np.array([*map(len, parts)])), pa.array(np.concatenate(parts)))


def from_dataset(
    dataset: Dataset, *, support: Support = "list+sampled", vocab_size: int | None = None
) -> "ScoredDataset":
    """The rows of a dataset as scored sequences, read when they are needed.

    Args:
        dataset: with the columns that `to_dataset` writes. Of those that are optional, a missing
            `id` is the row's number, `sample` 0, `loss_mask` all True, `finish_reason` "stop", a
            weight 1; log-probs, entropies and rewards that are missing are unknown. Other columns
            are ignored.
        support, vocab_size: as in `TeacherCache.open`.

    Returns:
        A sequence of `TeacherSequence`, for `OfflineDistillationTrainer`, `LopdTrainer` and
        `train_loop`.

    Raises:
        DataError: a column is missing or of another type. A row that is not a distribution, or
            whose lists differ in length, is refused when it is read.

    >>> row = {"prompt_token_ids": [5, 6], "response_token_ids": [7], "teacher_logprobs": [-0.7],
    ...        "topk_ids": [[7, 8]], "topk_logprobs": [[-0.7, -1.4]], "tail_logprobs": [-1.372]}
    >>> from_dataset(Dataset.from_list([row]))[0].lists.ids.tolist()
    [7, 8]
    """
    return ScoredDataset(dataset, support, vocab_size)


class ScoredDataset(Sequence[TeacherSequence]):
    """Rows of a `datasets.Dataset` as `TeacherSequence`; made by `from_dataset`."""

    def __init__(self, dataset: Dataset, support: Support, vocab_size: int | None) -> None:
        self._support, self._vocab_size = support, vocab_size
        columns = usable_columns(dataset)
        self._dataset = dataset.select_columns(columns).with_format("arrow")

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.read(range(*index.indices(len(self))))
        return self.read([index])[0]

    def __iter__(self) -> Iterator[TeacherSequence]:
        for part in self._parts():
            yield from self.read(part)

    def rollouts(self) -> Iterator[Rollout]:
        """Every sequence in order, without the scores.

        Raises:
            DataError: a row cannot be used; names it.
        """
        names = [name for name in self._dataset.column_names if name not in SCORES]
        without_scores = self._dataset.select_columns(names)
        for part in self._parts():
            yield from rollouts_of(Rows(without_scores[part], part))

    def read(self, indices: Sequence[int]) -> list[TeacherSequence]:
        """The sequences of these rows.

        Raises:
            DataError: a row cannot be used; names it.
        """
        numbers = [range(len(self))[index] for index in indices]
        rows = Rows(self._dataset[numbers], numbers)
        rollouts = rollouts_of(rows)
        sequences = join_sequences(
            rollouts,
            rows.scores(np.array([len(r.rollout_logprobs) for r in rollouts])),
            support="list",
            vocab_size=None,
            source="dataset",
        )
        for row, item in zip(numbers, sequences, strict=True):
            check_scores(f"row {row}", item)
        teachers = rows.values("teacher_id", [None] * len(numbers))
        return [*map(self._adapted, sequences, teachers)]

    def _adapted(self, item: TeacherSequence, teacher_id: str | None) -> TeacherSequence:
        """With the lists that `support` and `vocab_size` ask for, as a cache has them."""
        (sequence,) = join_sequences(
            [item.rollout],
            item,
            support=self._support,
            vocab_size=self._vocab_size,
            source="dataset",
            teacher_id=teacher_id,
        )
        return sequence

    def _parts(self) -> Iterator[range]:
        for start in range(0, len(self), _TOGETHER):
            yield range(start, min(start + _TOGETHER, len(self)))
