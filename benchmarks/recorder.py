"""Rows of a run: self-contained JSON lines, written immediately.

Each row has versions, device, commit and the command that measures it again.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

PEERS = ("liger-kernel", "cut-cross-entropy")
ROOT = Path(__file__).parents[1]


class OutOfTime(Exception):
    """The time limit of the run has passed; completed rows are on disk."""


@dataclass
class Recorder:
    """Collects the rows of one run and writes each one immediately."""

    path: Path
    device: torch.device
    command: str
    deadline: float = float("inf")  # of time.monotonic
    commit: str | None = None
    identity: dict[str, Any] = field(init=False)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.identity = identity(self.device, self.commit)

    def emit(self, part: str, name: str, status: str, **fields: Any) -> dict[str, Any]:
        row = {
            "part": part, "variant": name, "status": status, **fields,
            "command": self.command.format(part=part), **self.identity,
        }  # fmt: skip
        row = json.loads(json.dumps(row), parse_constant=lambda name: None)  # JSON has no NaN
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if status != "ok" or part != "correctness":  # these are many
            print(describe(row), flush=True)
        return row

    @property
    def out_of_time(self) -> bool:
        return time.monotonic() > self.deadline

    def check_time(self) -> None:
        if self.out_of_time:
            raise OutOfTime


def describe(row: dict[str, Any]) -> str:
    text = f"{row['part']:>13}  {row['variant']:<34} {row['status']:<12}"
    if row.get("median_ms") is not None:
        text += f" {row['median_ms']:9.3f} ms"
    if row.get("tokens_per_s") is not None:
        text += f" {row['tokens_per_s']:8.3g} tokens/s"
    if row.get("floor_ratio") is not None:
        text += f" {row['floor_ratio']:6.3f} x floor"
    if row.get("extra_mib") is not None:
        text += f" {row['extra_mib']:8.1f} MiB extra"
    if row.get("dweight_error") is not None:
        text += f"  dW error {row['dweight_error']:.1e}"
    if row.get("head_share") is not None:
        text += f"  head {row['head_share']:.1%}"
    if row.get("largest_sequences") is not None:
        text += f"  {row['largest_sequences']} sequences"
    return text + (f"  {row['reason']}" if row.get("reason") else "")


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def identity(device: torch.device, commit: str | None) -> dict[str, Any]:
    cuda = device.type == "cuda"
    rows = ":!benchmarks/results"  # those that earlier runs left; they change no measurement
    changes = None if commit else command_output("git", "status", "--porcelain", "--", ".", rows)
    return {
        "date": now(),
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU {platform.machine()}",
        "driver": query_gpu("driver_version") if cuda else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{name: version(name) for name in ("triton", *PEERS)},
        "commit": commit or command_output("git", "rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def command_output(*command: str) -> str | None:
    """The output of a command; None if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def query_gpu(*fields: str) -> str | None:
    query = f"--query-gpu={','.join(fields)}"
    return command_output("nvidia-smi", query, "--format=csv,noheader", "--id=0")
