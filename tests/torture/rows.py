"""Rows of a campaign: a JSON line for each attack, so that one that was stopped can go on."""

import json
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

from torture.table import Table

ROOT = Path(__file__).parents[2]
KILL = "SIGKILL at a random moment"


def commit() -> str:
    """The version of the code under attack; marked if files differ from it."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return (git("rev-parse", "--short=10", "HEAD") or "unknown") + ("+" if changed else "")


class Rows:
    """The rows in `file`, which need not exist yet; None keeps them in memory."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.rows: list[dict[str, Any]] = []
        if file is not None and file.exists():
            self.rows = [json.loads(line) for line in file.read_text().splitlines()]
        self.done = {row["attack"] for row in self.rows}

    def add(self, attack: str, version: str, found: Table, first: int) -> None:
        """Append what an attack added to the table after its first `first` entries."""
        for fault, stage, problem in found.entries[first:]:
            row = {"attack": attack, "commit": version, "fault": fault, "stage": stage}
            if problem:
                row["lost"] = re.sub(r"(?<!\S)/\S*/", "", problem)  # no folders of this machine
            self.rows.append(row)
            if self.file is not None:
                with self.file.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(row) + "\n")
        self.done.add(attack)

    def markdown(self, skipped: Table) -> str:
        """The versions attacked, the table of faults, and the kills of each command."""
        table, kills = Table(skipped=skipped.skipped), Table()
        for row in self.rows:
            table.add(_family(row["fault"]), row["stage"], row.get("lost", ""))
            if row["fault"] == KILL:
                kills.add(row["stage"], row["stage"], row.get("lost", ""))
        versions = Counter(row["commit"] for row in self.rows)
        counted = ", ".join(f"`{name}` ({count:,})" for name, count in versions.items())
        by_command = kills.markdown("command")
        return f"Attacks by commit: {counted}.\n\n{table.markdown()}\n\n{by_command}"


def _family(fault: str) -> str:
    """One name for the flips in all files of a checkpoint."""
    return fault.partition(":")[0]
