"""The frame of every part of the evidence: cells, what they share, and runs that continue."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
import transformers

from benchmarks.recorder import ROOT, identity, now
from lopd.stages import distill, score
from lopd.stages.demo.driver import Demo, DemoStage
from lopd.stages.demo.report import DISTILLED
from lopd.stages.demo.toy import ToyDemo
from lopd.store.folders import locked

Row = dict[str, Any]
RESULTS = Path("benchmarks/results")
WORK = Path("build/evidence")
SEEDS = (0, 1, 2, 3, 4)


class Shared:
    """What the cells of one seed share: the demo's models, rollouts and scores.

    Folders of `demo` are made once and kept in the work folder, so that cells of several parts and
    of several calls find them there; a folder of other settings or inputs is refused. What a cell
    alone writes is made anew with its row.

    Attributes:
        demo: the demo of this seed, with teacher, fine-tuned student (`sft`) and `rollouts`.
        scores: the stage that scores the rollouts; `cache` runs it with another length of lists.
        distillation: the stage that distils the student with the demo's settings.
    """

    kind: ClassVar[type[Demo]] = ToyDemo
    prefix: ClassVar[str] = "seed"  # of the demo's folder in the work folder
    shared_until: ClassVar[str] = "teacher's scores"  # the first stage that cells do not share
    distilled: ClassVar[str] = DISTILLED  # the stage of distillation with the demo's settings
    minutes: ClassVar[float] = 0.9  # of teacher, student and rollouts

    def __init__(self, work: Path, seed: int) -> None:
        self.demo = self.kind(self.folder(work, seed), seed)
        stages = {stage.name: stage for stage in self.demo.stages(online=False)}
        for name, stage in stages.items():
            if name == self.shared_until:
                break
            stage.run()
        self.scores = stages["teacher's scores"]
        self.distillation = stages[self.distilled]

    @classmethod
    def folder(cls, work: Path, seed: int) -> Path:
        """The folder of the demo of a seed."""
        return work / f"{cls.prefix}{seed}"

    def discard(self, folders: Iterable[str]) -> None:
        """Remove folders of the demo and their evaluations, which an earlier call left."""
        for name in folders:
            for path in (name, f"eval/{name}"):
                shutil.rmtree(self.demo.path(path), ignore_errors=True)

    def cache(self, k: int) -> str:
        """The folder of the teacher's scores with lists of length k."""
        folder = f"cache-k{k}"
        config = replace(self.scores.config, k=k, out=self.demo.path(folder))
        DemoStage("scores", folder, score, config).run()
        return str(config.out)

    def train(self, folder: str, **changes: Any) -> None:
        """Distil the student into a folder, with changed settings."""
        config = replace(self.distillation.config, out=self.demo.path(folder), **changes)
        DemoStage(folder, folder, distill, config).run()

    def distil(self, folder: str, **changes: Any) -> Row:
        """Distil the student into a folder, with changed settings, and evaluate it."""
        self.train(folder, **changes)
        return self.demo.evaluate(folder)


