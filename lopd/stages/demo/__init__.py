"""The whole pipeline from nothing, at toy scale, on a CPU (`lopd demo`).

A tiny teacher learns chain arithmetic (arithmetic.py); a smaller student is fine-tuned on
its answers, rolled out once, its rollouts are scored once, and from there on no teacher is
needed: the student is distilled with the sparse reverse KL (the default) and with the
paper's sampled-token objective, plain and with its advantage clipped. The fair control
fine-tunes the same student for as many steps on fresh teacher answers. `--online` adds a
run whose rollouts are sampled anew and scored by a live teacher at every step.

Every artefact stays under `--out`, and every stage command can be run on it again.
"""

import importlib.util
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lopd.config.fields import Settings, setting
from lopd.errors import ConfigError
from lopd.provenance import difference
from lopd.provenance.io import pretty_json, write_atomic
from lopd.stages import distill, evaluate, rollout, score, sft, sft_data
from lopd.stages.demo import arithmetic as toy
from lopd.stages.demo.report import (
    CLIPPED,
    DISTILLED,
    FINE_TUNED,
    MORE,
    ONLINE,
    SAMPLED,
    conclusion,
    draw_curves,
    format_table,
)
from lopd.stages.run import finished
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


@dataclass(kw_only=True)
class DemoConfig(Settings):
    """Run the whole pipeline at toy scale (`lopd demo`)."""

    out: str = setting(
        "lopd-demo", group="Model and data", identity=False, help="Folder of all artefacts."
    )
    seed: int = setting(
        0,
        within="[0, 4294967296)",
        group="Model and data",
        help="Seed of models, data and sampling.",
    )
    online: bool = setting(
        False, group="Model and data", identity=False, help="Add the run with a live teacher."
    )


@dataclass(frozen=True)
class Entry:
    """One line of the demo's table."""

    name: str
    folder: str
    run: Callable[[], Any]
    model: bool  # whether the product is a model to evaluate, or data


