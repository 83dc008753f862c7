"""Cells of the part `consistency`: one pair of teachers, or one run of a student of one of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from benchmarks.evidence.frame import SEEDS, Cell, Row, Shared
from benchmarks.evidence.habits import Habits
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
TO_B = (("A", "B"), ("B", "B"))  # the same target, from another and from its own student
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

    def measure(self, shared: Shared) -> Row:
        habits, demo = Habits(shared.demo), shared.demo
        setting: Row = {"sft": self.sft, "opd": self.opd, "objective": self.objective}
        setting |= {"live": self.live, "steps": self.steps}
        if self.objective == CONTROL:
            folder = habits.fine_tuned(self.sft, self.opd, self.steps)
            return {**setting, **habits.evaluate(folder, self.opd)}
        folder = "habit-" + self.name.rsplit("/", 1)[0].replace("/", "-")
        scores = habits.calibrated if self.objective == CALIBRATED else habits.cache
        live = {"refresh_every": 1, "teacher": demo.path(habits.teacher(self.opd))}
        config = replace(
            shared.distillation.config,
            student=demo.path(habits.student(self.sft)),
            cache=scores(self.sft, self.opd),
            out=demo.path(folder),
            max_steps=self.steps,
            allow_teacher_mismatch=self.sft != self.opd and self.objective != CALIBRATED,
            **OBJECTIVES[self.objective],
            **(live if self.live else {}),
        )
        DemoStage(self.name, folder, distill, config).run()
        return {**setting, **habits.evaluate(folder, self.opd)}


def of_seed(seed: int) -> Iterator[Cell]:
    """The cells of one seed."""
    for pair in PAIRS:
        yield Start(*pair, seed)
    for pair in PAIRS:
        yield Run(*pair, LISTS, False, SHORT, seed)
    for pair in TO_B:
        yield Run(*pair, LISTS, True, SHORT, seed)
    for pair in PAIRS:
        yield Run(*pair, LISTS, False, LONG, seed)
    for opd in DOSES:
        yield Start("A", opd, seed)
        for steps in (SHORT, LONG):
            yield Run("A", opd, LISTS, False, steps, seed)
    for steps in (SHORT, LONG):
        for pair in TO_B:
            yield Run(*pair, SAMPLED, False, steps, seed)
        yield Run("A", "B", CALIBRATED, False, steps, seed)
        yield Run("A", "B", CONTROL, False, steps, seed)
    for pair in TO_B:
        yield Run(*pair, LISTS, True, LONG, seed)
    for pair in PAIRS[:1] + PAIRS[2:3]:
        yield Run(*pair, LISTS, True, SHORT, seed)
    for pair in TO_B:
        yield Run(*pair, SAMPLED, True, SHORT, seed)


def cells() -> Sequence[Cell]:
    """All cells, seed by seed."""
    return [cell for seed in SEEDS for cell in of_seed(seed)]
