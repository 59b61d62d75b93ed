"""core/coldregions.py: which regions become huge pages again, and when."""

import numpy as np
import pytest

from nova_ftvm.core.coldregions import BUSY_S, COLD_S, REGION, REGION_PAGES, ColdRegions
from nova_ftvm.types import PAGE

ALIGNED = 7 * REGION


def pages(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def test_a_block_that_was_never_written_has_none() -> None:
    assert ColdRegions(ALIGNED, 4 * REGION_PAGES).coldest(1e9) is None


def test_a_region_is_cold_a_while_after_it_was_last_written() -> None:
    regions = ColdRegions(ALIGNED, 4 * REGION_PAGES)
    regions.on_written(pages(REGION_PAGES + 3), 10.0)
    regions.on_written(pages(REGION_PAGES + 9), 20.0)
    assert regions.coldest(20.0 + COLD_S - 0.1) is None
    assert regions.coldest(20.0 + COLD_S) == REGION_PAGES


def test_the_region_that_was_not_written_for_longest_comes_first() -> None:
    regions = ColdRegions(ALIGNED, 4 * REGION_PAGES)
    regions.on_written(pages(5, 2 * REGION_PAGES), 10.0)
    regions.on_written(pages(5), 11.0)
    assert regions.coldest(1000.0) == 2 * REGION_PAGES
    regions.on_rebuilt(2 * REGION_PAGES)
    assert regions.coldest(1000.0) == 0
    regions.on_rebuilt(0)
    assert regions.coldest(1000.0) is None


def test_a_rebuilt_region_that_is_written_again_is_rebuilt_again() -> None:
    regions = ColdRegions(ALIGNED, 4 * REGION_PAGES)
    regions.on_written(pages(5), 10.0)
    regions.on_rebuilt(0)
    regions.on_written(pages(6), 500.0)
    assert regions.coldest(500.0 + COLD_S) == 0


def test_a_busy_region_is_tried_again_in_a_moment_and_others_meanwhile() -> None:
    regions = ColdRegions(ALIGNED, 4 * REGION_PAGES)
    regions.on_written(pages(5, REGION_PAGES), 10.0)
    assert regions.coldest(500.0) == 0
    regions.on_busy(0, 500.0)
    assert regions.coldest(500.0) == REGION_PAGES
    regions.on_rebuilt(REGION_PAGES)
    assert regions.coldest(500.0 + BUSY_S - 0.1) is None
    assert regions.coldest(500.0 + BUSY_S + 0.1) == 0


@pytest.mark.parametrize("before", [1, 511])
def test_regions_are_aligned_as_huge_pages_are_in_the_hosts_addresses(before: int) -> None:
    regions = ColdRegions(ALIGNED - before * PAGE, 4 * REGION_PAGES)
    regions.on_written(pages(before - 1, before + 3 * REGION_PAGES), 10.0)
    assert regions.coldest(1000.0) is None, "parts of huge pages at both ends are none of ours"
    regions.on_written(pages(before), 10.0)
    assert regions.coldest(1000.0) == before


@pytest.mark.parametrize("size", [0, 1, 511])
def test_a_block_that_is_smaller_than_a_huge_page_has_no_region(size: int) -> None:
    regions = ColdRegions(ALIGNED, size)
    regions.on_written(np.arange(size, dtype=np.int64), 10.0)
    assert regions.coldest(1000.0) is None
