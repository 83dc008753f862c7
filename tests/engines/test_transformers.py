"""The transformers engine against dense forwards: alignment, distributions, independence."""

import numpy as np
import pytest
import torch

from lopd.engines.base import Sampling, sequence_seed
from lopd.engines.transformers import TransformersEngine, draw
from lopd.errors import ConfigError, DataError, ModelError
from lopd.models.load import load_model, load_tokenizer

PROMPTS = [[5, 6, 7], [9, 8], [30, 31, 32, 33, 34], [12], [40, 41, 42]]
SEEDS = [sequence_seed(0, str(i), 0) for i in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def engine(teacher_folder):
    return TransformersEngine.load(teacher_folder, dtype="float32", device="cpu")


def dense_logprobs(engine, tokens, temperature=1.0):
    """[T, V] log-probs, entry t of the token after position t; fp64 softmax."""
    with torch.no_grad():
        logits = engine.model(torch.tensor([list(map(int, tokens))])).logits[0]
    return torch.log_softmax(logits.double() / temperature, dim=-1).numpy()


def of_tokens(logprobs, tokens, prompt_length):
    positions = np.arange(prompt_length - 1, len(tokens) - 1)
    return logprobs[positions, np.asarray(tokens)[prompt_length:]]


@pytest.mark.parametrize("sampling", [Sampling(12), Sampling(12, 0.7), Sampling(12, 1.3, 0.8)])
def test_logprobs_are_those_of_a_dense_forward(engine, sampling):
    for prompt, answer in zip(PROMPTS, engine.generate(PROMPTS, sampling, SEEDS), strict=True):
        tokens = [*prompt, *answer.tokens]
        raw = of_tokens(dense_logprobs(engine, tokens), tokens, len(prompt))
        np.testing.assert_allclose(answer.logprobs_raw, raw, atol=2e-5)
        scaled = dense_logprobs(engine, tokens, sampling.temperature)
        for t, token in enumerate(answer.tokens):
            row = scaled[len(prompt) - 1 + t]
            order = np.argsort(-row)
            size = int(np.searchsorted(np.exp(row[order]).cumsum(), sampling.top_p)) + 1
            nucleus = order[:size]
            assert token in nucleus
            expected = row[token] - np.log(np.exp(row[nucleus]).sum())
            np.testing.assert_allclose(answer.logprobs[t], expected, atol=2e-5)


def test_one_position_off_is_seen(engine):
    (answer,) = engine.generate(PROMPTS[:1], Sampling(12), SEEDS[:1])
    tokens = [*PROMPTS[0], *answer.tokens]
    shifted = of_tokens(np.roll(dense_logprobs(engine, tokens), 1, axis=0), tokens, 3)
    assert np.abs(answer.logprobs - shifted).max() > 0.1


def test_an_answer_does_not_depend_on_its_neighbours(engine, teacher_folder):
    together = engine.generate(PROMPTS, Sampling(12), SEEDS)
    small = TransformersEngine(engine.model, engine.tokenizer, batch_size=2)
    backwards = small.generate(PROMPTS[::-1], Sampling(12), SEEDS[::-1])[::-1]
    for a, b in zip(together, backwards, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        assert a.finish_reason == b.finish_reason
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_seeds_and_prompts_change_the_answer(engine):
    answers = engine.generate([PROMPTS[0]] * 8, Sampling(12), list(range(8)))
    assert len({tuple(answer.tokens) for answer in answers}) > 4
    assert (
        len({sequence_seed(*key) for key in [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1)]})
        == 4
    )


def test_the_end_of_sequence_token_is_stored_and_ends_the_answer(engine):
    answers = engine.generate([[5, 6]] * 400, Sampling(40), list(range(400)))
    stopped = [answer for answer in answers if answer.finish_reason == "stop"]
    cut = [answer for answer in answers if answer.finish_reason == "length"]
    assert len(stopped) > 5 and len(cut) > 5
    eos = engine.eos_ids[0]
    assert all(a.tokens[-1] == eos and eos not in a.tokens[:-1] for a in stopped)
    assert all(len(a.tokens) == 40 and eos not in a.tokens for a in cut)
    assert all(len(a.logprobs) == len(a.tokens) == len(a.logprobs_raw) for a in answers)
    longest = max(stopped, key=lambda answer: len(answer.tokens))
    tokens = [5, 6, *longest.tokens]
    expected = of_tokens(dense_logprobs(engine, tokens), tokens, 2)
    np.testing.assert_allclose(longest.logprobs, expected, atol=2e-5)


def test_progress_counts_every_answer_as_it_ends(engine):
    reports = []
    engine.generate([[5, 6]] * 200, Sampling(30), list(range(200)), progress=reports.append)
    assert sum(reports) == 200 and len(reports) > 10 and min(reports) > 0


def test_greedy_takes_the_largest_logit(engine):
    (answer,) = engine.generate([PROMPTS[2]], Sampling(6, temperature=0), [0])
    tokens = [*PROMPTS[2], *answer.tokens]
    rows = dense_logprobs(engine, tokens)[len(PROMPTS[2]) - 1 : -1]
    assert answer.tokens.tolist() == rows.argmax(1).tolist()


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0, -1.0]])
    uniforms = (torch.arange(20000).double() + 0.5) / 20000
    token, _, _ = draw(logits.expand(20000, -1), Sampling(1), uniforms)
    shares = torch.bincount(token, minlength=5) / 20000
    torch.testing.assert_close(shares, torch.softmax(logits[0], 0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_pick_possible_tokens(uniform):
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    token, logprob, _ = draw(logits, Sampling(1), torch.tensor([uniform], dtype=torch.float64))
    assert token.item() == (1 if uniform == 0 else 2)
    assert logprob.item() == pytest.approx(np.log(0.5))


def test_nan_logits_stop_generation():
    with pytest.raises(ModelError, match="NaN or infinite logits"):
        draw(torch.tensor([[0.0, torch.nan]]), Sampling(1), torch.tensor([0.5]).double())


def rollouts(engine):
    answers = engine.generate(PROMPTS, Sampling(12), SEEDS)
    sequences = [
        np.array([*prompt, *answer.tokens], dtype=np.int32)
        for prompt, answer in zip(PROMPTS, answers, strict=True)
    ]
    return sequences, list(map(len, PROMPTS))


@pytest.mark.parametrize(("k", "temperature"), [(1, 1.0), (8, 1.0), (8, 0.6)])
def test_scores_are_those_of_a_dense_forward(engine, k, temperature):
    sequences, lengths = rollouts(engine)
    scores = engine.score(sequences, lengths, k, temperature=temperature)
    for tokens, length, score in zip(sequences, lengths, scores, strict=True):
        rows = dense_logprobs(engine, tokens, temperature)[length - 1 : -1]
        np.testing.assert_allclose(
            score.teacher_logprobs, rows[np.arange(len(rows)), tokens[length:]], atol=2e-5
        )
        order = np.argsort(-rows, axis=1)[:, :k]
        np.testing.assert_allclose(
            score.topk_logprobs, np.take_along_axis(rows, order, 1), atol=2e-5
        )
        np.testing.assert_allclose(
            np.take_along_axis(rows, score.topk_ids.astype(int), 1), score.topk_logprobs, atol=2e-5
        )
        rest = rows.copy()
        np.put_along_axis(rest, order, -np.inf, axis=1)
        np.testing.assert_allclose(score.tail_logprobs, np.log(np.exp(rest).sum(1)), atol=2e-5)
        np.testing.assert_allclose(score.teacher_entropy, -(np.exp(rows) * rows).sum(1), atol=2e-5)


def test_scores_that_are_one_position_off_are_seen(engine):
    sequences, lengths = rollouts(engine)
    for tokens, length, score in zip(
        sequences, lengths, engine.score(sequences, lengths, 8), strict=True
    ):
        rows = dense_logprobs(engine, tokens)[length:-1]  # each of the token after
        assert np.abs(np.sort(rows, axis=1)[:, ::-1][:, :8] - score.topk_logprobs[:-1]).max() > 0.1
        own = rows[np.arange(len(rows)), tokens[length + 1 :]]
        assert np.abs(own - score.teacher_logprobs[:-1]).max() > 0.1


def test_scores_do_not_depend_on_the_batch(engine):
    sequences, lengths = rollouts(engine)
    one_by_one = TransformersEngine(engine.model, engine.tokenizer, tokens_per_batch=1)
    for a, b in zip(
        engine.score(sequences, lengths, 4), one_by_one.score(sequences, lengths, 4), strict=True
    ):
        assert a.topk_ids.tolist() == b.topk_ids.tolist()
        np.testing.assert_allclose(a.teacher_logprobs, b.teacher_logprobs, atol=1e-5)


def test_the_whole_vocabulary_leaves_no_tail(engine):
    sequences, lengths = rollouts(engine)
    (score,) = engine.score(sequences[:1], lengths[:1], engine.vocab_size)
    assert np.isneginf(score.tail_logprobs).all()
    np.testing.assert_allclose(np.exp(score.topk_logprobs).sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "prompt_length", "error"),
    [
        ([5, 6, 100000], 1, "token 2 has id 100000"),
        ([5] * 65, 1, "expected at most 64, the context of"),
        ([5, 6], 2, "2 of 2 tokens are the prompt"),
        ([5, 6], 0, "0 of 2 tokens are the prompt"),
    ],
)
def test_sequences_that_cannot_be_scored(engine, tokens, prompt_length, error):
    with pytest.raises(DataError, match=error):
        engine.score([np.array(tokens)], [prompt_length], 2)


def test_settings_out_of_range(engine):
    with pytest.raises(ConfigError, match="k: found 400; expected 1 to"):
        engine.score([np.array([5, 6])], [1], 400)
    with pytest.raises(ConfigError, match="max_new_tokens: found 0"):
        Sampling(0)
    with pytest.raises(ConfigError, match="top_p: found 0"):
        Sampling(4, top_p=0.0)
    with pytest.raises(ConfigError, match="temperature: found -1"):
        Sampling(4, temperature=-1)


def test_a_head_that_lopd_does_not_know_is_refused(teacher_folder):
    model = load_model(teacher_folder, dtype="float32", device="cpu")
    forward = model.forward

    def scaled(**inputs):
        output = forward(**inputs)
        output.logits = output.logits * 1.5
        return output

    model.forward = scaled
    with pytest.raises(ModelError, match="its logits differ"):
        TransformersEngine(model, load_tokenizer(teacher_folder))
