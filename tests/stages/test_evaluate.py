"""Evaluation: estimators against brute force, answers by exact match, KL against dense."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch

from lopd.data.prompts import Prompt
from lopd.engines.base import Sampling
from lopd.engines.transformers import TransformersEngine
from lopd.errors import ConfigError, DataError, ProvenanceError
from lopd.evaluation.accuracy import by_length, estimate, pass_at_k
from lopd.evaluation.kl import on_policy_kl
from lopd.stages.demo import arithmetic as toy
from lopd.stages.evaluate import EvalConfig, main, measure


def settings(**changes):
    given = {
        "model": "m",
        "prompts": "p",
        "out": "o",
        "max_new_tokens": 8,
        "dtype": "float32",
        "device": "cpu",
    }
    return EvalConfig(**(given | changes))


@pytest.mark.parametrize("n", [1, 3, 5])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n):
    for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([True] * correct + [False] * (n - correct), k))
        expected = np.mean([any(subset) for subset in subsets])
        assert pass_at_k(np.array([correct]), n, k)[0] == pytest.approx(expected)


def test_pass_at_more_than_the_samples_is_refused():
    with pytest.raises(ConfigError, match="k=3; expected 1 to the 2 samples"):
        pass_at_k(np.array([1]), 2, 3)


def test_the_interval_is_wilsons_for_zero_one_outcomes():
    # Wilson (1927), 81 of 263: centre and half-width by hand
    per_prompt = np.array([1.0] * 81 + [0.0] * 182)
    result = estimate(per_prompt)
    assert result["mean"] == pytest.approx(81 / 263)
    assert result["low"] == pytest.approx(0.2553, abs=3e-4)
    assert result["high"] == pytest.approx(0.3662, abs=3e-4)


def test_the_interval_keeps_a_width_when_all_agree():
    result = estimate(np.ones(10))
    assert result["high"] == pytest.approx(1.0) and 0.7 < result["low"] < 0.75


def test_more_samples_a_prompt_narrow_the_interval():
    coarse, fine = estimate(np.array([0.0, 1.0] * 20)), estimate(np.array([0.4, 0.6] * 20))
    assert fine["high"] - fine["low"] < 0.5 * (coarse["high"] - coarse["low"])


class Scripted:
    """An engine whose answers are given."""

    class tokenizer:
        @staticmethod
        def decode(tokens, skip_special_tokens):
            return "".join(map(chr, tokens))

    def __init__(self, *answers):
        self.answers = answers

    def generate(self, prompts, sampling, seeds, progress=None):
        from lopd.engines.base import Generation

        given = [self.answers[i % len(self.answers)] for i in range(len(prompts))]
        return [
            Generation(np.array(list(map(ord, text))), reason, np.zeros(1), np.zeros(1))
            for text, reason in given
        ]


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
def test_an_answer_is_right_when_its_last_match_is(text, reason, right):
    prompt = Prompt("a", [1], "2")
    results, answers, _ = measure(Scripted((text, reason)), [prompt], settings(num_samples=2))
    assert [answer["correct"] for answer in answers] == [right] * 3
    assert answers[0]["text"] == text and answers[0]["sample"] is None
    assert results["greedy"]["mean"] == results["avg@2"]["mean"] == float(right)
    assert results["truncated"] == float(reason == "length")


def test_avg_and_pass_differ_when_half_the_samples_are_right():
    prompts = [Prompt("a", [1], "2"), Prompt("b", [1], "2")]
    engine = Scripted(("#2", "stop"), ("#3", "stop"))
    results, _, _ = measure(engine, prompts, settings(num_samples=4))
    assert results["avg@4"]["mean"] == 0.5
    assert results["pass@1"]["mean"] == 0.5
    assert results["pass@2"]["mean"] == pytest.approx(1 - 1 / 6)
    assert results["pass@4"]["mean"] == 1.0


def test_a_mathematical_answer_is_judged_as_such_and_must_have_ended():
    prompts, answers = [Prompt("a", [1], "0.5")], [(r"\boxed{1/2}", "stop"), ("1/2", "length")]
    config = settings(num_samples=2, judge="math")
    results, records, _ = measure(Scripted(*answers), prompts, config)
    assert [record["correct"] for record in records] == [True, True, False]
    assert [record["answer"] for record in records] == ["1/2"] * 3
    assert results["avg@2"]["mean"] == 0.5


def test_accuracy_by_length_is_that_of_the_answers_of_each_quarter():
    lengths = np.array([8, 1, 7, 2, 6, 3, 5, 4])
    correct = np.array([0, 1, 0, 1, 1, 1, 0, 1], bool)
    truncated = np.array([1, 0, 1, 0, 0, 0, 1, 0], bool)
    rows = by_length(lengths, correct, truncated)
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
def test_answers_of_one_length_share_a_bucket(lengths, counts):
    none = np.zeros(len(lengths), bool)
    rows = by_length(np.array(lengths), none, none)
    assert [row["count"] for row in rows] == counts


def test_the_sampled_answers_are_what_is_counted_by_length():
    engine = Scripted(
        ("#2", "stop"), ("about #3", "stop"), ("#2", "stop"), ("#222222222", "length")
    )
    prompts = [Prompt("a", [1], "2"), Prompt("b", [1], "2")]
    results, records, _ = measure(engine, prompts, settings(num_samples=2))
    assert [record["tokens"] for record in records] == [2, 8, 2, 8, 2, 10]
    assert [row["count"] for row in results["by_length"]] == [2, 1, 1]
    assert [row["accuracy"] for row in results["by_length"]] == [1.0, 0.0, 0.0]
    assert [row["truncated"] for row in results["by_length"]] == [0.0, 0.0, 1.0]


def test_an_answer_stops_at_the_end_of_sequence_token(tmp_path):
    folder = toy.write_model(tmp_path / "m", toy.STUDENT_SIZE, seed=0)
    engine = TransformersEngine.load(folder, dtype="float32", device="cpu", batch_size=8)
    eos = engine.tokenizer.eos_token_id
    prompts = [Prompt(str(i), [5, 6, 7 + i % 9], "1") for i in range(16)]
    config = settings(max_new_tokens=24, num_samples=2)
    _, records, sampled = measure(engine, prompts, config)
    ended = [int(answer.tokens[-1]) == eos for answer in sampled]
    assert 3 < sum(ended) < len(ended)
    for answer, record, end in zip(sampled, records[len(prompts) :], ended, strict=True):
        assert eos not in answer.tokens[:-1]
        assert answer.finish_reason == record["finish_reason"] == ("stop" if end else "length")
        assert end or len(answer.tokens) == 24
        assert toy.EOS not in record["text"]


@pytest.mark.parametrize("k", [4, 10**9])
def test_the_kl_is_that_of_dense_logits(teacher_folder, student_folder, k):
    teacher = TransformersEngine.load(teacher_folder, dtype="float32", device="cpu")
    student = TransformersEngine.load(student_folder, dtype="float32", device="cpu", batch_size=2)
    prompts = [Prompt(str(i), [5 + i, 6], None) for i in range(3)]
    sampled = student.generate([p.tokens for p in prompts], Sampling(9), [1, 2, 3])
    result = on_policy_kl(student, teacher, prompts, sampled, k)
    total, tokens = 0.0, 0
    for prompt, answer in zip(prompts, sampled, strict=True):
        ids = torch.tensor([[*prompt.tokens, *answer.tokens.tolist()]])
        with torch.no_grad():
            p, q = (
                torch.softmax(engine.model(ids).logits[0, 1:-1].double(), -1)
                for engine in (student, teacher)
            )
        if k < q.shape[1]:
            top = q.topk(k).indices
            p, q = (
                torch.cat([x.gather(1, top), 1 - x.gather(1, top).sum(1, keepdim=True)], 1)
                for x in (p, q)
            )
        total += float((p * (p / q).log()).sum())
        tokens += len(answer.tokens)
    assert result["tokens"] == tokens
    assert result["k"] == min(k, teacher.vocab_size)
    assert result["nats_per_token"] == pytest.approx(total / tokens, rel=1e-4)


def test_a_model_has_no_kl_to_itself(teacher_folder):
    engine = TransformersEngine.load(teacher_folder, dtype="float32", device="cpu")
    prompts = [Prompt("a", [5, 6], None)]
    sampled = engine.generate([[5, 6]], Sampling(9), [1])
    assert abs(on_policy_kl(engine, engine, prompts, sampled, 8)["nats_per_token"]) < 1e-6


def test_the_command_writes_results_and_a_manifest(
    teacher_folder, student_folder, prompt_file, tmp_path, capsys
):
    changes = {"model": str(student_folder), "teacher": str(teacher_folder)}
    out = main(settings(prompts=str(prompt_file), out=str(tmp_path / "e"), **changes))
    results = json.loads((out / "results.json").read_text())
    assert {"greedy", "avg@4", "pass@1", "pass@4", "kl"} <= set(results)
    assert sum(row["count"] for row in results["by_length"]) == 7 * 4
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 7 * 5 and {answer["sample"] for answer in answers} == {None, 0, 1, 2, 3}
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["kind"] == "evaluation"
    assert "KL to the teacher" in capsys.readouterr().out


def test_prompts_without_answers_are_refused(student_folder, write_jsonl):
    path = write_jsonl([{"prompt": "a", "answer": "1"}, {"id": "p2", "prompt": "b"}])
    with pytest.raises(DataError, match="1 of 2 prompts have no 'answer'.*'p2'"):
        main(settings(model=str(student_folder), prompts=str(path)))


@pytest.mark.parametrize("pattern", ["(", "a", "(a)(b)"])
def test_a_pattern_without_its_one_group_is_refused(pattern):
    with pytest.raises(ConfigError, match="answer_regex"):
        settings(answer_regex=pattern)


def test_the_kl_is_on_samples_at_temperature_1_whatever_is_evaluated(
    teacher_folder, student_folder, prompt_file, tmp_path
):
    def kl(**changes):
        name = f"e{len(list(tmp_path.iterdir()))}"
        given = {"model": str(student_folder), "teacher": str(teacher_folder), "num_samples": 1}
        given |= {"prompts": str(prompt_file), "out": str(tmp_path / name), **changes}
        return json.loads((main(settings(**given)) / "results.json").read_text())["kl"]

    assert kl(temperature=0.3) == kl(top_p=0.5) == kl()


def test_a_teacher_with_another_tokenizer_is_refused(student_folder, prompt_file, tmp_path):
    other = tmp_path / "teacher"
    shutil.copytree(student_folder, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = dict(
        zip(vocab, [*list(vocab.values())[:4], *list(vocab.values())[:3:-1]], strict=True)
    )
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    changes = {"model": str(student_folder), "teacher": str(other), "prompts": str(prompt_file)}
    with pytest.raises(ProvenanceError, match=r"id \d+ is .* to it and .* to the model"):
        main(settings(out=str(tmp_path / "out"), **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["", "file", "file/under", "model", "finished"])
def test_a_folder_that_holds_something_is_not_written_to(
    student_folder, prompt_file, tmp_path, name
):
    (tmp_path / "file").write_text("x")
    shutil.copytree(student_folder, tmp_path / "model")
    given = {"model": str(student_folder), "prompts": str(prompt_file), "num_samples": 1}
    main(settings(out=str(tmp_path / "finished"), **given))
    with pytest.raises(ConfigError, match="another --out|a new or empty folder"):
        main(settings(out=str(tmp_path / name) if name else "", **given))
    assert not (tmp_path / "model/manifest.json").exists()


@pytest.mark.parametrize("changes", [{"temperature": float("nan")}, {"kl_k": 0}, {"top_p": 0.0}])
def test_settings_out_of_range(changes):
    with pytest.raises(ConfigError, match=f"{next(iter(changes))}: found"):
        settings(**changes)
