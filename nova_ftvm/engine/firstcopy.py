"""The first copy: what never changes, then the disks, then RAM, while the guest runs.

Disks take longest and are followed write by write once they are copied, so RAM, which must be copied again where it
was written, comes last. Goes on in small steps, so that the loop can do other things in between.
"""

from collections.abc import Callable, Iterator

from nova_ftvm import ports
from nova_ftvm.core import dirty, wire
from nova_ftvm.core.disk import DiskWrite
from nova_ftvm.engine.diskstream import DiskStream, Send
from nova_ftvm.engine.livecopy import LiveCopy
from nova_ftvm.types import PAGE, Epoch, Generation

#: Seconds between two looks at QEMU's mirrors.
_LOOK_S = 0.1


class FirstCopy:
    """`step` sends a piece; `due` says when it wants to be called again."""

    def __init__(self, memory: ports.Memory, mirror: ports.Mirror, stream: DiskStream, fixed: Iterator[DiskWrite],
                 drain: Callable[[], None], generation: Generation, frame_limit: int, send: Send,
                 clock: Callable[[], float]) -> None:
        """fixed: contents of the disks that nobody writes to. drain: returns when all disk requests of before are over.
        """
        self._mirror = mirror
        self._drain = drain
        self._stream = stream
        self._fixed = fixed
        self._generation = generation
        self._limit = frame_limit
        self._send = send
        self._clock = clock
        self._memory = LiveCopy(memory)
        self._memory_bytes = sum(block.pages for block in memory.blocks) * PAGE
        self._pieces: Iterator[dirty.Pages] | None = None
        self._pass_pages = 0
        self._followed = False
        self._done = self._total = 0
        self.due = clock()

    @property
    def percent(self) -> float:
        """Of disks and RAM by their bytes; less than 100, as it is whole only with the first checkpoint."""
        whole = self._total + self._memory_bytes
        return min(99.99, (100 * self._done + self._memory.percent * self._memory_bytes) / max(1, whole))

    def step(self) -> int | None:
        """Sends something. Returns the pages of the pass over RAM that this ended, None if it ended none."""
        write = next(self._fixed, None)
        if write is not None:
            self._stream.preload([write])
        elif not self._followed:
            self._look_at_mirrors()
        else:
            return self._copy_memory()
        return None

    def _look_at_mirrors(self) -> None:
        self._done, self._total, self._followed = self._mirror.progress()
        self.due = self._clock() if self._followed else self._clock() + _LOOK_S

    def _copy_memory(self) -> int | None:
        if self._pieces is None:
            self._pass_pages = self._memory.start_pass()
            # A transfer that was under way when its page was noted ends before the page is read: nothing tells of it.
            self._drain()
            self._pieces = self._memory.pieces()
        piece = next(self._pieces, None)
        if piece is None:
            self._pieces = None
            return self._pass_pages
        for _, buffers in wire.encode_pages(wire.Kind.PRELOAD, self._generation, Epoch(0), piece, self._limit):
            self._send(buffers)
        return None
