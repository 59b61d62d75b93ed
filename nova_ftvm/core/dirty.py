"""Pages and runs of pages: the arithmetic between a scan and a frame. PURE (numpy only).

ranges  shape (n, 2), uint64: start and end address in QEMU; what the kernel speaks
runs    shape (n, 2), uint32: first page and number of pages within a RAM block; what the wire speaks
pages   uint8, contiguous: the contents, in the order of the runs
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from nova_ftvm.types import PAGE

_WORDS = PAGE // 8


@dataclasses.dataclass(frozen=True, slots=True)
class Pages:
    """Some pages of one RAM block, with their contents."""

    #: Index into the table of blocks that both sides agreed on.
    block: int
    runs: np.ndarray
    contents: np.ndarray

    @property
    def count(self) -> int:
        return len(self.contents) // PAGE


def runs_of(ranges: np.ndarray, base: int) -> np.ndarray:
    """Addresses to pages of the block at `base`."""
    runs = np.empty((len(ranges), 2), np.uint32)
    runs[:, 0] = (ranges[:, 0] - np.uint64(base)) // np.uint64(PAGE)
    runs[:, 1] = (ranges[:, 1] - ranges[:, 0]) // np.uint64(PAGE)
    return runs


def ranges_of(runs: np.ndarray, base: int) -> np.ndarray:
    """Pages of the block at `base` to addresses."""
    ranges = np.empty((len(runs), 2), np.uint64)
    ranges[:, 0] = runs[:, 0].astype(np.uint64) * np.uint64(PAGE) + np.uint64(base)
    ranges[:, 1] = ranges[:, 0] + runs[:, 1].astype(np.uint64) * np.uint64(PAGE)
    return ranges


def count(runs: np.ndarray) -> int:
    """Number of pages."""
    return int(runs[:, 1].sum(dtype=np.int64))


def expand(runs: np.ndarray) -> np.ndarray:
    """Runs to page numbers, int64, in the order of the runs."""
    lengths = runs[:, 1].astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    return np.repeat(runs[:, 0].astype(np.int64) - starts, lengths) + np.arange(lengths.sum(), dtype=np.int64)


def compress(numbers: np.ndarray) -> np.ndarray:
    """Ascending page numbers to runs."""
    if not len(numbers):
        return np.empty((0, 2), np.uint32)
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    firsts = np.concatenate(([0], breaks))
    lengths = np.diff(np.concatenate((firsts, [len(numbers)])))
    return np.stack((numbers[firsts], lengths), axis=1).astype(np.uint32)


def split(runs: np.ndarray, most_pages: int) -> list[np.ndarray]:
    """The same pages, ascending, in lists of runs of at most `most_pages` pages each."""
    if count(runs) <= most_pages:
        return [runs] if len(runs) else []
    numbers = expand(runs)
    return [compress(numbers[start:start + most_pages]) for start in range(0, len(numbers), most_pages)]


def parts(pages: Pages, most_pages: int) -> Iterator[Pages]:
    """The same pages in the same order, in parts of at most `most_pages`; the contents are not copied."""
    done = 0
    for runs in split(pages.runs, most_pages):
        length = count(runs) * PAGE
        yield Pages(pages.block, runs, pages.contents[done:done + length])
        done += length


def without_zero(pages: Pages) -> Pages:
    """Drops the pages that are zero; for a replica that is known to be zero there."""
    matrix = pages.contents.view(np.uint64).reshape(-1, _WORDS)
    kept = matrix.any(axis=1)
    if kept.all():
        return pages
    return Pages(pages.block, compress(expand(pages.runs)[kept]), matrix[kept].view(np.uint8).reshape(-1))
