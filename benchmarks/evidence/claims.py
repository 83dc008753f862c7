"""The claims of the Lightning OPD paper against the committed rows: `docs/evidence.md`.

`python -m benchmarks.readme` writes the table. Each number comes from rows that a command beside it
measures again; an interval is 95 % over seeds, paired, by Student's t.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from benchmarks import demo_seeds, objectives
from benchmarks.evidence import consistency, live, real, sampled
from benchmarks.evidence.consistency_cells import LISTS, LONG, SHORT
from benchmarks.evidence.consistency_tables import (
    SETTINGS,
    Setting,
    change,
    found,
    gap,
    irreducible,
    suffers,
)
from benchmarks.evidence.frame import Row
from benchmarks.evidence.intervals import (
    FEWEST,
    UNKNOWN,
    UNTESTABLE,
    Comparison,
    better,
    compare,
    equal,
    interval,
    no_worse,
    shown,
    words,
)
from benchmarks.evidence.live import cheaper, ends, near, of, times
from benchmarks.evidence.live_cells import OBJECTIVES, STEPS
from benchmarks.evidence.objective_tables import Runs
from lopd.stages.demo.report import CLIPPED, DISTILLED, FINE_TUNED, MORE_SFT, ONLINE, SAMPLED
from lopd.stages.demo.toy import OPD_STEPS

FROZEN_SHORT, FROZEN_LONG, LIVE_SHORT, LIVE_LONG = SETTINGS[:4]
Read = Callable[[str], list[Row]]


def compared(rows: list[Row], ours: str, base: str) -> Comparison | None:
    """A stage of the demo against another, on the same seeds."""
    stages = demo_seeds.by_stage(rows)
    one, other = ({row["seed"]: row for row in stages[name]} for name in (ours, base))
    return compare(one, other)


def claims(read: Read) -> Iterable[tuple[str, str, str, str]]:
    """(claim, verdict, what was found, command) of each claim."""
    demo, again = read(demo_seeds.NAME), "python -m benchmarks.demo_seeds"
    yield from against_live(read)
    token = compared(demo, SAMPLED, ONLINE)
    yield (
        "The teacher's log-prob of the sampled token is enough",
        no_worse(token),
        f"sampled token, against a live teacher with lists: {words(token)}; with the advantage "
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
    yield from tuned(read)
    yield from on_the_real_model(read)
    yield from mismatches(read(consistency.PART.file))
    yield from nearness(read(live.PART.file))
    yield from beyond()
    runs = Runs(read(objectives.PART.file))
    short, long = (runs.complete("list+sampled", k, 1.0) for k in (2, 8))
    if short is not None and long is not None:
        lists = compare(short, long)
        yield (
            "(ours) A few ids of each list carry most of what the teacher says",
            equal(lists),
            f"lists of 2, against lists of 8: {words(lists)}",
            "python -m benchmarks.objectives --again --only 'list+sampled/k[28]/lr1/*'",
        )


def against_live(read: Read) -> Iterable[tuple[str, str, str, str]]:
    """The claims about offline training and a live teacher."""
    demo, rows = read(demo_seeds.NAME), read(live.PART.file)
    again = "python -m benchmarks.evidence --part live --again"
    claim = "Offline training ends where training with a live teacher ends"
    first = compared(demo, DISTILLED, ONLINE)
    yield (
        claim,
        equal(first),
        f"lists of 8, {OPD_STEPS} steps, against a live teacher: {words(first)}",
        "python -m benchmarks.demo_seeds",
    )
    for objective in OBJECTIVES:
        if (ended := ends(rows, objective, "offline", "live")) is not None:
            yield f"{claim}: {objective}, {STEPS} steps", equal(ended), words(ended), again
    claim = "It costs a fourth of the live run"
    cost = times(rows, LISTS, "processor")
    said = f"a live run takes {shown(cost, '.2f')} times the CPU seconds of the whole offline run; "
    said += "tiny models, decoding on a CPU"
    yield finding(claim, cheaper(cost, 4.0), said, again)


def tuned(read: Read) -> Iterable[tuple[str, str, str, str]]:
    """The claims about objectives, each at the best of its own learning rates."""
    rows, again = read(sampled.PART.file), "python -m benchmarks.evidence --part sampled --again"
    for arm, more in (("sampled", ""), ("clipped", ", with its advantage clipped to 1")):
        against_lists = sampled.against(rows, arm, sampled.LISTS)
        claim = f"The sampled token is enough{more}, each objective at its best learning rate"
        said = f"against lists, {sampled.STEPS[-1]} steps offline: {words(against_lists)}"
        yield finding(claim, no_worse(against_lists), said, again)
    control = sampled.against(rows, sampled.LISTS, sampled.CONTROL)
    claim = "It improves on the fair control, each at its best learning rate"
    said = f"lists of 8, against the control: {words(control)}"
    yield finding(claim, better(control), said, again)


def on_the_real_model(read: Read) -> Iterable[tuple[str, str, str, str]]:
    """The claims that the runs on SmolLM2-135M can test, each run at the best of its rates."""
    rows, again = read(real.PART.file), "python -m benchmarks.evidence --part real --again"
    for claim, arm, base, verdict in (
        ("It improves on the fair control", real.LISTS, real.CONTROL, better),
        ("The sampled token is enough: against lists", real.TOKEN, real.LISTS, no_worse),
        ("The sampled token improves on the fair control", real.TOKEN, real.CONTROL, better),
    ):
        compared = real.against(rows, arm, base)
        yield finding(f"{claim}, SmolLM2-135M", verdict(compared), words(compared), again)
    found = real.against(rows, real.LISTS, real.LIVE, real.ENDS)
    claim = "Offline training ends where training with a live teacher ends: lists, SmolLM2-135M"
    yield finding(claim, equal(found), words(found), again)


def mismatches(rows: list[Row]) -> Iterable[tuple[str, str, str, str]]:
    """The claims about optima and other teachers, from the rows of `consistency`."""
    again = "python -m benchmarks.evidence --part consistency --again"
    ended = compare(*(found(rows, "A", "A", each) for each in (FROZEN_LONG, LIVE_LONG)))
    claim = "Offline and live training have the same optimum, the teacher"
    said = f"{LONG} steps, offline against live: {words(ended)}"
    yield finding(claim, equal(ended), said, again)
    claim = "With another teacher than that of the fine-tuning, offline and live runs end worse"
    short, live_short = against_both(rows, FROZEN_SHORT), against_both(rows, LIVE_SHORT)
    said = f"{SHORT} steps, offline, {short}; live, {live_short}"
    yield finding(claim, suffers(rows, FROZEN_SHORT, LIVE_SHORT), said, again)
    falls = change(rows, LISTS, live=False)
    claim = "That error is irreducible: more training does not remove it"
    said = f"{LONG} steps, offline, {against_both(rows, FROZEN_LONG)}"
    if falls is not None:
        said += f"; its KL is {shown(falls, '.2f')} times that after {SHORT} steps"
    yield finding(claim, irreducible(suffers(rows, FROZEN_LONG), falls), said, again)


def against_both(rows: list[Row], setting: Setting) -> str:
    """A's student distilled from B against both bases, in words."""
    own, other = (words(gap(rows, name, setting)) for name in ("A", "B"))
    return f"against A's student of A: {own}; against B's student of B: {other}"


