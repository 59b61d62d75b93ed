"""process_vm_readv and process_vm_writev over many ranges: no Python loop a page, no copy in between.

Ranges are arrays of shape (n, 2), uint64: start and end address in the other process. Buffers are contiguous uint8.
"""

import ctypes

import numpy as np

from nova_ftvm.exception import GuestGone
from nova_ftvm.host.syscalls import checked, libc

#: The kernel's UIO_MAXIOV.
_MOST_RANGES = 1024
#: One call moves less than 2 GiB (MAX_RW_COUNT); well below it, so that no call is cut short.
_MOST_BYTES = 1 << 30

for _call in (libc.process_vm_readv, libc.process_vm_writev):
    _call.restype = ctypes.c_ssize_t
    _call.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong]


def read(pid: int, ranges: np.ndarray, into: np.ndarray) -> int:
    """Gathers the ranges into the start of `into`. Returns the number of bytes."""
    return _transfer(libc.process_vm_readv, "process_vm_readv", pid, ranges, into)


def write(pid: int, ranges: np.ndarray, source: np.ndarray) -> int:
    """Scatters the start of `source` over the ranges. Returns the number of bytes."""
    return _transfer(libc.process_vm_writev, "process_vm_writev", pid, ranges, source)


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_uint64), ("length", ctypes.c_uint64))


class Word:
    """Eight bytes of another process, in a few microseconds."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._value = ctypes.c_uint64()
        self._local = _IoVec(ctypes.addressof(self._value), 8)
        self._remote = _IoVec(0, 8)

    def read(self, address: int) -> int:
        self._move(libc.process_vm_readv, "process_vm_readv", address)
        return self._value.value

    def write(self, address: int, value: int) -> None:
        self._value.value = value
        self._move(libc.process_vm_writev, "process_vm_writev", address)

    def _move(self, call: "ctypes._NamedFuncPointer", name: str, address: int) -> None:
        self._remote.base = address
        # SAFE: one local iovec of eight bytes, those of `_value`, which lives as long as this object.
        try:
            moved = checked(call(self._pid, ctypes.byref(self._local), 1, ctypes.byref(self._remote), 1, 0), name)
        except ProcessLookupError as error:
            raise GuestGone(f"process {self._pid} ended") from error
        if moved != 8:
            raise OSError(14, f"moved {moved} of 8 bytes", name)


def _transfer(call: "ctypes._NamedFuncPointer", name: str, pid: int, ranges: np.ndarray, local: np.ndarray) -> int:
    remote = np.empty((len(ranges), 2), np.uint64)
    remote[:, 0] = ranges[:, 0]
    np.subtract(ranges[:, 1], ranges[:, 0], out=remote[:, 1])
    ends = np.cumsum(remote[:, 1], dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    if total > local.nbytes:
        raise ValueError(f"{total} bytes do not fit into a buffer of {local.nbytes}")
    base, first, done = local.ctypes.data, 0, 0
    while first < len(remote):
        last = min(first + _MOST_RANGES, int(np.searchsorted(ends, done + _MOST_BYTES, side="right")))
        length = int(ends[last - 1]) - done if last > first else 0
        if length <= 0:
            raise ValueError(f"a range of more than {_MOST_BYTES} bytes")
        piece = np.array([base + done, length], np.uint64)
        # SAFE: `piece` lies within `local` (checked above), `remote` has last - first iovecs from `first` on,
        # and all three arrays outlive the call.
        try:
            moved = checked(call(pid, piece.ctypes.data, 1, remote[first:].ctypes.data, last - first, 0), name)
        except ProcessLookupError as error:
            raise GuestGone(f"process {pid} ended") from error
        if moved != length:
            raise OSError(14, f"moved {moved} of {length} bytes", name)
        first, done = last, done + length
    return done
