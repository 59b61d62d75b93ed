"""A guest's RAM, from outside: what was written (primary), and writing it (standby).

Joins qmp (which blocks), userfault and pagemap (which pages), procmem (their contents). No policy: the engine says
when. Memory of the guest is never mapped: process_vm_readv and process_vm_writev reach it where it is, so that the
standby needs no special memory backing (doc/source/contributor/decisions/standby-memory.rst).
"""

import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterator

import numpy as np

from nova_ftvm.core import dirty
from nova_ftvm.core.coldregions import REFUSED_S, REGION, REGION_PAGES, ColdRegions
from nova_ftvm.core.hotpages import Budget, HotPages
from nova_ftvm.exception import Unsupported
from nova_ftvm.host import hugepages, procmem, qmp
from nova_ftvm.host.pagemap import Pagemap
from nova_ftvm.host.userfault import WriteProtection
from nova_ftvm.types import PAGE, RamBlock

#: name, page size, offset, used, total, host address
_BLOCK_LINE = re.compile(r"\s*(\S+)\s+\d+ \S+\s+0x[0-9a-f]+\s+(0x[0-9a-f]+)\s+0x[0-9a-f]+(?:\s+(0x[0-9a-f]+))?")

Look = Callable[[int, int], np.ndarray]

#: What is copied at once within a pause: some milliseconds.
_PIECE_PAGES = 2048

#: Dirty pages of one checkpoint that the buffer takes at first; it grows by itself.
_BUFFER_PAGES = 4096

#: A look at all of the guest's memory that took longer is taken once in a pause and not twice.
_QUICK_LOOK_S = 0.5e-3

#: Between two huge pages that are rebuilt: each makes an epoch 512 pages longer.
_REBUILD_EVERY_S = 0.5

#: Written ranges above which a look while the guest runs protects by one scan of everything: the guest then finds most
#: of its mappings gone either way, and each single range would interrupt its processors once.
_MOST_RANGES_LIVE = 4096


def ram_blocks(monitor: qmp.Monitor) -> list[RamBlock]:
    """All RAM blocks of the guest, by name. Raises Unsupported before QEMU 8.0, which prints no addresses."""
    text = monitor.command("x-query-ramblock")["human-readable-text"]
    blocks = []
    for line in text.splitlines()[1:]:
        match = _BLOCK_LINE.match(line)
        if not match:
            continue
        name, used, address = match.groups()
        if address is None:
            raise Unsupported("QEMU tells no host addresses of its RAM blocks: use QEMU 8.0 or newer")
        if int(used, 16):
            blocks.append(RamBlock(name, int(used, 16), int(address, 16)))
    return sorted(blocks, key=lambda block: block.name)


@dataclasses.dataclass(frozen=True, slots=True)
class _Spot:
    """A block's place in the table and in QEMU's address space, in whole pages."""

    index: int
    start: int
    end: int


class GuestMemory:
    """The RAM blocks of one QEMU process. Indexes into `blocks` are what the wire calls a block."""

    def __init__(self, pid: int, blocks: list[RamBlock]) -> None:
        self.pid = pid
        self.blocks = blocks
        self._spots = [_Spot(i, b.address, b.address + b.pages * PAGE) for i, b in enumerate(blocks)]
        self._pagemap = Pagemap(pid)

    def read(self, block: int, runs: np.ndarray) -> dirty.Pages:
        """Copies the pages out, into memory of their own."""
        contents = np.empty(dirty.count(runs) * PAGE, np.uint8)
        procmem.read(self.pid, dirty.ranges_of(runs, self._spots[block].start), contents)
        return dirty.Pages(block, runs, contents)

    def write(self, pages: dirty.Pages) -> None:
        """Puts the pages in."""
        procmem.write(self.pid, dirty.ranges_of(pages.runs, self._spots[pages.block].start), pages.contents)

    def clear(self) -> None:
        """Makes every page zero."""
        for block, runs in self._runs(self._pagemap.existing, self._spots):
            for part in dirty.split(runs, _PIECE_PAGES):
                self.write(dirty.Pages(block, part, np.zeros(dirty.count(part) * PAGE, np.uint8)))

    def close(self) -> None:
        self._pagemap.close()

    def _runs(self, look: Look, spots: list[_Spot]) -> list[tuple[int, np.ndarray]]:
        """What the look finds. Raises GuestGone."""
        found = [(spot.index, dirty.runs_of(ranges, spot.start)) for spot in spots
                 if len(ranges := look(spot.start, spot.end))]
        if not found:
            # A process that has ended has no pages, and on Linux 6.18 a look at them tells no more than that.
            self.read(0, np.array([[0, 1]], np.uint32))
        return found


