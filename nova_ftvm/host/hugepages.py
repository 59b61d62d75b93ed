"""Makes a huge page of small ones, in another process: process_madvise(2) with MADV_COLLAPSE (Linux 6.1).

The kernel refuses it for pages that are write-protected by a userfaultfd.
Source: Documentation/admin-guide/mm/transhuge.rst.
"""

import ctypes
import enum
import errno
import struct

from nova_ftvm.exception import GuestGone
from nova_ftvm.host.syscalls import NR_PROCESS_MADVISE, checked, libc

_MADV_COLLAPSE = 25
_SETTING = "/sys/kernel/mm/transparent_hugepage/enabled"
_IOVEC = struct.Struct("QQ")


class Collapse(enum.Enum):
    """What became of it."""

    DONE = enum.auto()
    #: A page was in use elsewhere just then: it may work in a moment.
    BUSY = enum.auto()
    #: The kernel has no huge page to give.
    NO_MEMORY = enum.auto()
    #: Not this memory.
    IMPOSSIBLE = enum.auto()


_OUTCOMES = {errno.EAGAIN: Collapse.BUSY, errno.EBUSY: Collapse.NO_MEMORY, errno.ENOMEM: Collapse.NO_MEMORY}


def are_allowed(setting: str = _SETTING) -> bool:
    """Has the host's administrator not forbidden them? MADV_COLLAPSE itself does not ask."""
    try:
        with open(setting) as file:
            return "[never]" not in file.read()
    except FileNotFoundError:
        return False


def collapse(pidfd: int, start: int, length: int) -> Collapse:
    """Makes the pages there huge ones, within some milliseconds. Raises GuestGone."""
    where = ctypes.create_string_buffer(_IOVEC.pack(start, length), _IOVEC.size)
    try:
        # SAFE: one iovec, which the kernel only reads and which outlives the call; it names the other process's memory.
        checked(libc.syscall(NR_PROCESS_MADVISE, pidfd, where, ctypes.c_size_t(1), _MADV_COLLAPSE, 0),
                "process_madvise")
    except ProcessLookupError as error:
        raise GuestGone("the process whose memory it is ended") from error
    except OSError as error:
        return _OUTCOMES.get(error.errno or 0, Collapse.IMPOSSIBLE)
    return Collapse.DONE
