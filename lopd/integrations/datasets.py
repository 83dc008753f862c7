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

from lopd.errors import ConfigError, DataError, ShardError
from lopd.store import Rollout, TeacherCache, TeacherSequence, TopKLists
from lopd.store.ragged import offsets_of
from lopd.store.sequences import Support, join_sequences
from lopd.store.types import TeacherColumns, name_of
from lopd.store.validate import (
    LOSSY_MASS_TOLERANCE,
    MASS_TOLERANCE,
    check_rollout,
    check_scored_sequence,
    check_weights,
)

__all__ = ["ScoredDataset", "from_dataset", "to_dataset"]

_INTS, _FLOATS = pa.list_(pa.int32()), pa.list_(pa.float32())
REQUIRED = {
    "prompt_token_ids": _INTS,
    "response_token_ids": _INTS,
    "topk_ids": pa.list_(_INTS),
    "topk_logprobs": pa.list_(_FLOATS),
    "teacher_logprobs": _FLOATS,
    "tail_logprobs": _FLOATS,
}
OPTIONAL = {
    "id": pa.string(),
    "sample": pa.int32(),
    "loss_mask": pa.list_(pa.bool_()),
    "finish_reason": pa.string(),
    "teacher_entropy": _FLOATS,
    "rollout_logprobs": _FLOATS,
    "rollout_logprobs_raw": _FLOATS,
    "weight": pa.float32(),
    "reward": pa.float32(),
    "token_weights": _FLOATS,
    "teacher_id": pa.string(),
}
COLUMNS = {**REQUIRED, **OPTIONAL}
# Columns that only the teacher's scores need.
SCORES = {"topk_ids", "topk_logprobs", "teacher_logprobs", "tail_logprobs", "teacher_entropy"}
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
        ConfigError: the cache is calibrated.
        ShardError: a shard is altered, or the file cannot be written.

    >>> cache = TeacherCache.open("cache")  # doctest: +SKIP
    >>> to_dataset(cache).to_parquet("scores.parquet")  # doctest: +SKIP
    """
    if cache.manifest.scoring.is_calibrated:
        raise ConfigError(
            f"{cache.path}: its log-probs are calibrated, which a dataset cannot say, so that a "
            "loss over lists would take them for the teacher's; use the cache itself"
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
        dataset: with the columns that `to_dataset` writes. Of `OPTIONAL`, a missing `id` is the
            row's number, `sample` 0, `loss_mask` all True, `finish_reason` "stop", a weight 1;
            log-probs, entropies and rewards that are missing are unknown. Other columns are
            ignored.
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
        columns = _usable_columns(dataset)
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
            yield from _rollouts(_Rows(without_scores[part], part))

    def read(self, indices: Sequence[int]) -> list[TeacherSequence]:
        """The sequences of these rows.

        Raises:
            DataError: a row cannot be used; names it.
        """
        numbers = [range(len(self))[index] for index in indices]
        rows = _Rows(self._dataset[numbers], numbers)
        rollouts = _rollouts(rows)
        sequences = join_sequences(
            rollouts,
            rows.scores(np.array([len(r.rollout_logprobs) for r in rollouts])),
            support="list",
            vocab_size=None,
            source="dataset",
        )
        for row, item in zip(numbers, sequences, strict=True):
            _check_scores(f"row {row}", item)
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


class _Rows:
    """Some rows of a dataset, column by column."""

    def __init__(self, table: pa.Table, numbers: Sequence[int]) -> None:
        self.numbers = numbers
        self.columns = {
            name: table[name].combine_chunks().cast(COLUMNS[name]) for name in table.column_names
        }
        for name, column in self.columns.items():
            if _has_nulls(column):
                place = next(i for i, value in enumerate(column.to_pylist()) if _holds_none(value))
                raise DataError(
                    f"row {numbers[place]}: column '{name}' has an empty value; fill it, or leave "
                    "the column out if it is optional"
                )

    def values(self, name: str, default: list[Any]) -> list[Any]:
        """One value per row."""
        return self.columns[name].to_pylist() if name in self.columns else default

    def parts(self, name: str, lengths: np.ndarray | None = None) -> list[np.ndarray]:
        """One array per row, of these lengths."""
        column = self.columns[name]
        found = column.value_lengths().to_numpy()
        if lengths is not None:
            self._check_lengths(name, found, lengths)
        return np.split(column.flatten().to_numpy(zero_copy_only=False), np.cumsum(found)[:-1])

    def _check_lengths(self, name: str, found: np.ndarray, lengths: np.ndarray) -> None:
        if (wrong := np.flatnonzero(found != lengths)).size:
            place = int(wrong[0])
            raise DataError(
                f"row {self.numbers[place]}: {found[place]} entries of '{name}'; expected "
                f"{lengths[place]}, one per response token"
            )

    def scores(self, lengths: np.ndarray) -> TeacherColumns:
        """The teacher's columns of all rows, end to end."""

        def flat(name: str) -> np.ndarray:
            if name not in self.columns:
                return np.full(int(lengths.sum()), np.nan, np.float32)
            return np.concatenate(self.parts(name, lengths))

        ids, logprobs = self.columns["topk_ids"], self.columns["topk_logprobs"]
        for name in ("topk_ids", "topk_logprobs"):
            self._check_lengths(name, self.columns[name].value_lengths().to_numpy(), lengths)
        ids, logprobs = ids.flatten(), logprobs.flatten()
        entries = ids.value_lengths().to_numpy()
        if (wrong := np.flatnonzero(entries != logprobs.value_lengths().to_numpy())).size:
            place = int(np.searchsorted(np.cumsum(lengths), wrong[0], side="right"))
            raise DataError(
                f"row {self.numbers[place]}: a list of topk_ids and its topk_logprobs differ in "
                "length; expected one log-prob per id"
            )
        return TeacherColumns(
            teacher_logprobs=flat("teacher_logprobs"),
            teacher_entropy=flat("teacher_entropy"),
            lists=TopKLists(
                ids.flatten().to_numpy(), logprobs.flatten().to_numpy(), entries.astype(np.int64)
            ),
            tail_logprobs=flat("tail_logprobs"),
        )


