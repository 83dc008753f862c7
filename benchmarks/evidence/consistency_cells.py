"""Cells of the part `consistency`: one pair of teachers, or one run of a student of one of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from benchmarks.evidence.frame import SEEDS, Cell, Row, Shared
from benchmarks.evidence.habits import Habits, fine_tuned, student, teacher
from lopd.stages import distill
from lopd.stages.demo.driver import DemoStage

SHORT, LONG = 200, 600  # steps
LISTS, SAMPLED, CALIBRATED = "lists", "sampled", "calibrated"
CONTROL = "fine-tuning"  # on answers of the teacher, instead of distillation
OBJECTIVES: dict[str, dict[str, Any]] = {
    LISTS: {},  # the default: lists of 8, and the tail
    SAMPLED: {"objective": "policy_gradient"},
    CALIBRATED: {"objective": "policy_gradient"},
}
PAIRS = (("A", "A"), ("A", "B"), ("B", "A"), ("B", "B"))
FROM_A = PAIRS[:2]  # one student, distilled from its own teacher and from the other
FROM_B = PAIRS[2:]
DOSES = ("same", "half")  # teachers of A's student, besides A and B


@dataclass(frozen=True)
class Start:
    """A student before it is distilled, and the disagreement of its teacher with another.

    `disagreement` is KL(its teacher || the other) in nat per token, on the answers of its teacher.
    """

    sft: str
    opd: str
    seed: int
    minutes: ClassVar[float] = 0.3  # most of it for the models

    @property
    def name(self) -> str:
        return f"start/{self.sft}-{self.opd}/seed{self.seed}"

    @property
    def results(self) -> Sequence[str]:
        """Only evaluations: the models are shared."""
        return [f"eval/{x}-{teacher(self.opd)}" for x in (teacher(self.sft), student(self.sft))]

    def measure(self, shared: Shared) -> Row:
        habits = Habits(shared.demo)
        teachers = habits.evaluate(habits.teacher(self.sft), self.opd)
        student = habits.evaluate(habits.student(self.sft), self.opd)
        setting = {"sft": self.sft, "opd": self.opd, "steps": 0}
        return {
            **setting,
            "disagreement": teachers["kl"],
            "teacher": teachers["sampled"],
            **student,
        }


@dataclass(frozen=True)
class Run:
    """The student of one teacher, distilled from a teacher."""

    sft: str
    opd: str
    objective: str
    live: bool
    steps: int
    seed: int

    @property
    def name(self) -> str:
        rollouts = "live" if self.live else "frozen"
        return f"{self.sft}-{self.opd}/{self.objective}/{rollouts}/{self.steps}/seed{self.seed}"

    @property
    def minutes(self) -> float:
        return 0.04 + self.steps * (0.002 if self.live else 0.0006)

    @property
    def folder(self) -> str:
        if self.objective == CONTROL:
            return fine_tuned(self.sft, self.opd, self.steps)
        return "habit-" + self.name.rsplit("/", 1)[0].replace("/", "-")

    @property
    def results(self) -> Sequence[str]:
        return [self.folder, f"eval/{self.folder}-{teacher(self.opd)}"]

    def measure(self, shared: Shared) -> Row:
        habits, demo = Habits(shared.demo), shared.demo
        setting: Row = {"sft": self.sft, "opd": self.opd, "objective": self.objective}
        setting |= {"live": self.live, "steps": self.steps}
        if self.objective == CONTROL:
            folder = habits.fine_tuned(self.sft, self.opd, self.steps)
            return {**setting, **habits.evaluate(folder, self.opd)}
        scores = habits.calibrated if self.objective == CALIBRATED else habits.cache
        live = {"refresh_every": 1, "teacher": demo.path(habits.teacher(self.opd))}
        config = replace(
            shared.distillation.config,
            student=demo.path(habits.student(self.sft)),
            cache=scores(self.sft, self.opd),
            out=demo.path(self.folder),
            max_steps=self.steps,
            allow_teacher_mismatch=self.sft != self.opd and self.objective != CALIBRATED,
            **OBJECTIVES[self.objective],
            **(live if self.live else {}),
        )
        DemoStage(self.name, self.folder, distill, config).run()
        return {**setting, **habits.evaluate(self.folder, self.opd)}


def of_seed(seed: int) -> Iterator[Cell]:
    """The cells of one seed; those that say most come first."""

    def runs(
        pairs: Sequence[tuple[str, str]], objective: str, *steps: int, live: bool = False
    ) -> Iterator[Cell]:
        for each in steps:
            for pair in pairs:
                yield Run(*pair, objective, live, each, seed)

    for pair in FROM_A:
        yield Start(*pair, seed)
    yield from runs(FROM_A, LISTS, SHORT, LONG)
    yield from runs(FROM_A, LISTS, SHORT, live=True)
    for dose in DOSES:
        yield Start("A", dose, seed)
        yield from runs([("A", dose)], LISTS, SHORT, LONG)
    yield from runs(FROM_A, CONTROL, SHORT, LONG)
    yield from runs(FROM_A, LISTS, LONG, live=True)
    for pair in FROM_B:
        yield Start(*pair, seed)
    yield from runs(FROM_B, LISTS, SHORT, LONG)
    yield from runs(FROM_B, LISTS, SHORT, LONG, live=True)
    yield from runs(FROM_A, SAMPLED, SHORT, LONG)
    yield from runs([("A", "B")], CALIBRATED, SHORT, LONG)
    yield from runs(FROM_A, SAMPLED, SHORT, live=True)


def cells() -> Sequence[Cell]:
    """All cells, seed by seed."""
    return [cell for seed in SEEDS for cell in of_seed(seed)]
