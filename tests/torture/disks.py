"""Disks that are full, files that may not grow, and file systems that become read-only."""

import os
import random
import shutil
import subprocess
from pathlib import Path

from torture import harness
from torture.interruptions import compared, unexpected
from torture.pipeline import Pipeline, Stage, clear, contents
from torture.table import Table

FULL, QUOTA, READ_ONLY = "full disk", "file size limit", "read-only file system"
REFUSED = {0, 2}


class Disks:
    """Attacks on the disk under a stage's output folder."""

    def __init__(self, pipeline: Pipeline, table: Table, seed: int) -> None:
        self.pipeline, self.table, self.seed = pipeline, table, seed
        self.mount = pipeline.root / "disk"
        self.stages = [stage for stage in pipeline.order if not stage.in_place]
        self.expected = {stage.name: contents(stage.out) for stage in self.stages}
        self.may_mount = self._may_mount()
        if not self.may_mount:
            for fault in (FULL, READ_ONLY):
                table.skipped.append((fault, "no right to mount a file system"))

    def fill(self, number: int) -> None:
        """A disk with room for a part of what the stage writes, then with enough."""
        if not self.may_mount:
            return
        stage = self.stages[number % len(self.stages)]
        size = self._rng(FULL, number).randrange(4096, max(8192, _bytes(stage.out)))
        self._mount(f"size={size}")
        try:
            end = harness.run(stage.argv(self.mount / "out"))
            problem = unexpected(end, REFUSED)
            self._mount("remount,size=64m")
            self._finish(FULL, stage, problem, f"{size} bytes", self.mount / "out")
        finally:
            self._unmount()

    def limit_files(self, number: int) -> None:
        """No file may grow beyond a random size, then any may."""
        stage = self.stages[number % len(self.stages)]
        largest = max(path.stat().st_size for path in stage.out.rglob("*") if path.is_file())
        size = int(2 ** self._rng(QUOTA, number).uniform(5, largest.bit_length()))
        out = self.pipeline.root / "attacked"
        clear(out)
        end = harness.run(stage.argv(out), harness.file_size_limit(size))
        self._finish(QUOTA, stage, unexpected(end, REFUSED), f"{size} bytes", out)

    def make_read_only(self, number: int) -> None:
        """A stage that was killed goes on where nothing can be written, and then where it can."""
        if not self.may_mount:
            return
        stage = self.stages[number % len(self.stages)]
        self._mount("size=64m")
        try:
            out = self.mount / "out"
            latest = self.pipeline.seconds[stage.name]
            seconds = self._rng(READ_ONLY, number).uniform(0, latest)
            harness.run(stage.argv(out), harness.Fault("kill", seconds=seconds))
            self._mount("remount,ro")
            end = harness.run(stage.argv(out))
            self._mount("remount,rw")
            detail = f"killed after {seconds:.3f} s"
            self._finish(READ_ONLY, stage, unexpected(end, REFUSED), detail, out)
        finally:
            self._unmount()

    def _rng(self, fault: str, number: int) -> random.Random:
        return random.Random(f"{self.seed} {fault} {number}")

    def _finish(self, fault: str, stage: Stage, problem: str, detail: str, out: Path) -> None:
        end = harness.run(stage.argv(out))
        problem = problem or compared(end, out, self.expected[stage.name])
        self.table.add(fault, stage.name, problem, detail)

    def _may_mount(self) -> bool:
        if shutil.which("mount") is None or os.geteuid() != 0:
            return False
        try:
            self._mount("size=64k")
        except subprocess.CalledProcessError:
            return False
        self._unmount()
        return True

    def _mount(self, options: str) -> None:
        self.mount.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", self.mount]
        subprocess.run(command, check=True, capture_output=True)

    def _unmount(self) -> None:
        subprocess.run(["umount", self.mount], check=True)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*"))
