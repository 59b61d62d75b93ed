"""What the guest is at, seen from outside: has it sent something, and do its processors sleep?

Nobody polls for the first: QEMU writes a sign of each packet into a FIFO (host/netbuf.py). The second is asked of the
kernel, as each processor is a thread of QEMU's.
"""

import os

from nova_ftvm.exception import GuestGone
from nova_ftvm.host import qmp
from nova_ftvm.host.gate import Fifo

#: Of /proc/PID/task/TID/stat: enough to hold the thread's name and its state.
_HEAD = 64


class Activity:
    """Of the processors that the guest has when this is made; one that is plugged in later is not looked at."""

    def __init__(self, monitor: qmp.Monitor, path: str, owner: tuple[int, int] | None = None) -> None:
        #: The signs. Somebody has to keep it: see host.gate.Gate.
        self.signs = Fifo(path, owner)
        self._stats = [os.open(f"/proc/{monitor.pid}/task/{processor['thread-id']}/stat", os.O_RDONLY | os.O_CLOEXEC)
                       for processor in monitor.command("query-cpus-fast")]

    def fileno(self) -> int:
        return self.signs.fileno()

    def hear(self) -> bool:
        """Has the guest sent something since the last call?"""
        return bool(self.signs.drain())

    def asleep(self) -> bool:
        """All processors: halted, or waiting for QEMU. Raises GuestGone."""
        try:
            return all(_state(os.pread(stat, _HEAD, 0)) == b"S" for stat in self._stats)
        except ProcessLookupError as error:
            raise GuestGone("a processor's thread is gone") from error

    def close(self) -> None:
        self.signs.close()
        for stat in self._stats:
            os.close(stat)


def _state(stat: bytes) -> bytes:
    """The thread's name is in parentheses, and may hold some itself."""
    return stat[stat.rindex(b")") + 2:][:1]
