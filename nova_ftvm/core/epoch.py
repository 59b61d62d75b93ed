"""The primary's epoch loop as a state machine. PURE: events and the time in, actions out, to be done in their order.

                       +--------------------------------------------------+
                       v                                                  |
    COPYING --> STOPPING --> STOPPED ---> DRAINING --> UNACKNOWLEDGED --> RUNNING
     (live)      (save       (disks come   (RAM copied,   (shipped; guest   (released)
                  asked)      to rest)      gate open)     runs, output held)
    any of them, the peer lost or handed the guest --> HOLDING --grant--> ALONE
                                                          +----refusal--> FENCED

One epoch is in flight at most. Output leaves in `Release` and in `Unbuffer` only: after the epoch's acknowledgement,
by the arbiter's grant, or at a planned end.
Source: Remus (Cully et al., NSDI 2008), asynchronous output commit.
"""

import dataclasses
import enum

from nova_ftvm.core import policy
from nova_ftvm.core.policy import Measured, Policy
from nova_ftvm.types import Epoch, Grant

#: Seconds until an unanswered question to the arbiter is asked again.
ASK_AGAIN_S = 0.5
#: What the wait for an acknowledgement grows by with each page of the epoch: 80 MB/s, less than any link of use.
ACK_ALLOWANCE_S = 50e-6
#: What it grows by with each byte of the epoch's disk writes: 10 MB/s. Only a backup that is heard of gets it.
DISK_ALLOWANCE_S = 100e-9
#: How long a backup that was handed the guest may take to get the arbiter's grant, before we ask to go on alone.
HAND_OVER_LIMIT_S = 3.0
#: Silence of the backup that ends the first copy. Nothing is held yet, so there is no hurry.
COPY_SILENCE_S = 5.0


class Phase(enum.Enum):
    COPYING = "copying disks and RAM while the guest runs"
    STOPPING = "waiting for the guest to stop"
    STOPPED = "waiting for the guest's disks to come to rest"
    DRAINING = "reading the device state"
    UNACKNOWLEDGED = "waiting for the backup's acknowledgement"
    RUNNING = "between checkpoints"
    HOLDING = "holding output, waiting for the arbiter"
    ALONE = "running without a backup"
    FENCED = "over: another side speaks"
    ENDED = "ended as planned"


#: Between the save's command and the guest's restart: whatever happens, the checkpoint is finished first.
PAUSED = frozenset({Phase.STOPPING, Phase.STOPPED, Phase.DRAINING})
OVER = frozenset({Phase.ALONE, Phase.FENCED, Phase.ENDED})


class Act(enum.Enum):
    #: Hold the guest's output, BEFORE the first checkpoint.
    BUFFER = enum.auto()
    #: Ask QEMU to stop the guest and save its devices.
    CHECKPOINT = enum.auto()
    #: Protect pages that were written, where that is of use, AFTER the guest's processors stand: its disks still write.
    PROTECT = enum.auto()
    #: End the epoch's output and disk writes here, and copy its pages: the disks are at rest, nothing changes any more.
    CAPTURE = enum.auto()
    #: Let QEMU write its device state, AFTER the capture: the guest starts when all is read.
    OPEN_GATE = enum.auto()
    #: Send the epoch's pages to the backup, while QEMU writes its device state.
    SHIP = enum.auto()
    #: Send the device state, and that the epoch is whole.
    COMMIT = enum.auto()
    #: Let the output of the acknowledged epoch go.
    RELEASE = enum.auto()
    #: Let the guest write to its disks without us: no epoch will come that could hold it.
    UNMIRROR = enum.auto()
    #: Let all output go, and hold none any more.
    UNBUFFER = enum.auto()
    #: Ask the arbiter to go on alone.
    ASK = enum.auto()
    #: Say that the pair's RAM, devices and disks are on the backup for the first time.
    REPORT_PROTECTED = enum.auto()
    #: Tell the backup that this is a planned end.
    SAY_BYE = enum.auto()
    #: Stop the guest for good, its output unreleased.
    FENCE = enum.auto()
    #: Tell the backup that QEMU ended by itself.
    SAY_GUEST_GONE = enum.auto()
    #: Tell the backup to take the guest.
    SAY_HAND_OVER = enum.auto()
    #: A sign of life.
    BEAT = enum.auto()


