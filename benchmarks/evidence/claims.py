"""The claims of the Lightning OPD paper against the committed rows: `docs/evidence.md`.

`python -m benchmarks.readme` writes the table. Each number comes from rows that a command beside it
measures again; an interval is 95 % over seeds, paired, by Student's t.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from benchmarks import demo_seeds, objectives, offline_live
from benchmarks.evidence.intervals import (
    IN_PART,
    NOT,
    REPRODUCED,
    UNKNOWN,
    Comparison,
    better,
    compare,
    equal,
    words,
)
from benchmarks.evidence.objective_tables import Runs
from lopd.stages.demo.report import CLIPPED, DISTILLED, FINE_TUNED, MORE_SFT, ONLINE, SAMPLED

Read = Callable[[str], list[dict[str, Any]]]


def compared(rows: list[dict[str, Any]], ours: str, base: str) -> Comparison:
    """A stage of the demo against another, on the same seeds."""
    stages = demo_seeds.by_stage(rows)
    one, other = ({row["seed"]: row for row in stages[name]} for name in (ours, base))
    return compare(one, other)


def claims(read: Read) -> Iterable[tuple[str, str, str, str]]:
    """(claim, verdict, what was found, command) of each claim."""
    demo, live = read(demo_seeds.NAME), read(offline_live.NAME)
    again = "python -m benchmarks.demo_seeds"
    gap = compared(demo, DISTILLED, ONLINE)
    yield (
        "Offline training ends where training with a live teacher ends",
        equal(gap),
        f"lists of 8, against a live teacher: {words(gap)}",
        again,
    )
    renewed = next(row for row in live if row["every"] == 1)
    yield (
        "It costs a fourth of the live run",
        REPRODUCED if renewed["ratio"] >= 4 else IN_PART,
        f"a live run takes {renewed['ratio']:.2f} times as long as all of the offline run, and "
        f"{renewed['ratio_to_training']:.2f} times as long as its training alone; tiny models, "
        "decoding on a CPU",
        "python -m benchmarks.offline_live",
    )
    sampled = compared(demo, SAMPLED, ONLINE)
    yield (
        "The teacher's log-prob of the sampled token is enough",
        NOT if sampled["kl"][1] > 1 else equal(sampled),
        f"sampled token, against a live teacher with lists: {words(sampled)}; with the advantage "
        f"clipped to 1: {words(compared(demo, CLIPPED, ONLINE))}",
        again,
    )
    start = compared(demo, DISTILLED, FINE_TUNED)
    yield (
        "It improves on fine-tuning",
        better(start),
        f"lists of 8, against the start: {words(start)}",
        again,
    )
    more = compared(demo, DISTILLED, MORE_SFT)
    yield (
        "It improves on as many steps of more fine-tuning (the fair control)",
        better(more),
        f"lists of 8, against the control: {words(more)}",
        again,
    )
    yield (
        "With another teacher than that of the fine-tuning, an irreducible error remains",
        UNKNOWN,
        "`lopd distill` refuses such a pair unless told otherwise",
        "",
    )
    runs = Runs(read(objectives.PART.file))
    short, long = (runs.complete("list+sampled", k, 1.0) for k in (2, 8))
    if short is not None and long is not None:
        lists = compare(short, long)
        yield (
            "(ours) A few ids of each list carry most of what the teacher says",
            equal(lists),
            f"lists of 2, against lists of 8: {words(lists)}",
            "python -m benchmarks.objectives",
        )


def table(read: Read) -> str:
    lines = ["| claim | here | found | measured by |", "| --- | --- | --- | --- |"]
    for claim, verdict, found, command in claims(read):
        lines.append(f"| {claim} | **{verdict}** | {found} | {f'`{command}`' if command else ''} |")
    return "\n".join(lines)
