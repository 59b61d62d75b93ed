"""core/lifesigns.py: lines of /proc/PID/stat as Linux 6.18 wrote them for a QEMU."""

import pytest

from nova_ftvm.core.lifesigns import is_ending

RUNNING = (b"15411 (qemu-system-x86) %s 15406 15406 10057 0 -1 %d 5278 0 0 0 3 0 0 0 20 0 6 0 134770 1805922304 10061 "
           b"18446744073709551615 94657847803904 94657854590165 140722256194224 0 0 %d 268444224 4100 16451 0 0 0 17 0 "
           b"0 0 0 0 0 94657858129224 94657871679344 94658354130944 140722256202368 140722256202447 140722256202447 "
           b"140722256203740 %d\n")
FLAGS = 138412416  # PF_NOFREEZE and others that QEMU has while it lives
EXITING, POSTCOREDUMP, DUMPCORE, SIGNALED = 0x4, 0x8, 0x200, 0x400
SIGKILL, SIGTERM = 1 << 8, 1 << 14
KILLED, STOPPED, TRAPPED = 9, 19, 5


@pytest.mark.parametrize("state, signals, code", [
    (b"S", 0, 0), (b"R", 0, 0), (b"D", 0, 0), (b"T", 0, STOPPED), (b"t", 0, TRAPPED), (b"I", 0, 0), (b"S", SIGTERM, 0),
], ids=["asleep", "at work", "waits for a disk", "stopped", "traced", "idle", "asked to end"])
def test_a_process_that_only_stands_still_lives(state: bytes, signals: int, code: int) -> None:
    assert not is_ending(RUNNING % (state, FLAGS, signals, code))


@pytest.mark.parametrize("state, flags, signals, code", [
    (b"R", 0, SIGKILL, 0), (b"D", 0, SIGKILL, 0), (b"T", 0, SIGKILL | SIGTERM, STOPPED), (b"R", 0, 0, KILLED),
    (b"R", SIGNALED, 0, 0), (b"D", SIGNALED | DUMPCORE, 0, 0), (b"D", SIGNALED | POSTCOREDUMP, 0, 0),
    (b"R", SIGNALED | POSTCOREDUMP | EXITING, 0, 0), (b"R", EXITING, 0, 0), (b"Z", EXITING, 0, 0), (b"Z", 0, 0, 0),
    (b"X", 0, 0, 0),
], ids=["killed", "killed at a disk", "killed while stopped", "takes its kill", "by a signal", "dumps its core",
        "waits for its core's dump", "gives its memory back", "left by itself", "zombie", "zombie alone", "dead"])
def test_a_process_that_the_kernel_is_ending_does_not_live(state: bytes, flags: int, signals: int,
                                                                  code: int) -> None:
    assert is_ending(RUNNING % (state, FLAGS | flags, signals, code))


def test_a_name_with_parentheses_hides_nothing() -> None:
    line = (RUNNING % (b"S", FLAGS, 0, 0)).replace(b"qemu-system-x86", b"a) Z 1 (b)")
    assert not is_ending(line)
    assert is_ending((RUNNING % (b"Z", FLAGS, 0, 0)).replace(b"qemu-system-x86", b"a) S 1 (b"))
