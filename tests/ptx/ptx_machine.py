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

import numpy as np
from ptx_gang import EXITED, RUNNING, WAITING, Batch, Gang
from ptx_memory import WARP, Fault, Space
from ptx_parser import Instruction, Program, PtxError
from ptx_steps import Translator

SCHEDULES = ("block", "warps", "reverse", "random")
BLOCKS_AT_ONCE = 8
PATIENCE = 100  # how often each block asks, if no block changes anything, before it is a deadlock


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
        self.translator = Translator(self)
        self.code = [self.translator.of_block(block) for block in program.blocks]

    def describe(self, site: int) -> str:
        return str(self.translator.sites[site])

    def run(self) -> None:
        blocks = np.arange(int(np.prod(self.grid)))
        if self.schedule == "reverse":
            blocks = blocks[::-1]
        elif self.schedule == "random":
            blocks = self.random.permutation(blocks)
        with np.errstate(all="ignore"):
            for first in range(0, len(blocks), self.resident):
                self._run_batch(Batch(self, blocks[first : first + self.resident]))

    def _run_batch(self, batch: Batch) -> None:
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

    def _refuse_deadlock(self, batch: Batch) -> None:
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

    def _release(self, batch: Batch) -> None:
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
