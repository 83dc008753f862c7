"""The row pass with a gradient by the kernels of `kernels/one_pass.py`, several programs per row.

It moves 6 bytes a logit where `rows` moves 10, and waits within a row instead. No GPU has measured
yet which is faster, so `ENABLED` is False. Set it for a measurement or a test: `rows.row_pass`
then uses this form for every call that wants the gradient of whole rows, whatever its rule, its
logit options and its dtypes are. Calls without a gradient, with `split`, and panels read the
logits once in any case. Where this form cannot run, the call raises.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from lopd_kernels._core.waves import occupancy
from lopd_kernels._triton.kernels import one_pass

ENABLED = False


class Launch(NamedTuple):
    """How the kernel is launched."""

    BLOCK: int  # columns of a program at most
    num_warps: int
    maxnreg: int


# By whether logits have a soft cap. A thread has 64 columns in registers, or 32 where tanh needs
# more of them: no spills for any target (tests/kernels/aot.py).
LAUNCHES = {False: Launch(BLOCK=8192, num_warps=4, maxnreg=128),
            True: Launch(BLOCK=4096, num_warps=4, maxnreg=160)}  # fmt: skip
OLDEST_TRITON = (3, 7)  # 3.6 spills, up to 110 words of a thread


def slices(vocab: int, block: int) -> tuple[int, int]:
    """(programs of a row, columns of each): equal slices that keep wide loads aligned."""
    programs = triton.cdiv(vocab, block)
    return programs, triton.cdiv(triton.cdiv(vocab, programs), 16) * 16


def is_compiled_well() -> bool:
    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= OLDEST_TRITON


def multiprocessors(device: torch.device) -> int:
    """Of a device that can hold all programs of a launch at once.

    Raises:
        NotImplementedError: programs of this device or of the interpreter do not run together, or
            Triton is too old.
    """
    if not isinstance(one_pass.one_pass_kernel, triton.JITFunction):
        raise NotImplementedError(
            "one_pass.ENABLED is set, but Triton's interpreter runs one program after another, and "
            "programs of a row would wait for ever; leave it False with TRITON_INTERPRET=1"
        )
    if not is_compiled_well():
        raise NotImplementedError(
            f"one_pass.ENABLED is set, but Triton is {triton.__version__}, whose code for it "
            f"spills; it needs {OLDEST_TRITON[0]}.{OLDEST_TRITON[1]} or newer"
        )
    if device.type != "cuda" or torch.version.hip:
        kind = "ROCm" if torch.version.hip else device.type
        raise NotImplementedError(
            f"one_pass.ENABLED is set, but the tensors are on {kind}; it needs an NVIDIA GPU"
        )
    return torch.cuda.get_device_properties(device).multi_processor_count


def grid(rows: int, programs: int, resident: int) -> int:
    """Programs of a launch: whole groups, one to a row at a time, as many as are resident at once.

    Raises:
        NotImplementedError: the device is too small for a row.
    """
    if programs > resident:
        raise NotImplementedError(
            f"one_pass.ENABLED is set, but a row takes {programs} programs at once and the device "
            f"holds {resident}; leave it False"
        )
    return min(rows, resident // programs) * programs


def row_pass(
    u: Tensor,
    listed_ids: Tensor,
    active: Tensor,
    listed: Tensor,  # [R, K] scratch, filled with -inf
    target: Tensor,
    weights: Tensor,
    stats: Tensor,
    out: Tensor,
    bias: Tensor,
    list_block: int,
    logit_arguments: dict[str, Any],
    rule_arguments: dict[str, Any],
    want_entropy: bool,
) -> None:
    """`rows.row_pass` with a gradient, from the arguments that it has prepared."""
    (count, vocab), k = u.shape, listed_ids.shape[1]
    launch = LAUNCHES[logit_arguments["SOFTCAP"]]
    programs, width = slices(vocab, launch.BLOCK)
    size = grid(
        count, programs, multiprocessors(u.device) * occupancy(launch.maxnreg, launch.num_warps)
    )
    block = min(launch.BLOCK, max(128, triton.next_power_of_2(width)))
    warps = max(1, launch.num_warps * block // launch.BLOCK)
    arrived, invalid = u.new_empty((2, count), dtype=torch.int32)
    partials = u.new_empty((count, programs, 4))
    one_pass.take_kernel[(count,)](
        u, listed_ids, listed, active, arrived, invalid, bias, u.stride(0), vocab, k,
        KBLOCK=list_block, num_warps=max(1, list_block // 256), num_stages=1,
        maxnreg=launch.maxnreg, **logit_arguments,
    )  # fmt: skip
    one_pass.one_pass_kernel[(size,)](
        u, out, listed_ids, listed, target, active, weights, stats, arrived, invalid, partials,
        bias, u.stride(0), out.stride(0), min(u.stride(0), out.stride(0)), vocab, k,
        target.shape[1], stats.stride(0),
        rows=count, programs=programs, width=width,
        **logit_arguments, **rule_arguments, ENTROPY=want_entropy,
        BLOCK=block, KBLOCK=list_block, PBLOCK=triton.next_power_of_2(programs),
        num_warps=warps, num_stages=1, maxnreg=launch.maxnreg, launch_cooperative_grid=True,
    )  # fmt: skip
