"""Rows of a `datasets.Dataset` as sequences and scores, checked."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from lopd.errors import DataError
from lopd.integrations.dataset_columns import COLUMNS
from lopd.store import Rollout, TeacherSequence, TopKLists
from lopd.store.types import TeacherColumns, name_of
from lopd.store.validate import (
    MASS_TOLERANCE,
    check_rollout,
    check_scored_sequence,
    check_weights,
)


class Rows:
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


def rollouts_of(rows: Rows) -> list[Rollout]:
    """The rows as rollouts.

    Raises:
        DataError: a row cannot be used; names it.
    """
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


def check_scores(where: str, item: TeacherSequence) -> None:
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
        check_scored_sequence(item, "compact")  # which rounds most; the codec is not known
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
