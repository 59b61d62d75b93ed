"""A QEMU under KVM that ends is told to the backup as dead before it has given its guest's memory back.

Its guest sleeps. How long an end takes is not left to the machine: a killed QEMU is held, by a tracer, where it would
begin to give its memory back, and a dump of a core takes as long as the memory that was touched is large.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nova_ftvm.exception import GuestGone
from tests.host.machine import Qemu, die_with_the_tests, wait_for
from tests.host.protection import Protection, protected
from tests.kvm.machine import small_pages

_PTRACE_SEIZE, _PTRACE_O_TRACEEXIT = 0x4206, 1 << 6
_ROM_BYTES = 1 << 16
_RESET_VECTOR = 0xFFF0
#: hlt, with interrupts off as after a reset; and again.
_SLEEP = b"\xf4\xeb\xfd"


def pair_of(launch: Callable[..., Qemu], folder: Path, mib: int) -> tuple[Qemu, Qemu]:
    rom = folder / "sleeping.rom"
    rom.write_bytes(b"\xf4" * _RESET_VECTOR + _SLEEP.ljust(_ROM_BYTES - _RESET_VECTOR, b"\xf4"))

    def start(name: str, touched: str, standby: bool) -> Qemu:
        disk = folder / f"{name}.raw"
        disk.write_bytes(bytes(1 << 20))
        return launch(name, rom, memory_mib=mib, standby=standby, extra=(
            "-object", f"memory-backend-ram,id=ram,size={mib}M,prealloc={touched}", "-machine", "memory-backend=ram",
            "-blockdev", f"driver=raw,node-name=disk,file.driver=file,file.filename={disk}",
            "-device", "virtio-blk-pci,id=vda,drive=disk"))

    with small_pages():
        return start("p", "on", False), start("b", "off", True)


@contextmanager
def watched(qemu: Qemu) -> Iterator[Callable[[], list[str]]]:
    """What has told of its end: a socket that it closed, and the pidfd."""
    pidfd = os.pidfd_open(qemu.pid)

    def signs() -> list[str]:
        seen = ["pidfd"] if select.select([pidfd], [], [], 0)[0] else []
        with contextlib.suppress(GuestGone):
            while qemu.operator.receive():
                pass
            return seen
        return ["socket", *seen]

    try:
        yield signs
    finally:
        os.close(pidfd)


@contextmanager
def held_at_its_exit(qemu: Qemu) -> Iterator[None]:
    """Killed meanwhile, its main thread stops at its exit until this is over: all is still open."""
    program = (f"import ctypes, sys; assert ctypes.CDLL(None).ptrace({_PTRACE_SEIZE}, {qemu.pid}, 0, "
               f"{_PTRACE_O_TRACEEXIT}) == 0; print('ready', flush=True); sys.stdin.read()")
    tracer = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              preexec_fn=die_with_the_tests)
    try:
        assert tracer.stdout.readline() == b"ready\n"
        yield
    finally:
        tracer.kill()
        tracer.communicate()


def goes_on_in_its_backup(pair: Protection, signs: Callable[[], list[str]]) -> list[str]:
    """Waits for it, and says what of QEMU's end was seen when the backup asked."""
    asked = pair.backup.hear("ask_promotion")
    seen = signs()
    pair.backup.grant()
    pair.backup.hear("promoted")
    assert asked["evidence"] == "the primary's agent saw QEMU end"
    assert wait_for("the primary's engine ends", pair.primary.ended)
    assert pair.primary.heard("ask_degrade") is None
    assert "protection ended, ended as planned: QEMU ended" in pair.primary.log.read_text()
    assert pair.standby_qemu.is_running()
    return seen


def test_a_killed_qemu_is_told_as_dead_before_it_gives_anything_back(launch: Callable[..., Qemu],
                                                                     tmp_path: Path) -> None:
    primary, standby = pair_of(launch, tmp_path, 64)
    with watched(primary) as signs, protected(primary, standby) as pair:
        with held_at_its_exit(primary):
            primary.process.send_signal(signal.SIGKILL)
            assert goes_on_in_its_backup(pair, signs) == [], "only its end told"
        primary.kill()


def test_a_qemu_that_dumps_its_core_is_told_as_dead_before_the_dump_is_over(launch: Callable[..., Qemu],
                                                                           tmp_path: Path) -> None:
    primary, standby = pair_of(launch, tmp_path, 1024)
    with watched(primary) as signs, protected(primary, standby) as pair:
        primary.process.send_signal(signal.SIGABRT)
        seen = goes_on_in_its_backup(pair, signs)
        # A dump that is under way ends with a kill.
        primary.kill()
    cores = list(primary.folder.glob("core*"))
    for core in cores:
        core.unlink()
    if not cores:
        pytest.skip("this machine writes no core: see /proc/sys/kernel/core_pattern")
    assert seen == [], "only its end told"


def test_a_qemu_that_is_stopped_is_not_told_as_dead(launch: Callable[..., Qemu], tmp_path: Path) -> None:
    """Its backup receives the engine's beats while that waits for the checkpoint."""
    primary, standby = pair_of(launch, tmp_path, 64)
    with protected(primary, standby) as pair:
        primary.process.send_signal(signal.SIGSTOP)
        with pytest.raises(AssertionError, match="not within"):
            pair.backup.hear("ask_promotion", timeout_s=1.0)
        assert not pair.primary.ended()
        primary.process.send_signal(signal.SIGCONT)
        primary.kill()
        assert pair.backup.hear("ask_promotion")["evidence"] == "the primary's agent saw QEMU end"


def test_a_qemu_that_is_told_to_quit_is_a_planned_end(launch: Callable[..., Qemu], tmp_path: Path) -> None:
    primary, standby = pair_of(launch, tmp_path, 512)
    with protected(primary, standby) as pair:
        primary.operator.command("quit")
        pair.primary.hear("guest_shutdown")
        assert wait_for("the backup's engine ends", pair.backup.ended)
        assert pair.backup.heard("ask_promotion") is None and pair.primary.heard("ask_degrade") is None
        assert primary.process.wait() == 0


def test_a_standby_that_dies_is_told_before_it_gives_anything_back(launch: Callable[..., Qemu], tmp_path: Path) -> None:
    primary, standby = pair_of(launch, tmp_path, 64)
    with watched(standby) as signs, protected(primary, standby) as pair:
        with held_at_its_exit(standby):
            standby.process.send_signal(signal.SIGKILL)
            why = pair.primary.hear("ask_degrade")["reason"]
            assert signs() == [], "only its end told"
        standby.kill()
        assert why == "the backup failed: the standby ended: QEMU is ending"
        pair.primary.grant()
        assert wait_for("the primary's engine ends", pair.primary.ended)
        assert primary.is_running()
