"""core/dirty.py: ranges, runs and pages."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nova_ftvm.core import dirty
from nova_ftvm.types import PAGE

BASE = 0x7F00_0000_0000
page_sets = st.sets(st.integers(0, 5000), max_size=200).map(sorted)


@given(page_sets)
def test_compress_and_expand_are_each_others_inverse(numbers: list[int]) -> None:
    runs = dirty.compress(np.array(numbers, np.int64))
    assert dirty.expand(runs).tolist() == numbers
    assert dirty.count(runs) == len(numbers)
    assert all(later[0] > first[0] + first[1] for first, later in zip(runs.tolist(), runs.tolist()[1:], strict=False))


@given(page_sets)
def test_addresses_and_pages_are_each_others_inverse(numbers: list[int]) -> None:
    runs = dirty.compress(np.array(numbers, np.int64))
    ranges = dirty.ranges_of(runs, BASE)
    assert ranges.dtype == np.uint64 and (ranges[:, 1] > ranges[:, 0]).all()
    assert dirty.runs_of(ranges, BASE).tolist() == runs.tolist()


@given(page_sets, st.integers(1, 64))
def test_split_keeps_the_pages_and_their_order_and_the_limit(numbers: list[int], most: int) -> None:
    runs = dirty.compress(np.array(numbers, np.int64))
    parts = dirty.split(runs, most)
    assert [n for part in parts for n in dirty.expand(part).tolist()] == numbers
    assert all(0 < dirty.count(part) <= most for part in parts)


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(0, 900))
def test_without_zero_drops_zero_pages_and_nothing_else(zero: list[bool], first: int) -> None:
    contents = np.concatenate([np.full(PAGE, 0 if z else i % 255 + 1, np.uint8) for i, z in enumerate(zero)])
    kept = dirty.without_zero(dirty.Pages(3, np.array([[first, len(zero)]], np.uint32), contents))
    assert kept.block == 3
    assert dirty.expand(kept.runs).tolist() == [first + i for i, z in enumerate(zero) if not z]
    assert kept.contents[::PAGE].tolist() == [i % 255 + 1 for i, z in enumerate(zero) if not z]
    assert kept.count == zero.count(False)


def test_a_page_with_one_byte_at_its_end_is_not_zero() -> None:
    contents = np.zeros(2 * PAGE, np.uint8)
    contents[-1] = 1
    kept = dirty.without_zero(dirty.Pages(0, np.array([[7, 2]], np.uint32), contents))
    assert kept.runs.tolist() == [[8, 1]]


def test_addresses_near_the_top_of_the_address_space_keep_their_value() -> None:
    base = 0xFFFF_FFFF_0000_0000
    ranges = dirty.ranges_of(np.array([[0xFFFF, 1]], np.uint32), base)
    assert ranges.tolist() == [[base + 0xFFFF * PAGE, base + 0x10000 * PAGE]]
