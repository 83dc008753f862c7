"""What a stage asks of an inference engine: generate answers, score given ones.

An engine decides batching and order of execution; what it returns depends on the
sequence alone. Each sequence brings its own random seed, so that a rollout does not
depend on its neighbours in a batch, on the shard it falls into or on the prompt order
(up to floating-point rounding where batch shapes differ).
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np

from lopd.config.fields import Settings, setting
from lopd.data.prompts import Prompt
from lopd.errors import ConfigError, DataError
from lopd.store import Rollout, TeacherScores

Progress = Callable[[int], object]  # called with the number of sequences just finished
_sampling = partial(setting, group="Sampling")


@dataclass(frozen=True)
class Sampling(Settings):
    """How answers are drawn. `temperature=0` is greedy decoding."""

    max_new_tokens: int = _sampling(
        within="[1, inf)", help="Maximum length of an answer, in tokens."
    )
    temperature: float = _sampling(
        1.0, within="[0, inf)", help="Sampling temperature; 0 is greedy."
    )
    top_p: float = _sampling(
        1.0,
        within="(0, 1]",
        help="Sample from the smallest set of tokens with this probability mass.",
    )

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
    context: int | None  # longest sequence that it scores; None for no bound

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
        extra_ids: Sequence[np.ndarray] | None = None,  # each [R, E] int, -1 pads
        progress: Progress | None = None,
    ) -> list[TeacherScores]:
        """The model's top-k, own-token log-prob, tail and entropy at every response token.

        With `extra_ids` also the log-probs of further ids at each token, and the log of the
        mass outside list and extra ids together.

        Raises:
            DataError: a sequence without prompt or response, longer than the context, or with an
                id beyond the vocabulary.
            ConfigError: k beyond the vocabulary, or what this engine cannot do.
        """
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


def check_k(k: int, vocab_size: int) -> None:
    """Refuse lists longer than the vocabulary."""
    if not 1 <= k <= vocab_size:
        raise ConfigError(
            f"k: found {k}; expected 1 to the scoring model's vocabulary of {vocab_size}"
        )


def check_sequences(
    sequences: Sequence[np.ndarray],
    prompt_lengths: Sequence[int],
    *,
    context: int | None,
    vocab_size: int,
) -> None:
    """Refuse sequences that a model cannot score; see `Engine.score`."""
    for i, (tokens, prompt_length) in enumerate(zip(sequences, prompt_lengths, strict=True)):
        if not 1 <= prompt_length < len(tokens):
            raise DataError(
                f"sequence {i}: {prompt_length} of {len(tokens)} tokens are the prompt; "
                "expected at least one prompt token and one response token"
            )
        if context is not None and len(tokens) > context:
            raise DataError(
                f"sequence {i}: {len(tokens)} tokens; the scoring model's context holds "
                f"{context}; roll out with fewer --max_new_tokens"
            )
        if (largest := int(np.max(tokens))) >= vocab_size:
            raise DataError(
                f"sequence {i}: token id {largest}; the scoring model's vocabulary ends at "
                f"{vocab_size - 1}: the two models do not share a tokenizer"
            )
