"""Stages of the demo with changed settings, for the cells of several parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from benchmarks.evidence.frame import Row, Shared
from lopd.stages.demo.driver import DemoStage
from lopd.stages.demo.report import MORE_SFT
from lopd.stages.demo.toy import TOP_K

NONE: Mapping[str, Any] = {}


def run(shared: Shared, name: str, folder: str, **changes: Any) -> str:
    """Run a stage of the demo, named as in its table, with changed settings.

    Args:
        shared: what the cells of the seed share.
        name: of the stage.
        folder: of the demo, for the result.
        **changes: settings of the stage that differ from the demo's.

    Returns:
        The path of the folder.
    """
    stage = next(each for each in shared.demo.stages(online=False) if each.name == name)
    config = replace(stage.config, out=shared.demo.path(folder), **changes)
    DemoStage(folder, folder, stage.module, config).run()
    return str(config.out)


def scored(
    shared: Shared,
    folder: str,
    *,
    student: str = "sft",
    sampling: Mapping[str, Any] = NONE,
    scoring: Mapping[str, Any] = NONE,
) -> str:
    """The path of the teacher's scores of rollouts of a student, with changed settings."""
    rollouts = shared.demo.path("rollouts")
    if student != "sft" or sampling:
        changes = {"student": shared.demo.path(student), **sampling}
        rollouts = run(shared, "student's rollouts", f"rollouts-{folder}", **changes)
    changes = {"rollouts": rollouts, "k": TOP_K, **scoring}
    return run(shared, "teacher's scores", f"cache-{folder}", **changes)


def more_fine_tuning(shared: Shared, folder: str, factor: float = 1.0, **changes: Any) -> str:
    """The path of the student after more fine-tuning on the teacher's answers to all prompts.

    This is the fair control: each step costs what a step of distillation costs, and the answers
    cost what rollouts cost.
    """
    run(shared, "control: answers", "more-data")
    rate = factor * shared.demo.task.opd["learning_rate"]
    return run(shared, MORE_SFT, folder, learning_rate=rate, **changes)


def quality(shared: Shared, folder: str) -> Row:
    """KL to the teacher and sampled pass@1 of a model of the demo."""
    found = shared.demo.evaluate(folder)
    return {"kl": found["kl"], "sampled": found["sampled"]}
