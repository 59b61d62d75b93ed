"""Does QEMU's process live, or is it ending? Asked of the kernel, long before its pidfd tells: core/lifesigns.py."""

import os
import select

from nova_ftvm.core import lifesigns
from nova_ftvm.exception import GuestGone

#: More than the name and 50 numbers ever take.
_LINE = 2048


class ProcessLife:
    """ports.Life of one process, and of no other that gets its number later: the file is the process's own."""

    def __init__(self, pid: int, pidfd: int) -> None:
        """Raises GuestGone when the process that the pidfd is of has ended: the number may be another's by now."""
        try:
            self._stat = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise GuestGone(f"process {pid} ended") from error
        if select.select([pidfd], [], [], 0)[0]:
            os.close(self._stat)
            raise GuestGone(f"process {pid} ended")

    def is_ending(self) -> bool:
        try:
            return lifesigns.is_ending(os.pread(self._stat, _LINE, 0))
        except ProcessLookupError:
            return True

    def close(self) -> None:
        os.close(self._stat)
