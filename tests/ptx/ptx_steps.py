"""Translates PTX instructions into steps, which a gang of threads takes together."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from ptx_gang import Gang, lanes_of, put_warps, space_of, spread, whole_warps
from ptx_memory import UNSIGNED, WARP, Fault
from ptx_order import UPDATES, Atomic, keep, replace
from ptx_parser import (
    Address,
    Block,
    Immediate,
    Instruction,
    PtxError,
    Register,
    Special,
    Vector,
    is_atomic,
    is_warp_wide,
)
from ptx_semantics import OPERATIONS, TYPES

FULL_WARP = -1

Step = Callable[[Gang], None]


class Translator:
    """Translates the blocks of a program for one launch.

    Args:
        machine: the `ptx_machine.Machine` of the launch, whose memory and parameters steps use.
    """

    def __init__(self, machine: Any) -> None:
        self.machine = machine
        self.sites: list[Instruction] = []  # the instructions by number, for reports

    def of_block(self, block: Block) -> tuple[list[Step], Instruction | None]:
        """The steps of a block, and the instruction that ends it."""
        end = block.end
        if end is not None and end.opcode == "bar.sync":
            if [getattr(x, "value", x) for x in end.operands] != [0]:
                raise PtxError(f"{end}: only barrier 0 of all threads")
        elif end is not None and end.opcode != "ret":
            (target,) = end.operands
            if target not in self.machine.program.labels:
                raise PtxError(f"{end}: target {target}")
        return [self._step(instruction) for instruction in block.body], end

    def _step(self, instruction: Instruction) -> Step:
        self.sites.append(instruction)
        site = len(self.sites) - 1
        step = self._unguarded(instruction, site)
        guard, negated = instruction.guard, instruction.negated
        if guard is None:
            return step

        def guarded(gang: Gang) -> None:
            mask = gang.mask
            allowed = gang.get(guard) ^ negated
            if mask is not None:
                allowed = allowed & mask
            if allowed.any():
                gang.mask = None if allowed.all() else allowed
                step(gang)
            gang.mask = mask

        return guarded

    def _unguarded(self, instruction: Instruction, site: int) -> Step:
        words = instruction.opcode.split(".")
        if is_atomic(instruction.opcode):
            return self._atomic_step(instruction, site)
        if words[0] in ("ld", "st"):
            return self._memory_step(instruction, site)
        if is_warp_wide(instruction.opcode):
            if instruction.guard is not None:
                raise PtxError(f"{instruction} under a predicate")
            return self._warp_step(instruction, site)
        if words[0] == "mov" and any(isinstance(x, Vector) for x in instruction.operands):
            return self._pack_step(instruction)
        return self._arithmetic_step(instruction)

    def _source(self, operand, type_: str, instruction: Instruction):
        """A function from a gang to the operand's values in the type."""
        dtype = np.dtype(TYPES[type_])
        width = 0 if type_ == "pred" else dtype.itemsize
        if isinstance(operand, Register):
            if operand.width != width:
                raise PtxError(f"{instruction}: {operand.name} has not {width} bytes")
            if type_ == "pred":
                return lambda gang: gang.get(operand)
            return lambda gang: gang.get(operand).view(dtype)
        if isinstance(operand, Special):
            name = operand.name
            return lambda gang: gang.batch.special[name][gang.lanes].astype(dtype)
        if operand == "global_smem":
            constant = np.zeros(1, dtype)
        elif isinstance(operand, Immediate):
            constant = _constant(operand, dtype)
        else:
            raise PtxError(f"{instruction}: operand {operand}")
        return lambda gang: constant

    def _arithmetic_step(self, instruction: Instruction) -> Step:
        opcode, target, *operands = instruction.opcode, *(instruction.operands or [None])
        operation = OPERATIONS.get(opcode)
        if len(operands) == 3 and f"{opcode}/3" in OPERATIONS:
            operation = OPERATIONS[f"{opcode}/3"]
        if operation is None:
            raise PtxError(f"unknown instruction {instruction}")
        function, result, types, error = operation
        if len(operands) != len(types):
            raise PtxError(f"{instruction} with {len(operands)} sources, not {len(types)}")
        _check_target(target, result, instruction)
        sources = [self._source(x, t, instruction) for x, t in zip(operands, types, strict=True)]
        dtype = TYPES[result]

        def compute(gang: Gang) -> None:
            value = np.asarray(function(*(source(gang) for source in sources)), dtype)
            if error and self.machine.noise:
                sign = self.machine.random.uniform(-error, error, value.shape)
                value = (value * (1.0 + sign)).astype(dtype)
            gang.put(target, value)

        return compute

    def _pack_step(self, instruction: Instruction) -> Step:
        target, source = instruction.operands
        whole = {"mov.b32": "b32", "mov.b64": "b64"}.get(instruction.opcode)
        vector = source if isinstance(source, Vector) else target
        if whole is None or len(vector.items) != 2:
            raise PtxError(f"unknown form of {instruction}")
        half = {"b32": "b16", "b64": "b32"}[whole]
        bits = 8 * np.dtype(TYPES[half]).itemsize
        wide = TYPES[whole]
        if vector is source:
            _check_target(target, whole, instruction)
            low, high = (self._source(x, half, instruction) for x in vector.items)

            def pack(gang: Gang) -> None:
                upper = high(gang).astype(wide) << wide(bits)
                gang.put(target, upper | low(gang).astype(wide))

            return pack
        get = self._source(source, whole, instruction)
        parts = [(x, wide(i * bits)) for i, x in enumerate(vector.items) if x != "_"]
        for item, _ in parts:
            _check_target(item, half, instruction)

        def unpack(gang: Gang) -> None:
            value = get(gang)
            for item, shift in parts:
                gang.put(item, (value >> shift).astype(TYPES[half]))

        return unpack

    def _memory_step(self, instruction: Instruction, site: int) -> Step:
        kind, space, *rest = instruction.opcode.split(".")
        count = 1
        if rest and rest[0] in ("v2", "v4"):
            count = int(rest.pop(0)[1])
        if len(rest) != 1 or rest[0] not in TYPES or len(instruction.operands) != 2:
            raise PtxError(f"unknown form of {instruction}")
        each = np.dtype(TYPES[rest[0]]).itemsize
        address, data = instruction.operands if kind == "st" else instruction.operands[::-1]
        items = data.items if isinstance(data, Vector) else (data,)
        if not isinstance(address, Address) or len(items) != count:
            raise PtxError(f"unknown form of {instruction}")
        if space == "param" and kind == "ld" and count == 1:
            return self._parameter_step(instruction, address, items[0], rest[0])
        if space not in ("global", "shared"):
            raise PtxError(f"unknown space of {instruction}")
        locate = self._locate(instruction, space, address)
        what = str(instruction)
        if kind == "st":
            sources = [self._stored(x, each, instruction) for x in items]

            def store(gang: Gang) -> None:
                where = gang.selected(locate(gang))
                values = [gang.selected(spread(gang, source(gang))) for source in sources]
                space_of(gang, space).store(where, values, gang.access(site), what)

            return store
        for item in items:
            if not isinstance(item, Register) or item.width < each:
                raise PtxError(f"{instruction}: result {item}")

        def load(gang: Gang) -> None:
            where = gang.selected(locate(gang))
            loaded = space_of(gang, space).load(where, count * each, each, gang.access(site), what)
            for item, value in zip(items, loaded, strict=True):
                register = gang.get(item)
                if gang.mask is None:
                    register[...] = value  # zero-extended
                else:
                    register[gang.mask] = value

        return load

    def _atomic_step(self, instruction: Instruction, site: int) -> Step:
        """The lanes one after another, each at once."""
        atomic, operands = Atomic.parse(instruction), list(instruction.operands)
        if len(operands) != (3 if atomic.kind == "atom" else 2):
            raise PtxError(f"unknown form of {instruction}")
        target = operands.pop(0) if atomic.kind != "st" else None
        if isinstance(target, Vector) and len(target.items) == 1:
            (target,) = target.items
        if target is not None:
            _check_target(target, "b32", instruction)
        address, *operand = operands
        if not isinstance(address, Address):
            raise PtxError(f"unknown form of {instruction}")
        locate, what = self._locate(instruction, "global", address), str(instruction)
        get = self._source(operand[0], "u32", instruction) if operand else lambda gang: 0
        apply = {"ld": keep, "st": replace}.get(atomic.kind) or UPDATES[atomic.update]

        def access(gang: Gang) -> None:
            batch, threads = gang.batch, self.machine.program.threads
            order, lanes = batch.order, np.arange(lanes_of(gang))
            where = locate(gang)
            value = np.broadcast_to(get(gang), len(lanes)).astype(np.uint32)
            for lane in gang.selected(lanes):
                index = gang.lanes.start + lane
                block = int(batch.thread[index]) // threads
                by, change = gang.access_of(lane, site), partial(apply, value[lane])
                if not atomic.reaches_others and int(np.prod(self.machine.grid)) > 1:
                    raise Fault(f"{what}: its scope is one block of several")
                offset, old, after = self.machine.memory.update(where[lane], change, by, what)
                if atomic.acquires:
                    order.acquire(index, offset)
                if atomic.kind != "ld":
                    order.write(index, offset, block, batch.barriers[index], atomic.releases)
                if target is not None:
                    gang.get(target)[lane] = old
                if old != after:
                    batch.asked.clear()
                batch.asked[block] += 1

        return access

    def _stored(self, operand, each: int, instruction: Instruction):
        """The low `each` bytes of an operand."""
        if isinstance(operand, Register):
            if operand.width < each:
                raise PtxError(f"{instruction}: {operand.name} is too narrow")
            return lambda gang: gang.get(operand).astype(UNSIGNED[each])
        return self._source(operand, f"b{8 * each}", instruction)

    def _locate(self, instruction: Instruction, space: str, address: Address):
        offset = address.offset
        if isinstance(address.base, Register):
            base = self._source(address.base, "b64" if space == "global" else "b32", instruction)
        elif space == "shared" and address.base == "global_smem":
            base = self._source("global_smem", "b32", instruction)
        else:
            raise PtxError(f"{instruction}: base {address.base}")
        if space == "global":
            return lambda gang: spread(gang, base(gang)).astype(np.int64) + offset

        def locate(gang: Gang) -> np.ndarray:
            inside = base(gang).astype(np.int64) + offset
            if (gang.selected(spread(gang, inside)) >= self.machine.shared).any():
                raise Fault(f"{instruction}: beyond {self.machine.shared} bytes of shared memory")
            return inside + gang.batch.shared_start[gang.lanes]

        return locate

    def _parameter_step(self, instruction, address: Address, target, type_: str) -> Step:
        raw = self.machine.parameters.get(address.base)
        if raw is None or not isinstance(target, Register):
            raise PtxError(f"{instruction}: parameter {address.base}")
        dtype = np.dtype(TYPES[type_])
        if address.offset + dtype.itemsize > len(raw):
            raise PtxError(f"{instruction}: beyond the parameter's {len(raw)} bytes")
        value = np.frombuffer(raw, dtype, 1, address.offset)
        if target.width > dtype.itemsize:  # ld.param.s32 into 64 bits extends the sign
            value = value.astype(np.int64 if dtype.kind == "i" else np.uint64)
        elif target.width != dtype.itemsize:
            raise PtxError(f"{instruction}: result {target}")
        return lambda gang: gang.put(target, value)

    def _warp_step(self, instruction: Instruction, site: int) -> Step:
        opcode, operands = instruction.opcode, instruction.operands
        if opcode == "shfl.sync.bfly.b32" and len(operands) == 5:
            target, source, lane_mask, clamp, members = operands
            _check_target(target, "b32", instruction)
            if (clamp, members) != (Immediate(31), Immediate(FULL_WARP)):
                raise PtxError(f"{instruction}: only whole warps")
            get = self._source(source, "b32", instruction)
            if not isinstance(lane_mask, Immediate):
                raise PtxError(f"{instruction}: lane mask {lane_mask}")
            partner = np.arange(WARP) ^ lane_mask.value

            def exchange(gang: Gang) -> None:
                rows = whole_warps(gang, get(gang))
                put_warps(gang, target, rows[:, partner])

            return exchange
        if opcode.startswith("redux.sync.") and len(operands) == 3:
            _, _, name, type_ = opcode.split(".")
            reduce = {"max": np.maximum, "min": np.minimum}.get(name)
            if type_ == "f32":  # a NaN loses against a number
                reduce = {"max": np.fmax, "min": np.fmin}.get(name)
            if reduce is None or type_ not in ("s32", "u32", "f32"):
                raise PtxError(f"unknown instruction {instruction}")
            target, source, members = operands
            _check_target(target, type_, instruction)
            get = self._source(source, type_, instruction)
            member = self._source(members, "s32", instruction)

            def redux(gang: Gang) -> None:
                if (gang.selected(spread(gang, member(gang))) != FULL_WARP).any():
                    raise Fault(f"{instruction}: not the whole warp")
                rows = whole_warps(gang, get(gang))
                best = np.repeat(reduce.reduce(rows, axis=1)[:, None], WARP, axis=1)
                put_warps(gang, target, best)

            return redux
        if opcode == "bar.warp.sync" and operands in (
            (Immediate(FULL_WARP),),
            (Immediate(2**32 - 1),),
        ):

            def synchronise(gang: Gang) -> None:
                syncs = gang.batch.warp_syncs[gang.lanes]
                whole_warps(gang, syncs)
                syncs[slice(None) if gang.mask is None else gang.mask] += 1
                if gang.batch.order is not None:
                    lanes = np.arange(gang.lanes.start, gang.lanes.stop)
                    gang.batch.order.share(gang.selected(lanes), WARP)

            return synchronise
        parts = opcode.split(".")
        if parts[0] in ("ldmatrix", "stmatrix") and parts[1:4] == ["sync", "aligned", "m8n8"]:
            return self._matrix_step(instruction, site)
        raise PtxError(f"unknown instruction {instruction}")

    def _matrix_step(self, instruction: Instruction, site: int) -> Step:
        """8 x 8 matrices of 16-bit elements: lane i holds elements 2i and 2i + 1 of each."""
        parts = instruction.opcode.split(".")
        count = {"x1": 1, "x2": 2, "x4": 4}.get(parts[4])
        is_load = parts[0] == "ldmatrix"
        address, vector = instruction.operands if not is_load else instruction.operands[::-1]
        if count is None or parts[5:] != ["shared", "b16"] or len(vector.items) != count:
            raise PtxError(f"unknown instruction {instruction}")
        locate = self._locate(instruction, "shared", address)
        what = str(instruction)
        for item in vector.items:
            _check_target(item, "b32", instruction)

        def transfer(gang: Gang) -> None:
            rows = whole_warps(gang, spread(gang, locate(gang)))
            for matrix, item in enumerate(vector.items):
                # lane i: row i // 4, from the address that lane 8 matrix + i // 4 gives
                row = rows[:, 8 * matrix + np.arange(WARP) // 4] + 4 * (np.arange(WARP) % 4)
                if (rows[:, 8 * matrix : 8 * matrix + 8] % 16).any():
                    raise Fault(f"{what}: a row is not aligned to 16 bytes")
                by = gang.access(site)
                if is_load:
                    (value,) = gang.batch.shared.load(row.ravel(), 4, 4, by, what)
                    put_warps(gang, item, value.reshape(-1, WARP))
                else:
                    value = whole_warps(gang, gang.get(item)).ravel()
                    gang.batch.shared.store(row.ravel(), [value], by, what)

        return transfer


def _constant(operand: Immediate, dtype: np.dtype) -> np.ndarray:
    if operand.is_float != (dtype.kind == "f") and dtype.itemsize != 4:
        raise PtxError(f"immediate {operand} as {dtype}")
    if operand.is_float:
        return np.array([operand.value], np.float32).view(dtype)
    if dtype.kind == "b":
        return np.array([operand.value != 0])
    bits = operand.value & ((1 << 8 * dtype.itemsize) - 1)
    return np.array([bits], UNSIGNED[dtype.itemsize]).view(dtype)


def _check_target(target, type_: str, instruction: Instruction) -> None:
    width = 0 if type_ == "pred" else np.dtype(TYPES[type_]).itemsize
    if not isinstance(target, Register) or target.width != width:
        raise PtxError(f"{instruction}: result {target} has not {width} bytes")
