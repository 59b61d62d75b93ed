"""PAGEMAP_SCAN: which pages of a process were written since the last look (Linux 6.7).

One ioctl returns the written ranges and write-protects them again, atomically a page: no write is missed
between the two. Source: Documentation/admin-guide/mm/pagemap.rst.
"""

import fcntl
import os
import struct

import numpy as np

from nova_ftvm.exception import GuestGone

_PAGEMAP_SCAN = 0xC0606610
#: struct pm_scan_arg: size flags start end walk_end vec vec_len max_pages inverted mask anyof_mask return_mask
_ARGUMENT = struct.Struct("12Q")
_WALK_END = 4 * 8

_WP_MATCHING = 1 << 0
_CHECK_WPASYNC = 1 << 1

_WRITTEN = 1 << 1
_PRESENT = 1 << 3
_SWAPPED = 1 << 4

#: struct page_region: start, end, categories.
_REGION_WORDS = 3


class Pagemap:
    """The pagemap of one process. Ranges are arrays of shape (n, 2), uint64: start and end address."""

    def __init__(self, pid: int, regions_a_call: int = 1 << 16) -> None:
        self._pid = pid
        self._fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        self._regions = np.zeros((regions_a_call, _REGION_WORDS), np.uint64)

    def take_written(self, start: int, end: int) -> np.ndarray:
        """The ranges written since the last call, protected again."""
        return self._scan(start, end, _WP_MATCHING | _CHECK_WPASYNC, all_of=_WRITTEN, any_of=0)

    def populated(self, start: int, end: int) -> np.ndarray:
        """The ranges that hold a page, in memory or in swap."""
        return self._scan(start, end, 0, all_of=0, any_of=_PRESENT | _SWAPPED)

    def close(self) -> None:
        os.close(self._fd)

    def _scan(self, start: int, end: int, flags: int, all_of: int, any_of: int) -> np.ndarray:
        parts = []
        while start < end:
            argument = bytearray(_ARGUMENT.pack(
                _ARGUMENT.size, flags, start, end, 0, self._regions.ctypes.data, len(self._regions), 0,
                0, all_of, any_of, all_of | any_of))
            # SAFE: the kernel writes at most len(regions) page_regions into an array that self keeps alive,
            # and walk_end within the bytearray.
            try:
                found = fcntl.ioctl(self._fd, _PAGEMAP_SCAN, argument)
            except ProcessLookupError as error:
                raise GuestGone(f"process {self._pid} ended") from error
            parts.append(self._regions[:found, :2].copy())
            (start,) = struct.unpack_from("Q", argument, _WALK_END)
        return np.concatenate(parts) if len(parts) != 1 else parts[0]
