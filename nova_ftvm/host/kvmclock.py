"""The place in QEMU's heap where the number stands that it sets kvmclock to (KVMClockState.clock). Effects only.

What may be written and when core/kvmclock.py says. Only the mapping that the kernel calls [heap] is looked through:
QEMU's devices are made there, by malloc in its main thread; a guest's RAM never lies in it, and if a block does by
whatever accident the heap is left alone. Caller: engine/clockforward.py.
"""

import numpy as np

from nova_ftvm.core.kvmclock import Reason
from nova_ftvm.host import procmem
from nova_ftvm.types import RamBlock

#: What is looked through at once, within 1 ms; and in all at most.
_PIECE_BYTES = 1 << 20
_MOST_BYTES = 256 << 20
_WORD = 8


class QemuHeap:
    """ports.ClockPlaces, of one QEMU."""

    def __init__(self, pid: int, blocks: list[RamBlock]) -> None:
        self._pid = pid
        self._blocks = blocks
        self._rest: list[tuple[int, int]] = []
        self._piece = np.empty(_PIECE_BYTES, np.uint8)
        self._word = procmem.Word(pid)
        self.places: list[int] = []

    def begin(self) -> Reason | None:
        self.places = []
        try:
            start, end = _heap(self._pid)
        except OSError:
            return Reason.UNREADABLE
        if end - start > _MOST_BYTES:
            return Reason.TOO_LARGE
        if any(block.address < end and start < block.address + block.size for block in self._blocks):
            return Reason.NO_PLACE
        self._rest = [(at, min(at + _PIECE_BYTES, end)) for at in range(start, end, _PIECE_BYTES)]
        return None

    def look(self, number: int) -> bool:
        if self._rest:
            start, end = self._rest.pop()
            try:
                self._read(start, end, self._piece)
            except OSError:
                # The heap has shrunk: this pass is none.
                self._rest, self.places = [], []
                return False
            found = np.flatnonzero(self._piece[:end - start].view(np.uint64) == np.uint64(number))
            self.places += [start + _WORD * int(index) for index in found]
        return bool(self._rest)

    def read(self, place: int) -> int:
        return self._word.read(place)

    def write(self, place: int, number: int) -> None:
        self._word.write(place, number)

    def _read(self, start: int, end: int, into: np.ndarray) -> None:
        procmem.read(self._pid, np.array([[start, end]], np.uint64), into)


def _heap(pid: int) -> tuple[int, int]:
    """(start, end); (0, 0) when there is none."""
    with open(f"/proc/{pid}/maps") as lines:
        for line in lines:
            span, rights, *_, name = line.split()
            if name == "[heap]" and rights == "rw-p":
                start, end = span.split("-")
                return int(start, 16), int(end, 16)
    return 0, 0
