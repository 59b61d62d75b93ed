"""host/memory.py's RangedMemory on a process that writes, drops pages, and has a disk read into its memory."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from nova_ftvm.core import dirty
from nova_ftvm.core.coldregions import COLD_S, REGION
from nova_ftvm.core.hotpages import TIMES
from nova_ftvm.host import hugepages, procmem
from nova_ftvm.host.hugepages import Collapse
from nova_ftvm.host.memory import RangedMemory
from nova_ftvm.types import PAGE, RamBlock
from tests.host import images
from tests.host.machine import ROOT, die_with_the_tests

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="not root")

SIZE = 2 * REGION
PAGES = SIZE // PAGE
READ_PAGES = 128
#: 'w N V' writes a page, 'e N V' every Nth, 'z N' drops one, 'r' reads READ_PAGES of the file into the first pages.
OWNER = f"""
import ctypes, mmap, os, sys
memory = mmap.mmap(-1, {SIZE + REGION}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_HUGEPAGE)
anchor = ctypes.c_char.from_buffer(memory)
start = -ctypes.addressof(anchor) % {REGION}
for page in range({PAGES}): memory[start + page * {PAGE}] = 1
print(ctypes.addressof(anchor) + start, flush=True)
file = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
for line in sys.stdin:
    what, *numbers = line.split()
    n = [int(number) for number in numbers]
    if what == 'w': memory[start + n[0] * {PAGE} + 5] = n[1]
    if what == 'e':
        for page in range(0, {PAGES}, n[0]): memory[start + page * {PAGE} + 5] = n[1]
    if what == 'z': memory.madvise(mmap.MADV_DONTNEED, start + n[0] * {PAGE}, {PAGE})
    if what == 'r': os.preadv(file, [memoryview(memory)[start:start + {READ_PAGES * PAGE}]], 0)
    print('done', flush=True)
"""


class Owner:
    """The process, its memory tracked, and the copy that a backup would have."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.process = subprocess.Popen([sys.executable, "-c", OWNER, file], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True, preexec_fn=die_with_the_tests)
        self._start = int(self.process.stdout.readline())
        pidfd = os.pidfd_open(self.process.pid)
        self.memory = RangedMemory(self.process.pid, pidfd, [RamBlock("ram", SIZE, self._start)])
        self._copy = np.zeros((PAGES, PAGE), np.uint8)
        for block, runs in self.memory.take_existing():
            self._keep(self.memory.read(block, runs))

    def begin(self, *words: object) -> None:
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()

    def end(self) -> None:
        assert self.process.stdout.readline() == "done\n"

    def do(self, *words: object) -> None:
        self.begin(*words)
        self.end()

    def checkpoint(self) -> int:
        """Pages of the epoch."""
        self.memory.begin_capture()
        self.memory.protect()
        captured = list(self.memory.capture())
        for pages in captured:
            self._keep(pages)
        self.memory.end_capture()
        return sum(pages.count for pages in captured)

    def missed(self) -> list[int]:
        now = np.empty(SIZE, np.uint8)
        procmem.read(self.process.pid, np.array([[self._start, self._start + SIZE]], np.uint64), now)
        return np.flatnonzero((now.reshape(-1, PAGE) != self._copy).any(axis=1)).tolist()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def _keep(self, pages: dirty.Pages) -> None:
        numbers = dirty.expand(pages.runs)
        new = pages.contents.reshape(-1, PAGE)
        changed = (self._copy[numbers] != new).any(axis=1)
        self._copy[numbers] = new
        self.memory.on_sent(pages.block, dirty.compress(numbers[changed]))


@pytest.fixture
def owner() -> Iterator[Owner]:
    with tempfile.NamedTemporaryFile(dir=ROOT / "build") as file:
        file.write(b"\x5a" * (READ_PAGES * PAGE))
        file.flush()
        os.fsync(file.fileno())
        made = Owner(Path(file.name))
        yield made
        made.kill()


def test_written_and_dropped_pages_are_captured_once_each(owner: Owner) -> None:
    owner.do("w", 3, 7)
    owner.do("z", 700)
    assert owner.checkpoint() == 2 and owner.missed() == []
    assert owner.checkpoint() == 0


def test_more_ranges_than_a_piece_are_captured_whole_whatever_was_protected_early(owner: Owner) -> None:
    for value in (7, 8, 9):
        owner.do("e", 2, value)
        assert owner.checkpoint() >= PAGES // 2 and owner.missed() == []


def test_a_page_that_stayed_unprotected_is_captured_again_until_it_is_protected(owner: Owner) -> None:
    for value in range(TIMES + 3):
        owner.do("w", 3, value)
        assert owner.checkpoint() == 1
    assert owner.checkpoint() == 1, "it is hot, so it counts as written"
    owner.do("w", 3, 99)
    assert owner.checkpoint() == 1 and owner.missed() == []


def test_a_rebuilt_region_is_part_of_the_next_epoch_and_not_rebuilt_again(owner: Owner,
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    collapse, rebuilt = hugepages.collapse, []

    def counted(pidfd: int, start: int, length: int) -> Collapse:
        outcome = collapse(pidfd, start, length)
        rebuilt.append(outcome)
        return outcome

    monkeypatch.setattr(hugepages, "collapse", counted)
    owner.do("w", 3, 7)
    owner.checkpoint()
    cold = time.monotonic() + COLD_S + 1
    owner.memory.tend(cold)
    assert rebuilt == [Collapse.DONE]
    owner.do("w", 5, 8)
    assert owner.checkpoint() == REGION // PAGE and owner.missed() == []
    assert owner.checkpoint() == 0
    owner.memory.tend(cold + COLD_S)
    assert rebuilt == [Collapse.DONE, Collapse.DONE], "it was written since"
    assert owner.checkpoint() == REGION // PAGE
    for number in range(1, 10):
        owner.memory.tend(cold + number * 2 * COLD_S)
    assert len(rebuilt) == 2
    owner.do("w", 5, 9)
    assert owner.checkpoint() == 1 and owner.missed() == []


@pytest.mark.skipif(not images.can_be_slowed(ROOT / "build"), reason="no control group can slow this disk down")
@pytest.mark.parametrize("outcome", [None, Collapse.BUSY], ids=["as-it-comes", "busy"])
def test_a_disk_that_begins_to_read_while_a_region_is_rebuilt_loses_no_page(
        owner: Owner, monkeypatch: pytest.MonkeyPatch, outcome: Collapse | None) -> None:
    """The transfer marks its pages when it begins, and they are unprotected just then; it ends without a sign."""
    collapse = hugepages.collapse

    def read_and_collapse(pidfd: int, start: int, length: int) -> Collapse:
        owner.begin("r")
        time.sleep(0.05)
        return outcome or collapse(pidfd, start, length)

    owner.do("w", 3, 7)
    owner.checkpoint()
    monkeypatch.setattr(hugepages, "collapse", read_and_collapse)
    with images.slow_disk(owner.file, owner.process.pid, rbps=READ_PAGES * PAGE):
        owner.memory.tend(time.monotonic() + COLD_S + 1)
        owner.end()  # At a checkpoint the disks are at rest.
    owner.checkpoint()
    assert owner.missed() == []
