"""Free memory of a device, threads of a CPU, and errors of memory that has run out."""

import contextlib
import functools
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from lopd.errors import ConfigError

LOG = logging.getLogger(__name__)

CGROUP = Path("/sys/fs/cgroup")
# How torch's allocators for CPUs begin a RuntimeError.
_ON_A_CPU = ("DefaultCPUAllocator", "not enough memory", "can't allocate memory")


def free_bytes(device: torch.device) -> int:
    """Bytes that a process may still allocate on a device; on a CPU, within its control group."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        found.append(int(text.split("MemAvailable:")[1].split()[0]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
        most = int((CGROUP / "memory.max").read_text(encoding="ascii"))
        found.append(most - int((CGROUP / "memory.current").read_text(encoding="ascii")))
    return max(0, min(found, default=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")))


def processors() -> int:
    """Processors that this process may use: those of its affinity, within its control group."""
    count = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        quota, period = (CGROUP / "cpu.max").read_text(encoding="ascii").split()
        count = min(count, max(1, int(quota) // int(period)))
    return count


@functools.cache
def limit_threads() -> None:
    """Let torch use no more threads than there are processors for it, and print how many.

    torch counts the cores of the machine, which a container may have few of; more threads than
    processors wait for each other. OMP_NUM_THREADS decides if it is set. Only the first call in a
    process does something.
    """
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > processors():
        torch.set_num_threads(processors())
    LOG.info(f"threads: {torch.get_num_threads()}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch says that memory has run out."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _ON_A_CPU)
    )


@contextlib.contextmanager
def explaining_memory(what: str, remedy: str) -> Iterator[None]:
    """Turn an error of memory that has run out into a ConfigError.

    Args:
        what: what was done, with its size.
        remedy: the settings that need less.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(f"out of memory {what}; rerun the same command with {remedy}") from error