def finding(claim: str, verdict: str, said: str, command: str) -> tuple[str, str, str, str]:
    """A claim with its verdict, or that nothing is measured yet."""
    return too_few(claim) if verdict == UNKNOWN else (claim, verdict, said, command)


def too_few(claim: str) -> tuple[str, str, str, str]:
    """A claim whose cells have rows of too few seeds."""
    return claim, UNKNOWN, f"fewer than {FEWEST} seeds so far", ""


def nearness(rows: list[Row]) -> Iterable[tuple[str, str, str, str]]:
    """The claim about drift, from the rows of `live`."""
    claim = "The student stays near the policy of its rollouts (mean ratio of tokens: 0.94)"
    for objective in OBJECTIVES:
        drift = [row["drift"]["trained on"] for row in of(rows, objective)]
        means = interval([each["mean"] for each in drift])
        within = interval([each["within a quarter"] for each in drift])
        yield finding(
            f"{claim}: {objective}",
            near(means, within),
            f"mean of p / r on the rollouts it was trained on: {shown(means, '.2f')}; tokens "
            f"within a quarter of 1: {shown(within, '.2f')}",
            "python -m benchmarks.evidence --part live --again",
        )


def beyond() -> Iterable[tuple[str, str, str, str]]:
    """The claims that tiny models cannot decide."""
    yield (
        "Offline training matches live training on AIME, HMMT and LiveCodeBench at 4B and 8B",
        UNTESTABLE,
        "it takes models of that size, and days of GPUs",
        "",
    )
    yield (
        "It trains a 30B mixture of experts where a live run does not fit into 8 GPUs",
        UNTESTABLE,
        "it takes that model; `lopd plan` says what a run needs",
        "",
    )


def table(read: Read) -> str:
    lines = ["| claim | here | found | measured by |", "| --- | --- | --- | --- |"]
    for claim, verdict, said, command in claims(read):
        lines.append(f"| {claim} | **{verdict}** | {said} | {f'`{command}`' if command else ''} |")
    return "\n".join(lines)
