"""Stages run in forks of one warm process, with a fault on the way; and what a run left behind.

Starting Python and importing torch takes far longer than a stage of tiny models. `warm_up` imports
everything once; `run` forks, and the child calls `lopd.cli.main`, so a run costs only its work.
"""

import contextlib
import fcntl
import importlib
import io
import os
import re
import resource
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

HANG_S = 600  # a run that takes this long hangs: the stages here take seconds on any machine
# Audit events by which Python changes the file system; `open` counts only when it may write.
EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")


def warm_up() -> None:
    """Import what the stages import, and run nothing, so that forks are safe."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    torch.set_num_threads(1)
    from lopd.cli.commands import COMMANDS

    for module in sorted({command.module for command in COMMANDS.values()}):
        importlib.import_module(f"lopd.stages.{module}")
    for module in ("lopd.training.setup", "lopd.training.trainer", "lopd.engines.transformers"):
        importlib.import_module(module)
    importlib.import_module("transformers.models.qwen3.modeling_qwen3")


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its exit code (negative: the signal), what it printed, how long it took."""

    code: int
    text: str
    seconds: float

    @property
    def error(self) -> str:
        """The one line that names an error; empty if there is none."""
        lines = [line for line in self.text.splitlines() if re.match(r"lopd( \S+)?: error: ", line)]
        return lines[-1] if lines else ""

    @property
    def has_traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.text


@dataclass(frozen=True)
class Fault:
    """What happens to a run: `prepare` in the child before it starts, `finish` when it has ended
    by itself, a signal after `seconds`."""

    name: str
    prepare: Callable[[], None] | None = None
    finish: Callable[[], None] | None = None
    seconds: float | None = None
    signal: int = signal.SIGKILL


def killed_at(count: int, folder: Path) -> Fault:
    """A kill before change `count` (from 0) of the file system below `folder`."""

    def step(number: int) -> None:
        if number == count:
            os.kill(os.getpid(), signal.SIGKILL)

    return Fault(f"kill before change {count}", lambda: _watch(folder, step))


def count_changes(argv: Sequence[object], folder: Path) -> int:
    """Changes of the file system that an uninterrupted run makes below `folder`."""
    seen = [0]

    def prepare() -> None:
        _watch(folder, lambda number: seen.__setitem__(0, number + 1))

    done = run(argv, Fault("none", prepare, lambda: print(f"changes: {seen[0]}")))
    assert done.code == 0, done.text
    return int(done.text.rsplit("changes: ", 1)[1])


def _watch(folder: Path, step: Callable[[int], None]) -> None:
    """Call `step(number)` before every change below `folder` that Python makes: files opened for
    writing, synced, renamed or removed, folders made. Libraries in C and Rust are not seen."""
    prefix, fsync, count = os.fspath(folder), os.fsync, iter(range(1 << 60))

    def see(path) -> None:
        if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(prefix):
            step(next(count))

    def hook(event: str, args: tuple) -> None:
        if event in EVENTS or (
            event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        ):
            see(args[0])

    def sync(descriptor) -> None:
        see(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    os.fsync = sync
    sys.addaudithook(hook)


def file_size_limit(size: int) -> Fault:
    """No file may grow beyond `size` bytes, as with a quota."""

    def prepare() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return Fault(f"files of at most {size} bytes", prepare)


def run(argv: Sequence[object], fault: Fault | None = None) -> Outcome:
    """Run one lopd command in a fork and wait for it."""
    return wait(start(argv, fault), fault)


@dataclass(frozen=True)
class Started:
    """A run in progress."""

    pid: int
    log: int
    began: float


def start(argv: Sequence[object], fault: Fault | None = None) -> Started:
    """Start one lopd command in a fork."""
    log, write_end = os.pipe()  # not a file: a fault may limit those
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 1 << 20)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 120
        try:
            os.dup2(write_end, 1)
            os.dup2(write_end, 2)
            sys.stdout = io.TextIOWrapper(io.FileIO(1, "w"), write_through=True)
            sys.stderr = io.TextIOWrapper(io.FileIO(2, "w"), write_through=True)
            for name in (signal.SIGINT, signal.SIGTERM):
                signal.signal(name, signal.default_int_handler if name == 2 else signal.SIG_DFL)
            if fault is not None and fault.prepare is not None:
                fault.prepare()
            from lopd.cli import main

            code = main([str(word) for word in argv])
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command has ended
            if fault is not None and fault.finish is not None:
                fault.finish()
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
            os._exit(code)
    os.close(write_end)
    return Started(pid, log, time.monotonic())


def wait(started: Started, fault: Fault | None = None) -> Outcome:
    """Wait for a run, and send the fault's signal on the way."""
    pidfd = os.pidfd_open(started.pid)
    try:
        if fault is not None and fault.seconds is not None:
            ended, _, _ = select.select([pidfd], [], [], fault.seconds)
            if not ended:
                os.kill(started.pid, fault.signal)
        ended, _, _ = select.select([pidfd], [], [], HANG_S)
        if not ended:
            os.kill(started.pid, signal.SIGKILL)
    finally:
        os.close(pidfd)
    code = os.waitstatus_to_exitcode(os.waitpid(started.pid, 0)[1])
    seconds = time.monotonic() - started.began
    with open(started.log, "rb") as file:
        text = file.read().decode("utf-8", "replace")
    return Outcome(code if ended else 124, text, seconds)
