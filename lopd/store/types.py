"""What is stored per sequence, and what is refused at the door."""

from dataclasses import dataclass

import numpy as np

FINISH_REASONS = ("stop", "length")


@dataclass(frozen=True)
class Rollout:
    """One sequence: a teacher's answer for fine-tuning, or a student's rollout.

    `rollout_logprobs` are under the distribution that was sampled from (temperature and
    top_p applied), `rollout_logprobs_raw` at temperature 1 and top_p 1; pass the same array
    twice where they agree. Both are NaN throughout where the manifest of the cache says that
    they are absent (`shards.scoring_of`).
    """

    prompt_id: str  # stable under reordering of the prompts
    sample: int  # sample number of that prompt
    tokens: np.ndarray  # [T] int32, prompt then response, EOS kept when finish_reason is "stop"
    prompt_length: int  # >= 1; R = T - prompt_length >= 1
    finish_reason: str  # "stop" or "length"
    loss_mask: np.ndarray  # [T] bool, False on the prompt
    rollout_logprobs: np.ndarray  # [R] fp32, nat
    rollout_logprobs_raw: np.ndarray  # [R] fp32, nat


@dataclass(frozen=True)
class TeacherScores:
    """What an engine returns for one rollout. Entry t describes the distribution that
    produced response token t; log-probs in nat, not renormalised over any list.

    `extra_ids` are further ids to store whatever `top_p` says, e.g. the student's own top
    ids; those already in the list are stored once. `extra_tail_logprobs` goes with them where
    the engine can reduce it; otherwise their mass is taken out of the tail.
    """

    logprobs: np.ndarray  # [R] fp32, of the response token itself
    entropy: np.ndarray  # [R] fp32, nat; all NaN where the engine cannot tell it
    topk_ids: np.ndarray  # [R, K] int32, distinct
    topk_logprobs: np.ndarray  # [R, K] fp32, descending
    tail_logprobs: np.ndarray  # [R] fp32, log of the mass outside the K ids; -inf when K = V
    extra_ids: np.ndarray | None = None  # [R, E] int32, -1 pads
    extra_logprobs: np.ndarray | None = None  # [R, E] fp32
    extra_tail_logprobs: np.ndarray | None = None  # [R] fp32, outside the K ids and extra ids


@dataclass(frozen=True)
class TeacherSequence:
    """One scored rollout as the reader returns it; every array is the caller's own.

    Lists of codec `compact` begin with the sampled token and go on by id; those of the others
    go by log-prob, what was appended last.
    """

    rollout: Rollout
    teacher_logprobs: np.ndarray  # [R] fp32, of the response token itself
    teacher_entropy: np.ndarray  # [R] fp32, nat; all NaN where the engine could not tell it
    topk_ids: np.ndarray  # [R, K_i] int32, -1 pads; K_i = the longest list of the sequence
    topk_logprobs: np.ndarray  # [R, K_i] fp32, -inf pads
    tail_logprobs: np.ndarray  # [R] fp32, log of the mass outside the list as it stands here


def name_of(rollout: Rollout) -> str:
    """How messages call a sequence."""
    return f"sequence {rollout.prompt_id}/{rollout.sample}"