class TrackedMemory(GuestMemory):
    """The primary's RAM: also tells what was written. One scan finds and protects: the way for a guest under TCG."""

    #: Is it of use to call `protect` as soon as the guest's processors stand?
    protects_at_stop = False

    def __init__(self, pid: int, pidfd: int, blocks: list[RamBlock]) -> None:
        super().__init__(pid, blocks)
        self._buffer = np.empty(_BUFFER_PAGES * PAGE, np.uint8)
        self._used = 0
        self._protection = WriteProtection(pid, pidfd)
        for spot in self._spots:
            self._protection.register(spot.start, spot.end - spot.start)

    def take_existing(self) -> list[tuple[int, np.ndarray]]:
        """(block, runs) of all pages that exist; from now on it is seen which are written."""
        return self._runs(self._pagemap.take_existing, self._spots)

    def take_written(self) -> list[tuple[int, np.ndarray]]:
        """(block, runs) of the pages written since the last look. Their contents are not read."""
        return self._runs(self._pagemap.take_written, self._spots)

    def begin_capture(self) -> None:
        """Forgets the last capture: its pages' memory is used again."""
        self._used = 0

    def protect(self) -> None:
        """The guest's processors stand, its disks are not at rest yet: what can be done by now of `capture`."""

    def capture(self) -> Iterator[dirty.Pages]:
        """Copies what was written since the last capture, piece by piece: all, or the epoch is of no use.

        The guest must stand still, and its disks be at rest: a transfer marks its pages when it begins, and puts the
        contents there later without any further sign. The contents are valid until the next `begin_capture`.
        """
        for block, written in self.take_written():
            for runs in dirty.split(written, _PIECE_PAGES):
                yield self._copy(block, runs)

    def on_sent(self, block: int, runs: np.ndarray) -> None:
        """These pages of the last capture went to the backup: they changed, or nobody knows whether they did."""

    def end_capture(self) -> None:
        """AFTER `on_sent` told of all: what can be learned of the epoch is learned, the guest running."""

    def tend(self, now: float) -> None:
        """Between two checkpoints, the guest running: upkeep that takes a few milliseconds at most."""

    def close(self) -> None:
        self._protection.close()
        super().close()

    def _copy(self, block: int, runs: np.ndarray) -> dirty.Pages:
        contents = self._take(dirty.count(runs) * PAGE)
        procmem.read(self.pid, dirty.ranges_of(runs, self._spots[block].start), contents)
        return dirty.Pages(block, runs, contents)

    def _take(self, length: int) -> np.ndarray:
        if self._used + length > len(self._buffer):
            # Earlier pieces of this capture keep the old memory alive.
            self._buffer = np.empty(max(2 * len(self._buffer), length), np.uint8)
            self._used = 0
        piece = self._buffer[self._used:self._used + length]
        self._used += length
        return piece


