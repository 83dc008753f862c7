"""Which row of a model's output predicts which token."""

import numpy as np


def response_positions(prompt_length: int, length: int) -> np.ndarray:  # [R] int64
    """Positions of the response tokens in a sequence of `length` tokens."""
    return np.arange(prompt_length, length)


def predicting_rows(
    positions: np.ndarray,  # [N] int64, of tokens in their sequence, at least 1
    start: int = 0,  # row of the sequence's first token
) -> np.ndarray:  # [N] int64
    """Rows whose hidden state (or logits) predicts the tokens at `positions`.

    The output at position t - 1 predicts token t.

    >>> predicting_rows(response_positions(2, 5), start=10).tolist()
    [11, 12, 13]
    """
    return start + positions - 1
