"""Rollouts and scores joined into the records that training reads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from lopd.models.limits import ModelLimits
from lopd.store.lists import add_sampled, drop_ids, to_columns
from lopd.store.ragged import TopKLists, offsets_of
from lopd.store.types import Rollout, TeacherColumns, TeacherScores, TeacherSequence, name_of

Support = Literal["list+sampled", "list"]
SUPPORTS: tuple[Support, ...] = ("list+sampled", "list")


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
    columns = to_columns(scores, top_p=1.0)
    (sequence,) = join_sequences(
        [rollout], columns, support=support, vocab_size=vocab_size, source="scores"
    )
    return sequence


def join_sequences(
    rollouts: Sequence[Rollout],
    columns: TeacherColumns,  # of all of them, end to end
    *,
    support: Support,
    vocab_size: int | None,
    source: Path | str,
    teacher_id: str | None = None,
) -> list[TeacherSequence]:
    """Rollouts and their scores as records that own their arrays, with the lists of `support`."""
    lists, tail = columns.lists, columns.tail_logprobs
    if vocab_size is not None:
        remedy = "train the student that made the rollouts"
        limits = ModelLimits("the student", vocab_size, id_remedy=remedy)
        for rollout in rollouts:
            limits.check(f"{source}: {name_of(rollout)}", rollout.tokens)
        lists, tail = drop_ids(lists, tail, vocab_size)
    if support == "list+sampled":
        sampled = np.concatenate([r.tokens[r.prompt_length :] for r in rollouts])
        lists, tail = add_sampled(lists, tail, sampled, columns.teacher_logprobs)
    # Read-only views of a file are copied; fresh arrays are not.
    lists = TopKLists(
        np.require(lists.ids, requirements="W"),
        np.require(lists.logprobs, requirements="W"),
        lists.lengths,
    )
    rows = offsets_of(np.array([len(rollout.rollout_logprobs) for rollout in rollouts]))
    logprobs, entropy = np.array(columns.teacher_logprobs), np.array(columns.teacher_entropy)
    tail = np.array(tail)
    return [
        TeacherSequence(
            rollout=rollout,
            teacher_logprobs=logprobs[start:stop],
            teacher_entropy=entropy[start:stop],
            lists=part,
            tail_logprobs=tail[start:stop],
            teacher_id=teacher_id,
        )
        for rollout, part, start, stop in zip(
            rollouts, lists.split(rows), rows[:-1], rows[1:], strict=True
        )
    ]