class Cell(Protocol):
    """One measurement on one seed, which makes one row.

    Attributes:
        name: unique in its part, such as `unbiased/k4/seed0`; `--only` selects by it.
        minutes: on one quiet core, without what is shared.
        results: the folders of the demo that the cell writes; they are removed before it is
            measured, so that its row is made by the call, and the commit, that it names.
    """

    @property
    def name(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def minutes(self) -> float: ...
    @property
    def results(self) -> Sequence[str]: ...

    def measure(self, shared: Shared) -> Row:
        """The fields of the row."""
        ...


@dataclass(frozen=True)
class Measure:
    """A number that the tables take from a row.

    Attributes:
        value: the number.
        interval: its 95 % interval over new prompts, if the row has one.
        geometric: whether the tables take geometric means of it over seeds.
    """

    value: float
    interval: tuple[float, float] | None = None
    geometric: bool = False


def measure_of(row: Row, key: str, *, geometric: bool = False) -> Measure:
    """A field of a row, with the interval that stands beside it, if one does."""
    own = row.get(f"{key}_interval")
    return Measure(row[key], None if own is None else (own[0], own[1]), geometric)


def quality_measures(row: Row, prefix: str = "") -> dict[str, Measure]:
    """The KL and sampled pass@1 of a run, from its row or from a part of that."""
    return {
        f"{prefix}KL": measure_of(row, "kl", geometric=True),
        f"{prefix}pass@1": measure_of(row, "sampled"),
    }


@dataclass(frozen=True)
class Part:
    """One question: its cells, in the order in which they are measured, and its tables.

    Attributes:
        name: of the part, and of its rows `NAME.jsonl`.
        cells: all cells; seeds outermost, so that a part of them is already an answer.
        tables: Markdown from the rows, by the name of the block that `benchmarks.readme` writes.
        figures: figures of matplotlib from the rows, by the name of their SVG in `docs`.
        command: of this part alone, as it stands in the rows; "" is that of `benchmarks.evidence`.
        shared: makes the demo of the cells.
        measures: the numbers that the tables take from a row, by name.
    """

    name: str
    cells: Callable[[], Sequence[Cell]]
    tables: Mapping[str, Callable[[list[Row]], str]]
    figures: Mapping[str, Callable[[list[Row]], Any]]
    command: str = ""
    shared: type[Shared] = Shared
    measures: Callable[[Row], dict[str, Measure]] = quality_measures

    @property
    def file(self) -> str:
        return f"{self.name}.jsonl"

    def again(self, *patterns: str) -> str:
        """The command that measures cells once more, and compares; all cells without a pattern."""
        command = self.command or f"python -m benchmarks.evidence --part {self.name}"
        only = " ".join(["", "--only", *(f"'{each}'" for each in patterns)]) if patterns else ""
        return f"{command} --again{only}"


def done(part: Part, out: Path) -> set[str]:
    """The cells of a part that have a row."""
    return {row["cell"] for row in read(out / part.file)}


def matching(part: Part, patterns: Sequence[str]) -> list[Cell]:
    """The cells of a part whose names match a pattern."""
    return [c for c in part.cells() if any(fnmatch.fnmatch(c.name, each) for each in patterns)]


def planned(todo: Sequence[tuple[Part, Cell]]) -> float:
    """Minutes of these cells and of what they share."""
    demos = {(part.shared, cell.seed) for part, cell in todo}
    return sum(cell.minutes for _, cell in todo) + sum(shared.minutes for shared, _ in demos)


def run(todo: Sequence[tuple[Part, Cell]], work: Path, out: Path) -> None:
    """Measure cells; append the row of each to the file of its part.

    Cells that another process has measured in the meantime are left out.

    Raises:
        ShardError: another process measures cells of the same seed in the same work folder.
    """
    torch.set_num_threads(1)  # as the demo sets it
    environment = {"transformers": transformers.__version__, **identity(torch.device("cpu"), None)}
    environment["instructions"] = torch.backends.cpu.get_cpu_capability()  # they decide rounding
    out.mkdir(parents=True, exist_ok=True)
    made: dict[Path, Shared] = {}
    for number, (part, cell) in enumerate(todo, start=1):
        if cell.name in done(part, out):
            continue
        folder = part.shared.folder(work, cell.seed)
        with locked(folder), contextlib.redirect_stdout(sys.stderr):  # what stages print
            if folder not in made:
                made[folder] = part.shared(work, cell.seed)
            made[folder].discard(cell.results)
            began, date = time.process_time(), now()
            measured = cell.measure(made[folder])
            minutes = round((time.process_time() - began) / 60, 3)
        row = {"cell": cell.name, "seed": cell.seed, **measured, "minutes": minutes}
        row |= {"command": part.again(cell.name), **environment, "date": date}
        if cell.name in done(part, out):  # by a process with another work folder
            continue
        with (out / part.file).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"[{number}/{len(todo)}] {part.name} {cell.name}: {minutes:.2f} minutes", flush=True)


def read(path: Path) -> list[Row]:
    """The rows of a file; none if there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def draw(part: Part, out: Path) -> None:
    """Draw the figures of a part, in `docs` if the rows are the committed ones."""
    import matplotlib

    rows = read(out / part.file)
    folder = ROOT / "docs" if out == RESULTS else out
    for name, figure in part.figures.items() if rows else ():
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
            figure(rows).savefig(folder / f"{name}.svg", metadata={"Date": None})
