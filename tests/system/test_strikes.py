"""What faults are made of, without a lab: a clock that jumps, memory and a disk that have no room."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ftvm_lab import clocks, storage
from ftvm_lab.faults import FAULTS
from ftvm_lab.layout import COMPUTES, Layout
from ftvm_lab.memory import FullMemory

from tests.system.claims import CLAIMS, ELSEWHERE

pytestmark = pytest.mark.trial

HOST = COMPUTES[0]
TABLE = Path(__file__).parents[2] / "doc/source/admin/faults.rst"


@pytest.fixture
def layout(tmp_path: Path) -> Iterator[Layout]:
    made = Layout(tmp_path)
    made.outside(HOST).mkdir(parents=True)
    yield made
    storage.detach_all(made)


def test_a_hosts_wall_clock_jumps_under_a_running_program_and_no_other_clock_does(layout: Layout) -> None:
    clocks.install(layout, HOST)
    # As a host sees its own directory.
    layout.host.symlink_to(layout.outside(HOST))
    tell = "import time\nwhile input(): print(time.time(), time.monotonic(), flush=True)"
    with subprocess.Popen(
        [sys.executable, "-c", tell],
        env={**os.environ, **clocks.environment(layout)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as program:
        assert program.stdin is not None and program.stdout is not None
        for jump in (0, 3600, -3600, 0):
            clocks.set_offset(layout, HOST, jump)
            program.stdin.write("?\n")
            program.stdin.flush()
            wall, monotonic = map(float, program.stdout.readline().split())
            assert wall - time.time() == pytest.approx(jump, abs=5)
            assert monotonic == pytest.approx(time.monotonic(), abs=5)
        program.kill()


def test_a_program_without_room_for_more_memory_is_killed_by_the_kernel_and_a_frugal_one_lives() -> None:
    # What it has was never counted there, so it must touch new pages to be noticed.
    grow = "import sys\nprint('up', flush=True)\nfor line in sys.stdin: print(len(bytearray(int(line))), flush=True)"
    greedy, frugal = (
        subprocess.Popen([sys.executable, "-c", grow], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    )
    for program in (greedy, frugal):
        # Else it would be noticed while it starts.
        assert program.stdout is not None and program.stdout.readline() == "up\n"
    full = FullMemory.of("ftvm-test-memory", [greedy.pid])
    try:
        for program in (greedy, frugal):
            assert program.stdin is not None
            program.stdin.write(f"{64 << 20}\n")
            program.stdin.flush()
        assert greedy.wait(20) == -signal.SIGKILL
        assert frugal.stdout is not None and frugal.stdout.readline() == f"{64 << 20}\n"
    finally:
        full.end()
        full.end()
        for program in (greedy, frugal):
            program.kill()
            program.wait()
    assert not full.group.exists()


def test_a_full_disk_takes_no_byte_until_it_is_freed(layout: Layout) -> None:
    storage.attach(layout, HOST)
    storage.fill(layout, HOST)
    file = layout.instances(HOST) / "file"
    with pytest.raises(OSError, match="No space left"):
        file.write_bytes(b"x")
    storage.free(layout, HOST)
    file.write_bytes(b"x")
    storage.attach(layout, HOST)
    assert file.read_bytes() == b"x"


def test_every_fault_is_claimed_and_in_the_administrators_table() -> None:
    assert set(FAULTS) == CLAIMS.keys() | ELSEWHERE
    told = TABLE.read_text()
    assert [name for name in FAULTS if f"``{name}``" not in told] == []


def test_every_fault_lasts_some_bounded_time() -> None:
    for fault in FAULTS.values():
        shortest, longest = fault.lasts_s
        assert 0 <= shortest <= longest <= 60, fault.name
