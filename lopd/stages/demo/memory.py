"""Peak memory of this process, by part, on Linux."""

import ctypes
from pathlib import Path

_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def reset_peak() -> None:
    """Start a new part: its peak begins at the memory that is in use now.

    What earlier parts have freed and the allocator keeps is given back first, where glibc can.
    Otherwise it would count as in use, and a part that takes it again would seem to need nothing.
    """
    if _REFS.exists():
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        _REFS.write_text("5", encoding="ascii")  # VmHWM becomes VmRSS


def peak_mib() -> float | None:
    """Largest resident size since the last reset, in MiB; None where Linux does not say."""
    if not (_REFS.exists() and _STATUS.exists()):
        return None
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))
