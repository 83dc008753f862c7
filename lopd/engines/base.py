"""The interface of inference engines: generate answers, score sequences.

An engine decides batching and the order of execution; its results depend only on the
sequence. Each sequence has its own random seed, so that a rollout does not depend on its
neighbours in a batch, its shard or the order of the prompts (up to floating-point rounding
where batch shapes differ).
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from lopd.config.inference import Sampling
from lopd.data.prompts import Prompt
from lopd.engines.support import Support
from lopd.errors import DataError, ModelError
from lopd.models.limits import ModelLimits
from lopd.store import Rollout, TeacherScores

Progress = Callable[[int], object]  # called with the number of sequences just finished


@dataclass(frozen=True)
class Generation:
    """One answer, as token ids."""

    tokens: np.ndarray  # [R] int32, with the end-of-sequence token if finish_reason is "stop"
    finish_reason: str  # "stop" | "length"
    logprobs: np.ndarray  # [R] fp32, under the sampling distribution
    logprobs_raw: np.ndarray  # [R] fp32, at temperature 1 and top_p 1


class Engine(Protocol):
    """One model, ready to generate and to score."""

    name: str
    tokenizer: Any
    vocab_size: int
    eos_ids: list[int]  # that end an answer
    context: int | None  # longest sequence that it scores; None for no limit

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        *,
        progress: Progress | None = None,
    ) -> list[Generation]:
        """One answer to each prompt (token ids), drawn with that prompt's seed."""
        ...

    def score(
        self,
        sequences: Sequence[np.ndarray],
        prompt_lengths: Sequence[int],
        k: int,
        *,
        temperature: float = 1.0,
        extra_ids: Sequence[np.ndarray] | None = None,  # each [R, E_i] int, -1 pads
        progress: Progress | None = None,
    ) -> list[TeacherScores]:
        """Top-k list, tail, entropy and the token's log-prob at every response token.

        With `extra_ids` also the log-probs of further ids at each token, and the log of the mass
        outside the list and the extra ids together. Their number may differ by sequence.

        Raises:
            DataError: a sequence has no prompt or no response, is longer than the context, or has
                an id beyond the vocabulary.
            ConfigError: k is beyond the vocabulary, or the engine does not support an option.
        """
        ...


def sequence_seed(seed: int, prompt_id: str, sample: int) -> int:
    """A 63-bit seed of one (seed, prompt, sample), the same in every batch and process."""
    digest = hashlib.sha256(f"{seed}/{prompt_id}/{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def to_rollout(prompt: Prompt, sample: int, generation: Generation) -> Rollout:
    """A prompt and its answer as one sequence; the loss is on every response token."""
    length = len(prompt.tokens)
    return Rollout(
        prompt_id=prompt.id,
        sample=sample,
        tokens=np.concatenate([np.asarray(prompt.tokens, dtype=np.int32), generation.tokens]),
        prompt_length=length,
        finish_reason=generation.finish_reason,
        loss_mask=np.arange(length + len(generation.tokens)) >= length,
        rollout_logprobs=generation.logprobs,
        rollout_logprobs_raw=generation.logprobs_raw,
    )


def check_sequences(
    sequences: Sequence[np.ndarray],
    prompt_lengths: Sequence[int],
    limits: ModelLimits,
    extra_ids: Sequence[np.ndarray] | None = None,
) -> None:
    """Refuse sequences and extra ids that a model cannot score; see `Engine.score`."""
    for i, (tokens, prompt_length) in enumerate(zip(sequences, prompt_lengths, strict=True)):
        if not 1 <= prompt_length < len(tokens):
            raise DataError(
                f"sequence {i}: {prompt_length} of {len(tokens)} tokens are the prompt; "
                "expected at least one prompt token and one response token"
            )
        limits.check(f"sequence {i}", tokens)
        if extra_ids is None:
            continue
        if extra_ids[i].ndim != 2 or len(extra_ids[i]) != len(tokens) - prompt_length:
            raise DataError(
                f"sequence {i}: extra_ids are {extra_ids[i].dtype} {list(extra_ids[i].shape)}; "
                f"expected integers [{len(tokens) - prompt_length}, E], a row per response token"
            )
        if len(used := extra_ids[i][extra_ids[i] != -1]):
            limits.check_vocabulary(f"sequence {i}: extra_ids", used)


def score_rollouts(
    teacher: Engine,
    rollouts: Sequence[Rollout],
    support: Support,
    *,
    temperature: float = 1.0,
    student: Engine | None = None,
    seen_by_teacher: Callable[[Rollout], Rollout] = lambda rollout: rollout,
    progress: Progress | None = None,
) -> list[TeacherScores]:
    """The teacher's scores of rollouts.

    Args:
        support: which ids are listed.
        student: the model that sampled them; needed if `support` lists the student's ids.
        seen_by_teacher: the sequence that the teacher reads for a rollout: the same answer, perhaps
            after another prompt.

    Raises:
        DataError, ConfigError: as `Engine.score`.
        ModelError: the engine returned another number of scores.
    """
    sequences = [rollout.tokens for rollout in rollouts]
    prompt_lengths = [rollout.prompt_length for rollout in rollouts]
    own: Sequence[TeacherScores | None] = [None] * len(rollouts)
    if support.student_k:
        assert student is not None, support
        own = student.score(sequences, prompt_lengths, support.student_k, temperature=temperature)
    ids = [
        support.chosen_ids(scores, len(rollout.rollout_logprobs), teacher.vocab_size)
        for scores, rollout in zip(own, rollouts, strict=True)
    ]
    seen = [seen_by_teacher(rollout) for rollout in rollouts]
    scores = teacher.score(
        [rollout.tokens for rollout in seen],
        [rollout.prompt_length for rollout in seen],
        support.teacher_k,
        temperature=temperature,
        extra_ids=ids if support.has_chosen_ids else None,
        progress=progress,
    )
    if len(scores) != len(rollouts):
        raise ModelError(
            f"engine: {teacher.name} scored {len(scores)} of {len(rollouts)} sequences; nothing is "
            "written"
        )
    return [support.listed(each) for each in scores]
