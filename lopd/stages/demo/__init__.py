"""The whole pipeline at toy scale, on a CPU (`lopd demo`).

A tiny teacher learns chain arithmetic (arithmetic.py). A smaller student is fine-tuned on its
answers and rolled out once, and its rollouts are scored once. From then on no teacher is needed:
the student is distilled with the sparse reverse KL (the default) and with the sampled-token
objective, plain and with a clipped advantage. As a control, the same student is fine-tuned for
as many steps on new answers of the teacher. `--online` adds a run that samples new rollouts and
scores them with a live teacher at each step.

All artefacts stay under `--out`, and the stage commands can be run on them.
"""

import importlib.util
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lopd.config.demo import DemoConfig
from lopd.config.distill import DistillConfig
from lopd.config.evaluate import EvalConfig
from lopd.config.rollout import RolloutConfig
from lopd.config.score import ScoreConfig
from lopd.config.sft import SftConfig
from lopd.config.sft_data import SftDataConfig
from lopd.engines.progress import duration
from lopd.errors import ConfigError, DataError
from lopd.provenance import difference
from lopd.provenance.io import pretty_json, read_json_object, write_atomic
from lopd.provenance.manifest import environment
from lopd.stages import distill, evaluate, rollout, score, sft, sft_data
from lopd.stages.demo import arithmetic as toy
from lopd.stages.demo.figure import NAME, draw
from lopd.stages.demo.report import (
    CLIPPED,
    DISTILLED,
    FINE_TUNED,
    MORE_SFT,
    ONLINE,
    SAMPLED,
    conclusion,
    format_table,
)
from lopd.stages.run import is_finished
from lopd.store.folders import examine_folder

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
SAMPLING: dict[str, Any] = {
    "max_new_tokens": toy.MAX_NEW_TOKENS,
    "batch_size": 512,
    "dtype": "float32",
    "device": "cpu",
}
TOP_K = 8
EVAL_PROMPTS = 1024
PROMPTS = {"eval": EVAL_PROMPTS, "demonstrations": 38400, "sft": 4000, "opd": 8000}
SFT_STEPS = {"teacher": 600, "student": 430}
# Seconds of each stage in benchmarks/results/demo_seeds.jsonl, for the time that is left.
COSTS = {
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
}
NOTE = (
    f"Accuracies are over {EVAL_PROMPTS} new prompts, with 95 % intervals. KL: nat per token, on "
    "the model's own new answers. In training it stays higher on stored answers, which the "
    "student no longer gives."
)
LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class DemoStage:
    """One stage of the demo, and one row of its table."""

    name: str
    module: Any  # of lopd.stages
    config: Any

    @property
    def folder(self) -> str:
        """The name of the folder that the stage writes."""
        return Path(self.config.out).name

    def run(self) -> None:
        """Run or continue the stage, unless it is finished."""
        if not is_finished(self.config):
            self.module.main(self.config)


def main(config: DemoConfig) -> Path:
    """Run or continue the demo; write `results.json` and `curves.png`, and print the table.

    Finished stages are not run again; `online` may be added later.

    Raises:
        ConfigError: `out` holds a demo of another seed, or matplotlib is missing.
    """
    out = Path(config.out)
    results_file, progress_file = out / "results.json", out / "progress.json"
    progress: dict[str, Any] = {"seed": config.seed, "steps": OPD_STEPS, "rows": []}
    if progress_file.is_file():
        progress = read_json_object(progress_file)
        if {"seed", "steps", "rows"} - progress.keys():
            raise DataError(f"{progress_file} is not a demo's; restore it, or remove {out}")
    examine_folder(
        out,
        record=progress_file.name,
        differs=lambda: difference({"seed": progress["seed"]}, {"seed": config.seed}),
        allowed_files=None,
    ).require_writable()
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("matplotlib: not installed; the demo draws with it; pip install it")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the numbers must not depend on the number of cores
    try:
        demo = Demo(out, config.seed)
        stages, rows = demo.stages(config.online), progress["rows"]
        began, first = time.monotonic(), len(rows)
        for number, stage in enumerate(stages[first:], start=first + 1):
            done, left = (
                sum(COSTS[each.name] for each in part)
                for part in (stages[first : number - 1], stages[number - 1 :])
            )
            seconds = (time.monotonic() - began) / done * left if done else 0.0
            time_left = f", about {duration(seconds)} left" if done else ""
            LOG.info(f"[{number}/{len(stages)}] {stage.name}{time_left}")
            rows.append(demo.run_stage(stage))
            write_atomic(progress_file, pretty_json(progress))
    finally:
        torch.set_num_threads(threads)
    results = progress | {"environment": environment(), "eval_prompts": EVAL_PROMPTS}
    write_atomic(results_file, pretty_json(results))
    draw(out, rows)
    print(f"\n{format_table(rows)}\n\n{NOTE}\n\n{conclusion(rows, OPD_STEPS)}")
    print(f"\n{results_file}, {out / NAME}")
    return out


