"""Graders: they extract the answer from a text and compare it with the expected one."""

import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

from lopd.data.prompts import Prompt
from lopd.data.shapes import BOXED, last_boxed
from lopd.errors import ConfigError, DataError

LOG = logging.getLogger(__name__)

# Takes the text and the expected answer; returns the extracted answer (None if the text has
# none) and whether it is correct.
Grader = Callable[[str, str], tuple[str | None, bool]]
# Takes a prompt whose expected answer no answer can equal, and why.
Refuse = Callable[[Prompt, DataError], None]


def refuse_first(prompt: Prompt, error: DataError) -> None:
    """The `Refuse` that raises the error."""
    raise error


def exact_grader(
    pattern: str, prompts: Sequence[Prompt] = (), refuse: Refuse = refuse_first
) -> Grader:
    """Compare as strings, ignoring surrounding white space.

    Args:
        pattern: regular expression with one group; the group of its last match is the answer.
        prompts: their expected answers are checked, and numbers with a second spelling counted
            on stderr.
        refuse: is given the prompts whose expected answer the group can never be; raises by
            default.
    """
    compiled = re.compile(pattern)
    group = _group_of(pattern)
    for prompt in prompts:
        expected = str(prompt.answer).strip()
        boxed = last_boxed(expected)
        if boxed is not None and expected != f"{BOXED}{boxed}}}":
            error = DataError(
                f"prompt '{prompt.id}': found a solution as answer, {_brief(expected)}, with "
                f"\\boxed{{{boxed}}}; expected the final answer alone; write it so, or use "
                "--judge math"
            )
            refuse(prompt, error)
            continue
        if group is None or _can_be(group, expected):
            continue
        found = compiled.findall(expected)
        instead = f", but {found[-1].strip()!r} inside it" if found else ""
        error = DataError(
            f"prompt '{prompt.id}': answer_regex never finds the answer {_brief(expected)}"
            f"{instead}, so every answer would count as wrong; expected what its group can match: "
            "write the final answer alone, change --answer-regex, or use --judge math"
        )
        refuse(prompt, error)
    spelled = [prompt for prompt in prompts if _has_other_spelling(str(prompt.answer))]
    if spelled:
        LOG.warning(
            f"judge: {len(spelled)} of {len(prompts)} expected answers are numbers that can be "
            f"written differently (first: {spelled[0].answer!r}, prompt '{spelled[0].id}'); exact "
            "compares text; --judge math compares values"
        )

    def grade(text: str, expected: str) -> tuple[str | None, bool]:
        matches = compiled.findall(text)
        answer = matches[-1].strip() if matches else None
        return answer, answer == expected.strip()

    return grade


def math_grader(prompts: Sequence[Prompt] = (), refuse: Refuse = refuse_first) -> Grader:
    r"""Compare as mathematics, with math-verify: 0.5 equals `\frac{1}{2}`, and 2 equals `x = 2`.

    The answer is the content of the last closed `\boxed{...}`. In a text without one,
    math-verify searches the whole text: it takes what follows "the answer is", or else the last
    formula or number. The expected answer is an expression, or a text with a `\boxed{...}`.

    Args:
        prompts: their expected answers are checked.
        refuse: is given the prompts whose expected answer math-verify cannot parse; raises by
            default.

    Raises:
        ConfigError: math-verify is not installed.
    """
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ConfigError(
            f"judge: math needs the package math-verify ({error}); pip install 'lopd[eval]'"
        ) from None

    def parse_expected(expected: str) -> list[Any]:
        boxed = last_boxed(expected)
        return parse(f"{BOXED}{expected if boxed is None else boxed}}}")

    for prompt in prompts:
        parsed = parse_expected(str(prompt.answer))
        if not parsed or not verify(parsed, parsed):
            found = (
                f"{_brief(str(prompt.answer))}, which does not equal itself"
                if parsed
                else repr(prompt.answer)
            )
            what = f"prompt '{prompt.id}': found answer {found}; expected a formula or a number"
            refuse(prompt, DataError(f"{what}; fix it, or use --judge exact"))

    def grade(text: str, expected: str) -> tuple[str | None, bool]:
        boxed = last_boxed(text)
        parsed = parse(text if boxed is None else f"{BOXED}{boxed}}}")
        if not parsed:
            return boxed, False
        answer = str(parsed[-1]) if boxed is None else boxed
        return answer, bool(verify(parse_expected(expected), parsed))

    return grade


def _group_of(pattern: str) -> re.Pattern[str] | None:
    r"""The group of a regular expression as an expression; None if it depends on what follows it.

    >>> _group_of(r"####\s*(-?\d+)").pattern
    '-?\\d+'
    """
    start, depth, in_class, position = -1, 0, False, 0
    while position < len(pattern):
        char = pattern[position]
        if char == "\\":
            position += 1
        elif in_class:
            in_class = char != "]" or pattern[position - 1] == "["
        elif char == "[":
            in_class = True
        elif char == "(":
            is_group = pattern[position + 1 : position + 2] != "?" or pattern.startswith(
                "(?P<", position
            )
            if start < 0 and is_group:
                start, depth = position, 0
            depth += 1
        elif char == ")":
            depth -= 1
            if start >= 0 and depth == 0:
                break
        position += 1
    source = pattern[start + 1 : position].removeprefix("?P")
    source = re.sub(r"^<\w+>", "", source)
    if start < 0 or re.search(r"\(\?[=!<]|\(\?P=|\\[1-9bBAZ]|(?<!\[)\^|\$", source):
        return None
    try:
        return re.compile(source, re.compile(pattern).flags & ~re.UNICODE)
    except re.error:
        return None


def _can_be(group: re.Pattern[str], answer: str) -> bool:
    """Whether a group can match an answer, which is compared without surrounding white space."""
    return any(
        group.fullmatch(before + answer + after)
        for before in ("", " ")
        for after in ("", " ", "\n")
    )


def _has_other_spelling(answer: str) -> bool:
    """Whether an answer is a number such as 1,234 or 18.0, for which 1234 and 18 stand as well."""
    plain = re.fullmatch(r"[-+$]*(\d{1,3}(,\d{3})+|\d+)(\.\d+)?\s*%?", answer.strip())
    return (
        plain is not None and re.fullmatch(r"-?(0|[1-9]\d*)(\.\d*[1-9])?", answer.strip()) is None
    )


def _brief(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:28]} ... {text[-28:]}")