class RangedMemory(TrackedMemory):
    """The same for a guest under KVM: looks first, which tells nobody, then protects just what it found.

    A scan that protects makes KVM forget all that the guest has mapped (host/pagemap.py), and the guest would spend its
    time on mapping it again. In a pause the first look and its protection go on while QEMU brings the disks to rest;
    what the disks still wrote is found by a second one. Hot pages stay unprotected (core/hotpages.py).
    Measured: doc/source/contributor/decisions/ranged-tracking.rst.
    """

    protects_at_stop = True

    def __init__(self, pid: int, pidfd: int, blocks: list[RamBlock]) -> None:
        super().__init__(pid, pidfd, blocks)
        self._pidfd = pidfd
        budget = Budget()
        self._hot = [HotPages(block.pages, budget) for block in blocks]
        self._epoch = HotPages.FIRST
        self._cold = [ColdRegions(block.address, block.pages) for block in blocks]
        self._next_rebuild = 0.0 if hugepages.are_allowed() else math.inf
        #: Pages, by block, of the next capture: those that were written and are protected again, and those of regions
        #: that were rebuilt; and those that were written before the last one.
        self._protected: dict[int, np.ndarray] = {}
        self._rebuilt: dict[int, np.ndarray] = {}
        self._captured: dict[int, np.ndarray] = {}
        self._largest = max(self._spots, key=lambda spot: spot.end - spot.start)
        self._look_s = 0.0

    def take_written(self) -> list[tuple[int, np.ndarray]]:
        found = self._look(self._spots)
        if sum(len(runs) for _, runs in found) > _MOST_RANGES_LIVE:
            return super().take_written()
        for block, runs in found:
            self._protect(block, runs)
        return found

    def begin_capture(self) -> None:
        super().begin_capture()
        self._epoch += 1

    def protect(self) -> None:
        if self._look_s > _QUICK_LOOK_S:
            return
        # The other blocks, the firmware's for the most part, are looked at by the capture alone.
        for block, runs in self._look([self._largest]):
            # No more than a piece: the rest is protected with its copies, as a long pause must show life.
            numbers = dirty.expand(runs)[:_PIECE_PAGES]
            self._protect_cold(block, numbers)
            self._protected[block] = _union(self._protected.get(block, _NO_PAGES), numbers)

    def capture(self) -> Iterator[dirty.Pages]:
        found = {block: dirty.expand(runs) for block, runs in self._look(self._spots)}
        protected, self._protected = self._protected, {}
        rebuilt, self._rebuilt = self._rebuilt, {}
        for block in sorted(found.keys() | protected.keys() | rebuilt.keys()):
            early, late, whole = (which.get(block, _NO_PAGES) for which in (protected, found, rebuilt))
            new = late[~_are_in(early, late)]
            self._captured[block] = _union(early, new)
            for numbers in _pieces(_union(self._captured[block], whole)):
                self._protect_cold(block, new[slice(*np.searchsorted(new, (numbers[0], numbers[-1] + 1)))])
                yield self._copy(block, dirty.compress(numbers))

    def end_capture(self) -> None:
        now = time.monotonic()
        for block, numbers in self._captured.items():
            self._hot[block].learn(numbers, self._epoch)
            self._cold[block].on_written(numbers, now)
        self._captured = {}

    def on_sent(self, block: int, runs: np.ndarray) -> None:
        self._hot[block].on_sent(dirty.expand(runs), self._epoch)

    def tend(self, now: float) -> None:
        """Makes a cold region one huge page again, at most one in _REBUILD_EVERY_S."""
        if now < self._next_rebuild:
            return
        self._next_rebuild = now + _REBUILD_EVERY_S
        for block, regions in enumerate(self._cold):
            first = regions.coldest(now)
            if first is not None:
                outcome = self._rebuild(block, first)
                if outcome is hugepages.Collapse.BUSY:
                    regions.on_busy(first, now)
                else:
                    regions.on_rebuilt(first)
                if outcome is hugepages.Collapse.NO_MEMORY:
                    self._next_rebuild = now + REFUSED_S
                return

    def _rebuild(self, block: int, first: int) -> hugepages.Collapse:
        """Makes the region one huge page, unless it was written just now.

        Protected pages cannot become one, so for a moment nothing tells of what is written there, nor of a disk that
        begins to read into them and ends later. So all of them belong to the next epoch, whose copy is made when the
        disks are at rest.
        """
        runs = np.array([[first, REGION_PAGES]], np.uint32)
        ((start, end),) = dirty.ranges_of(runs, self._spots[block].start).tolist()
        if len(self._pagemap.written(start, end)):
            return hugepages.Collapse.BUSY
        self._rebuilt[block] = _union(self._rebuilt.get(block, _NO_PAGES), dirty.expand(runs))
        self._protection.lift(start, end)
        try:
            return hugepages.collapse(self._pidfd, start, REGION)
        finally:
            self._protect(block, runs)

    def _look(self, spots: list[_Spot]) -> list[tuple[int, np.ndarray]]:
        began = time.monotonic()
        found = self._runs(self._pagemap.written, spots)
        self._look_s = time.monotonic() - began
        return found

    def _protect_cold(self, block: int, numbers: np.ndarray) -> None:
        cold = self._hot[block].cold(numbers)
        if len(cold):
            self._protect(block, dirty.compress(cold))

    def _protect(self, block: int, runs: np.ndarray) -> None:
        self._protection.protect(dirty.ranges_of(runs, self._spots[block].start))


_NO_PAGES = np.empty(0, np.int64)


def _union(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Of ascending page numbers; most times one of them has none."""
    return np.union1d(some, others) if len(some) and len(others) else some if len(some) else others


def _are_in(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which of the others are among some; both ascending."""
    if not len(some):
        return np.zeros(len(others), np.bool_)
    return some[np.minimum(np.searchsorted(some, others), len(some) - 1)] == others


def _pieces(numbers: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(numbers), _PIECE_PAGES):
        yield numbers[start:start + _PIECE_PAGES]
