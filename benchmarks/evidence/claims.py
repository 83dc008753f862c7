"""The claims of the Lightning OPD paper against the committed rows: `docs/evidence.md`.

`python -m benchmarks.readme` writes the table. Each number comes from rows that a command beside it
measures once more; an interval is 95 % over seeds, paired, by Student's t.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

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
    Interval,
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
from benchmarks.evidence.markdown import grid
from benchmarks.evidence.objective_cells import EXACT
from benchmarks.evidence.objective_cells import LISTS as LISTS_OF
from benchmarks.evidence.objective_tables import Runs
from benchmarks.evidence.rates import tried
from lopd.stages.demo.report import CLIPPED, DISTILLED, FINE_TUNED, MORE_SFT, ONLINE, SAMPLED
from lopd.stages.demo.toy import OPD_STEPS

FROZEN_SHORT, FROZEN_LONG, LIVE_SHORT, LIVE_LONG = SETTINGS[:4]
DEMO = "python -m benchmarks.demo_seeds --again"
Read = Callable[[str], list[Row]]


def compared(rows: list[Row], ours: str, base: str) -> Comparison | None:
    """A stage of the demo against another, on the same seeds."""
    stages = demo_seeds.by_stage(rows)
    one, other = ({row["seed"]: row for row in stages[name]} for name in (ours, base))
    return compare(one, other)


class Claim(NamedTuple):
    """A claim, the verdict on it, what was found, and the command that measures that again."""

    claim: str
    verdict: str
    found: str
    command: str


def claims(read: Read) -> Iterable[Claim]:
    """All claims, in the order of the table."""
    yield from against_live(read(demo_seeds.NAME), read(live.PART.file))
    yield from of_the_demo(read(demo_seeds.NAME))
    yield from tuned(read(sampled.PART.file))
    yield from on_the_real_model(read(real.PART.file))
    yield from mismatches(read(consistency.PART.file))
    yield from nearness(read(live.PART.file))
    yield from beyond()
    yield from shorter(read(objectives.PART.file))


def against_live(demo: list[Row], rows: list[Row]) -> Iterable[Claim]:
    """The claims about offline training and a live teacher."""
    claim = "Offline training ends as accurate as training with a live teacher"
    ended = compared(demo, DISTILLED, ONLINE)
    yield Claim(claim, equal(ended), f"lists of 8, {OPD_STEPS} steps: {words(ended)}", DEMO)
    for objective in OBJECTIVES:
        ended = ends(rows, objective, "offline", "live")
        command = live.PART.again(f"{objective}/*")
        yield Claim(f"{claim}: {objective}, {STEPS} steps", equal(ended), words(ended), command)
    cost = times(rows, LISTS, "processor")
    said = f"a live run takes {shown(cost, '.2f')} times the CPU seconds of the whole offline run; "
    said += "tiny models, decoding on a CPU"
    command = live.PART.again(f"{LISTS}/*")
    yield Claim("It costs a fourth of the live run", cheaper(cost, 4.0), said, command)


def of_the_demo(rows: list[Row]) -> Iterable[Claim]:
    """The claims that the demo's own runs decide, at the demo's learning rate."""
    token, clipped = (compared(rows, each, ONLINE) for each in (SAMPLED, CLIPPED))
    yield Claim(
        "The teacher's log-prob of the sampled token is enough",
        no_worse(token),
        f"sampled token, against a live teacher with lists: {words(token)}; with the advantage "
        f"clipped to 1: {words(clipped)}",
        DEMO,
    )
    start, control = (compared(rows, DISTILLED, each) for each in (FINE_TUNED, MORE_SFT))
    said = f"lists of 8, against the start: {words(start)}"
    yield Claim("It improves on fine-tuning", better(start), said, DEMO)
    claim = "It improves on as many steps of more fine-tuning (the fair control)"
    yield Claim(claim, better(control), f"lists of 8, against the control: {words(control)}", DEMO)


def tuned(rows: list[Row]) -> Iterable[Claim]:
    """The claims about objectives, each at the best of its own learning rates."""
    for arm, more in (("sampled", ""), ("clipped", ", with its advantage clipped to 1")):
        ended = sampled.against(rows, arm, sampled.LISTS)
        yield Claim(
            f"The sampled token is enough{more}, each objective at its best learning rate",
            no_worse(ended),
            f"against lists, {sampled.STEPS[-1]} steps offline: {words(ended)}",
            sampled.PART.again(f"{sampled.LISTS}/*", f"{arm}/*"),
        )
    ended = sampled.against(rows, sampled.LISTS, sampled.CONTROL)
    yield Claim(
        "It improves on the fair control, each at its best learning rate",
        better(ended),
        f"lists of 8, against the control: {words(ended)}",
        sampled.PART.again(f"{sampled.LISTS}/*", f"{sampled.CONTROL}/*"),
    )


def on_the_real_model(rows: list[Row]) -> Iterable[Claim]:
    """The claims that the runs on SmolLM2-135M can test, each run at the best of its rates."""
    for claim, arm, base, verdict in (
        ("It improves on the fair control", real.LISTS, real.CONTROL, better),
        ("The sampled token is enough: against lists", real.TOKEN, real.LISTS, no_worse),
        ("The sampled token improves on the fair control", real.TOKEN, real.CONTROL, better),
    ):
        ended = real.against(rows, arm, base)
        rates = [tried(curves) for curves in real.alike(rows, arm, base).values()]
        best_of = ", against the best of ".join(rates)
        said = f"at the best of {best_of} times the demo's rate: {words(ended)}"
        command = real.PART.again(f"{arm}/*", f"{base}/*")
        yield Claim(
            f"{claim}, SmolLM2-135M", verdict(ended), said if rates else words(ended), command
        )
    ended = real.against(rows, real.LISTS, real.LIVE, real.ENDS)
    claim = "Offline training ends as accurate as training with a live teacher: lists, SmolLM2-135M"
    yield Claim(claim, equal(ended), words(ended), real.PART.again(f"{real.LIVE}/*"))


def mismatches(rows: list[Row]) -> Iterable[Claim]:
    """The claims about optima and other teachers, from the rows of `consistency`."""
    again = consistency.PART.again
    ended = compare(*(found(rows, "A", "A", each) for each in (FROZEN_LONG, LIVE_LONG)))
    yield Claim(
        "Offline and live training have the same optimum, the teacher",
        equal(ended),
        f"{LONG} steps, offline against live: {words(ended)}",
        again(f"A-A/{LISTS}/*/{LONG}/*"),
    )
    offline, with_live = (against_both(rows, each) for each in (FROZEN_SHORT, LIVE_SHORT))
    yield Claim(
        "With another teacher than that of the fine-tuning, offline and live runs end worse",
        suffers(rows, FROZEN_SHORT, LIVE_SHORT),
        f"{SHORT} steps, offline, {offline}; live, {with_live}",
        again(*(f"{pair}/{LISTS}/*/{SHORT}/*" for pair in ("A-A", "?-B"))),
    )
    claim = "That error is irreducible: more training does not remove it"
    for short, long in ((FROZEN_SHORT, FROZEN_LONG), (LIVE_SHORT, LIVE_LONG)):
        falls, rollouts = change(rows, LISTS, live=long.live), "live" if long.live else "offline"
        yield Claim(
            f"{claim}: {rollouts}",
            irreducible(suffers(rows, long), falls),
            f"{LONG} steps, {against_both(rows, long)}; its KL is {shown(falls, '.2f')} times "
            f"that after {SHORT} steps",
            again(f"A-A/{long.path}/*", f"?-B/{long.path}/*", f"A-B/{short.path}/*"),
        )


def against_both(rows: list[Row], setting: Setting) -> str:
    """A's student distilled from B against both bases, in words."""
    own, other = (words(gap(rows, name, setting)) for name in ("A", "B"))
    return f"against A's student of A: {own}; against B's student of B: {other}"


