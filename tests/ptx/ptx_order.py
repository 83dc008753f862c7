"""Atomic accesses, and what blocks of threads learn of each other through them.

A release publishes what the thread's block did before its last bar.sync, and what the thread had
learnt itself. An acquire that reads the published value learns all that; the rest of its block
learns it at the next bar.sync, the rest of its warp at the next bar.warp.sync. This is a little
less than PTX grants: a thread's own accesses since the barrier count only with the next one,
because which thread of a block stores a scalar is the compiler's choice; and a read-modify-write
passes on what others have released before it only if it acquires.
"""

from typing import NamedTuple

import numpy as np
from ptx_parser import Instruction, PtxError

SEMANTICS = ("relaxed", "acquire", "release", "acq_rel")
WIDE_SCOPES = ("gpu", "sys")  # reach other blocks of the grid


def keep(operand, old):
    return old


def replace(operand, old):
    return operand


UPDATES = {"add.u32": np.add, "exch.b32": replace}  # of (operand, value before)


class Atomic(NamedTuple):
    """An access that threads may make to one address at one time."""

    kind: str  # ld, st or atom
    update: str  # of an atom: the operation and its type
    acquires: bool
    releases: bool
    reaches_others: bool  # its scope includes other blocks

    @classmethod
    def parse(cls, instruction: Instruction) -> "Atomic":
        """From an opcode in the order of the ISA or in Triton's; 32 bits of global memory."""
        kind, *words = instruction.opcode.split(".")
        semantics, scope = "relaxed", "sys"  # of .volatile
        if "volatile" in words:
            words.remove("volatile")
        else:
            semantics = next((w for w in words if w in SEMANTICS), "")
            scope = next((w for w in words if w in ("cta", "gpu", "sys")), "")
            words = [w for w in words if w not in (semantics, scope)]
        space, *rest = words or [""]
        update = ".".join(rest)
        known = UPDATES if kind == "atom" else {"b32", "u32", "s32"}
        wrong = {"ld": ("release", "acq_rel"), "st": ("acquire", "acq_rel")}.get(kind, ())
        if not semantics or not scope or space != "global" or update not in known:
            raise PtxError(f"unknown instruction {instruction}")
        if semantics in wrong:
            raise PtxError(f"{instruction}: {semantics} of a {kind}")
        acquires, releases = (
            semantics in ("acquire", "acq_rel"),
            semantics in ("release", "acq_rel"),
        )
        return cls(kind, update, acquires, releases, scope in WIDE_SCOPES)


class Order:
    """What each thread knows of each block: it has seen all before the block's barrier number x.

    Args:
        released: offset of an address -> what the last write there published; of the launch.
    """

    def __init__(self, lanes: int, blocks: int, released: dict[int, np.ndarray]) -> None:
        self.seen, self.released = np.zeros((lanes, blocks), np.int32), released

    def acquire(self, lane: int, offset: int) -> None:
        if offset in self.released:
            np.maximum(self.seen[lane], self.released[offset], out=self.seen[lane])

    def write(self, lane: int, offset: int, block: int, barriers: int, releases: bool) -> None:
        self.released.pop(offset, None)
        if releases:
            self.released[offset] = self.seen[lane].copy()
            self.released[offset][block] = barriers

    def share(self, lanes: np.ndarray, group: int) -> None:
        """Each group of so many of these threads shares what one of them knows."""
        known = self.seen[lanes].reshape(-1, group, self.seen.shape[1]).max(1)
        self.seen[lanes] = np.repeat(known, group, axis=0)
