"""Sets kvmclock forward in pauses, by the decisions of core/kvmclock.py. Called by the primary's engine.

In the pause it takes what QEMU has to say up to kvmclock, a page at a time, as the gate is still narrow: so the number
that is written over is the one of this very state. Whatever goes wrong with it ends it, and nothing else.
"""

import contextlib
import logging
import select
import time
from collections.abc import Callable, Iterator

from nova_ftvm import ports
from nova_ftvm.core import kvmclock
from nova_ftvm.core.kvmclock import Forwarding, Phase, Reason
from nova_ftvm.engine.capture import Conversation
from nova_ftvm.engine.faults import Fault, trip

LOG = logging.getLogger(__name__)

#: What a pause may take longer for it. Each page of the state before kvmclock takes about 15 us.
_LONGEST_S = 3e-3


def _raw_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)


class NotForwarded:
    """A clock that is left alone: it is not wanted, or there is no kvmclock."""

    def begin(self) -> None: ...

    def forward(self) -> None: ...

    def running(self, saved: bool) -> None: ...

    def search(self) -> None: ...

    def on_foreign_pause(self) -> None: ...


class ClockForward(NotForwarded):
    """Of one guest, for one engine's life."""

    def __init__(self, places: ports.ClockPlaces, talk: Conversation, gate: ports.Gate,
                 on_change: Callable[[bool], None] = lambda goes_on: None,
                 clock: Callable[[], int] = _raw_ns) -> None:
        """on_change: is told when the clock begins to go on through pauses, and when it does so no more."""
        self._places = places
        self._talk = talk
        self._gate = gate
        self._on_change = on_change
        self._clock = clock
        self._what = Forwarding()
        self._phase = Phase.SEARCHING
        self._is_passing = False

    def begin(self) -> None:
        """BEFORE each checkpoint's command."""
        self._what.on_began(self._clock())

    def forward(self) -> None:
        """The gate is still narrow, and all else is done: QEMU cannot start the guest."""
        if not self._what.is_due():
            return
        with self._ends_for_trouble():
            numbers = self._await_number()
            if not numbers:
                self._what.on_late()
                return
            due = self._what.on_saved(self._clock(), numbers[0], self._places.read(self._what.place))
            if due is not None:
                trip(Fault.BEFORE_FORWARD)
                self._places.write(self._what.place, due)
                trip(Fault.FORWARDED)

    def running(self, saved: bool) -> None:
        """AFTER the guest's start; saved: the state is whole."""
        if self._what.phase is not Phase.STOPPED:
            self._what.on_running(self._clock(), kvmclock.saved(self._talk.current.state) if saved else None)
        self._tell()

    def search(self) -> None:
        """A part of the heap, when nobody waits: the guest runs, and its output has left."""
        if self._what.phase is not Phase.SEARCHING or self._what.number is None:
            return
        with self._ends_for_trouble():
            if not self._is_passing:
                if refusal := self._places.begin():
                    self._what.stop(refusal)
                    return
                self._is_passing = True
            self._is_passing = self._places.look(self._what.number)
            if not self._is_passing:
                self._what.on_pass(self._places.places)

    def on_foreign_pause(self) -> None:
        self._what.on_foreign_pause()

    def _await_number(self) -> list[int]:
        """[] when it does not come."""
        deadline = time.monotonic() + _LONGEST_S
        while not (numbers := kvmclock.saved(self._talk.current.state)):
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not select.select([self._gate], [], [], left_s)[0]:
                break
            self._talk.read_state()
        return numbers

    @contextlib.contextmanager
    def _ends_for_trouble(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self._what.stop(Reason.UNREADABLE)

    def _tell(self) -> None:
        if (phase := self._what.phase) is self._phase:
            return
        if phase is Phase.FORWARDING:
            LOG.info("kvmclock is set forward in pauses, by what the guest stood")
            self._on_change(True)
        elif phase is Phase.STOPPED:
            LOG.warning("kvmclock is not set forward in pauses: %s; a guest that goes by it (kvm-clock, a Windows "
                        "guest) loses what it stands: let a Linux guest take its TSC, or lower [engine] "
                        "max_pause_percent",
                        self._what.reason)
            self._on_change(False)
        self._phase = phase
