"""Position t - 1 predicts token t, wherever the sequence lies in a batch."""

import numpy as np
import torch

from lopd.data.alignment import predicting_rows, response_positions


def test_rows_predict_the_tokens_of_the_response():
    tokens, prompt_length, start = np.array([4, 5, 6, 7, 8]), 2, 20
    positions = response_positions(prompt_length, len(tokens))
    assert tokens[positions].tolist() == [6, 7, 8]
    assert predicting_rows(positions, start).tolist() == [21, 22, 23]


def test_rows_are_those_of_a_causal_loss():
    """Rows picked from [T, V] logits give the loss of the usual shift by one."""
    torch.manual_seed(0)
    logits, tokens = torch.randn(6, 9), torch.tensor([1, 2, 3, 4, 5, 6])
    positions = response_positions(3, 6)
    picked = torch.nn.functional.cross_entropy(
        logits[predicting_rows(positions)], tokens[positions], reduction="none"
    )
    shifted = torch.nn.functional.cross_entropy(logits[:-1], tokens[1:], reduction="none")
    assert torch.equal(picked, shifted[-3:])
