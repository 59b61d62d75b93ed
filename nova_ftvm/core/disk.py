"""Writes to the guest's disks, and the log of those that no acknowledged epoch covers. PURE.

The log is a count, not a store: a write goes on the wire as soon as it is logged, tagged with the epoch that it
belongs to. What the log owns is the boundary between epochs, and the bound on what is on its way.
"""

import dataclasses
import enum
from collections import deque
from collections.abc import Iterable, Iterator

from nova_ftvm.types import Buffer, Epoch


class DiskOp(enum.IntEnum):
    #: These contents.
    WRITE = 1
    #: Reads as zero from now on.
    ZERO = 2
    #: The guest needs it no more.
    DISCARD = 3


@dataclasses.dataclass(frozen=True, slots=True)
class DiskWrite:
    """One change of one disk. Offset and length in bytes."""

    #: Index into the table of disks that both sides agreed on.
    disk: int
    op: DiskOp
    offset: int
    length: int
    #: `length` bytes for WRITE, nothing otherwise. Must not be changed any more.
    contents: Buffer = b""


#: What one write costs beside its contents, on the wire and in memory.
ENTRY_BYTES = 64


def weight(write: DiskWrite) -> int:
    """Bytes of memory that a write on its way takes."""
    return ENTRY_BYTES + len(write.contents)


def split(write: DiskWrite, most: int) -> Iterator[DiskWrite]:
    """The same write in parts of at most `most` bytes of the disk: in nearly every case the write itself."""
    if write.length <= most:
        yield write
        return
    contents = memoryview(write.contents)
    for done in range(0, write.length, most):
        length = min(most, write.length - done)
        yield DiskWrite(write.disk, write.op, write.offset + done, length, contents[done:done + length])


class DiskLog:
    """What is on its way to the backup, by epoch. It holds no contents: those are in the connection's queue."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        #: The epoch that a write of now belongs to.
        self.epoch = Epoch(1)
        self._open = 0
        self._closed: deque[tuple[Epoch, int]] = deque()

    @property
    def on_its_way(self) -> int:
        """Bytes logged, and in no acknowledged epoch."""
        return self._open + sum(number for _, number in self._closed)

    @property
    def full(self) -> bool:
        """No more may come before an epoch is acknowledged."""
        return self.on_its_way >= self._limit

    def add(self, writes: Iterable[DiskWrite]) -> None:
        self._open += sum(weight(write) for write in writes)

    def cut(self) -> int:
        """The epoch ends here. Returns its bytes."""
        number, self._open = self._open, 0
        self._closed.append((self.epoch, number))
        self.epoch = Epoch(self.epoch + 1)
        return number

    def acknowledged(self, epoch: Epoch) -> None:
        while self._closed and self._closed[0][0] <= epoch:
            self._closed.popleft()
