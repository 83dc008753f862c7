"""Records of a store: rollouts, the scores of an engine, and scored rollouts."""

import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lopd.store.ragged import TopKLists

FINISH_REASONS = ("stop", "length")
_REPEATED = re.compile(r"([0-9a-f]{16})#[1-9][0-9]*")


@dataclass(frozen=True)
class Rollout:
    """One sequence: a teacher's answer for fine-tuning, or a student's rollout.

    `rollout_logprobs` are under the distribution that was sampled from (temperature and
    top_p applied), `rollout_logprobs_raw` at temperature 1 and top_p 1; they may be the same array.
    Both are NaN if the cache's manifest declares them absent (`lopd.provenance.scoring`).
    """

    prompt_id: str  # stable under reordering of the prompts
    sample: int  # sample number of that prompt
    tokens: np.ndarray  # [T] int32, prompt then response, with the EOS if finish_reason is "stop"
    prompt_length: int  # >= 1; R = T - prompt_length >= 1
    finish_reason: str  # "stop" or "length"
    loss_mask: np.ndarray  # [T] bool, False on the prompt
    rollout_logprobs: np.ndarray  # [R] fp32, nat
    rollout_logprobs_raw: np.ndarray  # [R] fp32, nat
    weight: float = 1.0  # of the sequence in a loss, above 0
    reward: float | None = None  # what a verifier gave the answer; None: unknown
    token_weights: np.ndarray | None = None  # [R] fp32, in a loss, at least 0; None: all are 1


@dataclass(frozen=True)
class TeacherScores:
    """What an engine returns for one rollout. Entry t describes the distribution that
    produced response token t; log-probs in nat, not renormalised over any list.

    `extra_ids` are stored regardless of `top_p`, e.g. the student's top ids; those that are also in
    the list are stored once. Without `extra_tail_logprobs`, their mass is subtracted from the tail.
    """

    teacher_logprobs: np.ndarray  # [R] fp32, of the response token itself
    teacher_entropy: np.ndarray  # [R] fp32, nat; all NaN where the engine does not compute it
    topk_ids: np.ndarray  # [R, K] int32, distinct
    topk_logprobs: np.ndarray  # [R, K] fp32, descending
    tail_logprobs: np.ndarray  # [R] fp32, log of the mass outside the K ids; -inf when K = V
    extra_ids: np.ndarray | None = None  # [R, E] int32, -1 pads
    extra_logprobs: np.ndarray | None = None  # [R, E] fp32
    extra_tail_logprobs: np.ndarray | None = None  # [R] fp32, outside the K ids and extra ids


@dataclass(frozen=True)
class TeacherColumns:
    """The teacher's scores of R response tokens, of one sequence or of several end to end."""

    teacher_logprobs: np.ndarray  # [R] fp32, of the response token itself
    teacher_entropy: np.ndarray  # [R] fp32, nat; all NaN where the engine did not compute it
    lists: TopKLists
    tail_logprobs: np.ndarray  # [R] fp32, log of the mass outside the list


@dataclass(frozen=True)
class TeacherSequence(TeacherColumns):
    """One scored rollout as the reader returns it; its arrays belong to the caller.

    Lists of codec `compact` begin with the sampled token and are then sorted by id; those of the
    other codecs are sorted by log-prob, with appended ids last.
    """

    rollout: Rollout
    teacher_id: str | None = None  # the name of the teacher; None if it has none

    @property
    def topk_ids(self) -> np.ndarray:  # [R, K] int32, -1 pads; K = the longest of the R lists
        """The ids of `lists`, padded; read-only."""
        return self._padded[0]

    @property
    def topk_logprobs(self) -> np.ndarray:  # [R, K] fp32, -inf pads
        """The log-probs of `lists`, padded; read-only."""
        return self._padded[1]

    @cached_property
    def _padded(self) -> tuple[np.ndarray, np.ndarray]:
        arrays = self.lists.padded()
        for array in arrays:
            array.flags.writeable = False
        return arrays


def prompt_name(prompt_id: str) -> str:
    """The name of a prompt, the same for every repetition of it in a file.

    `lopd.data.prompts` numbers the repetitions.

    >>> prompt_name("0123456789abcdef#2"), prompt_name("task#2")
    ('0123456789abcdef', 'task#2')
    """
    match = _REPEATED.fullmatch(prompt_id)
    return match[1] if match else prompt_id


def name_of(rollout: Rollout) -> str:
    """The name of a sequence in messages."""
    return f"sequence {rollout.prompt_id}/{rollout.sample}"
