"""Counts of a campaign: fault, tried, survived, lost; and what is known of every loss."""

from dataclasses import dataclass, field


@dataclass
class Table:
    """Results of attacks by fault.

    An attack is survived if the command, run again without the fault, ends with the bytes of an
    uninterrupted run, or is refused in one line with a remedy. Anything else is lost.
    """

    entries: list[tuple[str, str, str]] = field(default_factory=list)  # fault, stage, problem
    skipped: list[tuple[str, str]] = field(default_factory=list)  # fault, why

    def add(self, fault: str, stage: str, problem: str, detail: str = "") -> None:
        """Record an attack; `problem` is empty if it was survived."""
        self.entries.append((fault, stage, f"{problem} [{detail}]" if problem else ""))

    @property
    def lost(self) -> list[tuple[str, str, str]]:
        """The entries that have a problem."""
        return [entry for entry in self.entries if entry[2]]

    def markdown(self, head: str = "fault") -> str:
        """One line for each fault, over all stages."""
        totals: dict[str, list[int]] = {}
        for fault, _, problem in self.entries:
            total = totals.setdefault(fault, [0, 0])
            total[0] += 1
            total[1] += bool(problem)
        lines = [f"| {head} | tried | survived | lost |", "| --- | ---: | ---: | ---: |"]
        lines += [f"| {name} | {a:,} | {a - b:,} | {b:,} |" for name, (a, b) in totals.items()]
        lines += [f"| {name} | skipped: {why} | | |" for name, why in self.skipped]
        return "\n".join(lines)
