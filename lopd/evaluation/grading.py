"""Whether an answer is right: what in the text is the answer, and what equals what.

A judge takes the text and the expected answer and returns what it read and its verdict.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from lopd.data.prompts import Prompt
from lopd.errors import ConfigError, DataError

JUDGES = ("exact", "math")
BOXED = r"\boxed{"

Judge = Callable[[str, str], tuple[str | None, bool]]


def exact_judge(pattern: str) -> Judge:
    """The last match's one group, equal to the expected answer but for spaces around it."""
    compiled = re.compile(pattern)

    def judge(text: str, expected: str) -> tuple[str | None, bool]:
        found = compiled.findall(text)
        given = found[-1].strip() if found else None
        return given, given == expected.strip()

    return judge


def math_judge(prompts: Sequence[Prompt] = ()) -> Judge:
    r"""Mathematically equal, as math-verify judges it: 0.5 is `\frac{1}{2}`, and 2 is `x = 2`.

    The answer is what the text's last closed `\boxed{...}` holds; in a text without one, what
    math-verify finds in all of it: what follows "the answer is", else the last formula or
    number. The expected answer is an expression, or a text with a `\boxed{...}`.

    Raises:
        ConfigError: math-verify is not installed.
        DataError: the expected answer of one of `prompts` is nothing that it can read.
    """
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ConfigError(
            f"judge: math needs the package math-verify ({error}); pip install 'lopd[eval]'"
        ) from None

    def read(expected: str) -> list[Any]:
        inner = last_boxed(expected)
        return parse(f"{BOXED}{expected if inner is None else inner}}}")

    for prompt in prompts:
        if not read(str(prompt.answer)):
            raise DataError(
                f"prompt '{prompt.id}': its answer {prompt.answer!r} is no formula or number; "
                "mend it, or use --judge exact"
            )

    def judge(text: str, expected: str) -> tuple[str | None, bool]:
        inner = last_boxed(text)
        found = parse(text if inner is None else f"{BOXED}{inner}}}")
        if not found:
            return inner, False
        return str(found[-1]) if inner is None else inner, bool(verify(read(expected), found))

    return judge


def last_boxed(text: str) -> str | None:
    r"""What the last `\boxed{...}` that is closed holds, braces within it balanced."""
    start = len(text)
    while (start := text.rfind(BOXED, 0, start)) >= 0:
        depth, begin = 1, start + len(BOXED)
        for end in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[begin:end]
    return None
