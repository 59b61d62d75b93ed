"""host/precedence.py: on this kernel, with processes in QEMU's place."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nova_ftvm.host.gate import Gate
from nova_ftvm.host.precedence import Precedence
from tests.host.machine import ROOT, die_with_the_tests, wait_for

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="not root")

OURS = os.SCHED_RR | os.SCHED_RESET_ON_FORK
NOBODY = 65534
NICE = 3


@pytest.fixture
def qemu() -> Iterator[int]:
    """The pid of a process that does nothing."""
    with running(["sleep", "60"]) as process:
        os.setpriority(os.PRIO_PROCESS, process.pid, NICE)
        yield process.pid


@pytest.fixture
def precedence(qemu: int) -> Iterator[Precedence]:
    made = Precedence(qemu)
    yield made
    made.leave()


@contextmanager
def running(argv: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, preexec_fn=die_with_the_tests)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def policies(qemu: int) -> list[int]:
    return [os.sched_getscheduler(thread) for thread in (0, qemu)]


def test_both_have_it_until_they_leave_it(qemu: int, precedence: Precedence) -> None:
    for _ in range(2):
        precedence.take()
        assert policies(qemu) == [OURS, OURS]
        assert os.sched_getparam(qemu).sched_priority == os.sched_get_priority_min(os.SCHED_RR)
        precedence.leave()
        assert policies(qemu) == [os.SCHED_OTHER, os.SCHED_OTHER]
        assert os.getpriority(os.PRIO_PROCESS, qemu) == NICE
    precedence.leave()


def test_what_they_start_in_a_pause_has_none_of_it(precedence: Precedence) -> None:
    precedence.take()
    with running(["sleep", "60"]) as child:
        assert os.sched_getscheduler(child.pid) == os.SCHED_OTHER


@pytest.mark.parametrize("policy, priority", [(os.SCHED_BATCH, 0), (os.SCHED_FIFO, 5), (os.SCHED_RR, 1)])
def test_a_main_thread_with_a_policy_of_its_own_keeps_it(qemu: int, policy: int, priority: int) -> None:
    os.sched_setscheduler(qemu, policy, os.sched_param(priority))
    precedence = Precedence(qemu)
    precedence.take()
    assert policies(qemu) == [OURS, policy]
    precedence.leave()
    assert policies(qemu) == [os.SCHED_OTHER, policy]
    assert os.sched_getparam(qemu).sched_priority == priority


def test_a_qemu_that_is_gone_is_nobodys_error() -> None:
    with running(["sleep", "60"]) as qemu:
        precedence = Precedence(qemu.pid)
    precedence.take()
    precedence.leave()
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
    Precedence(qemu.pid)


def engine(qemu: int, keeper: str) -> str:
    return ("import time\nfrom nova_ftvm.host.gate import Gate\nfrom nova_ftvm.host.precedence import Precedence\n"
            f"precedence = Precedence({qemu})\n{keeper}\nprecedence.take()\nprint(flush=True)\ntime.sleep(60)")


def test_the_gates_keeper_gives_it_back_when_the_engine_dies(qemu: int, tmp_path: Path) -> None:
    keeper = f"gate = Gate({str(tmp_path / 'gate')!r}, None, precedence.leave)"
    with running([sys.executable, "-c", engine(qemu, keeper)]) as dying:
        assert dying.stdout is not None
        dying.stdout.readline()
        assert os.sched_getscheduler(qemu) == OURS
    wait_for("the keeper gives it back", lambda: os.sched_getscheduler(qemu) == os.SCHED_OTHER, 5.0)


def test_the_next_engine_gives_back_what_engine_and_keeper_left(qemu: int) -> None:
    with running([sys.executable, "-c", engine(qemu, "")]) as dying:
        assert dying.stdout is not None
        dying.stdout.readline()
    assert os.sched_getscheduler(qemu) == OURS
    Precedence(qemu)
    assert os.sched_getscheduler(qemu) == os.SCHED_OTHER


def test_a_closed_gate_leaves_no_precedence_behind(qemu: int, tmp_path: Path, precedence: Precedence) -> None:
    gate = Gate(str(tmp_path / "gate"), None, precedence.leave)
    precedence.take()
    gate.close()
    assert os.sched_getscheduler(qemu) == os.SCHED_OTHER


def test_who_may_not_goes_on_without(qemu: int, precedence: Precedence) -> None:
    """As in a container without CAP_SYS_NICE; an engine that had it has died."""
    precedence.take()
    script = (f"import logging, os\nfrom nova_ftvm.host.precedence import Precedence\nlogging.basicConfig()\n"
              f"Precedence({qemu}).leave()\n"
              "precedence = Precedence(os.getpid())\nfor _ in range(3): precedence.take(); precedence.leave()\n"
              "assert os.sched_getscheduler(0) == os.SCHED_OTHER")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, user=NOBODY, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("CAP_SYS_NICE") == 1
    assert os.sched_getscheduler(qemu) == OURS
