"""host/lifesigns.py: on this kernel, with processes in QEMU's place."""

import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nova_ftvm.exception import GuestGone
from nova_ftvm.host.lifesigns import ProcessLife
from tests.host.machine import die_with_the_tests, wait_for

#: What a process has of memory whose giving back, or dump, is to take some time.
MIB = 256
#: A main thread that sleeps beside one that holds a lock of its own; says when it is ready.
PROGRAM = f"""
import os, sys, threading, time
memory = bytearray({MIB} << 20)
memory[::4096] = b"x" * len(memory[::4096])
def other():
    print(threading.get_native_id(), flush=True)
    time.sleep(60)
threading.Thread(target=other, daemon=True).start()
sys.stdin.read()
os._exit(0)
"""


class Big:
    """A process with memory and two threads."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.other_thread = int(process.stdout.readline())
        self.pidfd = os.pidfd_open(process.pid)
        self.life = ProcessLife(process.pid, self.pidfd)

    def has_ended(self) -> bool:
        return bool(select.select([self.pidfd], [], [], 0)[0])

    def close(self) -> None:
        self.life.close()
        os.close(self.pidfd)


@contextmanager
def running(folder: Path, core: int = 0) -> Iterator[Big]:
    def prepare() -> None:
        die_with_the_tests()
        resource.setrlimit(resource.RLIMIT_CORE, (core, core))

    process = subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=folder, stdin=subprocess.PIPE, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, preexec_fn=prepare)
    big = None
    try:
        big = Big(process)
        yield big
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
        if big:
            big.close()


def kill(big: Big) -> None:
    big.process.kill()


def crash_main(big: Big) -> None:
    big.process.send_signal(signal.SIGSEGV)


def crash_other(big: Big) -> None:
    # The kernel gives a thread's own signal to that thread: what a fault of its code does.
    subprocess.run([sys.executable, "-c", f"import ctypes; ctypes.CDLL(None).syscall(234, {big.process.pid}, "
                    f"{big.other_thread}, {int(signal.SIGABRT)})"], check=True)


def leave(big: Big) -> None:
    big.process.stdin.close()


@pytest.mark.parametrize("end", [kill, crash_main, crash_other, leave], ids=lambda end: end.__name__)
def test_an_end_is_told_before_the_pidfd_tells_and_for_ever_after(end: Callable[[Big], None], tmp_path: Path) -> None:
    with running(tmp_path, resource.RLIM_INFINITY) as big:
        assert not big.life.is_ending()
        end(big)
        wait_for("the end is told", big.life.is_ending, pause_s=0)
        told_at, was_early = time.monotonic(), not big.has_ended()
        while not big.has_ended():
            assert big.life.is_ending(), "it came back"
        assert was_early, "only the pidfd told"
        if end in (crash_main, crash_other) and (tmp_path / "core").exists():
            assert time.monotonic() - told_at > 1e-3, "there was no dump to wait for"
        assert big.life.is_ending(), "a zombie"
        big.process.wait()
        assert big.life.is_ending(), "not even that"


@pytest.mark.parametrize("still", [signal.SIGSTOP, signal.SIGTSTP])
def test_a_process_that_is_stopped_lives_and_its_kill_is_told_all_the_same(still: signal.Signals,
                                                                          tmp_path: Path) -> None:
    with running(tmp_path) as big:
        big.process.send_signal(still)
        wait_for("it is stopped", lambda: b") T " in Path(f"/proc/{big.process.pid}/stat").read_bytes())
        assert not big.life.is_ending()
        big.process.kill()
        assert wait_for("its end is told", big.life.is_ending, pause_s=0)


def test_a_traced_process_lives(tmp_path: Path) -> None:
    with running(tmp_path) as big:
        program = ("import ctypes, os, sys; libc = ctypes.CDLL(None); "
                   f"assert libc.ptrace(16, {big.process.pid}, 0, 0) == 0; os.waitpid({big.process.pid}, 0x40000000); "
                   "print('traced', flush=True); sys.stdin.read()")
        tracer = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                  text=True, preexec_fn=die_with_the_tests)
        try:
            assert tracer.stdout.readline() == "traced\n"
            assert b") t " in Path(f"/proc/{big.process.pid}/stat").read_bytes()
            assert not big.life.is_ending()
        finally:
            tracer.kill()
            tracer.wait()
            tracer.stdin.close()
            tracer.stdout.close()


def test_a_process_that_is_gone_is_no_others(tmp_path: Path) -> None:
    with running(tmp_path) as big:
        big.process.kill()
        big.process.wait()
        descriptors = len(os.listdir("/proc/self/fd"))
        for pid in (big.process.pid, os.getpid()):  # Its number is nobody's, and somebody else's.
            with pytest.raises(GuestGone):
                ProcessLife(pid, big.pidfd)
        assert len(os.listdir("/proc/self/fd")) == descriptors
