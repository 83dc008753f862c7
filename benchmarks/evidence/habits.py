"""Teachers of one task who differ in a habit of writing, and students of each of them.

The long habit is that of the demo, `3+5=8;8*2=6;`; the short one leaves out the running value,
`+5=8;*2=6;`. The demo's teacher also learns the short one; each teacher here is that model, trained
a little further on demonstrations of which a share is long. So all know the same, and how far two
of them disagree is set by their shares.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.evidence.frame import Row
from lopd.config.calibrate import CalibrateConfig
from lopd.stages import calibrate, rollout, score, sft_data
from lopd.stages.demo.arithmetic import solve
from lopd.stages.demo.driver import Demo, DemoStage
from lopd.stages.demo.toy import OPD_SETTINGS, SFT_SETTINGS, TOP_K

BASE_STEPS, TUNING_STEPS, STUDENT_STEPS = 300, 100, 430
TUNING_RATE = 1e-3
# The share of long answers. `same`, `half` and B disagree with A more and more.
SHARES = {"A": 0.9, "B": 0.1, "same": 0.9, "half": 0.5}
DEMONSTRATIONS = TUNING_STEPS * SFT_SETTINGS["batch_size"]  # of a teacher; none is seen twice


def short(solution: str) -> str:
    """The short form of an answer.

    >>> short("3+5=8;8*2=6;#6")
    '+5=8;*2=6;#6'
    """
    return re.sub(r"\d([-+*])", r"\1", solution)


def teacher(name: str) -> str:
    """The folder of a teacher in the demo's."""
    return f"habit-{name}"


def student(name: str) -> str:
    """The folder of the student of a teacher."""
    return f"habit-student-{name}"


def fine_tuned(sft: str, opd: str, steps: int) -> str:
    """The folder of a student fine-tuned further, on answers of a teacher."""
    return f"habit-more-{sft}-{opd}-{steps}"


@dataclass(frozen=True)
class Habits:
    """Folders of one seed's teachers and students; each is made when it is first asked for."""

    demo: Demo

    def teacher(self, name: str) -> str:
        """The folder of a teacher, made if it is missing."""
        folder, number = teacher(name), list(SHARES).index(name)
        part = slice(number * DEMONSTRATIONS, (number + 1) * DEMONSTRATIONS)
        return self._train(
            folder,
            model=self.demo.path(self._base()),
            data=self._demonstrations(folder, SHARES[name], part),
            max_steps=TUNING_STEPS,
            **{**SFT_SETTINGS, "learning_rate": TUNING_RATE},
        )

    def student(self, name: str) -> str:
        """The folder of a student, fine-tuned on the answers of a teacher."""
        return self._train(
            student(name),
            model=self.demo.path("student-init"),
            data=self._answers(name, "sft"),
            max_steps=STUDENT_STEPS,
            **SFT_SETTINGS,
        )

    def fine_tuned(self, sft: str, opd: str, steps: int) -> str:
        """The folder of a student fine-tuned further, on answers of a teacher.

        The prompts, their number and the settings are those of the distillation.
        """
        return self._train(
            fine_tuned(sft, opd, steps),
            model=self.demo.path(self.student(sft)),
            data=self._answers(opd, "opd"),
            **{**OPD_SETTINGS, "max_steps": steps},
        )

    def cache(self, student: str, teacher: str) -> str:
        """The path of a teacher's scores of the answers of another's student."""
        rollouts = replace(
            self.demo.rollouts("", f"habit-rollouts-{student}", "opd").config,
            student=self.demo.path(self.student(student)),
        )
        DemoStage("", "", rollout, rollouts).run()
        scores = replace(
            self.demo.scores("", f"habit-cache-{student}-{teacher}", "").config,
            teacher=self.demo.path(self.teacher(teacher)),
            rollouts=rollouts.out,
            k=TOP_K,
        )
        DemoStage("", "", score, scores).run()
        return str(scores.out)

    def calibrated(self, student: str, teacher: str) -> str:
        """The path of the same scores, calibrated by `lopd calibrate`."""
        cache = self.cache(student, teacher)
        config = CalibrateConfig(cache=cache, out=f"{cache}-calibrated")
        calibrate.main(config)  # which finds what it has written
        return str(config.out)

    def evaluate(self, model: str, teacher: str) -> Row:
        """Accuracies, the KL to a teacher, and the share of long answers among the sampled ones."""
        found = self.demo.evaluate(model, self.teacher(teacher))
        folder = self.demo.out / "eval" / f"{model}-{self.teacher(teacher)}"
        texts = [text for sample, text in _answers(folder) if sample is not None]
        return {**found, "long": sum(text[:1].isdigit() for text in texts) / len(texts)}

    def _base(self) -> str:
        """The demo's teacher, taught to write half of its answers in each habit."""
        part = slice(BASE_STEPS * SFT_SETTINGS["batch_size"])
        return self._train(
            "habit-base",
            model=self.demo.path("teacher"),
            data=self._demonstrations("habit-base", 0.5, part),
            max_steps=BASE_STEPS,
            **SFT_SETTINGS,
        )

    def _train(self, folder: str, **settings: Any) -> str:
        self.demo.training("", folder, **settings).run()
        return folder

    def _answers(self, teacher: str, prompts: str) -> str:
        """The path of a teacher's answers to a set of the demo's prompts."""
        stage = self.demo.answers("", f"habit-answers-{teacher}-{prompts}", prompts)
        config = replace(stage.config, teacher=self.demo.path(self.teacher(teacher)))
        DemoStage("", "", sft_data, config).run()
        return str(config.out)

    def _demonstrations(self, name: str, share: float, part: slice) -> str:
        """Solved prompts of the demo, some of them in the short form.

        Written on every call, so that the training that reads them sees a change of the settings.
        """
        path, draw = self.demo.out / "prompts" / f"{name}.jsonl", random.Random(name)
        lines = self.demo.prompts["demonstrations"].read_text(encoding="utf-8").splitlines()[part]
        records = []
        for line in lines:
            prompt = json.loads(line)["prompt"]
            solution, _ = solve(prompt)
            text = solution if draw.random() < share else short(solution)
            records.append(json.dumps({"prompt": prompt, "completion": text}) + "\n")
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text("".join(records), encoding="utf-8")
        return str(unfinished.rename(path))


def _answers(folder: Path) -> Iterator[tuple[int | None, str]]:
    """(sample, text) of an evaluation's answers; the greedy ones have no sample."""
    for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        yield record["sample"], record["text"]
