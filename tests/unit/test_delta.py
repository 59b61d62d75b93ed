"""core/delta.py: whatever one side shrinks the other grows again, and both remember the same."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nova_ftvm.core import delta, dirty
from nova_ftvm.types import PAGE

#: So few that pages push one another out all the time.
PLACES = 5


def pages(numbers: list[int], values: list[int], block: int = 0) -> dirty.Pages:
    """Pages that hold their value in one word, at a place that depends on it."""
    contents = np.zeros((len(numbers), PAGE // 8), np.uint64)
    for row, value in enumerate(values):
        contents[row, value % 512] = value
    return dirty.Pages(block, dirty.compress(np.array(numbers, np.int64)), contents.view(np.uint8).reshape(-1))


EPOCH = st.tuples(st.integers(0, 2), st.dictionaries(st.integers(0, 12), st.integers(0, 3), min_size=1, max_size=10))


@settings(max_examples=300, deadline=None)
@given(st.lists(EPOCH, max_size=30))
def test_the_other_side_has_the_same_guest_after_each_epoch(epochs: list[tuple[int, dict[int, int]]]) -> None:
    ours, theirs = delta.Memory(PLACES), delta.Memory(PLACES)
    guest: dict[tuple[int, int], bytes] = {}
    replica: dict[tuple[int, int], bytes] = {}
    for block, written in epochs:
        numbers = sorted(written)
        captured = pages(numbers, [written[number] for number in numbers], block)
        rows = captured.contents.reshape(-1, PAGE)
        guest |= {(block, number): bytes(row) for number, row in zip(numbers, rows, strict=True)}
        grown = theirs.grow(ours.shrink(captured))
        for number, row in zip(dirty.expand(grown.runs).tolist(), grown.contents.reshape(-1, PAGE), strict=True):
            replica[block, number] = bytes(row)
        assert replica == guest


def test_only_what_changed_goes_again() -> None:
    ours = delta.Memory()
    first = ours.shrink(pages([3, 4, 9], [7, 8, 9]))
    assert (dirty.count(first.runs), len(first.words)) == (3, 3), "zero words do not go"
    again = ours.shrink(pages([3, 4, 9], [7, 8, 9]))
    assert (dirty.count(again.runs), len(again.words)) == (0, 0)
    changed = ours.shrink(pages([3, 4, 9], [7, 8, 10]))
    assert changed.runs.tolist() == [[9, 1]] and sorted(changed.words.tolist()) == [0, 10]


def test_a_page_that_became_zero_goes() -> None:
    ours, theirs = delta.Memory(), delta.Memory()
    theirs.grow(ours.shrink(pages([3], [7])))
    assert not theirs.grow(ours.shrink(pages([3], [0]))).contents.any()
    unknown = ours.shrink(pages([5], [0]))
    assert dirty.count(unknown.runs) == 1 and not len(unknown.words), "nobody knows that it was zero before"


def test_words_that_do_not_fit_are_seen_before_anything_is_changed() -> None:
    ours, theirs = delta.Memory(), delta.Memory()
    sent = ours.shrink(pages([3], [7]))
    bad = delta.Delta(sent.block, sent.runs, sent.masks, np.array([1, 2], np.uint64))
    assert sent.is_whole and not bad.is_whole
    assert theirs.grow(sent).contents.view(np.uint64)[7] == 7
    assert dirty.count(ours.shrink(pages([3], [7])).runs) == 0
