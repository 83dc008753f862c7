"""Tables in Markdown."""

from collections.abc import Sequence


def grid(head: Sequence[str], body: Sequence[Sequence[str]], *, words: int = 1) -> str:
    """A table whose first columns are words, aligned left, and whose others are numbers.

    >>> print(grid(["run", "KL"], [["live", "0.1"]]))
    | run | KL |
    | --- | ---: |
    | live | 0.1 |
    """
    rule = ["---"] * words + ["---:"] * (len(head) - words)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *body))
