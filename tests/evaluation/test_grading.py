"""Graders: which part of a text is the answer, and which answers are equal."""

import sys

import pytest

from lopd.config.evaluate import ANSWER_REGEX, EvalConfig
from lopd.data.prompts import Prompt
from lopd.errors import ConfigError, DataError
from lopd.evaluation.grading import exact_grader, last_boxed, math_grader


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{3}", "3"),
        (r"first \boxed{3}, no, \boxed{4}.", "4"),
        (r"\boxed{\frac{1}{2}} for \frac{1}{3}", r"\frac{1}{2}"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{3} and \boxed{4", "3"),
        (r"\boxed{}", ""),
        (r"\boxed{4", None),
        ("4", None),
    ],
)
def test_last_boxed_is_the_last_closed_box(text, content):
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    ("text", "expected", "is_correct"),
    [
        (r"so it is \boxed{\frac{1}{2}}.", "0.5", True),
        (r"so it is \boxed{0.5}", r"\frac{1}{2}", True),
        (r"\boxed{3}, no, it is \boxed{4}", "4", True),
        (r"\boxed{3}, no, it is \boxed{4}", "3", False),
        (r"\boxed{3} of the 5 apples", "3", True),
        (r"\boxed{3} of the 5 apples", "5", False),
        ("first 12, then 13", "13", True),
        ("first 12, then 13", "12", False),
        ("it is 1,000 in all", "1000", True),
        ("the answer is 3, of 5", "3", True),
        ("first 12, then $x = 13$", "13", True),
        (r"\boxed{x = 2}", "2", True),
        (r"\boxed{(x+1)^2}", "$x^2 + 2x + 1$", True),
        (r"\boxed{(x+1)^2}", "x^2 + x + 1", False),
        (r"\boxed{7}", r"add them: \boxed{7}", True),
        (r"\boxed{}, not 7", "7", False),
        ("I do not know", "7", False),
    ],
)
def test_math_grader_compares_as_mathematics(text, expected, is_correct):
    answer, correct = math_grader()(text, expected)
    assert correct is is_correct
    assert (answer is None) == ("know" in text)
    assert answer == last_boxed(text) or r"\boxed" not in text


def test_exact_grader_compares_as_text():
    grade = exact_grader(r"#(\S+)")
    assert grade("#0.50 #0.5", " 0.5 ") == ("0.5", True)
    assert grade("#0.50", "0.5") == ("0.50", False)
    assert grade("0.5", "0.5") == (None, False)


@pytest.mark.parametrize("answer", ["", " ", " $$ ", r"\boxed{}"])
def test_expected_answer_that_is_no_mathematics_is_refused(answer):
    prompts = [Prompt("good", [1], "3"), Prompt("bad", [1], answer)]
    with pytest.raises(DataError, match="prompt 'bad': found answer .* use --judge exact"):
        math_grader(prompts)


def test_missing_math_verify_is_named_with_its_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ConfigError, match=r"math-verify .*pip install 'lopd\[eval\]'"):
        EvalConfig(model="m", prompts="p", out="o", judge="math", device="cpu")


@pytest.mark.parametrize(
    ("pattern", "answer", "message"),
    [
        (ANSWER_REGEX, "5", None),
        (ANSWER_REGEX, r"\boxed{5}", None),
        (ANSWER_REGEX, "3 # 5", "never finds the answer '3 # 5', but '5' inside it"),
        (ANSWER_REGEX, "a\nb", "never finds the answer"),
        (ANSWER_REGEX, r"so \boxed{5}.", "found a solution as answer.*--judge math"),
        (r"answer: (-?\d+)", "-5", None),
        (r"(?i)the (?:final )?answer is\s+(?P<a>[)\w]+)", "X)", None),
        (r"(-?\d+)", "18.0", "never finds the answer '18.0', but '0' inside it"),
        (r"(-?\d+)", "five", "never finds the answer 'five', so every answer"),
        (r"(\d+(?=\.))", "5", None),  # the group depends on what follows it
        (r"\\\((\d)\)", "7", None),
    ],
)
def test_expected_answer_that_the_regex_never_finds_is_refused(pattern, answer, message):
    prompts = [Prompt("good", [1], "7"), Prompt("other", [1], answer)]
    if message is None:
        exact_grader(pattern, prompts[1:])
    else:
        with pytest.raises(DataError, match=f"prompt 'other': .*{message}"):
            exact_grader(pattern, prompts)


def test_numbers_with_a_second_spelling_are_counted(capsys):
    answers = ["18", "0.5", "-3", "x", "1,234", "18.0", "$5", "50%", "05"]
    exact_grader(ANSWER_REGEX, [Prompt(answer, [1], answer) for answer in answers])
    assert "5 of 9 expected answers are numbers" in capsys.readouterr().err
