"""The limits of a model on its input: longest sequence and vocabulary."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lopd.errors import ConfigError, DataError


@dataclass(frozen=True)
class ModelLimits:
    """What a model can read; messages call it `model`.

    >>> ModelLimits("the teacher", vocab_size=8, context=4).check("sequence a/0", [1, 2, 7])
    >>> ModelLimits("the teacher", vocab_size=7).check("sequence a/0", [1, 2, 7])
    Traceback (most recent call last):
    lopd.errors.DataError: sequence a/0: token 2 has id 7; expected ids in [0, 7), the vocabulary \
of the teacher; use models that share a tokenizer
    """

    model: str
    vocab_size: int | None  # rows of its embedding; None for no limit
    context: int | None = None  # tokens; None for no limit
    length_remedy: str = "roll out with fewer --max-new-tokens"
    id_remedy: str = "use models that share a tokenizer"

    def check(
        self,
        name: str,
        tokens: Sequence[int] | np.ndarray,  # [T]
        *,
        max_new_tokens: int = 0,
    ) -> None:
        """Refuse tokens that the model cannot read or that leave no room for an answer.

        Raises:
            DataError: `name`, what is beyond a limit, and the remedy.
        """
        length = len(tokens) + max_new_tokens
        if self.context is not None and length > self.context:
            more = f" and max_new_tokens={max_new_tokens}" if max_new_tokens else ""
            raise DataError(
                f"{name}: found {len(tokens)} tokens{more}; expected at most {self.context}, the "
                f"context of {self.model}; {self.length_remedy}"
            )
        self.check_vocabulary(name, np.asarray(tokens))

    def check_vocabulary(self, name: str, ids: np.ndarray) -> None:  # [T]
        """Refuse ids that the model has no row for.

        Raises:
            DataError: `name`, the first such id, and the remedy.
        """
        if self.vocab_size is None or 0 <= ids.min() <= ids.max() < self.vocab_size:
            return
        bad = int(np.flatnonzero((ids < 0) | (ids >= self.vocab_size))[0])
        raise DataError(
            f"{name}: token {bad} has id {ids[bad]}; expected ids in [0, {self.vocab_size}), the "
            f"vocabulary of {self.model}; {self.id_remedy}"
        )

    def check_ids(self, name: str, ids: Sequence[int]) -> None:
        """Refuse ids of a setting beyond the vocabulary.

        Raises:
            ConfigError: `name`, the id and the vocabulary.
        """
        beyond = [i for i in ids if self.vocab_size is not None and i >= self.vocab_size]
        if beyond:
            raise ConfigError(
                f"{name}: found {beyond[0]}; expected ids in [0, {self.vocab_size}), the "
                f"vocabulary of {self.model}"
            )

    def check_k(self, k: int, name: str = "k") -> None:
        """Refuse lists longer than the vocabulary.

        Raises:
            ConfigError: `name`, the number and the vocabulary.
        """
        assert self.vocab_size is not None
        if not 1 <= k <= self.vocab_size:
            raise ConfigError(
                f"{name}: found {k}; expected 1 to {self.vocab_size}, the vocabulary of "
                f"{self.model}"
            )
