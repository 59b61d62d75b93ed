"""PAGEMAP_SCAN: which pages of a process were written since they were protected (Linux 6.7).

One ioctl returns the written ranges and, if asked to, write-protects them again, atomically a page: no write is missed
between the two. A scan that protects tells the mmu notifiers of the whole range that it is given, whatever it finds
(fs/proc/task_mmu.c, do_pagemap_scan): KVM then forgets every page of it that the guest has mapped. A scan that only
looks tells nobody. Source: Documentation/admin-guide/mm/pagemap.rst.
"""

import fcntl
import os
import struct

import numpy as np

from nova_ftvm.exception import GuestGone

_PAGEMAP_SCAN = 0xC0606610
#: struct pm_scan_arg: size flags start end walk_end vec vec_len max_pages inverted mask anyof_mask return_mask
_ARGUMENT = struct.Struct("12Q")

_WP_MATCHING = 1 << 0
_CHECK_WPASYNC = 1 << 1

_WRITTEN = 1 << 1
_PRESENT = 1 << 3
_SWAPPED = 1 << 4
_EXISTS = _PRESENT | _SWAPPED

#: struct page_region: start, end, categories.
_REGION_WORDS = 3
_NOTHING = np.empty((0, _REGION_WORDS), np.uint64)


class Pagemap:
    """The pagemap of one process. Ranges are arrays of shape (n, 2), uint64: start and end address."""

    def __init__(self, pid: int, regions_a_call: int = 1 << 16) -> None:
        self._pid = pid
        self._fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        self._regions = np.zeros((regions_a_call, _REGION_WORDS), np.uint64)
        self._place = self._regions.ctypes.data

    def written(self, start: int, end: int) -> np.ndarray:
        """The ranges that are not protected: written since they were, or not protected again since. Protects none."""
        return self._scan(start, end, _CHECK_WPASYNC, all_of=_WRITTEN, told=_WRITTEN)[:, :2]

    def take_written(self, start: int, end: int) -> np.ndarray:
        """The ranges written since the last call, protected again."""
        return self._scan(start, end, _WP_MATCHING | _CHECK_WPASYNC, all_of=_WRITTEN, told=_WRITTEN)[:, :2]

    def take_existing(self, start: int, end: int) -> np.ndarray:
        """Protects every page. Returns the ranges that held one at that moment, in memory or in swap.

        For the first look only: a page that never existed counts as written until it is protected.
        """
        regions = self._scan(start, end, _WP_MATCHING | _CHECK_WPASYNC, all_of=_WRITTEN, told=_WRITTEN | _EXISTS)
        return regions[(regions[:, 2] & np.uint64(_EXISTS)) != 0, :2]

    def existing(self, start: int, end: int) -> np.ndarray:
        """The ranges that hold a page. For a process whose pages were never protected."""
        return self._scan(start, end, 0, any_of=_EXISTS, told=_EXISTS)[:, :2]

    def close(self) -> None:
        os.close(self._fd)

    def _scan(self, start: int, end: int, flags: int, *, all_of: int = 0, any_of: int = 0, told: int) -> np.ndarray:
        """Regions in the categories, as rows of start, end and those of the `told` categories that they are in."""
        parts = []
        while start < end:
            argument = bytearray(_ARGUMENT.pack(
                _ARGUMENT.size, flags, start, end, 0, self._place, len(self._regions), 0, 0, all_of, any_of, told))
            # SAFE: the kernel writes at most len(regions) page_regions into an array that self keeps alive,
            # and walk_end within the bytearray.
            try:
                found = fcntl.ioctl(self._fd, _PAGEMAP_SCAN, argument)
            except ProcessLookupError as error:
                raise GuestGone(f"process {self._pid} ended") from error
            if found:
                parts.append(self._regions[:found].copy())
            if found < len(self._regions):
                break
            # Not from walk_end: the kernel leaves there where its own buffer of 512 regions was full for the last time.
            start = int(self._regions[-1, 1])
        if not parts:
            return _NOTHING
        return np.concatenate(parts) if len(parts) != 1 else parts[0]
