"""Executes the basic blocks of a PTX program on vectors with one element per thread.

Threads that execute together form a gang. Within a gang every thread has its own program counter;
the block furthest behind runs first, under a mask of the threads that are at it. A gang runs until
all its threads wait at a barrier or have exited, then another gang runs:

    "block"    all threads of up to 8 blocks of threads are one gang (fast)
    "warps"    a warp is a gang, in order
    "reverse"  the same from the last warp to the first, and from the last block
    "random"   the same in an order drawn from the seed

In a program with atomic accesses no gang has more than one block, and a gang lets the others run
after each such access; "random" then gives each block a speed of its own. A device holds so many
blocks at once: `resident`, or 8 in an ordinary launch and all of them in a cooperative one. The
next blocks start when these have exited.

What a device leaves undefined is a `Fault`: a barrier that not all threads of a block reach, a
warp-wide instruction without all its lanes, an access outside an allocation, a race. So is a
launch in which blocks wait for ever.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial

import numpy as np
from ptx_memory import POISON, UNSIGNED, WARP, Access, Fault, Space
from ptx_order import UPDATES, Atomic, Order, keep, replace
from ptx_parser import (
    Address,
    Block,
    Immediate,
    Instruction,
    Program,
    PtxError,
    Register,
    Special,
    Vector,
    is_atomic,
    is_warp_wide,
)
from ptx_semantics import OPERATIONS, TYPES

SCHEDULES = ("block", "warps", "reverse", "random")
RUNNING, WAITING, EXITED = 0, 1, 2
BLOCKS_AT_ONCE = 8
PATIENCE = 100  # how often each block asks, if no block changes anything, before it is a deadlock
FULL_WARP = -1


class Gang:
    """Threads that execute together: views of the registers of their lanes."""

    def __init__(self, state: "_Batch", lanes: slice) -> None:
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
        mask, self.mask = self.mask, np.arange(_lanes(self)) == lane
        by, self.mask = self.access(site), mask
        return by


class _Batch:
    """The blocks of threads that are resident together, and their state."""

    def __init__(self, machine: "Machine", blocks: np.ndarray) -> None:
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


Step = Callable[[Gang], None]


class Machine:
    """One launch of a program.

    Args:
        program: from `ptx_parser.parse`.
        shared: bytes of shared memory per block of threads.
        grid: blocks of threads in x, y and z.
        memory: the global memory.
        arguments: values of the parameters as bytes.
        schedule: one of `SCHEDULES`.
        seed: of the random schedule and of `noise`.
        resident: blocks that the device holds at once.
        cooperative: whether the launch is refused if the device does not hold all blocks.
        races: look for races.
        noise: let approximate instructions err, each up to the bound of the ISA.
    """

    def __init__(
        self,
        program: Program,
        shared: int,
        grid: tuple[int, int, int],
        memory: Space,
        arguments: list[bytes],
        *,
        schedule: str = "block",
        seed: int = 0,
        resident: int | None = None,
        cooperative: bool = False,
        races: bool = True,
        noise: bool = False,
    ) -> None:
        self.program, self.shared, self.grid, self.memory = program, shared, grid, memory
        self.parameters = {
            p.name: value for p, value in zip(program.parameters, arguments, strict=True)
        }
        self.schedule, self.races, self.noise = schedule, races, noise
        count = int(np.prod(grid))
        if cooperative and resident is not None and count > resident:
            raise Fault(f"a cooperative launch of {count} blocks, but {resident} fit at once")
        self.resident = resident or (count if cooperative else BLOCKS_AT_ONCE)
        self.random = np.random.default_rng(seed)
        self.released: dict[int, np.ndarray] = {}  # see `Order`
        self.sites: list[Instruction] = []
        self.code = [self._translate(block) for block in program.blocks]

    def describe(self, site: int) -> str:
        return str(self.sites[site])

    # -- schedules --

    def run(self) -> None:
        blocks = np.arange(int(np.prod(self.grid)))
        if self.schedule == "reverse":
            blocks = blocks[::-1]
        elif self.schedule == "random":
            blocks = self.random.permutation(blocks)
        with np.errstate(all="ignore"):
            for first in range(0, len(blocks), self.resident):
                self._run_batch(_Batch(self, blocks[first : first + self.resident]))

    def _run_batch(self, batch: _Batch) -> None:
        lanes = len(batch.thread)
        size = WARP
        if self.schedule == "block":
            size = lanes if batch.order is None else self.program.threads
        gangs = [Gang(batch, slice(i, i + size)) for i in range(0, lanes, size)]
        speeds = self.random.uniform(0.02, 1.0, len(batch.blocks))
        while not (batch.state == EXITED).all():
            exited = (batch.state == EXITED).sum()
            order = np.arange(len(gangs))
            if self.schedule == "reverse":
                order = order[::-1]
            elif self.schedule == "random":
                order = self.random.permutation(order)
                if batch.order is not None:
                    ready = self.random.random(len(batch.blocks)) < speeds
                    order = order[ready[order * size // self.program.threads]]
            for i in order:
                self._run_gang(gangs[i])
            self._release(batch)
            if exited != (batch.state == EXITED).sum():
                batch.asked.clear()
            elif batch.order is not None:
                self._refuse_deadlock(batch)

    def _refuse_deadlock(self, batch: _Batch) -> None:
        alive = np.unique(batch.thread[batch.state != EXITED] // self.program.threads)
        if all(batch.asked[block] >= PATIENCE for block in alive):
            raise Fault(
                f"blocks {alive.tolist()} wait for ever: the device holds {self.resident} of "
                f"{int(np.prod(self.grid))} blocks, and none of these changes what it asks for"
            )

    def _run_gang(self, gang: Gang) -> None:
        batch, lanes = gang.batch, gang.lanes
        counter, state = batch.counter[lanes], batch.state[lanes]
        while True:
            running = state == RUNNING
            if not running.any():
                return
            at, mask = self._next(counter, running)
            gang.mask = None if mask.all() else mask
            steps, end = self.code[at]
            for step in steps:
                step(gang)
            self._leave(gang, at, end, mask, counter, state)
            if self.program.blocks[at].is_atomic:
                return

    def _next(self, counter, running) -> tuple[int, np.ndarray]:
        """The block to run, and the threads at it: the furthest behind that does not wait.

        An instruction of whole warps waits until all lanes of a warp are at it.
        """
        at = -1
        for at in np.unique(counter[running]):
            mask = running & (counter == at)
            if self.program.blocks[at].needs_whole_warps:
                mask &= np.repeat(mask.reshape(-1, WARP).all(1), WARP)
            if mask.any():
                return int(at), mask
        wide = self.program.blocks[at].body[0]
        raise Fault(f"{wide}: some lanes of a warp are elsewhere, and never come")

    def _leave(self, gang, at, end: Instruction | None, mask, counter, state) -> None:
        if end is None:
            counter[mask] = at + 1
            return
        taken = mask
        if end.guard is not None:
            taken = mask & (gang.get(end.guard) ^ end.negated)
        if end.opcode in ("bra", "bra.uni"):
            counter[mask] = at + 1
            counter[taken] = self.program.labels[end.operands[0]]
        elif end.guard is not None:
            raise PtxError(f"{end} under a predicate")
        else:
            state[mask] = EXITED if end.opcode == "ret" else WAITING

    def _release(self, batch: _Batch) -> None:
        threads = self.program.threads
        for first in range(0, len(batch.thread), threads):
            block = slice(first, first + threads)
            state, counter = batch.state[block], batch.counter[block]
            if (state == EXITED).all() or (state == RUNNING).any():
                continue
            waiting = state == WAITING
            sites = {str(self.program.blocks[i].end) for i in np.unique(counter[waiting])}
            if not waiting.all() or len(np.unique(counter)) > 1:
                raise Fault(
                    f"{int(waiting.sum())} of {threads} threads of block "
                    f"{int(batch.thread[first]) // threads} wait at {sorted(sites)}, "
                    f"{int((state == EXITED).sum())} have exited"
                )
            counter += 1
            batch.barriers[block] += 1
            if batch.order is not None:
                batch.order.share(np.arange(first, first + threads), threads)
            state[...] = RUNNING

    # -- translation --

    def _translate(self, block: Block) -> tuple[list[Step], Instruction | None]:
        end = block.end
        if end is not None and end.opcode == "bar.sync":
            if [getattr(x, "value", x) for x in end.operands] != [0]:
                raise PtxError(f"{end}: only barrier 0 of all threads")
        elif end is not None and end.opcode != "ret":
            (target,) = end.operands
            if target not in self.program.labels:
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
            if error and self.noise:
                sign = self.random.uniform(-error, error, value.shape)
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
                values = [
                    gang.selected(np.broadcast_to(source(gang), _lanes(gang))) for source in sources
                ]
                _space(gang, space).store(where, values, gang.access(site), what)

            return store
        for item in items:
            if not isinstance(item, Register) or item.width < each:
                raise PtxError(f"{instruction}: result {item}")

        def load(gang: Gang) -> None:
            where = gang.selected(locate(gang))
            loaded = _space(gang, space).load(where, count * each, each, gang.access(site), what)
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
            batch, threads = gang.batch, self.program.threads
            order, lanes = batch.order, np.arange(_lanes(gang))
            where = locate(gang)
            value = np.broadcast_to(get(gang), len(lanes)).astype(np.uint32)
            for lane in gang.selected(lanes):
                index = gang.lanes.start + lane
                block = int(batch.thread[index]) // threads
                by, change = gang.access_of(lane, site), partial(apply, value[lane])
                if not atomic.reaches_others and int(np.prod(self.grid)) > 1:
                    raise Fault(f"{what}: its scope is one block of several")
                offset, old, after = self.memory.update(where[lane], change, by, what)
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
            return lambda gang: np.broadcast_to(base(gang), _lanes(gang)).astype(np.int64) + offset

        def locate(gang: Gang) -> np.ndarray:
            inside = base(gang).astype(np.int64) + offset
            if (gang.selected(np.broadcast_to(inside, _lanes(gang))) >= self.shared).any():
                raise Fault(f"{instruction}: beyond {self.shared} bytes of shared memory")
            return inside + gang.batch.shared_start[gang.lanes]

        return locate

    def _parameter_step(self, instruction, address: Address, target, type_: str) -> Step:
        raw = self.parameters.get(address.base)
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
                rows = _whole_warps(gang, get(gang))
                _put_warps(gang, target, rows[:, partner])

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
                if (gang.selected(np.broadcast_to(member(gang), _lanes(gang))) != FULL_WARP).any():
                    raise Fault(f"{instruction}: not the whole warp")
                rows = _whole_warps(gang, get(gang))
                best = np.repeat(reduce.reduce(rows, axis=1)[:, None], WARP, axis=1)
                _put_warps(gang, target, best)

            return redux
        if opcode == "bar.warp.sync" and operands in (
            (Immediate(FULL_WARP),),
            (Immediate(2**32 - 1),),
        ):

            def synchronise(gang: Gang) -> None:
                syncs = gang.batch.warp_syncs[gang.lanes]
                _whole_warps(gang, syncs)
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
            rows = _whole_warps(gang, np.broadcast_to(locate(gang), _lanes(gang)))
            for matrix, item in enumerate(vector.items):
                # lane i: row i // 4, from the address that lane 8 matrix + i // 4 gives
                row = rows[:, 8 * matrix + np.arange(WARP) // 4] + 4 * (np.arange(WARP) % 4)
                if (rows[:, 8 * matrix : 8 * matrix + 8] % 16).any():
                    raise Fault(f"{what}: a row is not aligned to 16 bytes")
                by = gang.access(site)
                if is_load:
                    (value,) = gang.batch.shared.load(row.ravel(), 4, 4, by, what)
                    _put_warps(gang, item, value.reshape(-1, WARP))
                else:
                    value = _whole_warps(gang, gang.get(item)).ravel()
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


def _lanes(gang: Gang) -> int:
    return gang.lanes.stop - gang.lanes.start


def _space(gang: Gang, name: str) -> Space:
    return gang.batch.machine.memory if name == "global" else gang.batch.shared


def _whole_warps(gang: Gang, values: np.ndarray) -> np.ndarray:
    """[warp, lane] of the active lanes, which are whole warps."""
    values = np.broadcast_to(values, _lanes(gang)).reshape(-1, WARP)
    return values if gang.mask is None else values[gang.mask.reshape(-1, WARP).all(1)]


def _put_warps(gang: Gang, target: Register, rows: np.ndarray) -> None:
    register = gang.get(target)
    value = np.ascontiguousarray(rows).view(register.dtype).ravel()
    register[slice(None) if gang.mask is None else gang.mask] = value
