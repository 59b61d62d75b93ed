"""The primary's disk writes, from QEMU to the wire: logged, sent, and only then answered.

Called by the primary's loop, which says when it may read: what is not read makes the guest's writes wait, and so
bounds what is on its way. Reading must stop between the cut and the epoch's COMMIT, or the next epoch would overtake.
"""

import dataclasses
from collections.abc import Callable, Sequence

from nova_ftvm import ports
from nova_ftvm.core import wire
from nova_ftvm.core.disk import DiskLog, DiskWrite
from nova_ftvm.core.epoch import PAUSED, Phase
from nova_ftvm.types import Buffer, Epoch, Generation

Send = Callable[[list[Buffer]], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Cut:
    """What an epoch has of disk writes: their bytes, and how many frames and writes on the wire."""

    bytes: int = 0
    frames: int = 0
    writes: int = 0


class DiskStream:
    """One guest's disks. `open` until the mirrors are let go."""

    def __init__(self, mirror: ports.Mirror, limit_bytes: int, generation: Generation, frame_limit: int,
                 send: Send) -> None:
        self._mirror = mirror
        self._limit = limit_bytes
        self._log = DiskLog(limit_bytes)
        self._generation = generation
        self._frame_limit = frame_limit
        self._send = send
        self._frames = self._writes = 0
        self.open = True

    def fileno(self) -> int:
        return self._mirror.fileno()

    def has_room(self, queued: int) -> bool:
        """`queued`: bytes that wait for the connection; before the first epoch that is all there is."""
        return not self._log.full and queued < self._limit

    def may_read(self, phase: Phase, queued: int) -> bool:
        if not self.open or phase is Phase.DRAINING:
            return False
        # QEMU, on its way to a stop, waits for the end of its requests: those must be taken.
        return phase in PAUSED or self.has_room(queued)

    def take(self, preload: bool) -> None:
        """Passes on what QEMU wrote. Raises MirrorLost."""
        writes = self._mirror.receive()
        if preload:
            self.preload(writes)
        else:
            self._log.add(writes)
            frames, number = self._ship(wire.Kind.DISK, self._log.epoch, writes)
            self._frames += frames
            self._writes += number
        self._mirror.confirm()

    def preload(self, writes: Sequence[DiskWrite]) -> None:
        """Sends what the replica takes at once, and what no epoch counts."""
        self._ship(wire.Kind.DISK_PRELOAD, Epoch(0), writes)

    def cut(self) -> Cut:
        """The epoch's writes end here."""
        cut = Cut(self._log.cut(), self._frames, self._writes)
        self._frames = self._writes = 0
        return cut

    def acknowledged(self, epoch: Epoch) -> None:
        self._log.acknowledged(epoch)

    def close(self) -> None:
        """The guest's writes wait for nobody any more."""
        self.open = False
        self._mirror.close()

    def _ship(self, kind: wire.Kind, epoch: Epoch, writes: Sequence[DiskWrite]) -> tuple[int, int]:
        """Returns (frames, writes) on the wire."""
        fit = wire.fitting(writes, self._frame_limit)
        frames = 0
        for buffers in wire.encode_disk(kind, self._generation, epoch, fit, self._frame_limit):
            self._send(buffers)
            frames += 1
        return frames, len(fit)
