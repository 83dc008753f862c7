"""Free memory, threads, and errors of memory that has run out."""

import subprocess
import sys

import pytest
import torch

from lopd.errors import ConfigError
from lopd.models import machine

CPU = torch.device("cpu")


@pytest.fixture
def cgroup(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    return tmp_path


def test_free_memory_is_within_the_control_group(cgroup):
    unlimited = machine.free_bytes(CPU)
    assert unlimited > 1 << 20
    (cgroup / "memory.max").write_text("max\n")
    (cgroup / "memory.current").write_text("1000\n")
    assert machine.free_bytes(CPU) > 1 << 20
    (cgroup / "memory.max").write_text("5000\n")
    assert machine.free_bytes(CPU) == 4000
    (cgroup / "memory.max").write_text("500\n")
    assert machine.free_bytes(CPU) == 0


@pytest.mark.parametrize(
    ("quota", "processors"),
    [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1), ("9900000 100000", 8)],
)
def test_processors_are_those_of_affinity_and_control_group(cgroup, monkeypatch, quota, processors):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    (cgroup / "cpu.max").write_text(quota + "\n")
    assert machine.processors() == processors


THREADS = """
import sys, torch
from pathlib import Path
from lopd.models import machine
torch.set_num_threads(6)
machine.processors = lambda: 2
machine.limit_threads()
print(torch.get_num_threads())
"""


@pytest.mark.parametrize(("omp", "threads"), [(None, "2"), ("6", "6")])
def test_threads_are_limited_unless_the_environment_decides(monkeypatch, omp, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    assert subprocess.check_output([sys.executable, "-c", THREADS], text=True).strip() == threads


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_has_run_out_names_the_setting(error):
    with (
        pytest.raises(ConfigError, match="out of memory scoring; rerun the same command with --x"),
        machine.explaining_memory("scoring", "--x"),
    ):
        raise error


def test_an_allocation_that_is_too_large_for_a_cpu_counts():
    with (
        pytest.raises(ConfigError, match="out of memory"),
        machine.explaining_memory("allocating", "less"),
    ):
        torch.empty(1 << 60, dtype=torch.uint8)


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shape"), machine.explaining_memory("x", "y"):
        raise RuntimeError("shape mismatch")
