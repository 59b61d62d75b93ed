"""An epoch's RAM and devices on their way to the backup: as what changed, or as they are. Called by the primary's loop.

Its disk writes have gone before, while the guest ran (diskstream.py).
"""

from collections.abc import Callable, Iterator

import numpy as np

from nova_ftvm.core import delta, dirty, wire
from nova_ftvm.engine.capture import Checkpoint
from nova_ftvm.types import PAGE, Buffer, Epoch, Generation

Frame = list[Buffer]
#: Pages of a RAM block: its number, and runs of them.
Sent = Callable[[int, np.ndarray], None]


class Freight:
    """Of one generation: what was sent before is remembered, as the backup does."""

    def __init__(self, generation: Generation, blocks: int, frame_limit: int, send: Callable[[Frame], None],
                 on_sent: Sent = lambda block, runs: None) -> None:
        """on_sent: told of the pages that go. Those of the epoch that do not are as the backup has them already."""
        self._on_sent = on_sent
        self._generation = generation
        #: The device state's number: the one after the last block of RAM.
        self._state_block = blocks
        self._limit = frame_limit
        self._send = send
        self._sent_before = delta.Memory()
        self._worth = delta.Worth()
        # Of the epoch that is on its way.
        self._thrifty = False
        self._pages = self._frames = self._bytes = 0

    def ship(self, epoch: Epoch, checkpoint: Checkpoint) -> Iterator[None]:
        """Sends the pages, frame by frame."""
        self._thrifty = self._worth.is_given()
        self._pages = self._frames = self._bytes = 0
        for pages in checkpoint.pages:
            for runs, frame in self._frames_of(epoch, pages):
                self._pages += dirty.count(runs)
                self._send(frame)
                self._count(frame)
                self._on_sent(pages.block, runs)
                yield

    def commit(self, epoch: Epoch, checkpoint: Checkpoint) -> tuple[list[Buffer], int]:
        """The device state and the COMMIT, to be sent AFTER the pages; and the bytes that the epoch takes."""
        frames: list[Buffer] = []
        for frame in self._devices(epoch, checkpoint):
            frames += frame
            self._count(frame)
        cut = checkpoint.cut
        frames += wire.encode_commit(self._generation, epoch, self._frames + cut.frames, self._pages, cut.writes)
        if self._thrifty:
            self._worth.tell(checkpoint.page_count * PAGE, self._bytes)
        return frames, self._bytes

    def _count(self, frame: Frame) -> None:
        self._frames += 1
        self._bytes += sum(map(len, frame))

    def _frames_of(self, epoch: Epoch, pages: dirty.Pages) -> Iterator[tuple[np.ndarray, Frame]]:
        """Frames, each with the runs of its pages."""
        if self._thrifty:
            return wire.encode_changes(self._generation, epoch, pages, self._sent_before, self._limit)
        self._sent_before.forget(pages)
        return wire.encode_pages(wire.Kind.PAGES, self._generation, epoch, pages, self._limit)

    def _devices(self, epoch: Epoch, checkpoint: Checkpoint) -> Iterator[Frame]:
        if self._thrifty:
            yield from wire.encode_device_changes(self._generation, epoch, checkpoint.state, self._state_block,
                                                  self._sent_before, self._limit)
            return
        room = self._limit - wire.HEADER_BYTES
        state = memoryview(checkpoint.state)
        for start in range(0, len(state), room):
            yield wire.encode(wire.Kind.DEVICE, self._generation, epoch, (state[start:start + room],))
