"""Accuracy against brute force, and on scripted answers."""

import itertools

import numpy as np
import pytest

from lopd.config.evaluate import ANSWER_REGEX
from lopd.data.prompts import Prompt
from lopd.engines.base import Generation, Sampling
from lopd.engines.transformers import TransformersEngine
from lopd.errors import ConfigError
from lopd.evaluation.accuracy import (
    accuracy_by_length,
    mean_with_interval,
    measure_accuracy,
    pass_at_k,
)
from lopd.evaluation.grading import exact_grader, math_grader
from lopd.stages.demo import arithmetic as toy

EXACT = exact_grader(ANSWER_REGEX)


@pytest.mark.parametrize("n", [1, 3, 5])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_answer(n):
    for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([True] * correct + [False] * (n - correct), k))
        expected = np.mean([any(subset) for subset in subsets])
        assert pass_at_k(np.array([correct]), n, k)[0] == pytest.approx(expected)


def test_pass_at_k_refuses_k_above_the_number_of_samples():
    with pytest.raises(ConfigError, match="k=3; expected 1 to the 2 samples"):
        pass_at_k(np.array([1]), 2, 3)


def test_interval_is_wilsons_for_binary_outcomes():
    # Wilson (1927), 81 of 263: centre and half-width by hand
    per_prompt = np.array([1.0] * 81 + [0.0] * 182)
    result = mean_with_interval(per_prompt)
    assert result["mean"] == pytest.approx(81 / 263)
    assert result["low"] == pytest.approx(0.2553, abs=3e-4)
    assert result["high"] == pytest.approx(0.3662, abs=3e-4)


def test_interval_has_a_width_when_all_prompts_agree():
    result = mean_with_interval(np.ones(10))
    assert result["high"] == pytest.approx(1.0) and 0.7 < result["low"] < 0.75


def test_more_samples_per_prompt_narrow_the_interval():
    coarse, fine = (
        mean_with_interval(np.array([0.0, 1.0] * 20)),
        mean_with_interval(np.array([0.4, 0.6] * 20)),
    )
    assert fine["high"] - fine["low"] < 0.5 * (coarse["high"] - coarse["low"])


class ScriptedEngine:
    """Generates the given answers, one after another and then from the first again."""

    class tokenizer:
        @staticmethod
        def decode(tokens, skip_special_tokens):
            return "".join(map(chr, tokens))

    def __init__(self, *answers):
        self.answers = answers

    def generate(self, prompts, sampling, seeds, progress=None):
        answers = [self.answers[i % len(self.answers)] for i in range(len(prompts))]
        return [
            Generation(np.array(list(map(ord, text))), reason, np.zeros(1), np.zeros(1))
            for text, reason in answers
        ]


def measure(engine, prompts, num_samples, grader=EXACT, max_new_tokens=8):
    sampling = Sampling(max_new_tokens)
    return measure_accuracy(engine, prompts, grader, sampling, num_samples=num_samples, seed=0)


@pytest.mark.parametrize(
    ("text", "reason", "right"),
    [
        ("1+1=2;#2", "stop", True),
        ("#3;#2", "stop", True),
        ("#2;#3", "stop", False),
        ("so #### 2 ", "stop", True),
        ("2", "stop", False),
        ("#22", "stop", False),
        ("#2", "length", False),
    ],
)
def test_answer_is_correct_when_its_last_match_is(text, reason, right):
    prompt = Prompt("a", [1], "2")
    results, answers, _ = measure(ScriptedEngine((text, reason)), [prompt], 2)
    assert [answer["correct"] for answer in answers] == [right] * 3
    assert answers[0]["text"] == text and answers[0]["sample"] is None
    assert results["greedy"]["mean"] == results["avg@2"]["mean"] == float(right)
    assert results["truncated"] == float(reason == "length")


def test_avg_and_pass_at_k_differ_when_half_the_samples_are_correct():
    prompts = [Prompt("a", [1], "2"), Prompt("b", [1], "2")]
    engine = ScriptedEngine(("#2", "stop"), ("#3", "stop"))
    results, _, _ = measure(engine, prompts, 4)
    assert results["avg@4"]["mean"] == 0.5
    assert results["pass@1"]["mean"] == 0.5
    assert results["pass@2"]["mean"] == pytest.approx(1 - 1 / 6)
    assert results["pass@4"]["mean"] == 1.0


def test_math_answer_must_be_complete():
    prompts, answers = [Prompt("a", [1], "0.5")], [(r"\boxed{1/2}", "stop"), ("1/2", "length")]
    results, records, _ = measure(ScriptedEngine(*answers), prompts, 2, math_grader(prompts))
    assert [record["correct"] for record in records] == [True, True, False]
    assert [record["answer"] for record in records] == ["1/2"] * 3
    assert results["avg@2"]["mean"] == 0.5


def test_accuracy_by_length_has_one_row_per_quarter():
    lengths = np.array([8, 1, 7, 2, 6, 3, 5, 4])
    correct = np.array([0, 1, 0, 1, 1, 1, 0, 1], bool)
    truncated = np.array([1, 0, 1, 0, 0, 0, 1, 0], bool)
    rows = accuracy_by_length(lengths, correct, truncated)
    assert [(row["shortest"], row["longest"], row["count"]) for row in rows] == [
        (1, 2, 2),
        (3, 4, 2),
        (5, 6, 2),
        (7, 8, 2),
    ]
    assert [row["accuracy"] for row in rows] == [1.0, 1.0, 0.5, 0.0]
    assert [row["truncated"] for row in rows] == [0.0, 0.0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("lengths", "counts"), [([5, 5, 5], [3]), ([1, 5, 5, 5, 5, 9], [5, 1]), ([4], [1])]
)
def test_answers_of_equal_length_share_a_bucket(lengths, counts):
    none = np.zeros(len(lengths), bool)
    rows = accuracy_by_length(np.array(lengths), none, none)
    assert [row["count"] for row in rows] == counts


def test_accuracy_by_length_counts_the_sampled_answers():
    engine = ScriptedEngine(
        ("#2", "stop"), ("about #3", "stop"), ("#2", "stop"), ("#222222222", "length")
    )
    prompts = [Prompt("a", [1], "2"), Prompt("b", [1], "2")]
    results, records, _ = measure(engine, prompts, 2)
    assert [record["tokens"] for record in records] == [2, 8, 2, 8, 2, 10]
    assert [row["count"] for row in results["by_length"]] == [2, 1, 1]
    assert [row["accuracy"] for row in results["by_length"]] == [1.0, 0.0, 0.0]
    assert [row["truncated"] for row in results["by_length"]] == [0.0, 0.0, 1.0]


def test_answers_stop_at_the_end_of_sequence_token(tmp_path):
    folder = toy.write_model(tmp_path / "m", toy.STUDENT_SIZE, seed=0)
    engine = TransformersEngine.load(folder, dtype="float32", device="cpu", batch_size=8)
    eos = engine.tokenizer.eos_token_id
    prompts = [Prompt(str(i), [5, 6, 7 + i % 9], "1") for i in range(16)]
    _, records, sampled = measure(engine, prompts, 2, max_new_tokens=24)
    ended = [int(answer.tokens[-1]) == eos for answer in sampled]
    assert 3 < sum(ended) < len(ended)
    for answer, record, end in zip(sampled, records[len(prompts) :], ended, strict=True):
        assert eos not in answer.tokens[:-1]
        assert answer.finish_reason == record["finish_reason"] == ("stop" if end else "length")
        assert end or len(answer.tokens) == 24
        assert toy.EOS not in record["text"]
