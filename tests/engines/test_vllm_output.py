"""Chosen ids in vLLM's output, against the transformers engine on the same sequence."""

import numpy as np
import pytest

from lopd.engines.transformers import TransformersEngine
from lopd.engines.vllm_output import (
    check_readable,
    ids_to_ask,
    look_up,
    read_chosen,
    to_scores,
    with_extra,
)
from lopd.errors import ConfigError, ModelError

TOKENS, PROMPT, K = np.array([5, 6, 7, 40, 41, 9], np.int32), 2, 4
EXTRA = np.array([[1, 7], [40, -1], [300, 2], [9, 8]])


@pytest.fixture(scope="module")
def engine(teacher_folder):
    return TransformersEngine.load(teacher_folder, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def vocabulary(engine):
    """What vLLM returns of the last tokens: ids and log-probs of the token, then of all ids."""
    (full,) = engine.score([TOKENS], [PROMPT], engine.vocab_size)
    ids = np.column_stack([TOKENS[PROMPT:], full.topk_ids])
    return ids, np.column_stack([full.teacher_logprobs, full.topk_logprobs])


@pytest.mark.parametrize("by_ids", [True, False])
def test_extra_ids_have_the_log_probs_and_the_tail_of_transformers(engine, vocabulary, by_ids):
    ids, logprobs = vocabulary
    (expected,) = engine.score([TOKENS], [PROMPT], K, extra_ids=[EXTRA])
    top = to_scores(0, ids[:, : K + 1], logprobs[:, : K + 1], engine.vocab_size)
    if by_ids:
        asked = ids_to_ask(TOKENS, EXTRA)
        assert asked[:, 0].tolist() == TOKENS[PROMPT:].tolist()
        answer = np.where(asked >= 0, look_up(ids, logprobs, asked), -np.inf)
        found = read_chosen(0, answer, ids, logprobs, EXTRA)
    else:
        found = look_up(ids, logprobs, EXTRA)
    scores = with_extra(0, top, ids[:, 0], EXTRA, found, engine.vocab_size)
    used = EXTRA >= 0
    np.testing.assert_allclose(
        scores.extra_logprobs[used], expected.extra_logprobs[used], atol=2e-5
    )
    np.testing.assert_allclose(scores.extra_tail_logprobs, expected.extra_tail_logprobs, atol=1e-4)


def test_chosen_ids_that_are_missing_shifted_or_infinite_are_refused(vocabulary):
    ids, logprobs = vocabulary
    answer = look_up(ids, logprobs, ids_to_ask(TOKENS, EXTRA))
    with pytest.raises(ModelError, match=r"came back as \(\), expected \(4, 3\)"):
        read_chosen(0, None, ids, logprobs, EXTRA)
    with pytest.raises(ModelError, match="expected"):
        read_chosen(0, answer[1:], ids, logprobs, EXTRA)
    with pytest.raises(ModelError, match="not aligned with the tokens"):
        read_chosen(0, np.roll(answer, 1, axis=0), ids, logprobs, EXTRA)
    with pytest.raises(ModelError, match="no finite log-prob"):
        read_chosen(0, np.where(np.arange(3) == 1, -np.inf, answer), ids, logprobs, EXTRA)


def test_a_large_vocabulary_is_not_read_as_a_whole():
    check_readable([TOKENS], 1000)
    with pytest.raises(ConfigError, match="151936 log-probs of each of 100 tokens are too many"):
        check_readable([TOKENS, np.zeros(100)], 151936)
