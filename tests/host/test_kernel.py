"""host/: one kernel door at a time, on this kernel."""

import ctypes
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from nova_ftvm.exception import GuestGone, Unsupported
from nova_ftvm.host import hugepages, probe, procmem, ptrace
from nova_ftvm.host.gate import Gate
from nova_ftvm.host.pagemap import Pagemap
from nova_ftvm.host.syscalls import NR_CLOSE
from nova_ftvm.host.userfault import WriteProtection
from nova_ftvm.host.watchdog import Watchdog
from nova_ftvm.types import PAGE
from tests.host import images
from tests.host.machine import ROOT, die_with_the_tests, wait_for

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="not root")

GETPID = 39

#: Maps pages, tells where, and does what it is told: 'w N' writes page N, 'e N' every Nth page, 'z N' drops it.
MAPPER = """
import ctypes, mmap, sys
memory = mmap.mmap(-1, {pages} * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_NOHUGEPAGE)
for page in range({populated}): memory[page * 4096] = 1
anchor = ctypes.c_char.from_buffer(memory)
print(ctypes.addressof(anchor), flush=True)
value = 1
for line in sys.stdin:
    what, page = line.split()
    value = value % 255 + 1
    if what == 'w': memory[int(page) * 4096 + 5] = value
    if what == 'z': memory.madvise(mmap.MADV_DONTNEED, int(page) * 4096, 4096)
    if what == 'e':
        for other in range(0, {pages}, int(page)): memory[other * 4096 + 5] = value
    print('done', flush=True)
"""


