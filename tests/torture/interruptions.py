"""Interrupted runs: kills, signals, workers that die, and two processes on one folder."""

import random
import signal
from pathlib import Path

from torture import harness
from torture.harness import Fault, Outcome
from torture.pipeline import Pipeline, Stage, clear, contents, differences
from torture.rows import KILL
from torture.table import Table

WORKERS = ("sft-data", "rollout", "score", "score compact")  # stages that several processes share


class Interruptions:
    """Attacks on the commands of a pipeline. Each is chosen by its seed and number alone."""

    def __init__(self, pipeline: Pipeline, table: Table, seed: int) -> None:
        self.pipeline, self.table, self.seed = pipeline, table, seed
        self.rng = random.Random(seed)
        self.out = pipeline.root / "attacked"
        self.stages = pipeline.order
        self.expected = {stage.name: contents(stage.out) for stage in self.stages}
        self._changes: dict[str, int] = {}

    def kill(self, number: int) -> None:
        """Kill a stage once, or twice in a row, and run it again."""
        self._begin("kill", number)
        stage = self.stages[number % len(self.stages)]
        faults = [self._any_kill(stage) for _ in range(self.rng.choice((1, 1, 2)))]
        self._interrupt(KILL, stage, faults, codes={-9})

    def ask_to_stop(self, number: int) -> None:
        """SIGTERM or SIGINT in the middle of a stage."""
        self._begin("ask_to_stop", number)
        stage = self.stages[number // 2 % len(self.stages)]
        name, number, codes = (
            ("SIGTERM", signal.SIGTERM, {143, -15}),
            ("SIGINT", signal.SIGINT, {130, -2}),
        )[number % 2]
        seconds = self.rng.uniform(0.05, self.pipeline.seconds[stage.name])
        fault = Fault(f"{name} after {seconds:.3f} s", seconds=seconds, signal=number)
        self._interrupt(name, stage, [fault], codes)

    def lose_workers(self, number: int) -> None:
        """Three workers on one folder, one or two of which are killed."""
        self._begin("lose_workers", number)
        stage = self.pipeline.stages[WORKERS[number % len(WORKERS)]]
        doomed = self.rng.sample(range(3), self.rng.choice((1, 2)))
        faults = [self._any_kill(stage) if worker in doomed else None for worker in range(3)]
        clear(self.out)
        runs = []
        for worker, fault in enumerate(faults):
            argv = [*stage.argv(self.out), "--worker", f"{worker}/3"]
            runs.append((fault, harness.start(argv, fault)))
        ends = [harness.wait(started, fault) for fault, started in runs]
        detail = ", ".join(fault.name if fault else "lives" for fault, _ in runs)
        problem = next((p for end in ends if (p := unexpected(end, {0, -9}))), "")
        self._finish("workers on one folder, some killed", stage, problem, detail)

    def share_a_folder(self, number: int) -> None:
        """The same command twice at the same time: one works, the other is refused or done."""
        self._begin("share_a_folder", number)
        stage = self.stages[number % len(self.stages)]
        clear(self.out)
        first = harness.start(stage.argv(self.out))
        pause = Fault("", seconds=None)
        delay = self.rng.uniform(0, self.pipeline.seconds[stage.name])
        _sleep(delay)
        second = harness.start(stage.argv(self.out))
        ends = [harness.wait(first, pause), harness.wait(second, pause)]
        problem = next((p for end in ends if (p := unexpected(end, {0, 2}))), "")
        if not problem and all(end.code for end in ends):
            problem = "neither finished"
        self._finish("two processes on one folder", stage, problem, f"{delay:.3f} s apart")

    def _begin(self, attack: str, number: int) -> None:
        self.rng = random.Random(f"{self.seed} {attack} {number}")

    def _any_kill(self, stage: Stage) -> Fault:
        if self.rng.random() < 0.5:
            seconds = self.rng.uniform(0, self.pipeline.seconds[stage.name])
            return Fault(f"kill after {seconds:.3f} s", seconds=seconds)
        if stage.name not in self._changes:
            clear(self.out)
            self._changes[stage.name] = harness.count_changes(stage.argv(self.out), self.out)
            clear(self.out)
        return harness.killed_at(self.rng.randrange(self._changes[stage.name]), self.out)

    def _interrupt(self, name: str, stage: Stage, faults: list[Fault], codes: set[int]) -> None:
        clear(self.out)
        problem = ""
        for number, fault in enumerate(faults):
            end = harness.run(stage.argv(self.out), fault)
            # The run may have ended before the fault; run again, it may say that it has.
            allowed = {*codes, 0, 2} if number else {*codes, 0}
            problem = problem or unexpected(end, allowed)
        self._finish(name, stage, problem, ", ".join(fault.name for fault in faults))

    def _finish(self, name: str, stage: Stage, problem: str, detail: str) -> None:
        """Run the stage once more, without a fault, and compare."""
        end = harness.run(stage.argv(self.out))
        problem = problem or compared(end, self.out, self.expected[stage.name])
        self.table.add(name, stage.name, problem, detail)


def unexpected(end: Outcome, codes: set[int]) -> str:
    """What is wrong with the way a run ended; empty if nothing is."""
    if end.has_traceback:
        return "traceback: " + end.text.strip().splitlines()[-1][:200]
    if end.code not in codes:
        return f"exit {end.code}: {end.error or end.text.strip()[-200:]}"
    if end.code == 2 and not end.error:
        return f"exit 2 without a reason: {end.text.strip()[-200:]}"
    return ""


def compared(end: Outcome, out: Path, expected: dict[str, str]) -> str:
    """What is wrong with a result; empty if it is that of an uninterrupted run."""
    done = end.code == 2 and "finished run" in end.error
    if (problem := unexpected(end, {0})) and not done:
        return f"not continued: {problem}"
    if other := differences(contents(out), expected):
        return f"differs: {other}"
    return ""


def _sleep(seconds: float) -> None:
    import time

    time.sleep(seconds)
