"""Packets on their way through the engine: what the guest sent and nobody may hear yet. PURE.

    waiting ---- cut ----> covered ---- commit ----> released
    (sent since the         (by the epoch that
    last checkpoint)        is on its way)

And what was under way at the moment of a failover, kept on the backup and said once more when its guest goes on:

    heard  what came for the guest since the last committed checkpoint. The guest goes on from there, and has not
           heard it; its sender would wait for its timeout, which TCP doubles with each try.
    said   what the last committed checkpoint covers. It may not have left.
    spoken what committed checkpoints cover, of late: what the guest's clients have heard of it (core/reminders.py).

A network loses, repeats and reorders packets, so these are a kindness and no promise: nothing waits for them. They
know nothing of the future that is lost: whoever sent them had heard only what committed checkpoints cover.

Packets come as QEMU's filters write them, one after another: 4 bytes of length, big endian, and the packet. They go
back to QEMU the same way, so that nothing of them is read but the lengths.
"""

import dataclasses
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence

from nova_ftvm.exception import OutputLost
from nova_ftvm.types import Buffer, Epoch

_LENGTH = 4
#: QEMU's own limit (NET_BUFSIZE): whatever claims more is no packet.
_LONGEST = 4096 + 65536


@dataclasses.dataclass(frozen=True, slots=True)
class Packets:
    """Whole packets of one interface, in one direction, in their order."""

    #: The interface's address, the same on both sides: 6 bytes.
    mac: bytes
    framed: Buffer


class HeldPackets:
    """Of one interface, in one direction. Of more than `limit` bytes the latest are dropped, as a network would."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting = bytearray()
        #: Where the first packet begins that is not whole yet.
        self._whole = 0
        self._covered = bytearray()
        #: Packets that were dropped.
        self.dropped = 0

    @property
    def size(self) -> int:
        """Bytes that are held."""
        return len(self._waiting) + len(self._covered)

    def add(self, received: bytes) -> None:
        """Takes what came next, packets in whatever pieces. Raises OutputLost on what is none."""
        self._waiting += received
        before, packets = self._whole, 0
        while len(self._waiting) - self._whole >= _LENGTH:
            length = int.from_bytes(self._waiting[self._whole:self._whole + _LENGTH], "big")
            if length > _LONGEST:
                raise OutputLost(f"QEMU tells of a packet of {length} bytes")
            end = self._whole + _LENGTH + length
            if end > len(self._waiting):
                break
            self._whole = end
            packets += 1
        if self.size > self._limit:
            del self._waiting[before:self._whole]
            self._whole = before
            self.dropped += packets

    @property
    def covered(self) -> bytearray:
        """What the last cut covers and is not released: until then."""
        return self._covered

    def cut(self) -> None:
        """A checkpoint covers all packets that are here."""
        self._covered += self._waiting[:self._whole]
        del self._waiting[:self._whole]
        self._whole = 0

    def release(self) -> bytes:
        """What was covered: its epoch is committed, or nobody waits for one any more."""
        released = bytes(self._covered)
        self._covered.clear()
        return released


class InFlight:
    """What the backup keeps, of at most so many bytes in each direction."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._committed = Epoch(0)
        self._heard: list[tuple[Epoch, Packets]] = []
        self._said: list[tuple[Epoch, Packets]] = []
        self._spoken: deque[Packets] = deque()
        self._spoken_bytes = 0

    def on_heard(self, epoch: Epoch, packets: Packets) -> None:
        """They came for the guest before the checkpoint of that epoch, and after the one before it."""
        self._keep(self._heard, epoch, packets)

    def on_said(self, epoch: Epoch, packets: Packets) -> None:
        """That epoch covers them."""
        self._keep(self._said, epoch, packets)
        if epoch <= self._committed:
            self._remember(packets)

    def on_committed(self, epoch: Epoch) -> None:
        for number, packets in self._said:
            if self._committed < number <= epoch:
                self._remember(packets)
        self._committed = epoch
        self._heard = [(number, packets) for number, packets in self._heard if number > epoch]
        self._said = [(number, packets) for number, packets in self._said if number >= epoch]

    def on_released(self, epoch: Epoch) -> None:
        """What that epoch covers has left."""
        self._said = [(number, packets) for number, packets in self._said if number > epoch]

    @property
    def heard(self) -> dict[bytes, bytes]:
        """For the guest that goes on from the last committed checkpoint, by interface."""
        return _joined(packets for _, packets in self._heard)

    @property
    def said(self) -> dict[bytes, bytes]:
        """By that guest; likewise."""
        return _joined(packets for number, packets in self._said if number == self._committed)

    @property
    def spoken(self) -> Sequence[Packets]:
        """What the guest said before that checkpoint, the newest last; whether it has left or not."""
        return self._spoken

    def _keep(self, kept: list[tuple[Epoch, Packets]], epoch: Epoch, packets: Packets) -> None:
        if sum(len(one.framed) for _, one in kept) + len(packets.framed) <= self._limit:
            kept.append((epoch, packets))

    def _remember(self, packets: Packets) -> None:
        """Unread, as hardly any of it is ever needed. Copied, as what comes from a connection is a view of all that was
        read with it."""
        if not 0 < len(packets.framed) <= self._limit:
            return
        self._spoken.append(Packets(packets.mac, bytes(packets.framed)))
        self._spoken_bytes += len(packets.framed)
        while self._spoken_bytes > self._limit:
            self._spoken_bytes -= len(self._spoken.popleft().framed)


def _joined(parts: Iterable[Packets]) -> dict[bytes, bytes]:
    whole: dict[bytes, bytes] = defaultdict(bytes)
    for part in parts:
        whole[part.mac] += part.framed
    return dict(whole)
