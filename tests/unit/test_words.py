"""core/words.py: what is written in C does what is written in numpy, and refuses what does not fit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nova_ftvm.core import words
from nova_ftvm.core.words import MASK_BYTES, WORDS

PLACES = 4

pytestmark = pytest.mark.skipif(words.native is None, reason="nova_ftvm.core._words is not built: make setup")

#: A page: few of its words are not zero, and those are of few values, so that pages are alike.
PAGE = st.dictionaries(st.integers(0, WORDS - 1), st.integers(0, 2), max_size=6)
STEP = st.lists(st.tuples(PAGE, st.integers(0, PLACES - 1), st.booleans()), max_size=6)


def matrix(pages: list[dict[int, int]]) -> np.ndarray:
    made = np.zeros((len(pages), WORDS), np.uint64)
    for row, page in zip(made, pages, strict=True):
        for place, value in page.items():
            row[place] = value << 60 | value
    return made


@settings(max_examples=300, deadline=None)
@given(st.lists(STEP, max_size=4))
def test_both_find_the_same_words_and_make_the_same_pages(steps: list[list[tuple[dict[int, int], int, bool]]]) -> None:
    ours, theirs = (np.full((PLACES, WORDS), 7, np.uint64) for _ in range(2))
    ours_grown, theirs_grown = ours.copy(), theirs.copy()
    for step in steps:
        pages = matrix([page for page, _, _ in step])
        places = np.array([place for _, place, _ in step], np.int64)
        known = np.array([flag for _, _, flag in step], bool)
        found = words.shrink(pages, ours, places, known)
        expected = words.shrink_in_numpy(pages, theirs, places, known)
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype and np.array_equal(one, other)
        assert np.array_equal(ours, theirs)
        sent, masks, changed = found
        there = places[sent], known[sent]
        grown = words.grow(masks, changed, ours_grown, *there)
        assert np.array_equal(grown, words.grow_in_numpy(masks, changed, theirs_grown, *there))
        assert np.array_equal(ours_grown, theirs_grown)


def test_words_may_lie_anywhere_in_what_was_received() -> None:
    received = b"?" + np.array([5], np.uint64).tobytes()
    masks = np.zeros((1, MASK_BYTES), np.uint8)
    masks[0, 0] = 0x80
    store = np.zeros((PLACES, WORDS), np.uint64)
    pages = words.grow(masks, np.frombuffer(received, "<u8", offset=1), store, np.array([2]), np.array([False]))
    assert pages[0, 0] == store[2, 0] == 5 and np.count_nonzero(store) == 1


def arguments(count: int = 2) -> dict[str, np.ndarray]:
    return {"pages": np.zeros((count, WORDS), np.uint64), "store": np.zeros((PLACES, WORDS), np.uint64),
            "places": np.zeros(count, np.int64), "known": np.zeros(count, bool), "sent": np.zeros(count, np.uint8),
            "masks": np.zeros((count, MASK_BYTES), np.uint8), "words": np.zeros(count * WORDS + 1, np.uint64)}


@pytest.mark.parametrize("name", ["pages", "known", "sent", "masks", "words"])
def test_buffers_of_a_wrong_length_are_refused(name: str) -> None:
    given_ = arguments()
    for wrong in (given_[name][:-1], np.concatenate((given_[name], given_[name]))):
        with pytest.raises(ValueError, match=r"fit|flag"):
            words.native.shrink(*{**given_, name: np.ascontiguousarray(wrong)}.values())


@pytest.mark.parametrize("place", [-1, PLACES, 1 << 60])
def test_a_place_outside_the_store_is_refused(place: int) -> None:
    given_ = arguments()
    given_["places"][1] = place
    with pytest.raises(ValueError, match="outside"):
        words.native.shrink(*given_.values())
    with pytest.raises(ValueError, match="outside"):
        words.grow(given_["masks"], given_["words"][:0], given_["store"], given_["places"], given_["known"])


@pytest.mark.parametrize("extra", [-1, 1])
def test_words_that_the_masks_do_not_name_change_nothing(extra: int) -> None:
    given_ = arguments()
    given_["masks"][:] = 1
    store = given_["store"]
    with pytest.raises(ValueError, match="fit"):
        words.grow(given_["masks"], np.ones(2 * MASK_BYTES + extra, np.uint64), store, given_["places"],
                   given_["known"])
    assert not store.any()
