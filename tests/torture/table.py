"""Counts of a campaign: fault, tried, survived, lost; and what is known of every loss."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Table:
    """Results of attacks by fault and stage.

    An attack is survived if the command, run again without the fault, ends with the bytes of an
    uninterrupted run, or is refused in one line with a remedy. Anything else is lost.
    """

    tried: Counter[tuple[str, str]] = field(default_factory=Counter)
    lost: list[tuple[str, str, str]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)  # fault, why

    def add(self, fault: str, stage: str, problem: str, detail: str = "") -> None:
        """Record an attack; `problem` is empty if it was survived."""
        self.tried[fault, stage] += 1
        if problem:
            self.lost.append((fault, stage, f"{problem} [{detail}]"))

    def rows(self) -> list[tuple[str, str, int, int, int]]:
        """Fault, stage, tried, survived, lost."""
        lost = Counter((fault, stage) for fault, stage, _ in self.lost)
        return [
            (fault, stage, count, count - lost[fault, stage], lost[fault, stage])
            for (fault, stage), count in self.tried.items()
        ]

    def markdown(self) -> str:
        """One line for each fault, over all stages."""
        totals: dict[str, list[int]] = {}
        for fault, _, *numbers in self.rows():
            totals[fault] = [
                a + b for a, b in zip(totals.get(fault, (0, 0, 0)), numbers, strict=True)
            ]
        lines = ["| fault | tried | survived | lost |", "| --- | ---: | ---: | ---: |"]
        lines += [f"| {name} | {a:,} | {b:,} | {c:,} |" for name, (a, b, c) in totals.items()]
        lines += [f"| {name} | skipped: {why} | | |" for name, why in self.skipped]
        return "\n".join(lines)
