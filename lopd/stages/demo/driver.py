"""What demos share: their stages, the rows of their tables, and runs that can be continued."""

import gc
import importlib.util
import json
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

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
from lopd.evaluation.accuracy import Z95
from lopd.evaluation.results import read_results
from lopd.provenance import difference
from lopd.provenance.io import pretty_json, read_json_object, storing, write_atomic
from lopd.provenance.manifest import environment
from lopd.stages import distill, evaluate, rollout, score, sft, sft_data
from lopd.stages.demo.figure import NAME, Titles, draw
from lopd.stages.demo.memory import peak_mib, reset_peak
from lopd.stages.demo.report import format_table
from lopd.stages.run import is_finished
from lopd.store.folders import examine_folder, locked
from lopd.training.checkpoints import saving

PROGRESS, RESULTS = "progress.json", "results.json"
SEED_STRIDE = 1000  # between the seeds of the sampling of two demos of neighbouring seeds
LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class DemoStage:
    """One stage of a demo, and one row of its table."""

    name: str
    folder: str  # of the demo, that the stage writes
    module: Any = None  # of lopd.stages; None: nothing runs
    config: Any = None
    measured: bool = False  # whether the folder is that of a model, which is evaluated

    def run(self) -> None:
        """Run or continue the stage, unless it is finished."""
        if self.module is not None and not is_finished(self.config):
            self.module.main(self.config)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a demo runs; the dictionaries hold settings of the stages."""

    name: str
    threads: int | None = None  # of torch; None leaves them alone
    sets: Mapping[str, int]  # numbers of prompts, `eval` among them
    costs: Mapping[str, float]  # seconds of each stage, for the time that is left
    titles: Titles
    curves: Mapping[str, str]  # stages whose loss is drawn, and their folders
    live: str  # the stage with a live teacher
    note: str  # what the columns of the table are
    steps: int  # of distillation, and of the control
    common: Mapping[str, Any]  # of training
    sft: Mapping[str, Any]
    opd: Mapping[str, Any]  # of distillation and of the control
    sampling: Mapping[str, Any]
    scoring: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    held_out: str | None = None  # the cache whose KL is reported too


class Demo(ABC):
    """The demo's folder and the stages that fill it; subclasses are the tasks.

    Args:
        out: the folder.
        seed: of models, data and sampling.
    """

    task: ClassVar[Task]

    def __init__(self, out: Path, seed: int) -> None:
        self.out, self.seed = out, seed
        (out / "prompts").mkdir(parents=True, exist_ok=True)
        self.prompts: dict[str, Path] = self.write_prompts()
        self.write_models()

    @abstractmethod
    def write_prompts(self) -> dict[str, Path]:
        """Write the sets of prompts; returns their files by name, `eval` among them."""

    @abstractmethod
    def write_models(self) -> None:
        """Write the models that the stages start from, unless they exist."""

    @abstractmethod
    def stages(self, online: bool) -> list[DemoStage]:
        """All stages, in order."""

    @abstractmethod
    def conclusion(self, rows: list[dict[str, Any]]) -> str:
        """The result in words, with the numbers of this run."""

    def path(self, name: str) -> str:
        """A path in the demo's folder."""
        return str(self.out / name)

    def build(self, name: str, write: Callable[[Path], object]) -> None:
        """Let `write` fill a folder of this name, unless it exists; it appears when complete."""
        folder = self.out / name
        if not folder.exists():
            unfinished = folder.with_name(f"{name}.tmp")
            write(unfinished)
            unfinished.rename(folder)

    def training(self, name: str, out: str, *, measured: bool = True, **settings: Any) -> DemoStage:
        """A stage of fine-tuning."""
        config = SftConfig(out=self.path(out), seed=self.seed, **settings, **self.task.common)
        return DemoStage(name, out, sft, config, measured)

    def answers(self, name: str, out: str, prompts: str, *, draw: int = 0) -> DemoStage:
        """A stage in which the teacher answers; another `draw` gives other answers."""
        config = SftDataConfig(
            teacher=self.path("teacher"),
            prompts=str(self.prompts[prompts]),
            out=self.path(out),
            seed=self.seed + SEED_STRIDE * draw,
            **self.task.sampling,
        )
        return DemoStage(name, out, sft_data, config)

    def rollouts(self, name: str, out: str, prompts: str) -> DemoStage:
        """A stage in which the fine-tuned student answers."""
        config = RolloutConfig(
            student=self.path("sft"),
            prompts=str(self.prompts[prompts]),
            out=self.path(out),
            seed=self.seed,
            **self.task.sampling,
        )
        return DemoStage(name, out, rollout, config)

    def scores(self, name: str, out: str, rollouts: str) -> DemoStage:
        """A stage in which the teacher scores the student's answers."""
        config = ScoreConfig(
            teacher=self.path("teacher"),
            rollouts=self.path(rollouts),
            out=self.path(out),
            **self.task.scoring,
        )
        return DemoStage(name, out, score, config)

    def distillation(self, name: str, out: str, **changes: Any) -> DemoStage:
        """A stage of distillation, from the fine-tuned student."""
        config = DistillConfig(
            student=self.path("sft"),
            cache=self.path("cache"),
            out=self.path(out),
            seed=self.seed,
            **changes,
            **self.task.opd,
            **self.task.common,
        )
        return DemoStage(name, out, distill, config, True)

    def run_stage(self, stage: DemoStage) -> dict[str, Any]:
        """Run a stage and evaluate its model.

        Returns:
            The row of the table; without times and a peak if the stage was continued. On a shared
            machine the seconds of the processor tell more than those of the clock.
        """
        row: dict[str, Any] = {"stage": stage.name, "seconds": None}
        if stage.module is not None:
            continued = (self.out / stage.folder).exists()
            gc.collect()  # trainers are reference cycles, whose models would count here
            reset_peak()
            began, cpu_began = time.perf_counter(), time.process_time()
            stage.run()
            if not continued:
                row |= {
                    "seconds": time.perf_counter() - began,
                    "cpu_seconds": time.process_time() - cpu_began,
                    "peak_mib": peak_mib(),
                }
        if not stage.measured:
            return row
        began, cpu_began = time.perf_counter(), time.process_time()
        row |= self.evaluate(stage.folder)
        return row | {
            "eval_seconds": time.perf_counter() - began,
            "eval_cpu_seconds": time.process_time() - cpu_began,
        }

    def evaluate(self, name: str, teacher: str = "teacher") -> dict[str, Any]:
        """Accuracies of a model of the demo, and its KLs to a teacher."""
        suffix = "" if teacher == "teacher" else f"-{teacher}"
        config = EvalConfig(
            model=self.path(name),
            teacher=self.path(teacher),
            prompts=str(self.prompts["eval"]),
            cache=None if self.task.held_out is None else self.path(self.task.held_out),
            out=self.path(f"eval/{name}{suffix}"),
            seed=self.seed,
            **self.task.evaluation,
            **self.task.sampling,
        )
        DemoStage(name, name, evaluate, config).run()
        return measures(read_results(Path(config.out)), config.num_samples)

    def answers_of(self, name: str) -> list[dict[str, Any]]:
        """The greedy answers of a model that was evaluated, in the order of the prompts."""
        file = self.out / "eval" / name / evaluate.ANSWERS_NAME
        records = map(json.loads, file.read_text(encoding="utf-8").splitlines())
        return [record for record in records if record["sample"] is None]

    def examples(self) -> str:
        """Answers of some models, to print; empty by default."""
        return ""