def nearness(rows: list[Row]) -> Iterable[Claim]:
    """The claim about drift, from the rows of `live`."""
    claim = "The student stays near the policy of its rollouts (mean ratio of tokens: 0.94)"
    for objective in OBJECTIVES:
        drift = [row["drift"]["trained on"] for row in of(rows, objective)]
        means, within, ess = (
            interval([each[key] for each in drift]) for key in ("mean", "within a quarter", "ess")
        )
        yield Claim(
            f"{claim}: {objective}",
            near(means, within, ess),
            f"mean of p / r on the rollouts it was trained on: {shown(means, '.2f')}; tokens "
            f"within a quarter of 1: {shown(share(within), '.2f')}; effective share of the tokens, "
            f"by these ratios: {shown(share(ess), '.2f')}",
            live.PART.again(f"{objective}/*"),
        )


def share(found: Interval | None) -> Interval | None:
    """An interval of a share, which is between 0 and 1."""
    return None if found is None else (found[0], max(found[1], 0.0), min(found[2], 1.0))


def beyond() -> Iterable[Claim]:
    """The claims that tiny models cannot decide."""
    yield Claim(
        "Offline training matches live training on AIME, HMMT and LiveCodeBench at 4B and 8B",
        UNTESTABLE,
        "it takes models of that size, and days of GPUs",
        "",
    )
    yield Claim(
        "It trains a 30B mixture of experts where a live run does not fit into 8 GPUs",
        UNTESTABLE,
        "it takes that model; `lopd plan` says what a run needs",
        "",
    )


def shorter(rows: list[Row]) -> Iterable[Claim]:
    """Our claim about short lists, from the rows of `benchmarks.objectives`."""
    runs = Runs(rows)
    short, long = (runs.complete(EXACT, k, 1.0) for k in (LISTS_OF[0], LISTS_OF[-1]))
    lists = None if short is None or long is None else compare(short, long)
    yield Claim(
        "(ours) A few ids of each list carry most of what the teacher says",
        equal(lists),
        f"lists of {LISTS_OF[0]}, against lists of {LISTS_OF[-1]}: {words(lists)}",
        objectives.PART.again(*(f"{EXACT}/k{k}/lr1/*" for k in (LISTS_OF[0], LISTS_OF[-1]))),
    )


def table(read: Read) -> str:
    """Markdown: every claim; of those without rows of enough seeds, that it has too few."""
    body = []
    for claim, verdict, said, command in claims(read):
        if verdict == UNKNOWN:
            said = f"fewer than {FEWEST} seeds so far"
            command = command.replace(" --again", "")  # measures the missing cells
        body.append([claim, f"**{verdict}**", said, f"`{command}`" if command else ""])
    return grid(["claim", "here", "found", "measured by"], body, words=4)
