"""One checkpoint's conversation with QEMU: the save out; STOP, the device state, RESUME and the answers in.

Owns the order in which those are believed. Called by the primary's loop, which decides what each means.
`xen-save-devices-state`, despite its name plain QEMU, stops a running guest, saves all but RAM, starts it again.
"""

import dataclasses
import enum
from collections.abc import Callable, Iterator

from nova_ftvm import ports
from nova_ftvm.core import dirty
from nova_ftvm.core.virtualclock import ClockExcess
from nova_ftvm.engine.diskstream import Cut

_SAVE = "save"


class GuestEvent(enum.Enum):
    #: The guest stopped for our checkpoint.
    STOPPED = enum.auto()
    #: The guest runs again and `Checkpoint.state` is whole.
    RESUMED = enum.auto()
    #: The checkpoint is of no use. The guest runs.
    SAVE_FAILED = enum.auto()
    #: Somebody else stopped the guest, or started it again.
    PAUSED = enum.auto()
    UNPAUSED = enum.auto()
    #: The guest ended itself; QEMU follows.
    SHUTDOWN = enum.auto()
    #: One of our mirrors is over, for a reason that is in `Conversation.lost_mirror`.
    MIRROR_OVER = enum.auto()


@dataclasses.dataclass(slots=True)
class Checkpoint:
    """What one checkpoint brought."""

    pages: list[dirty.Pages] = dataclasses.field(default_factory=list)
    state: bytearray = dataclasses.field(default_factory=bytearray)
    #: Where the epoch's disk writes ended.
    cut: Cut = dataclasses.field(default_factory=Cut)
    stopped_us: int = 0
    resumed_us: int = 0
    #: What the guest's virtual clock lost beyond the pause, s.
    excess_s: float = 0.0
    failure: str = ""

    @property
    def pause_ms(self) -> float:
        """From QEMU's STOP event to its RESUME event."""
        return (self.resumed_us - self.stopped_us) / 1000 if self.resumed_us else 0.0

    @property
    def page_count(self) -> int:
        return sum(pages.count for pages in self.pages)


class Conversation:
    """The checkpoints of one guest, one at a time."""

    def __init__(self, monitor: ports.Monitor, gate: ports.Gate, ended_mirror: Callable[[ports.Message], str]) -> None:
        """`ended_mirror`: why a mirror of ours is over, if an event says so."""
        self._monitor = monitor
        self._gate = gate
        self._saving = False
        self._ended_mirror = ended_mirror
        self.lost_mirror = ""
        self._excess = ClockExcess()
        self.current = Checkpoint()

    def prepare(self) -> None:
        """Sends the save but for its end: before each `begin`, when nobody waits for it."""
        self._monitor.prepare("xen-save-devices-state", _SAVE, filename=self._gate.path, live=False)

    def begin(self) -> None:
        """Lets the save begin."""
        self.current = Checkpoint()
        self._saving = True
        self._gate.narrow()
        self._monitor.complete()

    def read_state(self) -> None:
        """Takes what is in the gate."""
        self.current.state += self._gate.drain()

    def events(self) -> Iterator[GuestEvent]:
        """What QEMU said since the last call, in its order."""
        for message in self._monitor.receive():
            event = self._event(message) if "event" in message else self._answer(message)
            if event:
                yield event
            if event is GuestEvent.RESUMED and self.current.stopped_us and not self.current.resumed_us:
                # The STOP was somebody else's, just before our save: QEMU saved a stopped guest, and left it so.
                yield GuestEvent.PAUSED

    def _event(self, message: ports.Message) -> GuestEvent | None:
        name = message["event"]
        if name == "SHUTDOWN":
            return GuestEvent.SHUTDOWN
        if name not in ("STOP", "RESUME"):
            why = self._ended_mirror(message)
            self.lost_mirror = self.lost_mirror or why
            return GuestEvent.MIRROR_OVER if why else None
        if not self._saving:
            self._excess.forget()
            return GuestEvent.PAUSED if name == "STOP" else GuestEvent.UNPAUSED
        stamp = message["timestamp"]
        now_us = stamp["seconds"] * 1_000_000 + stamp["microseconds"]
        if name == "RESUME":
            self.current.resumed_us = now_us
            return None
        self.current.stopped_us = now_us
        return GuestEvent.STOPPED

    def _answer(self, message: ports.Message) -> GuestEvent | None:
        if message.get("id") != _SAVE:
            return None
        # QEMU starts the guest before it answers, so RESUME came before, if the guest was running at all.
        self._saving = False
        self.read_state()
        done = self.current
        if "error" not in message:
            done.excess_s = self._excess.on_checkpoint(done.stopped_us, done.resumed_us, done.state)
            return GuestEvent.RESUMED
        self._excess.forget()
        done.failure = f"QEMU's {_SAVE} failed: {message['error']['desc']}"
        return GuestEvent.SAVE_FAILED