class Demo:
    """The demo's folder and the stages that fill it."""

    def __init__(self, out: Path, seed: int) -> None:
        self.out, self.seed = out, seed
        (out / "prompts").mkdir(parents=True, exist_ok=True)
        seen: set[str] = set()
        self.prompts = {
            name: toy.write_prompts(
                out / "prompts" / f"{name}.jsonl",
                toy.sample_prompts(count, 1000 * seed + number, exclude=seen),
                completions=name == "demonstrations",
            )
            for number, (name, count) in enumerate(PROMPTS.items())
        }
        for number, (name, size) in enumerate(
            {"teacher-init": toy.TEACHER_SIZE, "student-init": toy.STUDENT_SIZE}.items()
        ):
            if not (out / name).exists():
                toy.write_model(out / name, size, seed=10 * seed + number)

    def path(self, name: str) -> str:
        """A path in the demo's folder."""
        return str(self.out / name)

    def stages(self, online: bool) -> list[DemoStage]:
        """All stages, in order."""
        demonstrations = str(self.prompts["demonstrations"])
        sampled: dict[str, Any] = {"objective": "policy_gradient"}
        teacher = {"model": self.path("teacher-init"), "data": demonstrations}
        student = {"model": self.path("student-init"), "data": self.path("sft-data")}
        more = {"model": self.path("sft"), "data": self.path("more-data")}
        stages = [
            self._training(
                "teacher", "teacher", **teacher, max_steps=SFT_STEPS["teacher"], **SFT_SETTINGS
            ),
            self._answers("teacher's answers", "sft-data", "sft"),
            self._training(
                FINE_TUNED, "sft", **student, max_steps=SFT_STEPS["student"], **SFT_SETTINGS
            ),
            self._rollouts("student's rollouts", "rollouts"),
            self._scores("teacher's scores", "cache"),
            self._distillation(DISTILLED, "distill"),
            self._distillation(SAMPLED, "distill-sampled", **sampled),
            self._distillation(CLIPPED, "distill-clipped", **sampled, advantage_clip=1.0),
            self._answers("control: answers", "more-data", "opd"),
            self._training(MORE_SFT, "more-sft", **more, **OPD_SETTINGS),
        ]
        if online:
            live = {"refresh_every": 1, "teacher": self.path("teacher")}
            stages.append(self._distillation(ONLINE, "online", **live))
        return stages

    def _training(self, name: str, out: str, **settings: Any) -> DemoStage:
        config = SftConfig(out=self.path(out), seed=self.seed, **settings, **COMMON)
        return DemoStage(name, sft, config)

    def _answers(self, name: str, out: str, prompts: str) -> DemoStage:
        config = SftDataConfig(
            teacher=self.path("teacher"),
            prompts=str(self.prompts[prompts]),
            out=self.path(out),
            seed=self.seed,
            **SAMPLING,
        )
        return DemoStage(name, sft_data, config)

    def _rollouts(self, name: str, out: str) -> DemoStage:
        config = RolloutConfig(
            student=self.path("sft"),
            prompts=str(self.prompts["opd"]),
            out=self.path(out),
            seed=self.seed,
            **SAMPLING,
        )
        return DemoStage(name, rollout, config)

    def _scores(self, name: str, out: str) -> DemoStage:
        config = ScoreConfig(
            teacher=self.path("teacher"),
            rollouts=self.path("rollouts"),
            out=self.path(out),
            k=TOP_K,
            top_p=1.0,
            dtype="float32",
            device="cpu",
        )
        return DemoStage(name, score, config)

    def _distillation(self, name: str, out: str, **changes: Any) -> DemoStage:
        config = DistillConfig(
            student=self.path("sft"),
            cache=self.path("cache"),
            out=self.path(out),
            seed=self.seed,
            **changes,
            **OPD_SETTINGS,
            **COMMON,
        )
        return DemoStage(name, distill, config)

    def run_stage(self, stage: DemoStage) -> dict[str, Any]:
        """Run a stage and evaluate its model.

        Returns:
            The row of the table; without a time if the stage was continued.
        """
        continued, began = (self.out / stage.folder).exists(), time.perf_counter()
        stage.run()
        seconds = None if continued else time.perf_counter() - began
        row: dict[str, Any] = {"stage": stage.name, "seconds": seconds}
        return row | self.evaluate(stage.folder) if stage.module in (sft, distill) else row

    def evaluate(self, name: str) -> dict[str, Any]:
        """Accuracy of a stage's model, and its KL to the teacher."""
        config = EvalConfig(
            model=self.path(name),
            teacher=self.path("teacher"),
            prompts=str(self.prompts["eval"]),
            out=self.path(f"eval/{name}"),
            num_samples=1,
            seed=self.seed,
            **SAMPLING,
        )
        DemoStage(name, evaluate, config).run()
        results = json.loads((Path(config.out) / "results.json").read_text(encoding="utf-8"))
        row: dict[str, Any] = {"kl": results["kl"]["nats_per_token"]}
        for key, name in (("greedy", "greedy"), ("sampled", "avg@1")):
            found = results[name]
            row |= {key: found["mean"], f"{key}_interval": [found["low"], found["high"]]}
        return row
