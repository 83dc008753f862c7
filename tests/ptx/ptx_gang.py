"""Threads that execute together, and the state of the blocks that are resident."""

from collections import Counter
from typing import Any

import numpy as np
from ptx_memory import POISON, UNSIGNED, WARP, Access, Space
from ptx_order import Order
from ptx_parser import Register

RUNNING, WAITING, EXITED = 0, 1, 2


class Gang:
    """Threads that execute together: views of the registers of their lanes."""

    def __init__(self, state: "Batch", lanes: slice) -> None:
        self.lanes, self.batch = lanes, state
        self.registers = {name: array[lanes] for name, array in state.registers.items()}
        self.mask: np.ndarray | None = None  # None: all lanes

    def get(self, register: Register) -> np.ndarray:
        return self.registers[register.name]

    def put(self, register: Register, value: np.ndarray) -> None:
        target = self.registers[register.name]
        if target.dtype != value.dtype:
            value = value.view(target.dtype)
        if self.mask is None:
            target[...] = value
        else:
            np.copyto(target, value, where=self.mask)

    def selected(self, array: np.ndarray) -> np.ndarray:
        return array if self.mask is None else array[self.mask]

    def access(self, site: int) -> Access:
        batch = self.batch
        by = (
            self.selected(x[self.lanes]) for x in (batch.thread, batch.barriers, batch.warp_syncs)
        )
        seen = None if batch.order is None else self.selected(batch.order.seen[self.lanes])
        return Access(*by, seen, site, batch.machine.program.threads)

    def access_of(self, lane: int, site: int) -> Access:
        """The same of one lane."""
        mask, self.mask = self.mask, np.arange(lanes_of(self)) == lane
        by, self.mask = self.access(site), mask
        return by


class Batch:
    """The blocks of threads that are resident together, and their state."""

    def __init__(self, machine: Any, blocks: np.ndarray) -> None:
        threads = machine.program.threads
        lanes = len(blocks) * threads
        self.machine, self.blocks = machine, blocks
        self.thread = (blocks[:, None] * threads + np.arange(threads)).ravel()
        self.barriers, self.warp_syncs = np.zeros(lanes, np.int32), np.zeros(lanes, np.int32)
        self.counter, self.state = np.zeros(lanes, np.int32), np.full(lanes, RUNNING, np.int8)
        self.order = None
        if machine.program.has_atomics:
            self.order = Order(lanes, int(np.prod(machine.grid)), machine.released)
        # block -> its atomic accesses since a block changed a value or exited
        self.asked: Counter[int] = Counter()
        self.registers = {}
        for name, width in machine.program.registers.items():
            if width == 0:
                self.registers[name] = np.ones(lanes, bool)
            else:
                poison = int.from_bytes(bytes([POISON]) * width, "little")
                self.registers[name] = np.full(lanes, poison, UNSIGNED[width])
        self.shared = Space([machine.shared] * len(blocks), 0, 1, machine.describe, machine.races)
        self.shared_start = np.repeat(self.shared.starts, threads)
        index = np.tile(np.arange(threads), len(blocks))
        x, y, z = machine.grid
        self.special = {
            "tid.x": index, "tid.y": 0 * index, "tid.z": 0 * index, "laneid": index % WARP,
            "ntid.x": 0 * index + threads, "nctaid.x": 0 * index + x, "nctaid.y": 0 * index + y,
            "nctaid.z": 0 * index + z, "ctaid.x": np.repeat(blocks % x, threads),
            "ctaid.y": np.repeat(blocks // x % y, threads),
            "ctaid.z": np.repeat(blocks // (x * y), threads),
        }  # fmt: skip


def lanes_of(gang: Gang) -> int:
    return gang.lanes.stop - gang.lanes.start


def spread(gang: Gang, values: np.ndarray) -> np.ndarray:
    """One value per lane, of values that may be one for all."""
    return np.broadcast_to(values, lanes_of(gang))


def space_of(gang: Gang, name: str) -> Space:
    return gang.batch.machine.memory if name == "global" else gang.batch.shared


def whole_warps(gang: Gang, values: np.ndarray) -> np.ndarray:
    """[warp, lane] of the active lanes, which are whole warps."""
    values = spread(gang, values).reshape(-1, WARP)
    return values if gang.mask is None else values[gang.mask.reshape(-1, WARP).all(1)]


def put_warps(gang: Gang, target: Register, rows: np.ndarray) -> None:
    register = gang.get(target)
    value = np.ascontiguousarray(rows).view(register.dtype).ravel()
    register[slice(None) if gang.mask is None else gang.mask] = value
