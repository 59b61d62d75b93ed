"""Cold regions: which of the guest's huge pages should be whole again that a write to a protected one took apart.

PURE. A region is what one huge page covers, 2 MiB. The kernel does not rebuild one as long as any of its pages is
protected (khugepaged, SCAN_PTE_UFFD_WP), and a guest under KVM translates addresses in small pages for more work than
in huge ones. But a region that is rebuilt too early is taken apart again, and its 512 pages are mapped anew one by one:
so it must not have been written for COLD_S. One object a RAM block; times are seconds. Callers: host/memory.py.
"""

import numpy as np

from nova_ftvm.types import PAGE

#: Bytes and pages of a region.
REGION = 2 << 20
REGION_PAGES = REGION // PAGE
#: A region that was written is rebuilt when it has not been for this time.
COLD_S = 60.0
#: The kernel may have no huge page to give: then nothing is rebuilt for this time.
REFUSED_S = 60.0
#: A page of the region was in use elsewhere: it is tried again after this time. Each try makes an epoch longer.
BUSY_S = 10.0
_WHOLE = np.float64(np.inf)


class ColdRegions:
    """Of one RAM block at a host address, of whole pages."""

    def __init__(self, address: int, pages: int) -> None:
        #: Pages of the block before its first region that is aligned as a huge page is.
        self._before = -(address // PAGE) % REGION_PAGES
        self._written_at = np.full(max(0, pages - self._before) // REGION_PAGES, _WHOLE)

    def on_written(self, numbers: np.ndarray, now: float) -> None:
        """These pages of the block were written. numbers: int64."""
        regions = (numbers - self._before) // REGION_PAGES
        self._written_at[regions[(regions >= 0) & (regions < len(self._written_at))]] = now

    def coldest(self, now: float) -> int | None:
        """The first page of the region that was not written for longest, if that is long enough."""
        if not len(self._written_at):
            return None
        region = int(self._written_at.argmin())
        if now - self._written_at[region] < COLD_S:
            return None
        return self._before + region * REGION_PAGES

    def on_rebuilt(self, first_page: int) -> None:
        """It is whole again, or cannot be made so: either way not looked at before it is written again."""
        self._written_at[self._region(first_page)] = _WHOLE

    def on_busy(self, first_page: int, now: float) -> None:
        """It could not be rebuilt just now."""
        self._written_at[self._region(first_page)] = now - COLD_S + BUSY_S

    def _region(self, first_page: int) -> int:
        return (first_page - self._before) // REGION_PAGES