def _has_nulls(column: pa.Array) -> bool:
    return column.null_count > 0 or (pa.types.is_list(column.type) and _has_nulls(column.flatten()))


def _holds_none(value: Any) -> bool:
    return value is None or (isinstance(value, list) and any(map(_holds_none, value)))


def _rollouts(rows: _Rows) -> list[Rollout]:
    prompts, answers = rows.parts("prompt_token_ids"), rows.parts("response_token_ids")
    lengths, count = np.array([*map(len, answers)]), len(rows.numbers)
    names = rows.values("id", [str(number) for number in rows.numbers])
    samples, ends = (
        rows.values("sample", [0] * count),
        rows.values("finish_reason", ["stop"] * count),
    )
    masks = [np.ones(length, bool) for length in lengths]
    if "loss_mask" in rows.columns:
        masks = rows.parts("loss_mask", lengths)
    known = "rollout_logprobs" in rows.columns
    logprobs = [np.full(length, np.nan, np.float32) for length in lengths]
    if known:
        logprobs = rows.parts("rollout_logprobs", lengths)
    raw = logprobs
    if "rollout_logprobs_raw" in rows.columns:
        raw = rows.parts("rollout_logprobs_raw", lengths)
    weights = rows.values("weight", [1.0] * count)
    rewards = rows.values("reward", [math.nan] * count)
    token_weights: list[Any] = [None] * count
    if "token_weights" in rows.columns:
        token_weights = [part.copy() for part in rows.parts("token_weights", lengths)]
    found = []
    for place, number in enumerate(rows.numbers):
        prompt = prompts[place]
        rollout = Rollout(
            prompt_id=names[place],
            sample=samples[place],
            tokens=np.concatenate([prompt, answers[place]]),
            prompt_length=len(prompt),
            finish_reason=ends[place],
            loss_mask=np.concatenate([np.zeros(len(prompt), bool), masks[place]]),
            rollout_logprobs=logprobs[place].copy(),
            rollout_logprobs_raw=raw[place].copy(),
            weight=weights[place],
            reward=None if math.isnan(rewards[place]) else rewards[place],
            token_weights=token_weights[place],
        )
        try:
            check_rollout(rollout, 2**31, has_logprobs=known)
            check_weights(rollout)
        except DataError as error:
            raise DataError(f"row {number}: {error}") from None
        found.append(rollout)
    return found


def _check_scores(where: str, item: TeacherSequence) -> None:
    """Refuse lists that training would compute nonsense from.

    Raises:
        DataError: an id is listed twice or negative, a log-prob is not one, or list and tail are
            not a distribution.
    """
    lists, name = item.lists, name_of(item.rollout)
    pairs = lists.rows * 2**31 + lists.ids
    checks = {
        "ids of at least 0": lists.ids >= 0,
        "log-probs of at most 0": np.isfinite(lists.logprobs) & (lists.logprobs <= MASS_TOLERANCE),
        "distinct ids": np.isin(np.arange(len(pairs)), np.unique(pairs, return_index=True)[1]),
    }
    for what, good in checks.items():
        if not good.all():
            entry = int(np.flatnonzero(~good)[0])
            raise DataError(
                f"{where}: {name}: the list of response token {lists.rows[entry]} has id "
                f"{lists.ids[entry]} with log-prob {lists.logprobs[entry]:g}; expected {what}"
            )
    try:
        check_scored_sequence(item, LOSSY_MASS_TOLERANCE)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def _usable_columns(dataset: Dataset) -> list[str]:
    """The columns that are read, checked for presence and type."""
    if not isinstance(dataset, Dataset):
        raise DataError(
            f"found a {type(dataset).__name__}; expected a datasets.Dataset with the columns "
            f"{', '.join(REQUIRED)}"
        )
    if absent := [name for name in REQUIRED if name not in dataset.column_names]:
        raise DataError(
            f"dataset: no column '{absent[0]}'; found {sorted(dataset.column_names)}; "
            "lopd.integrations.datasets.to_dataset writes it; to use the scores of another tool, "
            "write a file and run 'lopd import --format topk'"
        )
    if not len(dataset):
        raise DataError("dataset: no rows; expected at least one")
    schema = dataset.data.schema
    names = [name for name in COLUMNS if name in dataset.column_names]
    for name in names:
        if not _fits(schema.field(name).type, COLUMNS[name]):
            raise DataError(
                f"dataset: column '{name}' is {schema.field(name).type}; expected {COLUMNS[name]}"
            )
    return names


def _fits(found: pa.DataType, expected: pa.DataType) -> bool:
    """Whether values of a type can be read as another of the same kind and depth."""
    kinds = pa.types
    if kinds.is_list(expected):
        is_list = (
            kinds.is_list(found) or kinds.is_large_list(found) or kinds.is_fixed_size_list(found)
        )
        return is_list and _fits(found.value_type, expected.value_type)
    if kinds.is_floating(expected):
        return kinds.is_floating(found)
    if kinds.is_integer(expected):
        return kinds.is_integer(found)
    if kinds.is_boolean(expected):
        return kinds.is_boolean(found)
    return kinds.is_string(found) or kinds.is_large_string(found)
