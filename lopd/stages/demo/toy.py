"""The toy demo: a tiny teacher learns chain arithmetic, and a smaller student is distilled."""

from pathlib import Path
from typing import Any

from lopd.stages.demo.arithmetic import (
    MAX_NEW_TOKENS,
    STUDENT_SIZE,
    TEACHER_SIZE,
    sample_prompts,
    write_model,
)
from lopd.stages.demo.arithmetic import write_prompts as write_arithmetic
from lopd.stages.demo.driver import Demo, DemoStage, Task
from lopd.stages.demo.figure import Titles
from lopd.stages.demo.report import (
    CLIPPED,
    DISTILLED,
    FINE_TUNED,
    IN_WORDS,
    MORE_SFT,
    ONLINE,
    SAMPLED,
    toy_conclusion,
)

SFT_SETTINGS: dict[str, Any] = {
    "batch_size": 64,
    "learning_rate": 3e-3,
    "warmup_steps": 20,
    "weight_decay": 0.01,
}
OPD_STEPS = 400
OPD_SETTINGS: dict[str, Any] = {
    "max_steps": OPD_STEPS,
    "batch_size": 64,
    "learning_rate": 2e-3,
    "warmup_steps": 10,
    "weight_decay": 0.0,
}
COMMON: dict[str, Any] = {
    "adam_beta1": 0.9,
    "adam_beta2": 0.98,
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "cosine_with_min_lr",
    "min_lr_ratio": 0.1,
    "log_every": 10,
    "save_every": 0,
    "dtype": "float32",
    "device": "cpu",
}
TOP_K = 8
EVAL_PROMPTS = 1024
PROMPTS = {"eval": EVAL_PROMPTS, "demonstrations": 38400, "sft": 4000, "opd": 8000}
SFT_STEPS = {"teacher": 600, "student": 430}


TASK = Task(
    name="arithmetic",
    threads=1,  # the numbers must not depend on the number of cores
    sets=PROMPTS,
    costs={  # from benchmarks/results/demo_seeds.jsonl
        "teacher": 29,
        "teacher's answers": 2,
        FINE_TUNED: 17,
        "student's rollouts": 3,
        "teacher's scores": 3,
        DISTILLED: 19,
        SAMPLED: 18,
        CLIPPED: 18,
        "control: answers": 3,
        MORE_SFT: 14,
        ONLINE: 61,
    },
    titles=Titles("Accuracy rises to the teacher's", "The KL to the teacher falls", IN_WORDS),
    curves={DISTILLED: "distill", ONLINE: "online"},  # whose objective is the reverse KL
    live=ONLINE,
    note=f"Accuracies are over {EVAL_PROMPTS} new prompts. KL: nat per token, on the model's own "
    "new answers. Both with 95 % intervals. In training the KL stays higher on stored answers, "
    "which the student no longer gives.",
    steps=OPD_STEPS,
    common=COMMON,
    sft=SFT_SETTINGS,
    opd=OPD_SETTINGS,
    sampling={
        "max_new_tokens": MAX_NEW_TOKENS,
        "batch_size": 512,
        "dtype": "float32",
        "device": "cpu",
    },
    scoring={"k": TOP_K, "top_p": 1.0, "dtype": "float32", "device": "cpu"},
    evaluation={"num_samples": 1},
)


class ToyDemo(Demo):
    """Chain arithmetic (`lopd.stages.demo.arithmetic`) with two tiny models.

    The student is distilled with the sparse reverse KL (the default) and with the sampled-token
    objective, plain and with a clipped advantage.
    """

    task = TASK

    def write_prompts(self) -> dict[str, Path]:
        """Prompts of all sets, which do not overlap."""
        seen: set[str] = set()
        return {
            name: write_arithmetic(
                self.out / "prompts" / f"{name}.jsonl",
                sample_prompts(count, 1000 * self.seed + number, exclude=seen),
                completions=name == "demonstrations",
            )
            for number, (name, count) in enumerate(self.task.sets.items())
        }

    def write_models(self) -> None:
        """Two random models."""
        sizes = {"teacher-init": TEACHER_SIZE, "student-init": STUDENT_SIZE}
        for number, (name, size) in enumerate(sizes.items()):
            if not (self.out / name).exists():
                write_model(self.out / name, size, seed=10 * self.seed + number)

    def stages(self, online: bool) -> list[DemoStage]:
        """The teacher first, then its student, then what becomes of that."""
        demonstrations = str(self.prompts["demonstrations"])
        sampled: dict[str, Any] = {"objective": "policy_gradient"}
        teacher: dict[str, Any] = {"model": self.path("teacher-init"), "data": demonstrations}
        student: dict[str, Any] = {
            "model": self.path("student-init"),
            "data": self.path("sft-data"),
        }
        more: dict[str, Any] = {"model": self.path("sft"), "data": self.path("more-data")}
        stages = [
            self.training(
                "teacher", "teacher", **teacher, max_steps=SFT_STEPS["teacher"], **SFT_SETTINGS
            ),
            self.answers("teacher's answers", "sft-data", "sft"),
            self.training(
                FINE_TUNED, "sft", **student, max_steps=SFT_STEPS["student"], **SFT_SETTINGS
            ),
            self.rollouts("student's rollouts", "rollouts", "opd"),
            self.scores("teacher's scores", "cache", "rollouts"),
            self.distillation(DISTILLED, "distill"),
            self.distillation(SAMPLED, "distill-sampled", **sampled),
            self.distillation(CLIPPED, "distill-clipped", **sampled, advantage_clip=1.0),
            self.answers("control: answers", "more-data", "opd"),
            self.training(MORE_SFT, "more-sft", **more, **OPD_SETTINGS),
        ]
        if online:
            live = {"refresh_every": 1, "teacher": self.path("teacher")}
            stages.append(self.distillation(ONLINE, "online", **live))
        return stages

    def conclusion(self, rows: list[dict[str, Any]]) -> str:
        """What the runs reached, from where."""
        return toy_conclusion(rows, OPD_STEPS)
