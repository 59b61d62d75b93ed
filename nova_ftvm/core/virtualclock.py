"""What QEMU's virtual clock loses at each checkpoint beyond the counted pause, read off the device state. PURE.

QEMU stops this clock first, then waits until the processors stand, and then says STOP; it says RESUME and then starts
the clock again. So a guest that goes by it (any under TCG; under KVM one on the PIT, the ACPI timer or the HPET) loses
more than STOP to RESUME. The state has the clock as it stood in the pause: what the host's clock advanced between the
RESUMEs of two checkpoints, less what this clock advanced between their stops, is the whole loss of one.

Both times are the host's wall clock, which runs as the clock under QEMU's does (CLOCK_MONOTONIC) unless it is set.
Called by engine/capture.py; core/policy.py and engine/stats.py account for it.
"""

import re

from nova_ftvm.core import sections

#: A whole section of the device state: its number, the name, instance 0, version 2; the offset of the processors'
#: ticks, 8 unused bytes, the clock, ns; the footer with the section's number again. Big-endian. With `-icount` there is
#: a subsection before the footer, and that is not read. Source: QEMU's migration/savevm.c and cpu-timers.c.
_SECTION = re.compile(
    rb"\x04(?P<section>.{4})\x05timer\0\0\0\0\0\0\0\x02.{16}(?P<clock>.{8})\x7e(?P=section)", re.DOTALL)

#: More than this, s, is no checkpoint's doing: the host's wall clock was set, or its host slept.
MOST_EXCESS_S = 0.1


def virtual_clock_ns(state: bytes | bytearray) -> int | None:
    """The virtual clock that a device state holds; None: it has none, or more than one, or one that is damaged."""
    found = [int.from_bytes(match["clock"], signed=True) for match in sections.named(b"timer", _SECTION, state)]
    return found[0] if len(found) == 1 else None


class ClockExcess:
    """Of one guest's checkpoints, one after the other."""

    def __init__(self) -> None:
        #: The last checkpoint's: the wall clock at its RESUME, us, and its virtual clock, ns. None: what the clock has
        #: lost since the last checkpoint is not, or not only, ours.
        self._last: tuple[int, int] | None = None

    def forget(self) -> None:
        """Somebody else stopped the guest, or started it, or a checkpoint failed: the next one is a beginning."""
        self._last = None

    def on_checkpoint(self, stopped_us: int, resumed_us: int, state: bytes | bytearray) -> float:
        """Seconds that the clock lost beyond this pause; 0 where nobody can say. Times of the events, wall clock."""
        last, clock_ns = self._last, virtual_clock_ns(state)
        self._last = (resumed_us, clock_ns) if resumed_us and clock_ns is not None else None
        if last is None or self._last is None or clock_ns is None:
            return 0.0
        lost_us = resumed_us - last[0] - (clock_ns - last[1]) / 1000
        excess_s = (lost_us - (resumed_us - stopped_us)) / 1e6
        return excess_s if 0 <= excess_s <= MOST_EXCESS_S else 0.0
