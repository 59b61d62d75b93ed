"""A userfaultfd of another process, for one thing: asynchronous write-protection (Linux 6.7, UFFD_FEATURE_WP_ASYNC).

With it the kernel itself lifts the protection at the first write to a page, without a fault handler, and
PAGEMAP_SCAN (pagemap.py) tells of it. It is renewed by PAGEMAP_SCAN, or range by range here.
Source: Documentation/admin-guide/mm/{userfaultfd,pagemap}.rst.
"""

import fcntl
import os
import struct

import numpy as np

from nova_ftvm.exception import GuestGone, Unsupported
from nova_ftvm.host import ptrace
from nova_ftvm.host.syscalls import NR_CLOSE, NR_USERFAULTFD, pidfd_getfd

_USER_MODE_ONLY = 1
_API = 0xAA
_FEATURE_PAGEFAULT_FLAG_WP = 1 << 0
_FEATURE_WP_HUGETLBFS_SHMEM = 1 << 12
_FEATURE_WP_UNPOPULATED = 1 << 13
_FEATURE_WP_ASYNC = 1 << 15
_FEATURES = _FEATURE_PAGEFAULT_FLAG_WP | _FEATURE_WP_HUGETLBFS_SHMEM | _FEATURE_WP_UNPOPULATED | _FEATURE_WP_ASYNC
_REGISTER_MODE_WP = 2
_WRITEPROTECT_MODE_WP = 1

# _IOWR(0xAA, 0x3F, struct uffdio_api), _IOWR(0xAA, 0x00, struct uffdio_register) and
# _IOWR(0xAA, 0x06, struct uffdio_writeprotect)
_UFFDIO_API = 0xC018AA3F
_UFFDIO_REGISTER = 0xC020AA00
_UFFDIO_WRITEPROTECT = 0xC018AA06
_API_STRUCT = struct.Struct("QQQ")
_REGISTER_STRUCT = struct.Struct("QQQQ")
#: struct uffdio_writeprotect: start, length, mode.
_WRITEPROTECT = struct.Struct("QQQ")


def enable_async_protection(uffd: int) -> None:
    """The UFFDIO_API handshake; raises Unsupported on a kernel before 6.7."""
    try:
        # SAFE: a bytearray of struct uffdio_api's size; the kernel writes within it.
        fcntl.ioctl(uffd, _UFFDIO_API, bytearray(_API_STRUCT.pack(_API, _FEATURES, 0)))
    except OSError as error:
        raise Unsupported("the kernel's userfaultfd lacks asynchronous write-protection: run Linux 6.7 or newer"
                          ) from error


def register(uffd: int, start: int, length: int) -> None:
    """Lets the pages of [start, start + length) be write-protected; both are multiples of the page size."""
    # SAFE: a bytearray of struct uffdio_register's size; the kernel writes its last field.
    fcntl.ioctl(uffd, _UFFDIO_REGISTER, bytearray(_REGISTER_STRUCT.pack(start, length, _REGISTER_MODE_WP, 0)))


class WriteProtection:
    """The userfaultfd of process `pid`. Closing it lifts every protection and costs the process nothing more."""

    def __init__(self, pid: int, pidfd: int) -> None:
        """Injects userfaultfd(2); about 3 ms during which the process's main thread is stopped."""
        self._pid = pid
        with ptrace.seized(pid) as process:
            remote = process.call(NR_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK | _USER_MODE_ONLY)
            if remote < 0:
                raise Unsupported(f"userfaultfd in process {pid}: {os.strerror(-remote)}")
            try:
                self._fd = pidfd_getfd(pidfd, remote)
            finally:
                process.call(NR_CLOSE, remote)
        enable_async_protection(self._fd)

    def register(self, start: int, length: int) -> None:
        register(self._fd, start, length)

    def lift(self, start: int, end: int) -> None:
        """Ends the protection of all pages there: they count as written. Raises GuestGone."""
        self._change(_WRITEPROTECT.pack(start, end - start, 0))

    def protect(self, ranges: np.ndarray) -> None:
        """Write-protects the ranges, shape (n, 2), uint64, start and end address: one ioctl of about 2 us each.

        The mmu notifiers are told of just these pages: no other page of the guest is taken out of its mappings.
        Raises GuestGone.
        """
        arguments = np.empty((len(ranges), 3), np.uint64)
        arguments[:, 0] = ranges[:, 0]
        np.subtract(ranges[:, 1], ranges[:, 0], out=arguments[:, 1])
        arguments[:, 2] = _WRITEPROTECT_MODE_WP
        words = arguments.tobytes()
        for place in range(0, len(words), _WRITEPROTECT.size):
            self._change(words[place:place + _WRITEPROTECT.size])

    def _change(self, argument: bytes) -> None:
        try:
            # SAFE: 24 bytes, struct uffdio_writeprotect's size, which the kernel only reads.
            fcntl.ioctl(self._fd, _UFFDIO_WRITEPROTECT, argument)
        except ProcessLookupError as error:
            raise GuestGone(f"process {self._pid} ended") from error

    def close(self) -> None:
        os.close(self._fd)
