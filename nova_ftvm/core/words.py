"""Which 64-bit words of pages changed, and pages from them. PURE.

Both sides' part that touches every byte. It is here twice: in numpy, which is what it means, and in C (`_words.c`),
which is used where it was built. Why: doc/source/contributor/decisions/words-in-c.rst.

pages, store: (number of pages, 512) uint64. places: each page's row in the store, int64; known: does that row hold the
page as it went last? One that does not counts as zero. Pages are looked up before any of them is put into the store;
of two with one place the later stays.
"""

import numpy as np
from numpy.typing import NDArray

from nova_ftvm.types import PAGE

WORDS = PAGE // 8
MASK_BYTES = WORDS // 8

Array = NDArray[np.generic]

try:
    from nova_ftvm.core import _words as native
except ImportError:
    native = None  # type: ignore[assignment]


def shrink(pages: np.ndarray, store: np.ndarray, places: np.ndarray,
           known: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(which pages have to go, a mask for each of those, their changed words); those are in the store now.

    A page has to go when a word of it changed, or when it was not known.
    """
    if native is None:
        return shrink_in_numpy(pages, store, places, known)
    sent = np.empty(len(places), np.uint8)
    masks = np.empty((len(places), MASK_BYTES), np.uint8)
    words = np.empty(len(places) * WORDS + 1, np.uint64)
    number = native.shrink(pages, store, places, known, sent, masks, words)
    return sent.view(bool), masks[:np.count_nonzero(sent)], words[:number]


def grow(masks: np.ndarray, words: np.ndarray, store: np.ndarray, places: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The pages whole; they are in the store now. Raises ValueError, with nothing changed, when the words do not fit
    the masks."""
    if native is None:
        return grow_in_numpy(masks, words, store, places, known)
    pages = np.empty((len(places), WORDS), np.uint64)
    native.grow(masks, words, store, places, known, pages)
    return pages


def shrink_in_numpy(pages: np.ndarray, store: np.ndarray, places: np.ndarray,
                    known: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    changed = pages != _before(store, places, known)
    sent = ~known | changed.any(axis=1)
    # numpy assigns in order.
    store[places[sent]] = pages[sent]
    return sent, np.packbits(changed[sent], axis=1), pages[changed]


def grow_in_numpy(masks: np.ndarray, words: np.ndarray, store: np.ndarray, places: np.ndarray,
                  known: np.ndarray) -> np.ndarray:
    changed = np.unpackbits(masks, axis=1).view(bool)
    if np.count_nonzero(changed) != len(words):
        raise ValueError("the masks name another number of words")
    pages = _before(store, places, known)
    pages[changed] = words
    store[places] = pages
    return pages


def _before(store: np.ndarray, places: np.ndarray, known: np.ndarray) -> np.ndarray:
    contents = store[places]
    contents[~known] = 0
    return contents
