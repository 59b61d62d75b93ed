"""The first copy's RAM, while the guest runs: passes over what exists, then over what was written meanwhile.

Gives pieces small enough that the loop can do other things in between. The order makes it safe: a page is
write-protected BEFORE it is read, so that a write after the read is seen by the next pass or by the first checkpoint.
"""

from collections.abc import Iterator

import numpy as np

from nova_ftvm import ports
from nova_ftvm.core import dirty

#: 4 MiB: what is read and sent at once.
PIECE_PAGES = 1024


class LiveCopy:
    """`pieces()` of one pass at a time; `start_pass()` says how much the next one has."""

    def __init__(self, memory: ports.Memory) -> None:
        self._memory = memory
        self._first = True
        self._todo: list[tuple[int, np.ndarray]] = []
        self._sent = self._total = 0

    @property
    def percent(self) -> float:
        """How much of what is known is sent."""
        return 100 * self._sent / max(1, self._total)

    def start_pass(self) -> int:
        """Protects what exists, later what was written, and makes it the next pass. Returns its pages."""
        self._todo = self._memory.take_existing() if self._first else self._memory.take_written()
        number = sum(dirty.count(runs) for _, runs in self._todo)
        self._total += number
        return number

    def pieces(self) -> Iterator[dirty.Pages]:
        """The pass's pages. In the first one zero pages are left out: a new replica is zero."""
        for block, runs in self._todo:
            for part in dirty.split(runs, PIECE_PAGES):
                pages = self._memory.read(block, part)
                self._sent += pages.count
                yield dirty.without_zero(pages) if self._first else pages
        self._first = False