@dataclasses.dataclass(frozen=True, slots=True)
class Pace:
    """The loop's settings, in seconds and pages."""

    policy: Policy
    #: For the policy `fixed`.
    epoch_s: float
    ack_limit_s: float
    beat_s: float
    live_passes: int
    live_rest_pages: int
    #: The share of the time that the guest may stand in pauses, whatever the policy says; 0.5 at most.
    most_paused: float = 0.5


Acts = tuple[Act, ...]


class EpochLoop:
    """The decisions of one primary engine. Every method returns what to do, in order."""

    def __init__(self, pace: Pace, now: float) -> None:
        self._pace = pace
        self.phase = Phase.COPYING
        #: The epoch in flight, or the last one.
        self.epoch = Epoch(0)
        #: Why the peer is lost, or why the protection ends; for people.
        self.reason = ""
        self._passes = 0
        self._seen = Measured(now)
        #: The last checkpoint.
        self._began = now
        #: Did the guest send something in the epoch that ends, and once more after that?
        self._spoke = self._spoke_on = False
        #: A checkpoint is needed as soon as the guest had its share of the time, whatever the policy says.
        self._urgent = False
        self._ack_limit_s = pace.ack_limit_s
        self._silence_limit_s = pace.ack_limit_s
        self._shipped = now
        self._next_ask = now
        self._next_beat = now
        self._heard = now
        self._stop_asked = False
        self._hand_over_asked = False
        self._guest_runs = True

    # Time

    def tick(self, now: float) -> Acts:
        acts: list[Act] = []
        if self.phase is Phase.RUNNING and self._guest_runs and now >= self._due():
            self._began = now
            policy.on_checkpoint(self._seen, now)
            acts += self._checkpoint()
        elif self.phase is Phase.UNACKNOWLEDGED and now >= self._ack_deadline():
            acts += self._lose(f"no acknowledgement within {(now - self._shipped) * 1000:.0f} ms", now)
        elif self.phase is Phase.COPYING and now >= self._heard + COPY_SILENCE_S:
            acts += self._lose(f"nothing heard of the backup for {COPY_SILENCE_S:g} s", now)
        elif self.phase is Phase.HOLDING and now >= self._next_ask:
            acts += self._ask(now)
        if self.phase not in OVER and self.phase is not Phase.HOLDING and now >= self._next_beat:
            self._next_beat = now + self._pace.beat_s
            acts.append(Act.BEAT)
        return tuple(acts)

    def next_tick(self) -> float:
        """When `tick` has something to do, unless an event comes first."""
        if self.phase is Phase.RUNNING and self._guest_runs:
            return min(self._due(), self._next_beat)
        if self.phase is Phase.UNACKNOWLEDGED:
            return min(self._ack_deadline(), self._next_beat)
        return self._next_ask if self.phase is Phase.HOLDING else self._next_beat

    # What the policy goes by

    def on_output(self, now: float) -> None:
        """The guest has sent something."""
        self._seen.output_last = now
        if self._seen.output_since is None:
            self._seen.output_since = now

    def on_processors(self, asleep: bool, now: float) -> None:
        """Of the guest: do all of them sleep?"""
        self._seen.looked = now
        if not asleep:
            self._seen.asleep_since = None
        elif self._seen.asleep_since is None:
            self._seen.asleep_since = now

    @property
    def next_look(self) -> float | None:
        """When somebody should look at them, and say so; None: they do not matter now."""
        if self.phase is not Phase.RUNNING or not policy.watches(self._pace.policy, self._seen):
            return None
        return policy.look(self._seen)

    @property
    def learns_from_processors(self) -> bool:
        """Should somebody look at them at the next release?"""
        return policy.learns(self._pace.policy, self._seen)

    def on_released(self, asleep: bool, now: float) -> None:
        """The epoch's output has left. Did the guest's processors sleep, if that matters (`learns_from_processors`)?
        """
        self._seen.commit_s = now - self._began
        policy.on_released(self._seen, not asleep)

    # The checkpoint

    def on_heard(self, now: float) -> None:
        """Any frame of the backup."""
        self._heard = now

    def on_live_pass(self, pages: int) -> Acts:
        """The disks are followed, and a pass of so many pages over RAM was sent. () means: one more, over what was
        written meanwhile."""
        if self.phase is not Phase.COPYING:
            return ()
        self._passes += 1
        if pages > self._pace.live_rest_pages and self._passes < self._pace.live_passes:
            return ()
        return (Act.BUFFER, *self._checkpoint())

    def on_paused(self, paused: bool) -> None:
        """Somebody else stopped the guest, or started it: one that stands still needs no checkpoint."""
        self._guest_runs = not paused

    def on_stopped(self) -> Acts:
        """QEMU's STOP event. Its disks still come to rest."""
        if self.phase is not Phase.STOPPING:
            return ()
        self.phase = Phase.STOPPED
        return (Act.PROTECT,)

    def on_state_begins(self) -> Acts:
        """The first bytes of the device state are in the gate: QEMU's processors stand and its disks are drained,
        whether or not its word of the stop was heard by now."""
        if self.phase not in (Phase.STOPPING, Phase.STOPPED):
            return ()
        self.phase = Phase.DRAINING
        # What it has sent is covered. What it sends from now on is the next epoch's.
        self._spoke = self._seen.output_since is not None
        self._spoke_on = self._spoke and self._seen.output_last != self._seen.output_since
        self._seen.output_since = self._seen.asleep_since = None
        is_wanted = not (self._stop_asked or self._hand_over_asked or self.reason)
        return (Act.CAPTURE, Act.OPEN_GATE, Act.SHIP) if is_wanted else (Act.CAPTURE, Act.OPEN_GATE)

    def on_cut(self, heard: bool) -> None:
        """What the guest has sent is cut. Had some of it not been told by then (`on_output`)?"""
        if self._spoke:
            policy.on_cut(self._seen, self._spoke_on or heard)

    def on_resumed(self, now: float, pages: int, disk_bytes: int, pause_s: float = 0.0, excess_s: float = 0.0) -> Acts:
        """The device state is whole and the guest runs; the epoch has these pages and bytes of disk writes; the guest
        stood still for pause_s, and its virtual clock lost excess_s beyond that."""
        if self.phase is not Phase.DRAINING:
            return ()
        policy.on_resumed(self._seen, self._pace.most_paused, now, pause_s, excess_s)
        if self._stop_asked:
            return self._end()
        if self.reason:
            return self._hold(now)
        if self._hand_over_asked:
            return self._hand_over(now)
        self.phase = Phase.UNACKNOWLEDGED
        self._silence_limit_s = self._pace.ack_limit_s + pages * ACK_ALLOWANCE_S
        self._ack_limit_s = self._silence_limit_s + disk_bytes * DISK_ALLOWANCE_S
        self._shipped = now
        return (Act.COMMIT,)

    def on_checkpoint_failed(self, why: str, now: float) -> Acts:
        """QEMU refused or broke off the save; the guest runs, and what was captured is of no use."""
        if self.phase in OVER:
            return ()
        if self._stop_asked:
            return self._end()
        self.phase = Phase.HOLDING
        return self._lose(why, now)

    def on_ack(self, epoch: Epoch) -> Acts:
        """The backup holds the epoch, whole. An answer to anything else changes nothing."""
        if self.phase is not Phase.UNACKNOWLEDGED or epoch != self.epoch:
            return ()
        self.phase = Phase.RUNNING
        return (Act.RELEASE, Act.REPORT_PROTECTED) if epoch == 1 else (Act.RELEASE,)

    def on_filling(self) -> None:
        """What is held of the guest's output, or logged of its writes, has no room for more: a checkpoint makes it.

        It too waits for the guest's share of the time. Until then the guest's writes wait, and what it sends beyond
        the room for output is lost as on a link that is full; no law depends on how soon a checkpoint comes.
        """
        self._urgent = True

    # The pair

    def on_peer_lost(self, why: str, now: float) -> Acts:
        if self.phase in OVER or self.phase is Phase.HOLDING:
            return ()
        return self._lose(why, now)

    def on_grant(self, grant: Grant) -> Acts:
        """The arbiter's answer to ASK. No answer is no event: output stays held."""
        if self.phase is not Phase.HOLDING:
            return ()
        if grant.granted:
            self.phase = Phase.ALONE
            return (Act.UNBUFFER,)
        return self.on_fence(grant.reason)

    def on_fence(self, why: str) -> Acts:
        """The generation is over."""
        if self.phase in OVER:
            return ()
        self.phase, self.reason = Phase.FENCED, why
        return (Act.FENCE,)

    def on_stop(self, why: str) -> Acts:
        """A planned end: the pair is disarmed already."""
        if self.phase in OVER:
            return ()
        self.reason = self.reason or why
        if self.phase in PAUSED:
            self._stop_asked = True
            return ()
        return self._end()

    def on_hand_over(self, now: float) -> Acts:
        """A planned failover. The guest runs on, unheard, until the arbiter has given it to the backup: what it does
        after the last committed epoch it does again there. If it comes to nothing, we ask to go on alone."""
        if self.phase in PAUSED:
            self._hand_over_asked = True
            return ()
        return self._hand_over(now) if self.phase in (Phase.RUNNING, Phase.UNACKNOWLEDGED) else ()

    def on_guest_shutdown(self) -> Acts:
        """The guest, or the host's operator, ended the guest: a planned end. What is held stays unsaid."""
        if self.phase in OVER:
            return ()
        self.phase, self.reason = Phase.ENDED, "the guest was shut down"
        return (Act.SAY_BYE,)

    def on_guest_gone(self) -> Acts:
        """QEMU ended without a word."""
        if self.phase in OVER:
            return ()
        self.phase, self.reason = Phase.ENDED, "QEMU ended"
        return (Act.SAY_GUEST_GONE,)

    def _due(self) -> float:
        if self._urgent:
            return policy.earliest(self._seen)
        return policy.due(self._pace.policy, self._pace.epoch_s, self._seen)

    def _checkpoint(self) -> Acts:
        self._urgent = False
        self.phase = Phase.STOPPING
        self.epoch = Epoch(self.epoch + 1)
        return (Act.CHECKPOINT,)

    def _lose(self, why: str, now: float) -> Acts:
        self.reason = self.reason or why
        return () if self.phase in PAUSED else self._hold(now)

    def _hold(self, now: float) -> Acts:
        self.phase = Phase.HOLDING
        return (*self._ask(now), Act.UNMIRROR)

    def _hand_over(self, now: float) -> Acts:
        self.phase, self.reason = Phase.HOLDING, "the backup did not take the guest that was handed to it"
        self._next_ask = now + HAND_OVER_LIMIT_S
        return (Act.SAY_HAND_OVER, Act.UNMIRROR)

    def _ack_deadline(self) -> float:
        """A backup that is not heard of has less time than one that takes in a long epoch."""
        silent_at = max(self._shipped, self._heard) + self._silence_limit_s
        return min(silent_at, self._shipped + self._ack_limit_s)

    def _ask(self, now: float) -> Acts:
        self._next_ask = now + ASK_AGAIN_S
        return (Act.ASK,)

    def _end(self) -> Acts:
        self.phase = Phase.ENDED
        return (Act.SAY_BYE, Act.UNBUFFER)