class Mapper:
    """A child process with memory of its own."""

    def __init__(self, pages: int, populated: int) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", MAPPER.format(pages=pages, populated=populated)],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        preexec_fn=die_with_the_tests)
        self.start = int(self.process.stdout.readline())
        self.end = self.start + pages * PAGE
        self.pid = self.process.pid

    def do(self, what: str, page: int) -> None:
        self.process.stdin.write(f"{what} {page}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"

    def numbers(self, ranges: np.ndarray) -> list[int]:
        return [n for first, last in ((ranges - np.uint64(self.start)) // np.uint64(PAGE)).tolist()
                for n in range(first, last)]

    def end_it(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def mapper() -> Iterator[Mapper]:
    made = Mapper(64, 8)
    yield made
    made.end_it()


# The probe


def test_this_host_lacks_nothing() -> None:
    assert probe.missing() == []


@pytest.mark.parametrize(("text", "version"), [
    ("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2~bpo12+1)\nCopyright", (10, 0)),
    ("QEMU emulator version 7.2.15", (7, 2)), ("QEMU emulator version 8.2.2 (qemu-kvm-8.2.2-1.el9)", (8, 2))])
def test_qemus_version_is_read(text: str, version: tuple[int, int]) -> None:
    assert probe.qemu_version(text) == version


@pytest.mark.parametrize("text", ["", "QEMU", "QEMU emulator version ten", "version 8"])
def test_what_is_no_version_is_said(text: str) -> None:
    with pytest.raises(Unsupported, match="no version"):
        probe.qemu_version(text)


# Injection


def test_an_injected_call_is_done_by_the_other_process(mapper: Mapper) -> None:
    with ptrace.seized(mapper.pid) as process:
        assert process.call(GETPID) == mapper.pid
        assert process.call(NR_CLOSE, 9999) == -9
        assert process.call(GETPID) == mapper.pid
    mapper.do("w", 1)


@pytest.mark.parametrize("script", [
    "import sys; print('up', flush=True); print('got', sys.stdin.readline().strip(), flush=True)",
    "import os, sys; r, w = os.pipe(); print('up', flush=True)\n"
    "if not os.fork(): import time; time.sleep(0.6); os.write(w, b'x'); os._exit(0)\n"
    "print('got', os.read(r, 1).decode() and 'go', flush=True)",
    "import select, time; print('up', flush=True); t = time.monotonic(); r = select.poll().poll(600)\n"
    "print('got', 'go' if r == [] and time.monotonic() - t > 0.55 else (r, time.monotonic() - t), flush=True)",
    "import time; print('up', flush=True); t = time.monotonic(); time.sleep(0.6)\n"
    "print('got', 'go' if time.monotonic() - t > 0.55 else 'short', flush=True)",
], ids=["read", "read-a-pipe", "poll-with-a-timeout", "sleep"])
def test_a_call_that_was_interrupted_goes_on(script: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                             preexec_fn=die_with_the_tests)
    try:
        assert child.stdout.readline() == "up\n"
        time.sleep(0.2)
        for _ in range(3):
            with ptrace.seized(child.pid) as process:
                assert process.call(GETPID) == child.pid
        child.stdin.write("go\n")
        child.stdin.flush()
        assert child.stdout.readline() == "got go\n"
        assert child.wait(5) == 0
    finally:
        child.kill()
        child.wait()


def test_a_process_that_is_gone_cannot_be_seized(mapper: Mapper) -> None:
    mapper.end_it()
    with pytest.raises(OSError), ptrace.seized(mapper.pid):
        raise AssertionError("never here")


# Written pages


def test_the_scan_sees_exactly_the_written_pages(mapper: Mapper) -> None:
    pidfd = os.pidfd_open(mapper.pid)
    protection, pagemap = WriteProtection(mapper.pid, pidfd), Pagemap(mapper.pid, regions_a_call=2)
    protection.register(mapper.start, mapper.end - mapper.start)
    assert mapper.numbers(pagemap.take_existing(mapper.start, mapper.end)) == list(range(8))
    assert mapper.numbers(pagemap.take_written(mapper.start, mapper.end)) == []
    for pages in ([3], [0, 1, 7], [5, 20, 63, 40, 42, 44, 46], []):
        for page in pages:
            mapper.do("w", page)
        assert mapper.numbers(pagemap.take_written(mapper.start, mapper.end)) == sorted(pages)
    mapper.do("z", 3)
    assert 3 in mapper.numbers(pagemap.take_written(mapper.start, mapper.end)), "a page that turned zero is a change"
    into = np.empty(mapper.end - mapper.start, np.uint8)
    procmem.read(mapper.pid, np.array([[mapper.start, mapper.end]], np.uint64), into)
    assert mapper.numbers(pagemap.take_written(mapper.start, mapper.end)) == [], "to read is not to write"
    protection.close()
    pagemap.close()
    mapper.do("w", 2)


def test_a_write_from_outside_is_seen_like_one_of_its_own(mapper: Mapper) -> None:
    pidfd = os.pidfd_open(mapper.pid)
    protection, pagemap = WriteProtection(mapper.pid, pidfd), Pagemap(mapper.pid)
    protection.register(mapper.start, mapper.end - mapper.start)
    pagemap.take_existing(mapper.start, mapper.end)
    place = mapper.start + 4 * PAGE
    procmem.write(mapper.pid, np.array([[place, place + 8]], np.uint64), np.full(8, 9, np.uint8))
    assert mapper.numbers(pagemap.take_written(mapper.start, mapper.end)) == [4]
    protection.close()
    pagemap.close()


def test_existing_pages_are_told_from_those_that_never_were(mapper: Mapper) -> None:
    pagemap = Pagemap(mapper.pid)
    mapper.do("w", 50)
    assert mapper.numbers(pagemap.existing(mapper.start, mapper.end)) == [*range(8), 50]
    pagemap.close()


_READER = """
import mmap, os, sys
memory = mmap.mmap(-1, {length}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
import ctypes
print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
sys.stdin.readline()
file = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
print(os.preadv(file, [memory], 0), flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("regions_a_call", [64, 512, 700, 1 << 16])
def test_more_regions_than_the_kernel_gathers_at_once_are_told_once_each(regions_a_call: int) -> None:
    mapper = Mapper(4096, 0)
    try:
        mapper.do("e", 3)
        pagemap = Pagemap(mapper.pid, regions_a_call)
        expected = list(range(0, 4096, 3))
        assert mapper.numbers(pagemap.existing(mapper.start, mapper.end)) == expected
        with_protection = WriteProtection(mapper.pid, os.pidfd_open(mapper.pid))
        with_protection.register(mapper.start, mapper.end - mapper.start)
        pagemap.take_written(mapper.start, mapper.end)
        mapper.do("e", 3)
        assert mapper.numbers(pagemap.written(mapper.start, mapper.end)) == expected
        assert mapper.numbers(pagemap.take_written(mapper.start, mapper.end)) == expected
        assert mapper.numbers(pagemap.written(mapper.start, mapper.end)) == []
    finally:
        mapper.end_it()


def test_what_is_protected_range_by_range_is_found_when_it_is_written_again(mapper: Mapper) -> None:
    protection = WriteProtection(mapper.pid, os.pidfd_open(mapper.pid))
    protection.register(mapper.start, mapper.end - mapper.start)
    pagemap = Pagemap(mapper.pid)
    pagemap.take_written(mapper.start, mapper.end)
    for page in (3, 4, 40):
        mapper.do("w", page)
    found = pagemap.written(mapper.start, mapper.end)
    assert mapper.numbers(found) == [3, 4, 40]
    assert mapper.numbers(pagemap.written(mapper.start, mapper.end)) == [3, 4, 40], "a look protects nothing"
    protection.protect(found[:1])
    assert mapper.numbers(pagemap.written(mapper.start, mapper.end)) == [40]
    protection.protect(found[1:])
    mapper.do("w", 4)
    assert mapper.numbers(pagemap.written(mapper.start, mapper.end)) == [4]


def test_a_page_that_was_dropped_is_written_until_it_is_protected(mapper: Mapper) -> None:
    protection = WriteProtection(mapper.pid, os.pidfd_open(mapper.pid))
    protection.register(mapper.start, mapper.end - mapper.start)
    pagemap = Pagemap(mapper.pid)
    pagemap.take_written(mapper.start, mapper.end)
    mapper.do("z", 2)
    found = pagemap.written(mapper.start, mapper.end)
    assert mapper.numbers(found) == [2]
    protection.protect(found)
    assert mapper.numbers(pagemap.written(mapper.start, mapper.end)) == []
    mapper.do("w", 2)
    assert mapper.numbers(pagemap.written(mapper.start, mapper.end)) == [2]


def test_protecting_the_memory_of_a_process_that_ended_is_a_guest_that_is_gone(mapper: Mapper) -> None:
    protection = WriteProtection(mapper.pid, os.pidfd_open(mapper.pid))
    protection.register(mapper.start, mapper.end - mapper.start)
    mapper.end_it()
    with pytest.raises(GuestGone):
        protection.protect(np.array([[mapper.start, mapper.end]], np.uint64))


@pytest.mark.parametrize(("text", "allowed"), [
    ("[always] madvise never\n", True), ("always [madvise] never\n", True), ("always madvise [never]\n", False)])
def test_huge_pages_are_made_where_the_administrator_has_not_forbidden_them(text: str, allowed: bool,
                                                                            tmp_path: Path) -> None:
    setting = tmp_path / "enabled"
    setting.write_text(text)
    assert hugepages.are_allowed(str(setting)) is allowed


def test_a_kernel_without_huge_pages_allows_none(tmp_path: Path) -> None:
    assert not hugepages.are_allowed(str(tmp_path / "nothing"))


@pytest.mark.skipif(not images.can_be_slowed(ROOT), reason="no control group can slow this disk down")
def test_a_transfer_that_is_under_way_marks_its_pages_when_it_begins_and_not_when_it_ends(tmp_path: Path) -> None:
    """So a page that a look found written must not be copied before the disks are at rest."""
    length = 128 * PAGE
    with tempfile.NamedTemporaryFile(dir=ROOT / "build") as file:
        file.write(b"\x5a" * length)
        file.flush()
        os.fsync(file.fileno())
        reader = subprocess.Popen([sys.executable, "-c", _READER.format(length=length), file.name],
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=die_with_the_tests)
        try:
            start = int(reader.stdout.readline())
            protection, pagemap = WriteProtection(reader.pid, os.pidfd_open(reader.pid)), Pagemap(reader.pid)
            protection.register(start, length)
            pagemap.take_existing(start, start + length)
            whole, into = np.array([[start, start + length]], np.uint64), np.empty(length, np.uint8)
            with images.slow_disk(Path(file.name), reader.pid, rbps=length):
                reader.stdin.write(b"go\n")
                reader.stdin.flush()
                time.sleep(0.3)
                begun = pagemap.take_written(start, start + length)
                procmem.read(reader.pid, whole, into)
                assert not into.any(), "the transfer was over before it was looked at"
                assert int((begun[:, 1] - begun[:, 0]).sum()) == length
                assert int(reader.stdout.readline()) == length
            procmem.read(reader.pid, whole, into)
            assert (into == 0x5A).all()
            assert len(pagemap.take_written(start, start + length)) == 0
        finally:
            reader.kill()
            reader.wait()


# Memory of another process


def own_memory(pages: int) -> tuple[mmap.mmap, int]:
    memory = mmap.mmap(-1, pages * PAGE)
    anchor = ctypes.c_char.from_buffer(memory)
    address = ctypes.addressof(anchor)
    del anchor
    return memory, address


def test_thousands_of_ranges_go_there_and_back() -> None:
    pages = 5000
    memory, address = own_memory(pages)
    starts = address + np.arange(0, pages, 2, dtype=np.uint64) * np.uint64(PAGE)
    ranges = np.stack((starts, starts + np.uint64(PAGE)), axis=1)
    contents = np.random.default_rng(1).integers(0, 256, len(ranges) * PAGE, np.uint8)
    assert procmem.write(os.getpid(), ranges, contents) == len(contents)
    into = np.zeros(len(contents) + PAGE, np.uint8)
    assert procmem.read(os.getpid(), ranges, into) == len(contents)
    assert (into[:len(contents)] == contents).all() and not into[len(contents):].any()
    assert not any(memory[PAGE:2 * PAGE]) and bytes(memory[:PAGE]) == contents[:PAGE].tobytes()


@pytest.mark.parametrize("transfer", [procmem.read, procmem.write])
def test_a_range_that_is_not_mapped_is_an_error_and_never_a_short_copy(transfer) -> None:
    memory, address = own_memory(4)
    ranges = np.array([[address, address + PAGE], [16 * PAGE, 17 * PAGE], [address, address + PAGE]], np.uint64)
    with pytest.raises(OSError, match=r"moved 4096 of 12288|Bad address"):
        transfer(os.getpid(), ranges, np.zeros(3 * PAGE, np.uint8))
    assert len(memory) == 4 * PAGE


def test_a_buffer_that_is_too_small_is_refused_before_anything_moves() -> None:
    memory, address = own_memory(2)
    with pytest.raises(ValueError, match="do not fit"):
        procmem.write(os.getpid(), np.array([[address, address + 2 * PAGE]], np.uint64), np.ones(PAGE, np.uint8))
    assert not any(memory[:])


def test_a_process_that_ended_is_a_guest_that_is_gone(mapper: Mapper) -> None:
    mapper.end_it()
    with pytest.raises(GuestGone, match="ended"):
        procmem.read(mapper.pid, np.array([[mapper.start, mapper.end]], np.uint64), np.empty(64 * PAGE, np.uint8))


def test_no_ranges_are_no_work() -> None:
    assert procmem.read(os.getpid(), np.empty((0, 2), np.uint64), np.empty(0, np.uint8)) == 0


# The watchdog

_HUNG = {
    "sleeps": "import time; time.sleep(60)",
    "spins": "while True: pass",
    "is stopped": "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)",
    "blocks in a pipe": "import os; r, w = os.pipe(); os.read(r, 1)",
    "ignores signals": ("import signal, time\n"
                        "for n in set(signal.Signals) - {9, 19}: signal.signal(n, signal.SIG_IGN)\ntime.sleep(60)"),
}


def run_watched(script: str, limit_s: float = 0.3) -> tuple[int, float]:
    """(exit status, how long it lived after it was armed)."""
    child = subprocess.Popen(
        [sys.executable, "-c", "from nova_ftvm.host.watchdog import Watchdog\n"
         f"dog = Watchdog({limit_s})\ndog.arm()\nprint(flush=True)\n{script}"], cwd=ROOT, stdout=subprocess.PIPE,
        preexec_fn=die_with_the_tests)
    child.stdout.readline()
    start = time.monotonic()
    try:
        return child.wait(20.0), time.monotonic() - start
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize("how", _HUNG)
def test_a_process_that_hangs_is_killed_within_the_limit(how: str) -> None:
    status, lived_s = run_watched(_HUNG[how])
    assert status == -signal.SIGKILL
    assert 0.2 < lived_s < 0.9


def test_a_watchdog_that_was_disarmed_kills_nobody() -> None:
    assert run_watched("dog.disarm(); import time; time.sleep(0.6)", 0.2)[0] == 0


def test_arming_again_starts_the_limit_anew() -> None:
    status, lived_s = run_watched("import time\nfor _ in range(5): time.sleep(0.1); dog.arm()\ntime.sleep(60)", 0.3)
    assert status == -signal.SIGKILL and lived_s > 0.7


def test_arming_again_at_once_leaves_the_timer_as_it_is_and_a_shorter_time_counts_at_once() -> None:
    dog = Watchdog(1.0)
    settings: list[float] = []
    dog._set = settings.append  # type: ignore[method-assign]
    for slack_s in (0.0, 0.0, 0.05, 10.0, 10.0, 0.0):
        dog.arm(slack_s)
    dog.disarm()
    dog.arm()
    assert settings == [1.0, 11.0, 1.0, 0.0, 1.0]


def test_a_block_that_ends_in_time_is_let_live_also_by_an_exception() -> None:
    script = "import time\ntry:\n  with dog.held(): raise KeyError\nexcept KeyError: time.sleep(0.5)"
    assert run_watched(script, 0.2)[0] == 0


# The gate


def test_a_narrow_gate_stops_the_writer_until_it_is_drained(tmp_path: Path) -> None:
    gate = Gate(str(tmp_path / "gate"))
    with open(gate.path, "wb", 0) as pipe:
        writer = subprocess.Popen(["head", "-c", "300000", "/dev/zero"], stdout=pipe)
    try:
        time.sleep(0.2)
        assert writer.poll() is None
        taken = len(gate.drain())
        assert PAGE <= taken < 300000
        gate.widen()
        wait_for("the writer ends", lambda: writer.poll() is not None, 5.0)
        taken += len(gate.drain())
        assert taken == 300000 and gate.drain() == b""
        gate.narrow()
    finally:
        writer.kill()
        writer.wait()
        gate.close()
    assert not Path(gate.path).exists()


@contextmanager
def gate_of_another(path: str, give_back: str = "lambda: None") -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds a gate, and does nothing with it."""
    owner = subprocess.Popen([sys.executable, "-c", "from nova_ftvm.host.gate import Gate; import time\n"
                              f"g = Gate({path!r}, None, {give_back}); print(flush=True); time.sleep(60)"], cwd=ROOT,
                             stdout=subprocess.PIPE, preexec_fn=die_with_the_tests)
    assert owner.stdout is not None
    owner.stdout.readline()
    try:
        yield owner
    finally:
        owner.kill()
        owner.wait()


def test_a_writer_is_not_kept_when_the_gates_owner_dies(tmp_path: Path) -> None:
    path = str(tmp_path / "gate")
    with gate_of_another(path) as owner:
        with open(path, "wb", 0) as pipe:
            writer = subprocess.Popen(["head", "-c", "300000", "/dev/zero"], stdout=pipe)
        time.sleep(0.1)
        assert writer.poll() is None
        owner.kill()
        # The keeper came in time, or the writer was told that nobody reads; QEMU takes both.
        assert writer.wait(5.0) in (0, -signal.SIGPIPE)
    wait_for("the path goes", lambda: not os.path.exists(path), 5.0)


def test_a_gate_keeps_nobody_though_nothing_can_be_given_back(tmp_path: Path) -> None:
    path = str(tmp_path / "gate")
    with gate_of_another(path, give_back="lambda: 1 / 0") as owner:
        owner.kill()
        owner.wait()
        late = subprocess.Popen(["sh", "-c", f"echo state > '{path}'"], preexec_fn=die_with_the_tests)
        late.wait(5.0)


@pytest.mark.parametrize("later_s", [0.0, 0.001, 0.01, 0.5])
def test_a_gate_never_keeps_who_opens_it_after_its_owners_death(tmp_path: Path, later_s: float) -> None:
    path = str(tmp_path / "gate")
    with gate_of_another(path) as owner:
        owner.kill()
        time.sleep(later_s)
        late = subprocess.Popen(["sh", "-c", f"head -c 300000 /dev/zero > '{path}'"], preexec_fn=die_with_the_tests)
        assert late.wait(5.0) == 0


def test_a_gates_keeper_leaves_a_younger_gate_at_its_place_alone(tmp_path: Path) -> None:
    path = str(tmp_path / "gate")
    with gate_of_another(path) as owner:
        younger = Gate(path)
        owner.kill()
        time.sleep(0.5)
        assert Path(path).is_fifo()
        younger.close()


def test_a_gate_takes_a_leftovers_place(tmp_path: Path) -> None:
    path = tmp_path / "gate"
    path.write_text("left by an engine that died")
    gate = Gate(str(path))
    assert path.is_fifo() and gate.drain() == b""
    gate.close()
