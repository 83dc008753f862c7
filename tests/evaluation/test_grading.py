"""What is read as the answer, and what equals what."""

import sys

import pytest

from lopd.data.prompts import Prompt
from lopd.errors import ConfigError, DataError
from lopd.evaluation.grading import exact_judge, last_boxed, math_judge
from lopd.stages.evaluate import EvalConfig


@pytest.mark.parametrize(
    ("text", "inner"),
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
def test_the_last_closed_box(text, inner):
    assert last_boxed(text) == inner


@pytest.mark.parametrize(
    ("text", "expected", "right"),
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
def test_a_mathematical_answer(text, expected, right):
    given, verdict = math_judge()(text, expected)
    assert verdict is right
    assert (given is None) == ("know" in text)
    assert given == last_boxed(text) or r"\boxed" not in text


def test_the_exact_judge_wants_the_very_text():
    judge = exact_judge(r"#(\S+)")
    assert judge("#0.50 #0.5", " 0.5 ") == ("0.5", True)
    assert judge("#0.50", "0.5") == ("0.50", False)
    assert judge("0.5", "0.5") == (None, False)


@pytest.mark.parametrize("answer", ["", " ", " $$ ", r"\boxed{}"])
def test_an_expected_answer_that_nothing_can_equal_is_refused(answer):
    prompts = [Prompt("good", [1], "3"), Prompt("bad", [1], answer)]
    with pytest.raises(DataError, match="prompt 'bad': its answer .* use --judge exact"):
        math_judge(prompts)


def test_without_math_verify_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ConfigError, match=r"math-verify .*pip install 'lopd\[eval\]'"):
        EvalConfig(model="m", prompts="p", out="o", judge="math", device="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judge": "vibes"}, "judge: found 'vibes'; expected one of exact, math"),
        ({"judge": "math", "answer_regex": "(a)"}, "answer_regex: --judge math does not use it"),
    ],
)
def test_settings_that_do_not_fit(changes, message):
    with pytest.raises(ConfigError, match=message):
        EvalConfig(model="m", prompts="p", out="o", device="cpu", **changes)
