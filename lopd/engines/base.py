"""What a stage asks of an inference engine: generate answers, score given ones.

An engine decides batching and order of execution; what it returns depends on the
sequence alone. Each sequence brings its own random seed, so that a rollout does not
depend on its neighbours in a batch, on the shard it falls into or on the prompt order
(up to floating-point rounding where batch shapes differ).
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from lopd.cache import Rollout, TeacherScores
from lopd.errors import ConfigError
from lopd.prompts import Prompt


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. `temperature=0` is greedy decoding."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens: found {self.max_new_tokens}; expected at least 1")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(
                f"temperature: found {self.temperature}; expected 0 (greedy) or a positive number"
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: found {self.top_p}; expected a number in (0, 1]")

    @property
    def is_raw(self) -> bool:
        """Whether the sampling distribution is the model's own, so one set of log-probs serves."""
        return self.temperature == 1.0 and self.top_p == 1.0


@dataclass(frozen=True)
class Generation:
    """One answer, as token ids."""

    tokens: np.ndarray  # [R] int32, the end-of-sequence token kept when finish_reason is "stop"
    finish_reason: str  # "stop" | "length"
    logprobs: np.ndarray  # [R] fp32, under the sampling distribution
    logprobs_raw: np.ndarray  # [R] fp32, at temperature 1 and top_p 1


class Engine(Protocol):
    """One model ready to generate and to score."""

    tokenizer: Any
    vocab_size: int
    context: int | None

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]
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
    ) -> list[TeacherScores]:
        """The model's top-k, own-token log-prob, tail and entropy at every response token."""
        ...


def sequence_seed(seed: int, prompt_id: str, sample: int) -> int:
    """A 63-bit seed that belongs to one (seed, prompt, sample) wherever it is generated."""
    digest = hashlib.sha256(f"{seed}/{prompt_id}/{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def to_rollout(prompt: Prompt, sample: int, generation: Generation) -> Rollout:
    """A prompt and its answer as one sequence; every response token bears loss."""
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