def main(config: DemoConfig) -> Path:
    """Every stage in order, continuing where it stopped; then table, figure, `results.json`."""
    out = Path(config.out)
    results_file, progress_file = out / "results.json", out / "progress.json"
    progress: dict[str, Any] = {"seed": config.seed, "steps": OPD_STEPS, "rows": []}
    if progress_file.is_file():
        progress = json.loads(progress_file.read_text(encoding="utf-8"))
    examine_folder(
        out,
        final=results_file.name,
        record=progress_file.name,
        differs=lambda: difference({"seed": progress["seed"]}, {"seed": config.seed}),
        own_files=None,
    ).require_writable()
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("matplotlib: not installed, and the demo draws curves; pip install it")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny models; and the numbers do not depend on the machine's cores
    try:
        demo = Demo(out, config.seed)
        entries, rows = demo.entries(config.online), progress["rows"]
        for number in range(len(rows), len(entries)):
            print(f"[{number + 1}/{len(entries)}] {entries[number].name}", flush=True)
            rows.append(demo.row(entries[number]))
            write_atomic(progress_file, pretty_json(progress))
    finally:
        torch.set_num_threads(threads)
    write_atomic(results_file, pretty_json(progress))
    draw_curves(out)
    print(f"\n{format_table(rows)}\n\n{conclusion(rows, OPD_STEPS)}")
    print(f"\n{results_file}, {out / 'curves.png'}")
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
            for number, (name, count) in enumerate(
                {"eval": EVAL_PROMPTS, "demonstrations": 38400, "sft": 4000, "opd": 8000}.items()
            )
        }
        for number, (name, size) in enumerate(
            {"teacher-init": toy.TEACHER_SIZE, "student-init": toy.STUDENT_SIZE}.items()
        ):
            if not (out / name).exists():
                toy.write_model(out / name, size, seed=10 * seed + number)

    def path(self, name: str) -> str:
        return str(self.out / name)

    def entries(self, online: bool) -> list[Entry]:
        """Every stage, in order."""
        clipped: dict[str, Any] = {"objective": "policy_gradient", "advantage_clip": 1.0}
        entries = [
            Entry("teacher", "teacher", self.train_teacher, True),
            Entry("teacher's answers", "sft-data", lambda: self.answers("sft-data", "sft"), False),
            Entry(FINE_TUNED, "sft", self.train_student, True),
            Entry("student's rollouts", "rollouts", self.roll_out, False),
            Entry("teacher's scores", "cache", self.score, False),
            Entry(DISTILLED, "distill", lambda: self.distill("distill"), True),
            Entry(
                SAMPLED,
                "distill-sampled",
                lambda: self.distill("distill-sampled", objective="policy_gradient"),
                True,
            ),
            Entry(
                CLIPPED,
                "distill-clipped",
                lambda: self.distill("distill-clipped", **clipped),
                True,
            ),
            Entry("control: answers", "more-data", lambda: self.answers("more-data", "opd"), False),
            Entry(MORE, "more-sft", self.train_more, True),
        ]
        if online:
            live = {"refresh_every": 1, "teacher": self.path("teacher")}
            entries.append(Entry(ONLINE, "online", lambda: self.distill("online", **live), True))
        return entries

    def row(self, entry: Entry) -> dict[str, Any]:
        """Run a stage, evaluate its model, and report both; a continued stage has no time."""
        continued, began = (self.out / entry.folder).exists(), time.perf_counter()
        entry.run()
        seconds = None if continued else time.perf_counter() - began
        row: dict[str, Any] = {"stage": entry.name, "seconds": seconds}
        if entry.model:
            row |= self.evaluate(entry.folder)
        return row

    def run_stage(self, module: Any, config: Any) -> None:
        if not finished(config):
            module.main(config)

    def train_teacher(self) -> None:
        self.fine_tune("teacher-init", str(self.prompts["demonstrations"]), "teacher", 600)

    def train_student(self) -> None:
        self.fine_tune("student-init", self.path("sft-data"), "sft", 430)

    def train_more(self) -> None:
        config = sft.SftConfig(
            model=self.path("sft"),
            data=self.path("more-data"),
            out=self.path("more-sft"),
            seed=self.seed,
            **OPD_SETTINGS,
            **COMMON,
        )
        self.run_stage(sft, config)

    def fine_tune(self, model: str, data: str, out: str, steps: int) -> None:
        config = sft.SftConfig(
            model=self.path(model),
            data=data,
            out=self.path(out),
            max_steps=steps,
            seed=self.seed,
            **SFT_SETTINGS,
            **COMMON,
        )
        self.run_stage(sft, config)

    def answers(self, out: str, prompts: str) -> None:
        config = sft_data.SftDataConfig(
            teacher=self.path("teacher"),
            prompts=str(self.prompts[prompts]),
            out=self.path(out),
            seed=self.seed,
            **SAMPLING,
        )
        sft_data.main(config)

    def roll_out(self) -> None:
        config = rollout.RolloutConfig(
            student=self.path("sft"),
            prompts=str(self.prompts["opd"]),
            out=self.path("rollouts"),
            seed=self.seed,
            **SAMPLING,
        )
        rollout.main(config)

    def score(self) -> None:
        config = score.ScoreConfig(
            teacher=self.path("teacher"),
            rollouts=self.path("rollouts"),
            out=self.path("cache"),
            k=TOP_K,
            top_p=1.0,
            dtype="float32",
            device="cpu",
        )
        score.main(config)

    def distill(self, out: str, **changes: Any) -> None:
        config = distill.DistillConfig(
            student=self.path("sft"),
            cache=self.path("cache"),
            out=self.path(out),
            seed=self.seed,
            **changes,
            **OPD_SETTINGS,
            **COMMON,
        )
        self.run_stage(distill, config)

    def evaluate(self, name: str) -> dict[str, float]:
        config = evaluate.EvalConfig(
            model=self.path(name),
            teacher=self.path("teacher"),
            prompts=str(self.prompts["eval"]),
            out=self.path(f"eval/{name}"),
            num_samples=1,
            seed=self.seed,
            **SAMPLING,
        )
        self.run_stage(evaluate, config)
        results = json.loads((Path(config.out) / "results.json").read_text(encoding="utf-8"))
        return {
            "greedy": results["greedy"]["mean"],
            "sampled": results["avg@1"]["mean"],
            "kl": results["kl"]["nats_per_token"],
        }
