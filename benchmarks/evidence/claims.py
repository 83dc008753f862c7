"""The claims of the Lightning OPD paper against the committed rows: `docs/evidence.md`.

`python -m benchmarks.readme` writes the table. Each number comes from rows that a command beside it
measures again; an interval is 95 % over seeds, paired, by Student's t.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from benchmarks import demo_seeds, objectives, offline_live
from benchmarks.evidence import consistency, live
from benchmarks.evidence.consistency_cells import LISTS, LONG, SHORT
from benchmarks.evidence.consistency_tables import (
    SETTINGS,
    both_suffer,
    change,
    gap,
    irreducible,
)
from benchmarks.evidence.intervals import (
    FEWEST,
    IN_PART,
    NOT,
    REPRODUCED,
    UNKNOWN,
    Comparison,
    better,
    compare,
    equal,
    interval,
    shown,
    words,
)
from benchmarks.evidence.live import near, of
from benchmarks.evidence.live_cells import OBJECTIVES
from benchmarks.evidence.objective_tables import Runs
from lopd.stages.demo.report import CLIPPED, DISTILLED, FINE_TUNED, MORE_SFT, ONLINE, SAMPLED

FROZEN_SHORT, FROZEN_LONG, LIVE_SHORT, LIVE_LONG = SETTINGS[:4]
Read = Callable[[str], list[dict[str, Any]]]


def compared(rows: list[dict[str, Any]], ours: str, base: str) -> Comparison:
    """A stage of the demo against another, on the same seeds."""
    stages = demo_seeds.by_stage(rows)
    one, other = ({row["seed"]: row for row in stages[name]} for name in (ours, base))
    return compare(one, other)


def claims(read: Read) -> Iterable[tuple[str, str, str, str]]:
    """(claim, verdict, what was found, command) of each claim."""
    demo, renewed = read(demo_seeds.NAME), read(offline_live.NAME)
    again = "python -m benchmarks.demo_seeds"
    gap = compared(demo, DISTILLED, ONLINE)
    yield (
        "Offline training ends where training with a live teacher ends",
        equal(gap),
        f"lists of 8, against a live teacher: {words(gap)}",
        again,
    )
    every_step = next(row for row in renewed if row["every"] == 1)
    yield (
        "It costs a fourth of the live run",
        REPRODUCED if every_step["ratio"] >= 4 else IN_PART,
        f"a live run takes {every_step['ratio']:.2f} times as long as all of the offline run, and "
        f"{every_step['ratio_to_training']:.2f} times as long as its training alone; tiny models, "
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
    yield from mismatches(read(consistency.PART.file))
    yield from nearness(read(live.PART.file))
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


def mismatches(rows: list[dict[str, Any]]) -> Iterable[tuple[str, str, str, str]]:
    """The claims about a student of another teacher, from the rows of `consistency`."""
    again = "python -m benchmarks.evidence --part consistency"
    frozen, online = (gap(rows, "B", each) for each in (FROZEN_SHORT, LIVE_SHORT))
    claim = "With another teacher than that of the fine-tuning, offline and live runs end worse"
    if frozen is None or online is None:
        yield claim, UNKNOWN, "too few seeds", ""
    else:
        yield (
            claim,
            both_suffer(frozen, online),
            f"{SHORT} steps with lists, against its own student: offline {words(frozen)}; live "
            f"{words(online)}",
            again,
        )
    long, less = gap(rows, "B", FROZEN_LONG), change(rows, "B", LISTS, live=False)
    claim = "That error is irreducible: more training does not remove it"
    if long is None or less is None:
        yield claim, UNKNOWN, "too few seeds", ""
    else:
        found = f"{LONG} steps offline: {words(long)}; the ratio of KLs is "
        found += f"{shown(less, '.2f')} times that after {SHORT} steps"
        if (online := gap(rows, "B", LIVE_LONG)) is not None:
            found += f"; live: {words(online)}"
        yield claim, irreducible(long["kl"], less), found, again


def nearness(rows: list[dict[str, Any]]) -> Iterable[tuple[str, str, str, str]]:
    """The claim about drift, from the rows of `live`."""
    claim = "The student stays near the policy of its rollouts (their mean ratio is 0.94)"
    for objective in OBJECTIVES:
        name = f"{claim}: {objective}"
        if len(chosen := of(rows, objective)) < FEWEST:
            yield name, UNKNOWN, "too few seeds", ""
            continue
        drift = [row["drift"]["trained on"] for row in chosen]
        means = interval([each["mean"] for each in drift])
        within = interval([each["within a quarter"] for each in drift])
        yield (
            name,
            near(means, within),
            f"mean of p / r on the rollouts it was trained on: {shown(means, '.2f')}; tokens "
            f"within a quarter of 1: {shown(within, '.2f')}",
            "python -m benchmarks.evidence --part live",
        )


def table(read: Read) -> str:
    lines = ["| claim | here | found | measured by |", "| --- | --- | --- | --- |"]
    for claim, verdict, found, command in claims(read):
        lines.append(f"| {claim} | **{verdict}** | {found} | {f'`{command}`' if command else ''} |")
    return "\n".join(lines)
