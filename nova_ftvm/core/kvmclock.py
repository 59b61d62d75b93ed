"""Whether, and by how much, kvmclock may be set forward in a pause, so that it does not lose the pause. PURE.

QEMU reads kvmclock when it saves the devices and sets it to that number when it starts the guest again. The number is
in the device state, and in one place of QEMU's heap. Put forward there before the start, it is what QEMU sets.
`Forwarding` says what to write, or that nothing may be written any more: on the first doubt it stops for good, and the
clock then loses the pauses as it did before. Called by engine/clockforward.py, which reads and writes.

The line that the clock is kept on: what it was at the anchor, a pause in which nothing was written, plus the time
since then by CLOCK_MONOTONIC_RAW. That runs as the host's TSC does, which is what kvmclock counts between two pauses;
CLOCK_MONOTONIC is slewed by the host's NTP client. So the guest gets the clock that it would have without pauses, and
its own NTP client keeps it as it would keep that one.

Why each rule: doc/source/contributor/decisions/clocks.rst.
"""

import enum
import re
from collections.abc import Sequence

from nova_ftvm.core import sections

#: A whole section of the device state: its number, the name, instance 0, version 1; the clock, ns; the subsection that
#: says that QEMU will set just that at the start, and not what it finds in the guest's memory; the footer with the
#: section's number again. Big-endian. Source: QEMU's migration/savevm.c and hw/i386/kvm/clock.c.
_SECTION = re.compile(
    rb"\x04(?P<section>.{4})\x08kvmclock\0\0\0\0\0\0\0\x01(?P<clock>.{8})"
    rb"\x05\x1akvmclock/clock_is_reliable\0\0\0\x01\x01\x7e(?P=section)", re.DOTALL)

#: Passes over the heap; pauses in which the place must follow the state before it is written to.
MOST_PASSES, PROOFS = 3, 3
#: The two clocks' readings lie so far apart at most, ns, and run apart by so much of the time at most.
_SLACK_NS, _DRIFT = 100_000, 500e-6
#: The clock is set forward when it may have lost this, ns: to take the state so far costs a pause some 0.1 ms.
_WORTH_NS = 3_000_000
#: Pauses that cost the clock more time than we know of, before that is no accident; a hundred good ones forgive them.
_MOST_STRIKES, _FORGIVING = 10, 100
#: Pauses in a row in which the number came too late. On a busy host some do.
_MOST_LATE = 30


def saved(state: bytes | bytearray) -> list[int]:
    """Each number that a device state, or the beginning of one, has for kvmclock, ns. A right one has one, when it has
    come so far."""
    return [int.from_bytes(match["clock"]) for match in sections.named(b"kvmclock", _SECTION, state)]


class Phase(enum.Enum):
    #: The place is looked for.
    SEARCHING = enum.auto()
    #: There is one, and it must follow the state for some pauses.
    PROVING = enum.auto()
    FORWARDING = enum.auto()
    #: For good.
    STOPPED = enum.auto()


class Reason(enum.StrEnum):
    """Why nothing is written any more."""

    NOT_SAVED = "the guest's state has no kvmclock that QEMU sets from it"
    SAVED_TWICE = "the guest's state has more than one kvmclock"
    LATE = "the state did not come so far within the time that a pause may take for this"
    TOO_LARGE = "QEMU's heap is larger than what is looked through"
    NO_PLACE = "the number was not found in QEMU's heap"
    SOME_PLACES = "the number is in more than one place of QEMU's heap"
    NOT_ALIGNED = "the number's place is not aligned, and a write to it might be seen in part"
    DIFFERS = "the place in QEMU's heap does not have the number of the state"
    CHANGED = "the number changed while the state was written"
    NO_EFFECT = "the clock did not go on from what was written"
    AHEAD = "the clock was set forward by somebody else, or runs faster than the host's"
    TOO_FAR = "the clock loses more time than the guest's pauses take"
    UNREADABLE = "QEMU's heap cannot be read, or not be written"


