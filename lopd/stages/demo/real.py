"""The demo on a real model: SmolLM2-135M-Instruct teaches a student with fewer layers."""

import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from lopd.stages.demo.driver import Demo, DemoStage, Task
from lopd.stages.demo.figure import Titles
from lopd.stages.demo.questions import ANSWER_REGEX, split_questions, write_questions
from lopd.stages.demo.report import (
    FINE_TUNED,
    IN_WORDS,
    MORE_SFT,
    SAMPLED,
    format_examples,
    real_conclusion,
)
from lopd.stages.demo.smollm2 import find_gguf, load_gguf, save, sharpen, write_pruned

TOP_K = 64
DISTILLED = f"distilled, top-{TOP_K} + tail"
UNBIASED = f"distilled, top-{TOP_K}, unbiased"
ONLINE = f"online, live teacher, top-{TOP_K}"
# At temperature 1 the model rambles; its card samples at 0.2.
TEMPERATURE = 0.5
LAYERS = 30
# The one of benchmarks/results/prunings.jsonl that is nearest to the teacher after fine-tuning.
DROPPED = tuple(range(14, 20))
SFT_STEPS, OPD_STEPS = 108, 72
QUICK_SFT_STEPS, QUICK_OPD_STEPS = 24, 12
CPU = {"dtype": "float32", "device": "cpu"}
SHOWN = ("teacher", "sft", "distill", "more-sft")  # folders of models whose answers are printed
EXAMPLES = 4  # questions whose answers are printed


TASK = Task(
    name="smollm2",
    sets={"eval": 96, "sft": 288, "opd": 192},
    costs={  # planned for two quiet cores, evaluations included
        "teacher's answers": 45,
        "fine-tuning": 220,
        "student's rollouts": 30,
        "teacher's scores": 20,
        "held-out rollouts": 15,
        "held-out scores": 10,
        "teacher": 40,
        FINE_TUNED: 40,
        DISTILLED: 190,
        UNBIASED: 190,
        SAMPLED: 190,
        "control: answers": 35,
        MORE_SFT: 190,
        ONLINE: 500,
    },
    titles=Titles(
        "Share of right answers",
        "KL to the teacher",
        IN_WORDS
        | {
            DISTILLED: f"distilled on the teacher's\n{TOP_K} most probable tokens",
            UNBIASED: "the same, all others\ncorrected without bias",
            ONLINE: "distilled with the\nteacher running",
        },
    ),
    curves={DISTILLED: "distill", ONLINE: "online"},
    live=ONLINE,
    note="Right answers to new questions. KL to the teacher: nat per token, on the model's own new "
    "answers, and (held-out) on answers of the fine-tuned student to the same questions. All with "
    "95 % intervals. All models below the fine-tuned student took equally many steps from there.",
    steps=OPD_STEPS,
    common={
        "batch_size": 8,
        "warmup_steps": 4,
        "lr_scheduler_type": "cosine_with_min_lr",
        "min_lr_ratio": 0.1,
        "log_every": 4,
        "save_every": 0,
        **CPU,
    },
    sft={"max_steps": SFT_STEPS, "learning_rate": 2e-4},
    opd={"max_steps": OPD_STEPS, "learning_rate": 1e-4, "weight_decay": 0.0},
    sampling={"max_new_tokens": 32, "batch_size": 64, **CPU},
    scoring={"k": TOP_K, "top_p": 1.0, "tokens_per_batch": 4096, **CPU},
    evaluation={
        "num_samples": 1,
        "kl_k": 256,
        "tokens_per_batch": 4096,
        "answer_regex": ANSWER_REGEX,
    },
    held_out="held-out",
)


QUICK = replace(
    TASK,
    sets={"eval": 24, "sft": 96, "opd": 48},
    steps=QUICK_OPD_STEPS,
    common={**TASK.common, "batch_size": 4},
    sft={**TASK.sft, "max_steps": QUICK_SFT_STEPS},
    opd={**TASK.opd, "max_steps": QUICK_OPD_STEPS},
)


class RealDemo(Demo):
    """Short questions (`lopd.stages.demo.questions`) to a chat model and a pruned student."""

    task = TASK
    dropped: ClassVar[Collection[int]] = DROPPED  # layers of the teacher that the student lacks

    def write_prompts(self) -> dict[str, Path]:
        """Questions of all sets, which do not overlap."""
        sets = split_questions(self.task.sets, self.seed)
        return {
            name: write_questions(self.out / "prompts" / f"{name}.jsonl", pairs)
            for name, pairs in sets.items()
        }

    def load_teacher(self) -> tuple[Any, Any]:
        """Model and tokenizer of the teacher."""
        return load_gguf(find_gguf())

    def write_models(self) -> None:
        """The teacher, and the student before it is fine-tuned."""
        self.build("teacher", self._write_teacher)
        self.build("student-init", self._write_student)

    def _write_teacher(self, folder: Path) -> None:
        model, tokenizer = self.load_teacher()
        sharpen(model, TEMPERATURE)
        save(folder, model, tokenizer)

    def _write_student(self, folder: Path) -> None:
        write_pruned(self.out / "teacher", folder, self.dropped)

    def stages(self, online: bool) -> list[DemoStage]:
        """The teacher's answers first, then the student, then what becomes of it."""
        student: dict[str, Any] = {
            "model": self.path("student-init"),
            "data": self.path("sft-data"),
        }
        more: dict[str, Any] = {"model": self.path("sft"), "data": self.path("more-data")}
        stages = [
            self.answers("teacher's answers", "sft-data", "sft"),
            self.training("fine-tuning", "sft", measured=False, **student, **self.task.sft),
            self.rollouts("student's rollouts", "rollouts", "opd"),
            self.scores("teacher's scores", "cache", "rollouts"),
            self.rollouts("held-out rollouts", "held-out-rollouts", "eval"),
            self.scores("held-out scores", "held-out", "held-out-rollouts"),
            DemoStage("teacher", "teacher", measured=True),
            DemoStage(FINE_TUNED, "sft", measured=True),  # once there are held-out answers
            self.distillation(DISTILLED, "distill"),
            self.distillation(UNBIASED, "distill-unbiased", tail="unbiased"),
            self.distillation(SAMPLED, "distill-sampled", objective="policy_gradient"),
            self.answers("control: answers", "more-data", "opd"),
            self.training(MORE_SFT, "more-sft", **more, **self.task.opd),
        ]
        if online:
            live = {"refresh_every": 1, "teacher": self.path("teacher")}
            stages.append(self.distillation(ONLINE, "online", **live))
        return stages

    def examples(self) -> str:
        """Some questions with the greedy answers of the models in `SHOWN`."""
        answers = {name: self.answers_of(name) for name in SHOWN}
        lines = self.prompts["eval"].read_text(encoding="utf-8").splitlines()
        asked = [json.loads(line)["messages"][-1]["content"] for line in lines]
        return format_examples(asked, answers, EXAMPLES)

    def conclusion(self, rows: list[dict[str, Any]]) -> str:
        """What the runs reached, from where."""
        return real_conclusion(rows, self.task.steps)


class QuickRealDemo(RealDemo):
    """The same with a twelfth of the training, for a look at every part."""

    task = QUICK
