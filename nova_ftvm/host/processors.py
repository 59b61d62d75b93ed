"""Do the guest's processors sleep? Asked of the kernel: each of them is a thread of QEMU's."""

import os

from nova_ftvm.exception import GuestGone
from nova_ftvm.host import qmp

#: Of /proc/PID/task/TID/stat: enough to hold the thread's name and its state.
_HEAD = 64


class Processors:
    """ports.Processors, of those that the guest has when this is made; one that is plugged in later is not looked at.
    """

    def __init__(self, monitor: qmp.Monitor) -> None:
        self._stats = [os.open(f"/proc/{monitor.pid}/task/{processor['thread-id']}/stat", os.O_RDONLY | os.O_CLOEXEC)
                       for processor in monitor.command("query-cpus-fast")]

    def asleep(self) -> bool:
        """All of them: halted, or waiting for QEMU. Raises GuestGone."""
        try:
            return all(_state(os.pread(stat, _HEAD, 0)) == b"S" for stat in self._stats)
        except ProcessLookupError as error:
            raise GuestGone("a processor's thread is gone") from error

    def close(self) -> None:
        for stat in self._stats:
            os.close(stat)


def _state(stat: bytes) -> bytes:
    """The thread's name is in parentheses, and may hold some itself."""
    return stat[stat.rindex(b")") + 2:][:1]
