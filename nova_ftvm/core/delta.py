"""What both sides remember of pages that went over the wire, so that only what changed in one has to go again. PURE.

A guest writes to the same pages again and again, and mostly little. So a page goes as the 64-bit words that differ
from what it was when it went last; one that is written and not changed does not go at all. Both sides keep the same
pages in the same places: each sees the same frames in the same order, and forgets a page when another one takes its
place. A page that is not remembered counts as zero, so its zero words do not go either.

    word mask   64 bytes a page, most significant bit first: which of its 512 words are sent
    words       the changed ones of all pages, in their order

Source: the page delta caches of Svärd et al. (VEE 2011) and of QEMU's XBZRLE; ours has no encoding to search for.
"""

import dataclasses

import numpy as np

from nova_ftvm.core import dirty
from nova_ftvm.types import PAGE

#: Pages that are remembered, on both sides: 16 MiB. Part of the protocol.
PLACES = 1 << 12
#: Pages that are looked at together: what that takes stays in the processor's cache.
AT_ONCE = 256
_WORDS = PAGE // 8
MASK_BYTES = _WORDS // 8
#: Blocks of RAM are kept apart in the places by so many pages.
_BLOCK_STEP = 4099
_NOBODY = -1
#: An epoch of so much that shrinks to no less than this part is followed by so many that go as they are.
_LARGE_BYTES = 1 << 20
_POOR = 0.8
_REST_EPOCHS = 15


@dataclasses.dataclass(frozen=True, slots=True)
class Delta:
    """Some pages of one RAM block, as the words that changed. masks: (pages, MASK_BYTES) uint8; words: uint64."""

    block: int
    runs: np.ndarray
    masks: np.ndarray
    words: np.ndarray

    @property
    def count(self) -> int:
        """Pages."""
        return len(self.masks)

    @property
    def is_whole(self) -> bool:
        """Are there as many words as the masks name?"""
        return int.from_bytes(self.masks.tobytes(), "big").bit_count() == len(self.words)


class Worth:
    """Does it pay to look for what changed? A guest that fills memory with new contents makes it work for nothing."""

    def __init__(self) -> None:
        self._rest = 0

    def is_given(self) -> bool:
        """Asked once for each epoch."""
        if self._rest:
            self._rest -= 1
            return False
        return True

    def tell(self, whole_bytes: int, sent_bytes: int) -> None:
        """How it went. What is small is looked at in any case."""
        if whole_bytes >= _LARGE_BYTES and sent_bytes > _POOR * whole_bytes:
            self._rest = _REST_EPOCHS


class Memory:
    """One side's. `shrink` and `grow` undo each other as long as each sees and forgets all that the other one does."""

    def __init__(self, places: int = PLACES) -> None:
        self._keys = np.full(places, _NOBODY, np.int64)
        # Filled, so that the kernel gives the memory here and now, and not within an epoch.
        self._pages = np.full((places, _WORDS), 0, np.uint64)

    def shrink(self, pages: dirty.Pages) -> Delta:
        """`pages` in ascending order, as a capture gives them."""
        numbers = dirty.expand(pages.runs)
        keys, places, known, old = self._recall(pages.block, numbers)
        new = pages.contents.view(np.uint64).reshape(-1, _WORDS)
        changed = new != old
        sent = ~known | changed.any(axis=1)
        # Only what is sent: of anything else the other side cannot know that it was here.
        self._remember(keys[sent], places[sent], new[sent])
        return Delta(pages.block, dirty.compress(numbers[sent]), np.packbits(changed[sent], axis=1), new[changed])

    def grow(self, delta: Delta) -> dirty.Pages:
        """The pages whole, of a delta that `is_whole`."""
        changed = np.unpackbits(delta.masks, axis=1).view(bool)
        keys, places, _, pages = self._recall(delta.block, dirty.expand(delta.runs))
        pages[changed] = delta.words
        self._remember(keys, places, pages)
        return dirty.Pages(delta.block, delta.runs, pages.view(np.uint8).reshape(-1))

    def forget(self, pages: dirty.Pages) -> None:
        """These went whole, past this memory: what it holds of them is not what the replica has any more."""
        numbers = dirty.expand(pages.runs)
        places = self._places(pages.block, numbers)
        self._keys[places[self._keys[places] == _keys(pages.block, numbers)]] = _NOBODY

    def _recall(self, block: int, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(keys, places, which are remembered, their contents as they were, zero for the others)."""
        keys, places = _keys(block, numbers), self._places(block, numbers)
        known = self._keys[places] == keys
        contents = self._pages[places]
        contents[~known] = 0
        return keys, places, known, contents

    def _places(self, block: int, numbers: np.ndarray) -> np.ndarray:
        return (numbers + block * _BLOCK_STEP) % len(self._keys)

    def _remember(self, keys: np.ndarray, places: np.ndarray, contents: np.ndarray) -> None:
        # Of two pages with one place the later stays: numpy assigns in order.
        self._keys[places] = keys
        self._pages[places] = contents


def _keys(block: int, numbers: np.ndarray) -> np.ndarray:
    """Of pages of all blocks, each another number."""
    return numbers + (block << 40)
