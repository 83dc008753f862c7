"""Graders: they extract the answer from a text and compare it with the expected one."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from lopd.data.prompts import Prompt
from lopd.errors import ConfigError, DataError

BOXED = r"\boxed{"

# Takes the text and the expected answer; returns the extracted answer (None if the text has
# none) and whether it is correct.
Grader = Callable[[str, str], tuple[str | None, bool]]


def exact_grader(pattern: str) -> Grader:
    """Compare as strings, ignoring surrounding white space.

    Args:
        pattern: regular expression with one group; the group of its last match is the answer.
    """
    compiled = re.compile(pattern)

    def grade(text: str, expected: str) -> tuple[str | None, bool]:
        matches = compiled.findall(text)
        answer = matches[-1].strip() if matches else None
        return answer, answer == expected.strip()

    return grade


def math_grader(prompts: Sequence[Prompt] = ()) -> Grader:
    r"""Compare as mathematics, with math-verify: 0.5 equals `\frac{1}{2}`, and 2 equals `x = 2`.

    The answer is the content of the last closed `\boxed{...}`. In a text without one,
    math-verify searches the whole text: it takes what follows "the answer is", or else the last
    formula or number. The expected answer is an expression, or a text with a `\boxed{...}`.

    Args:
        prompts: their expected answers are checked.

    Raises:
        ConfigError: math-verify is not installed.
        DataError: math-verify cannot parse the expected answer of a prompt.
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
        if not parse_expected(str(prompt.answer)):
            raise DataError(
                f"prompt '{prompt.id}': found answer {prompt.answer!r}; expected a formula or a "
                "number; fix it, or use --judge exact"
            )

    def grade(text: str, expected: str) -> tuple[str | None, bool]:
        boxed = last_boxed(text)
        parsed = parse(text if boxed is None else f"{BOXED}{boxed}}}")
        if not parsed:
            return boxed, False
        answer = str(parsed[-1]) if boxed is None else boxed
        return answer, bool(verify(parse_expected(expected), parsed))

    return grade


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` with balanced braces, or None."""
    start = len(text)
    while (start := text.rfind(BOXED, 0, start)) >= 0:
        depth, begin = 1, start + len(BOXED)
        for end in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[begin:end]
    return None
