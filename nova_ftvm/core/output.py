"""What the guest has sent and nobody may hear yet. PURE.

    waiting ---- cut ----> covered ---- commit ----> released
    (sent since the         (by the epoch that
    last checkpoint)        is on its way)

Packets come as QEMU's filter-redirector writes them, one after another: 4 bytes of length, big endian, and the packet.
They go back to QEMU the same way, so that nothing of them is read but the lengths.
"""

from nova_ftvm.exception import OutputLost

_LENGTH = 4
#: QEMU's own limit (NET_BUFSIZE): whatever claims more is no packet.
_LONGEST = 4096 + 65536


class HeldOutput:
    """Of one interface. Of more than `limit` bytes the latest packets are dropped, as a network would."""

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