class Forwarding:
    """Of one guest in one generation. Times and numbers are ns; times by CLOCK_MONOTONIC_RAW."""

    def __init__(self) -> None:
        self.phase = Phase.SEARCHING
        self.reason: Reason | None = None
        #: Where to write, once it is known.
        self.place = 0
        #: The last epoch's number: until the next pause that is what the place has.
        self.number: int | None = None
        self._passes = self._proofs = self._strikes = self._good = self._late = 0
        #: What the clock is ahead of the host's, on the line; None: anchored at the next pause.
        self._anchor: int | None = None
        #: The most that the clock can have lost since it was on the line.
        self._lost = 0
        #: When it was on the line.
        self._on_line = 0
        self._written = 0
        #: What the last pause wrote over, and when the guest was seen to run on; None: nothing, or nobody can say.
        self._replaced: int | None = None
        self._runs_since = 0
        #: The beginning of what was not counted into `_lost` by now.
        self._began = 0
        #: This pause's number.
        self._seen: int | None = None

    def stop(self, reason: Reason) -> None:
        """Nothing is written from now on, whatever happens. The first reason stays."""
        if self.reason is None:
            self.phase, self.reason = Phase.STOPPED, reason

    def on_pass(self, places: Sequence[int]) -> None:
        """All of the heap was looked through, each part for the number that was the last then."""
        self._passes += 1
        if len(places) == 1 and places[0] % 8:
            self.stop(Reason.NOT_ALIGNED)
        elif len(places) == 1:
            self.place, self.phase = places[0], Phase.PROVING
        elif self._passes == MOST_PASSES:
            self.stop(Reason.SOME_PLACES if places else Reason.NO_PLACE)

    def on_began(self, now: int) -> None:
        """BEFORE QEMU is told to stop the guest."""
        self._began, self._seen = now, None

    def on_foreign_pause(self) -> None:
        """Somebody else stopped the guest, or started it: what the clock lost by that stays lost."""
        self._anchor = self._replaced = None

    def is_due(self) -> bool:
        """Is there anything to do in this pause? Else neither `on_saved` nor `on_late` is for it."""
        return self.phase is Phase.PROVING or (self.phase is Phase.FORWARDING and (
            self._anchor is None or self._lost >= _WORTH_NS))

    def on_saved(self, now: int, number: int, found: int) -> int | None:
        """The guest stands. number: in this pause's state; found: at the place. What to write there, if anything."""
        self._seen, self._late = number, 0
        if found != number:
            self.stop(Reason.DIFFERS)
        self._check_effect(number)
        self._count(now)
        if self.phase is Phase.PROVING:
            self._prove()
            return None
        return self._forward(now, number) if self.phase is Phase.FORWARDING else None

    def on_late(self) -> None:
        """The number did not come in time: this pause stays lost until the next one."""
        self._replaced = None
        self._late += 1
        if self._late >= _MOST_LATE:
            self.stop(Reason.LATE)

    def on_running(self, now: int, numbers: Sequence[int] | None) -> None:
        """The guest runs. numbers: of the whole state; None: the checkpoint failed."""
        self.number = None
        if numbers is None:
            self._replaced = None
        elif len(numbers) != 1:
            self.stop(Reason.SAVED_TWICE if numbers else Reason.NOT_SAVED)
        elif self._seen not in (None, numbers[0]):
            self.stop(Reason.CHANGED)
        else:
            self.number = numbers[0]
            if self._seen is None:
                self._check_effect(self.number)
        self._count(now)
        self._runs_since = now

    def _check_effect(self, number: int) -> None:
        """In the first pause after a write."""
        if self._had_no_effect(number):
            self.stop(Reason.NO_EFFECT)
        self._replaced = None

    def _prove(self) -> None:
        self._proofs += 1
        if self._proofs >= PROOFS:
            self.phase = Phase.FORWARDING

    def _forward(self, now: int, number: int) -> int | None:
        if self._anchor is None:
            self._anchor_at(now, number)
            return None
        step = self._anchor + now - number
        slack = self._slack(now)
        if step <= 0:
            if step < -slack:
                self.stop(Reason.AHEAD)
            return None
        if step > self._lost + slack:
            self._strike()
            self._anchor_at(now, number)
            return None
        self._forgive()
        self._lost, self._on_line = 0, now
        self._replaced, self._written = number, number + step
        return self._written

    def _had_no_effect(self, number: int) -> bool:
        """Did the clock go on from what was there before the last write? One that somebody paused is farther back."""
        if number < self._written:
            return True
        if self._replaced is None:
            return False
        ran = self._began - self._runs_since
        return self._replaced <= number - ran + self._slack(self._began) < self._written

    def _slack(self, now: int) -> int:
        return _SLACK_NS + int(_DRIFT * (now - self._on_line))

    def _anchor_at(self, now: int, number: int) -> None:
        self._anchor, self._lost, self._on_line = number - now, 0, now

    def _forgive(self) -> None:
        self._good += 1
        if self._good >= _FORGIVING:
            self._strikes = 0

    def _strike(self) -> None:
        self._strikes, self._good = self._strikes + 1, 0
        if self._strikes >= _MOST_STRIKES:
            self.stop(Reason.TOO_FAR)

    def _count(self, now: int) -> None:
        self._lost += now - self._began
        self._began = now