def measures(results: Mapping[str, Any], samples: int) -> dict[str, Any]:
    """The values of a row from the results of an evaluation, with intervals where it has them.

    Those of a KL are absent for a single answer, and in evaluations of earlier versions.
    """
    row: dict[str, Any] = {}
    for key, name in (("kl", "kl"), ("held_out_kl", "cache_kl")):
        if (found := results.get(name)) is not None:
            row[key] = found["nats_per_token"]
            if (error := found.get("standard_error")) is not None:
                spread = Z95 * error
                row[f"{key}_interval"] = [max(0.0, row[key] - spread), row[key] + spread]
    for key, name in (("greedy", "greedy"), ("sampled", f"avg@{samples}")):
        found = results[name]
        row |= {key: found["mean"], f"{key}_interval": [found["low"], found["high"]]}
    return row


def run_demo(kind: type[Demo], config: DemoConfig) -> Path:
    """Run or continue a demo; write `results.json` and `curves.png`, and print the table.

    Finished stages are not run again; the online run may be added later.

    Args:
        kind: the task.

    Raises:
        ConfigError: `out` holds a demo of another task or seed, or matplotlib is missing.
        DataError: the record of the progress is damaged.
        ShardError: another process runs the demo there, or the folder cannot be written.
    """
    out = Path(config.out)
    identity = {"task": kind.task.name, "quick": config.quick, "seed": config.seed}
    progress = _read_progress(out, identity)
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("matplotlib: not installed; the demo draws with it; pip install it")
    threads, rows = torch.get_num_threads(), progress["rows"]
    with locked(out):
        with saving(out):
            demo = kind(out, config.seed)
        torch.set_num_threads(demo.task.threads or threads)
        try:
            progress |= {"steps": demo.task.steps}
            _run_stages(demo, demo.stages(config.online), progress)
        finally:
            torch.set_num_threads(threads)
        results = progress | {
            "environment": environment(),
            "threads": demo.task.threads or threads,
            "eval_prompts": demo.task.sets["eval"],
        }
        with storing(out):
            write_atomic(out / RESULTS, pretty_json(results))
            draw(out, rows, demo.task.titles, demo.task.curves, demo.task.live)
    parts = [format_table(rows), demo.task.note, demo.examples(), demo.conclusion(rows)]
    print("\n" + "\n\n".join(part for part in parts if part))
    print(f"\n{out / RESULTS}, {out / NAME}")
    return out


def _read_progress(out: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """What an interrupted or finished demo in this folder has recorded, or a new record."""
    file = out / PROGRESS
    progress: dict[str, Any] = {**identity, "rows": []}
    if file.is_file():
        # Earlier versions, which had one task, recorded neither it nor `quick`.
        progress = {"task": "arithmetic", "quick": False} | read_json_object(file)
        if {"seed", "rows"} - progress.keys():
            raise DataError(f"{file} is not a demo's; restore it, or remove {out}")
    recorded = {name: progress[name] for name in identity}
    examine_folder(
        out,
        record=PROGRESS,
        differs=lambda: difference(recorded, identity),
        allowed_files=None,
    ).require_writable()
    return progress


def _run_stages(demo: Demo, stages: list[DemoStage], progress: dict[str, Any]) -> None:
    """Run the stages that have no row yet, with the time that is left."""
    rows = progress["rows"]
    began, first = time.monotonic(), len(rows)
    for number, stage in enumerate(stages[first:], start=first + 1):
        done, left = (
            sum(demo.task.costs[each.name] for each in part)
            for part in (stages[first : number - 1], stages[number - 1 :])
        )
        seconds = (time.monotonic() - began) / done * left if done else 0.0
        time_left = f", about {duration(seconds)} left" if done else ""
        LOG.info(f"[{number}/{len(stages)}] {stage.name}{time_left}")
        rows.append(demo.run_stage(stage))
        with storing(demo.out):
            write_atomic(demo.out / PROGRESS, pretty_json(progress))
