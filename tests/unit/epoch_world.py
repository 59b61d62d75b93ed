"""Random events for an EpochLoop, and a checker that knows its promises from outside: from events and acts only."""

import random
from collections.abc import Iterable

from nova_ftvm.core.epoch import OVER, PAUSED, Act, Acts, EpochLoop, Pace, Phase
from nova_ftvm.core.policy import Policy
from nova_ftvm.types import Epoch, Generation, Grant

PACE = Pace(policy=Policy.FIXED, epoch_s=0.02, ack_limit_s=0.5, beat_s=0.1, live_passes=3, live_rest_pages=100)

#: 'next' is what a healthy world does next; it comes most of the time, so that sequences get far.
EVENTS = ("next",) * 12 + ("tick", "long tick", "heard", "few pages", "many pages", "paused", "unpaused",
                           "filling", "output", "stopped", "state begins", "resumed", "failed", "ack", "old ack",
                           "ack to come", "peer lost", "granted", "refused", "fence", "stop", "hand over", "shutdown",
                           "gone")
#: Ends that nothing can put off.
_AT_ONCE = ("fence", "shutdown", "gone", "refused")


class Broken(AssertionError):
    """The loop broke a promise."""


class Checker:
    """Every rule says in its message what may not happen."""

    def __init__(self, loop: EpochLoop) -> None:
        self.loop = loop
        self.now = 0.0
        #: QEMU has a save to answer.
        self.saving = False
        self.buffered = False
        self.stopped = self.captured = False
        self.gate_open = False
        self.sent: int | None = None
        self.shipped: int | None = None
        self.unreleased = False
        self.stop_asked = False
        self.over = False
        self.protected_told = 0
        self.seen: list[str] = []

    def drive(self, events: Iterable[str]) -> None:
        for event in events:
            if event == "next":
                event = self._next()
            if event in ("failed", "stopped", "state begins", "resumed") and not self.saving:
                continue  # the conversation with QEMU tells of its own checkpoints only
            if event == "resumed" and not self.gate_open:
                continue  # QEMU cannot answer before its state is read
            self.seen.append(event)
            self._check(event, self._happen(event))

    def _next(self) -> str:
        if self.loop.phase is Phase.COPYING:
            return "few pages"
        if self.saving:
            return "resumed" if self.gate_open else "state begins" if self.stopped else "stopped"
        return {Phase.UNACKNOWLEDGED: "ack", Phase.HOLDING: "granted"}.get(self.loop.phase, "tick")

    def _happen(self, event: str) -> Acts:
        loop = self.loop
        self.now += {"long tick": 2.0, "tick": 0.03}.get(event, 0.001)
        match event:
            case "tick" | "long tick":
                return loop.tick(self.now)
            case "heard":
                loop.on_heard(self.now)
            case "filling":
                loop.on_filling()
            case "output":
                loop.on_output(self.now)
                loop.on_processors(self.now % 0.002 > 0.001, self.now)
            case "few pages" | "many pages":
                return loop.on_live_pass(1 if event == "few pages" else 5000)
            case "paused" | "unpaused":
                loop.on_paused(event == "paused")
            case "stopped":
                self.stopped = True
                return loop.on_stopped()
            case "state begins":
                return loop.on_state_begins()
            case "resumed":
                self.saving = self.gate_open = False
                return loop.on_resumed(self.now, 100, 1000)
            case "failed":
                self.saving = self.gate_open = False
                return loop.on_checkpoint_failed("QEMU refused", self.now)
            case "ack" | "old ack" | "ack to come":
                return loop.on_ack(Epoch(loop.epoch + ("old ack", "ack", "ack to come").index(event) - 1))
            case "peer lost":
                return loop.on_peer_lost("the connection broke", self.now)
            case "granted" | "refused":
                return loop.on_grant(Grant(event == "granted", Generation(2), "the arbiter's"))
            case "fence":
                return loop.on_fence("over")
            case "stop":
                self.stop_asked = True
                return loop.on_stop("planned")
            case "hand over":
                return loop.on_hand_over(self.now)
            case "shutdown":
                return loop.on_guest_shutdown()
            case "gone":
                return loop.on_guest_gone()
        return ()

    def _check(self, event: str, acts: Acts) -> None:
        def never(wrong: bool, what: str) -> None:
            if wrong:
                raise Broken(f"{what}, after {self.seen[-6:]}: {[act.name for act in acts]}")

        never(self.over and bool(acts), "something is done after the end")
        for act in acts:
            if act is Act.CHECKPOINT:
                never(not self.buffered, "a checkpoint without output buffers")
                never(self.saving or self.unreleased, "a second epoch in flight")
                self.saving, self.unreleased, self.shipped = True, True, None
                self.stopped = self.captured = False
            elif act is Act.BUFFER:
                self.buffered = True
            elif act is Act.PROTECT:
                never(not self.stopped or self.captured, "pages are protected before the stop, or after their copy")
            elif act is Act.CAPTURE:
                never(not self.saving or self.gate_open, "a capture of a running guest")
                never(event != "state begins", "a capture before the disks are at rest")
                self.captured = True
            elif act is Act.OPEN_GATE:
                never(not self.captured, "the gate opens without a capture")
                self.gate_open = True
            elif act is Act.UNMIRROR:
                never(self.loop.phase is not Phase.HOLDING, "disks are let go while epochs still come")
            elif act is Act.SHIP:
                never(not self.captured, "pages are shipped that were not captured")
                self.sent = self.loop.epoch
            elif act is Act.COMMIT:
                never(not self.captured or self.saving or self.sent != self.loop.epoch, "a torn epoch is committed")
                self.shipped = self.loop.epoch
            elif act is Act.RELEASE:
                never(event != "ack" or self.shipped is None, "output is released without its epoch's acknowledgement")
                self.shipped, self.unreleased = None, False
            elif act is Act.UNBUFFER:
                never(event != "granted" and not self.stop_asked, "output is let go without a grant or a planned end")
            elif act is Act.REPORT_PROTECTED:
                self.protected_told += 1
                never(event != "ack" or self.protected_told > 1, "protection is told at a wrong time")
            elif act is Act.ASK:
                never(self.loop.phase is not Phase.HOLDING, "a question without holding")
        never(self.saving and event not in _AT_ONCE and self.loop.phase not in PAUSED and not self.over,
              "a checkpoint is left in the middle")
        never(self.over and self.loop.phase not in OVER, "the end is taken back")
        self.over = self.loop.phase in OVER


def random_life(loop: EpochLoop, seed: int, length: int = 80) -> Checker:
    source = random.Random(seed)
    checker = Checker(loop)
    checker.drive(source.choice(EVENTS) for _ in range(length))
    return checker
