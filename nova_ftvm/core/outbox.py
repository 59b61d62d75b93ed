"""What waits for room in a socket, in order. PURE.

The sockets of engine/link.py and host/nbd.py never block: whatever they do not take at once stays here.
"""

from collections import deque
from itertools import islice

from nova_ftvm.types import Buffer

#: The kernel's IOV_MAX.
_MOST_BUFFERS = 1024


class Outbox:
    """Buffers that were handed in and must not change until they are gone."""

    def __init__(self) -> None:
        self._waiting: deque[memoryview] = deque()
        #: Bytes that wait.
        self.size = 0

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, buffer: Buffer) -> None:
        if buffer:
            self._waiting.append(memoryview(buffer))
            self.size += len(buffer)

    def batch(self) -> list[memoryview]:
        """What one sendmsg may take."""
        return list(islice(self._waiting, _MOST_BUFFERS))

    def sent(self, number: int) -> None:
        """The kernel took so many bytes of the batch."""
        self.size -= number
        while number:
            head = self._waiting.popleft()
            if len(head) > number:
                self._waiting.appendleft(head[number:])
                return
            number -= len(head)
