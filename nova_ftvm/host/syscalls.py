"""libc by ctypes, with errno translated once. Owns no policy and no state.

Callers: the other modules of host/.
"""

import ctypes
import os
import platform

libc = ctypes.CDLL(None, use_errno=True)

_SYSCALL = libc.syscall
_SYSCALL.restype = ctypes.c_long

#: x86-64 numbers; probe.py refuses every other machine.
NR_CLOSE = 3
NR_USERFAULTFD = 323
NR_PIDFD_GETFD = 438
NR_PROCESS_MADVISE = 440

MACHINE = platform.machine()


def checked(result: int, what: str) -> int:
    """Returns `result`, or raises OSError with the call's errno when it is negative."""
    if result < 0:
        errno = ctypes.get_errno()
        raise OSError(errno, os.strerror(errno), what)
    return result


def pidfd_getfd(pidfd: int, remote_fd: int) -> int:
    """A duplicate of another process's descriptor (pidfd_getfd(2), Linux 5.6)."""
    # SAFE: three integers, no pointer.
    return checked(_SYSCALL(NR_PIDFD_GETFD, pidfd, remote_fd, 0), "pidfd_getfd")
