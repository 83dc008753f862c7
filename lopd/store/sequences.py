"""Rollouts and scores joined into the records that training reads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from lopd.errors import DataError
from lopd.store.codec import Scored, offsets_of
from lopd.store.lists import add_sampled, build_lists, drop_ids, pad_lists
from lopd.store.types import Rollout, TeacherScores, TeacherSequence

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
    lists, tail = build_lists(scores, top_p=1.0)
    scored = Scored(scores.logprobs, scores.entropy, lists, tail)
    (sequence,) = join_sequences(
        [rollout], scored, support=support, vocab_size=vocab_size, source="scores"
    )
    return sequence


def join_sequences(
    rollouts: Sequence[Rollout],
    scored: Scored,  # of all of them, end to end
    *,
    support: Support,
    vocab_size: int | None,
    source: Path | str,
) -> list[TeacherSequence]:
    """Rollouts and their scores as records of their own, lists as `support` has them."""
    lists, tail = scored.lists, scored.tail
    if vocab_size is not None:
        for rollout in rollouts:
            if rollout.tokens.max() >= vocab_size:
                raise DataError(
                    f"{source}: sequence {rollout.prompt_id}/{rollout.sample} has token id "
                    f"{rollout.tokens.max()}, the student has {vocab_size} vocabulary rows; "
                    "train the student that made the rollouts"
                )
        lists, tail = drop_ids(lists, tail, vocab_size)
    if support == "list+sampled":
        sampled = np.concatenate([r.tokens[r.prompt_length :] for r in rollouts])
        lists, tail = add_sampled(lists, tail, sampled, scored.logprobs)
    ids, logprobs = pad_lists(lists)
    rows = offsets_of(np.array([len(rollout.rollout_logprobs) for rollout in rollouts]))
    widths = np.maximum.reduceat(lists.lengths, rows[:-1]).tolist()
    own, entropy, tail = np.array(scored.logprobs), np.array(scored.entropy), np.array(tail)
    sequences = []
    for number, (rollout, width) in enumerate(zip(rollouts, widths, strict=True)):
        part = slice(rows[number], rows[number + 1])
        sequences.append(
            TeacherSequence(
                rollout=rollout,
                teacher_logprobs=own[part],
                teacher_entropy=entropy[part],
                topk_ids=ids[part, :width],
                topk_logprobs=logprobs[part, :width],
                tail_logprobs=tail[part],
            )
        )
    return sequences
