"""Memory of the machine: bounds, alignment, and who touched which bytes between two barriers.

The `Shadow` of a space remembers for each granule of bytes its last writer and its readers since
the last barrier. Two accesses by different threads, one of which writes, must be ordered:

    in one block of threads  by a bar.sync between them,
    in one warp              by a bar.sync or a bar.warp.sync,
    in different blocks      by a release and an acquire, see `ptx_order`.

Atomic accesses are in order among themselves. An address that has seen one is refused to others.

A write that changes nothing does not conflict with another write: Triton lets the threads that
hold copies of a value store it together.
"""

from typing import NamedTuple

import numpy as np

WARP = 32
POISON = 0xFE  # every byte of memory that nobody has written
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Fault(Exception):
    """The program did what a device forbids or leaves undefined."""


class Race(Fault):
    """Two threads reached the same bytes with nothing that orders them."""


class Access(NamedTuple):
    """The threads of one memory instruction: arrays with one element per thread."""

    thread: np.ndarray  # over all blocks of the launch
    barrier: np.ndarray  # barriers that the thread's block has passed
    warp_barrier: np.ndarray  # bar.warp.sync that its warp has passed
    seen: np.ndarray | None  # [thread, block]: barriers of each block known to be passed
    site: int
    threads_per_block: int

    def repeated(self, times: int) -> "Access":
        arrays = (None if x is None else np.repeat(x, times, axis=0) for x in self[:4])
        return Access(*arrays, self.site, self.threads_per_block)

    def knows(self, thread: np.ndarray, barrier: np.ndarray) -> np.ndarray:
        """Whether what those threads did before their block's next barrier is known here."""
        if self.seen is None:
            return np.zeros(len(thread), bool)
        return self.seen[np.arange(len(thread)), thread // self.threads_per_block] > barrier


class _Touched(NamedTuple):
    """Per granule: a thread (0: none, else 1 + its index), its barriers, and the instruction."""

    thread: np.ndarray
    barrier: np.ndarray
    warp_barrier: np.ndarray
    site: np.ndarray

    @classmethod
    def none(cls, size: int) -> "_Touched":
        return cls(*(np.zeros(size, np.int32) for _ in range(4)))

    def put(self, at: np.ndarray, by: Access) -> None:
        self.thread[at] = by.thread + 1
        self.barrier[at], self.warp_barrier[at] = by.barrier, by.warp_barrier
        self.site[at] = by.site


class Shadow:
    def __init__(self, size: int, granule: int, describe) -> None:
        self.granule, self.describe = granule, describe
        count = size // granule + 1
        self.writer, self.reader = _Touched.none(count), _Touched.none(count)
        # more readers than the one stored: in its warp, in its block, in another block
        self.lanes, self.warps, self.blocks = (np.zeros(count, bool) for _ in range(3))
        self.atomic = np.zeros(count, bool)

    def _granules(self, offsets, width, by: Access):
        each = max(1, width // self.granule)
        at = (offsets[:, None] // self.granule + np.arange(each)).ravel()
        return at, by.repeated(each)

    @staticmethod
    def _relation(first, by: Access):
        """(same block, same warp) of threads stored in a shadow and of an access."""
        same_block = (first - 1) // by.threads_per_block == by.thread // by.threads_per_block
        return same_block, (first - 1) // WARP == by.thread // WARP

    def _unordered(self, touched: _Touched, at, by: Access):
        """Where the last access of `touched` is another thread's and nothing orders the two."""
        first = touched.thread[at]
        same_block, same_warp = self._relation(first, by)
        ordered = same_block & (touched.barrier[at] != by.barrier)
        ordered |= same_warp & (touched.warp_barrier[at] != by.warp_barrier)
        ordered |= ~same_block & by.knows(np.maximum(first - 1, 0), touched.barrier[at])
        return (first != 0) & (first != by.thread + 1) & ~ordered

    def _refuse(self, conflict, touched: _Touched, at, by: Access, what: str) -> None:
        if not conflict.any():
            return
        i = int(np.flatnonzero(conflict)[0])
        first, thread = int(touched.thread[at[i]]) - 1, int(by.thread[i])
        per_block = by.threads_per_block
        raise Race(
            f"{_kind(first, thread, per_block)}: {what} without a barrier: thread {first} at "
            f"{self.describe(int(touched.site[at[i]]))}, thread {thread} at "
            f"{self.describe(by.site)} ({per_block} threads per block)"
        )

    def _refuse_mixture(self, at, by: Access) -> None:
        if self.atomic[at].any():
            raise Race(
                f"{self.describe(by.site)} is not atomic, and other accesses to its address are"
            )

    def access_atomically(self, offsets, width: int, by: Access) -> None:
        at, by = self._granules(offsets, width, by)
        what = "an access that is not atomic, then one that is"
        self._refuse(self._unordered(self.writer, at, by), self.writer, at, by, what)
        conflict = self._unordered(self.reader, at, by) | self.blocks[at]
        self._refuse(conflict, self.reader, at, by, what)
        self.atomic[at] = True

    def read(self, offsets, width: int, by: Access) -> None:
        at, by = self._granules(offsets, width, by)
        self._refuse_mixture(at, by)
        conflict = self._unordered(self.writer, at, by)
        self._refuse(conflict, self.writer, at, by, "a write, then a read")
        first = self.reader.thread[at]
        same_block, same_warp = self._relation(first, by)
        stale = (first != 0) & same_block & (self.reader.barrier[at] != by.barrier)
        stale |= same_warp & (self.reader.warp_barrier[at] != by.warp_barrier) & ~self.warps[at]
        self.lanes[at[stale]] = self.warps[at[stale]] = False
        self._mark(at, (first != 0) & ~stale, first, by)
        self.reader.put(at, by)
        self._mark(at, np.ones(len(at), bool), self.reader.thread[at], by)

    def _mark(self, at, where, other, by: Access) -> None:
        same_block, same_warp = self._relation(other, by)
        where = where & (other != by.thread + 1)
        self.lanes[at[where & same_warp]] = True
        self.warps[at[where & same_block & ~same_warp]] = True
        self.blocks[at[where & ~same_block]] = True

    def write(self, offsets, width: int, changed, by: Access) -> None:
        """`changed` [access, byte]: which bytes the write gives another value."""
        each = max(1, width // self.granule)
        changed = changed.reshape(len(offsets), each, -1).any(2).ravel()
        at, by = self._granules(offsets, width, by)
        self._refuse_mixture(at, by)
        conflict = changed & self._unordered(self.writer, at, by)
        self._refuse(conflict, self.writer, at, by, "two writes")
        reader = self.reader.thread[at]
        same_block, same_warp = self._relation(reader, by)
        current = same_block & (self.reader.barrier[at] == by.barrier)
        in_warp = same_warp & (self.reader.warp_barrier[at] == by.warp_barrier)
        known = by.knows(np.maximum(reader - 1, 0), self.reader.barrier[at])
        conflict = (reader != 0) & (
            (~same_block & ~known)
            | self.blocks[at]
            | (current & (self.warps[at] | ~same_warp))
            | (current & in_warp & (self.lanes[at] | (reader != by.thread + 1)))
        )
        self._refuse(conflict, self.reader, at, by, "a read, then a write")
        self.writer.put(at, by)


def _kind(first: int, second: int, threads_per_block: int) -> str:
    """The widest group of threads that has the two threads in different members."""
    if first // threads_per_block != second // threads_per_block:
        return "blocks"
    return "warps" if first // WARP != second // WARP else "lanes"


class Space:
    """A flat address space of allocations with unowned zones between them."""

    GAP = 512

    def __init__(self, sizes: list[int], base: int, granule: int, describe, races: bool) -> None:
        self.base, starts, end = base, [], self.GAP
        for size in sizes:
            starts.append(end)
            end += -(-size // self.GAP) * self.GAP + self.GAP
        self.starts = np.array(starts, np.int64)
        self.ends = self.starts + np.array(sizes, np.int64)
        self.data = np.full(end, POISON, np.uint8)
        self.shadow = Shadow(end, granule, describe) if races else None

    def addresses(self) -> list[int]:
        return [self.base + int(start) for start in self.starts]

    def contents(self, index: int) -> np.ndarray:
        return self.data[self.starts[index] : self.ends[index]]

    def _offsets(self, addresses, width: int, what: str) -> np.ndarray:
        offsets = addresses.astype(np.int64) - self.base
        odd = addresses.astype(np.int64) % width != 0
        if odd.any():
            first = int(addresses[odd][0])
            raise Fault(f"{what}: address {first:#x} is not aligned to its {width} bytes")
        owner = np.searchsorted(self.starts, offsets, side="right") - 1
        inside = owner >= 0
        inside &= offsets + width <= self.ends[owner]
        if not inside.all():
            i = int(np.flatnonzero(~inside)[0])
            beyond = int(offsets[i] - self.ends[owner[i]])
            raise Fault(
                f"{what}: {width} bytes at {int(addresses[i]):#x} are outside every allocation "
                f"({beyond} bytes beyond the end of number {int(owner[i])})"
            )
        return offsets

    def load(self, addresses, width: int, each: int, by: Access, what: str) -> list[np.ndarray]:
        """`each`-byte elements of `width` bytes at every address."""
        offsets = self._offsets(addresses, width, what)
        if self.shadow is not None:
            self.shadow.read(offsets, width, by)
        view, first = self.data.view(UNSIGNED[each]), offsets // each
        return [view[first + i] for i in range(width // each)]

    def update(self, address: int, change, by: Access, what: str) -> tuple[int, int, int]:
        """Of one atomic access to 32 bits: (its offset, the value before, the value after)."""
        (offset,) = self._offsets(np.array([address]), 4, what)
        if self.shadow is not None:
            self.shadow.access_atomically(np.array([offset]), 4, by)
        view = self.data.view(np.uint32)
        old = view[offset // 4]
        view[offset // 4] = new = change(old)
        return int(offset), old, new

    def store(self, addresses, values: list[np.ndarray], by: Access, what: str) -> None:
        each = values[0].dtype.itemsize
        width = each * len(values)
        offsets = self._offsets(addresses, width, what)
        view, first = self.data.view(values[0].dtype), offsets // each
        new = np.stack(values, 1)
        at = first[:, None] + np.arange(len(values))
        if self.shadow is not None:
            old = np.ascontiguousarray(view[at])
            changed = old.view(np.uint8) != np.ascontiguousarray(new).view(np.uint8)
            self.shadow.write(offsets, width, changed.reshape(len(offsets), -1), by)
        view[at] = new
        lost = (view[at] != new).any(1)
        if self.shadow is not None and lost.any():
            i = int(np.flatnonzero(lost)[0])
            last = int(np.flatnonzero(offsets == offsets[i])[-1])
            first, second = int(by.thread[i]), int(by.thread[last])
            raise Race(
                f"{_kind(first, second, by.threads_per_block)}: {what}: threads {first} and "
                f"{second} store different values to one address"
            )
