"""The primary's engine: carries out what core/epoch.py decides, for one guest, in one thread.

Called by cmd/engine.py with its ports joined. Never stops the guest but for a checkpoint; if this process dies at any
point of it, or hangs and is killed by the watchdog, the gate's keeper lets QEMU finish, and QEMU starts the guest.
"""

import contextlib
import logging
import selectors
import signal
import time
from collections.abc import Callable, Collection, Iterator

from nova_ftvm import ports
from nova_ftvm.core import wire
from nova_ftvm.core.disk import DiskWrite
from nova_ftvm.core.epoch import OVER, PAUSED, Act, Acts, EpochLoop, Phase
from nova_ftvm.core.packets import Packets
from nova_ftvm.engine.capture import Conversation, GuestEvent
from nova_ftvm.engine.clockforward import NotForwarded
from nova_ftvm.engine.diskstream import DiskStream
from nova_ftvm.engine.faults import Fault, trip
from nova_ftvm.engine.firstcopy import FirstCopy
from nova_ftvm.engine.freight import Freight
from nova_ftvm.engine.link import Link, PeerLost
from nova_ftvm.engine.stats import EpochLog, Stage
from nova_ftvm.exception import GuestGone, MirrorLost, OutputLost, ProtocolError, QemuError
from nova_ftvm.types import Buffer, Epoch, Generation, Grant

LOG = logging.getLogger(__name__)

#: Progress of the first copy is told so often.
_PROGRESS_S = 1.0
#: What a guest may wait for the loop beside the watchdog's limit, while QEMU is asked things: in the first copy, and
#: when its output is let go for good.
_ASKING_SLACK_S = 10.0
#: Whether QEMU lives is looked at whenever nothing comes from anybody, and at least this often while something does.
_LIFE_LOOK_S = 0.1
#: How soon the guest's output is listened to again, once some has come: to wake up for each packet would take half of
#: the processor that the guest needs to send it. And how soon while an epoch is on its way, when nothing depends on it.
_LISTEN_S, _LISTEN_LATER_S = 1e-3, 5e-3
#: For so long at most nobody wakes up for what QEMU says in a checkpoint before its device state comes.
_UNHEARD_S = 5e-3
#: How often the backup is told at most what came for the guest: each time wakes it up. And once soon after a release:
#: the clients that waited for it have sent again by then.
_TELL_S, _TELL_SOON_S = 3e-3, 1e-3
#: The guest's memory is tended while no checkpoint is due within the first of these, and once in the second at least.
_TEND_ROOM_S, _TEND_S = 5e-3, 1.0
#: An epoch is on its way, and what the guest sends belongs to the next one.
_ON_ITS_WAY = frozenset({*PAUSED, Phase.UNACKNOWLEDGED})
#: When the guest runs, or nobody knows whether it goes on here.
_TELLING = frozenset({Phase.RUNNING, Phase.UNACKNOWLEDGED, Phase.HOLDING})
#: QEMU starts the guest while its pages are shipped. So long that may go before the rest of the host as well: in most
#: epochs all of it.
_HURRY_S = 2e-3
#: A checkpoint that QEMU does not end within this is the end of the protection; the gate's keeper sees to the guest.
_CHECKPOINT_LIMIT_S = 30.0


class PrimaryEngine:
    """One guest's protection, from the first copy to its end. `run()` returns when the loop is over."""

    def __init__(self, *, generation: Generation, loop: EpochLoop, memory: ports.Memory, talk: Conversation,
                 monitor: ports.Monitor, gate: ports.Gate, buffers: ports.NetBuffer, mirror: ports.Mirror,
                 fixed: Iterator[DiskWrite], shallow: Collection[int], log_limit: int, link: Link, note: ports.Note,
                 processors: ports.Processors, precedence: ports.Precedence, control: ports.Control, pidfd: int,
                 life: ports.Life, watchdog: ports.Watchdog, stats: EpochLog, frame_limit: int,
                 kvmclock: NotForwarded | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """fixed: contents of the disks that nobody writes to. shallow: the disks whose replica lies on the same base.
        log_limit: bytes of disk writes that may be on their way."""
        self._generation = generation
        self._loop = loop
        self._memory = memory
        self._talk = talk
        self._monitor = monitor
        self._gate = gate
        self._buffers = buffers
        self._link = link
        self._kvmclock = kvmclock or NotForwarded()
        self._linked = True
        self._asks = False
        self._note = note
        self._processors = processors
        self._precedence = precedence
        self._control = control
        self._pidfd = pidfd
        self._life = life
        self._next_life_look = clock()
        self._tend_by = clock()
        self._watchdog = watchdog
        self._stats = stats
        self._limit = frame_limit
        self._clock = clock
        self._mirror = mirror
        self._disks_watched = False
        self._shallow = shallow
        self._freight = Freight(generation, len(memory.blocks), frame_limit, self._send, memory.on_sent)
        self._disks = DiskStream(mirror, log_limit, generation, frame_limit, self._send)
        # An empty transaction changes nothing, and waits for the end of all disk requests; the guest runs on.
        self._copy = FirstCopy(memory, mirror, self._disks, fixed, lambda: monitor.command("transaction", actions=[]),
                               generation, frame_limit, self._send, clock)
        #: The last epoch whose output has left.
        self._released = Epoch(0)
        self._next_progress = self._next_telling = self._checkpoint_deadline = clock()
        #: Somebody is to wake up for the next telling.
        self._tells_soon = False
        #: When QEMU is listened to again; None while it is.
        self._next_hearing: float | None = None
        #: When the guest's output was heard, which nobody listens to since; None while somebody does.
        self._heard_at: float | None = None
        # select() and not epoll: it waits for less than a millisecond.
        self._selector = selectors.SelectSelector()
        self._selector.register(monitor, selectors.EVENT_READ, self._on_monitor)
        self._selector.register(control, selectors.EVENT_READ, self._on_control)
        self._selector.register(link, selectors.EVENT_READ, self._on_link)
        self._selector.register(buffers, selectors.EVENT_READ, self._on_output)
        self._selector.register(pidfd, selectors.EVENT_READ, self._on_guest_gone)
        self._does: dict[Act, Callable[[], None]] = {
            Act.BUFFER: self._buffer,
            Act.CHECKPOINT: self._checkpoint,
            Act.PROTECT: self._protect,
            Act.CAPTURE: self._capture,
            Act.OPEN_GATE: self._open_gate,
            Act.SHIP: self._ship,
            Act.COMMIT: self._send_commit,
            Act.RELEASE: self._release,
            Act.UNMIRROR: self._unmirror,
            Act.UNBUFFER: self._unbuffer,
            Act.ASK: self._ask,
            Act.REPORT_PROTECTED: lambda: self._control.report("protected"),
            Act.SAY_BYE: lambda: self._say(wire.Kind.BYE),
            Act.SAY_GUEST_GONE: lambda: self._say(wire.Kind.GUEST_GONE),
            Act.SAY_HAND_OVER: self._hand_over,
            Act.FENCE: self._fence,
            Act.BEAT: lambda: self._send(wire.encode(wire.Kind.BEAT, self._generation, self._released)),
        }

    def run(self) -> Phase:
        """Returns the phase in which the protection ended."""
        try:
            # From the first mirror on, the guest's writes wait for this process.
            self._watchdog.arm(_ASKING_SLACK_S)
            self._mirror.start(self._shallow)
            trip(Fault.MIRROR_STARTED)
            while self._loop.phase not in OVER:
                self._turn()
        finally:
            self._precedence.leave()
            self._unmirror()
            self._watchdog.disarm()
            self._stats.close()
        self._note.remove()
        LOG.info("protection ended, %s: %s", self._loop.phase.value, self._loop.reason)
        return self._loop.phase

    def _turn(self) -> None:
        try:
            self._watch_disks()
            self._watch_output()
            self._watch_monitor()
            patience = self._patience()
            self._guard(patience)
            ready = self._selector.select(patience)
            for key, _ in ready:
                key.data()
            if not ready or self._clock() >= self._next_life_look:
                self._watch_qemu()
            if (look := self._loop.next_look) is not None and self._clock() >= look:
                self._loop.on_processors(self._processors.asleep(), self._clock())
            self._do(self._loop.tick(self._clock()))
            if self._copies():
                self._copy_some()
            self._watch_overheard()
            self._tend_memory()
        except GuestGone as gone:
            self._lose_qemu(gone)
        except (MirrorLost, OutputLost) as lost:
            self._lose_hold(str(lost))
        except (PeerLost, ProtocolError) as lost:
            self._lose_link(str(lost))

    def _patience(self) -> float:
        due = min(self._loop.next_tick(), self._copy.due) if self._copies() else self._loop.next_tick()
        if self._next_listening is not None:
            due = min(due, self._next_listening)
        if self._next_hearing is not None:
            due = min(due, self._next_hearing)
        if self._tells_soon and self._loop.phase is Phase.RUNNING:
            due = min(due, self._next_telling)
        if (look := self._loop.next_look) is not None:
            due = min(due, look)
        return max(0.0, due - self._clock())

    def _guard(self, patience: float) -> None:
        """A loop that hangs holds the guest up: in a checkpoint, and with its disk writes and its output at any time.

        One that turns does not: then it is QEMU that takes its time, to flush the host's disk for one. Only when that
        never ends is the checkpoint given up.
        """
        if self._loop.phase in PAUSED and self._clock() > self._checkpoint_deadline:
            raise QemuError("xen-save-devices-state", f"not done within {_CHECKPOINT_LIMIT_S:g} s")
        self._watchdog.arm(patience + (_ASKING_SLACK_S if self._loop.phase is Phase.COPYING else 0.0))

    def _do(self, acts: Acts) -> None:
        for act in acts:
            self._does[act]()

    # Events

    def _on_monitor(self) -> None:
        for event in self._talk.events():
            if event is GuestEvent.STOPPED:
                self._do(self._loop.on_stopped())
            elif event is GuestEvent.RESUMED:
                self._finish_checkpoint()
                checkpoint = self._talk.current
                self._do(self._loop.on_resumed(self._clock(), checkpoint.page_count, checkpoint.cut.bytes,
                                               checkpoint.pause_ms / 1000, checkpoint.excess_s))
                self._precedence.leave()
                self._kvmclock.running(saved=True)
            elif event is GuestEvent.SAVE_FAILED:
                self._finish_checkpoint()
                self._precedence.leave()
                self._kvmclock.running(saved=False)
                self._do(self._loop.on_checkpoint_failed(self._talk.current.failure, self._clock()))
            elif event is GuestEvent.MIRROR_OVER:
                if self._disks.open:  # Else it is we who ended it.
                    self._lose_hold(self._talk.lost_mirror)
            elif event is GuestEvent.SHUTDOWN:
                self._control.report("guest_shutdown")
                self._do(self._loop.on_guest_shutdown())
            else:
                self._kvmclock.on_foreign_pause()
                self._loop.on_paused(event is GuestEvent.PAUSED)

    def _on_gate(self) -> None:
        if self._loop.phase in (Phase.STOPPING, Phase.STOPPED):
            self._stats.mark(Stage.REST)
        self._do(self._loop.on_state_begins())
        self._talk.read_state()
        self._listen_to_monitor()
        # While the pages were looked through QEMU has written all, in most cases.
        self._on_monitor()

    def _on_link(self) -> None:
        self._link.flush()
        for frame in self._link.receive():
            self._loop.on_heard(self._clock())
            if frame.kind is wire.Kind.ACK:
                self._disks.acknowledged(frame.epoch)
                self._commit(self._loop.on_ack(frame.epoch))
            elif frame.kind is wire.Kind.BYE:
                raise PeerLost(_farewell(frame))
            elif frame.kind is not wire.Kind.BEAT:
                raise ProtocolError(f"{frame.kind.name} from a backup")
        self._watch_link()

    def _on_output(self) -> None:
        if self._buffers.hear():
            now = self._clock()
            self._loop.on_output(now)
            if self._heard_at is None:
                self._selector.unregister(self._buffers)
            self._heard_at = now
        if self._buffers.is_filling:
            self._loop.on_filling()

    def _commit(self, acts: Acts) -> None:
        self._do(acts)
        if acts:
            self._stats.committed()
            # What has come meanwhile is the next epoch's.
            self._on_output()
            self._loop.on_released(self._loop.learns_from_processors and self._processors.asleep(), self._clock())
            self._kvmclock.search()

    def _on_disks(self) -> None:
        if not self._disks.may_read(self._loop.phase, self._link.queued):
            return  # since the look that brought us here
        self._disks.take(preload=self._loop.phase is Phase.COPYING)
        trip(Fault.DISK_SHIPPED)

    def _on_control(self) -> None:
        for order in self._control.orders():
            what = order["do"]
            if what == "grant":
                grant = Grant(order["granted"], Generation(order["generation"]), order["reason"])
                # Refused within our own generation: not now. The loop asks again.
                if grant.granted or grant.generation != self._generation:
                    self._do(self._loop.on_grant(grant))
            elif what == "stop":
                self._do(self._loop.on_stop(order["reason"]))
            elif what == "hand_over":
                self._do(self._loop.on_hand_over(self._clock()))
            elif what == "fence":
                self._do(self._loop.on_fence(order["reason"]))

    def _watch_qemu(self) -> None:
        """Whenever nothing has come: a QEMU that dies is silent until its memory is given back."""
        self._next_life_look = self._clock() + _LIFE_LOOK_S
        if self._life.is_ending():
            LOG.warning("the guest is gone: QEMU is ending")
            self._on_guest_gone()

    def _lose_qemu(self, gone: GuestGone) -> None:
        """Something of QEMU does not answer. If it lives this ends the engine, and the agent asks in its place: no
        backup may be told that the guest is dead."""
        if not self._has_ended():
            raise gone
        LOG.warning("the guest is gone: %s", gone)

    def _has_ended(self) -> bool:
        """Has QEMU, or is it about to? Then the loop is over. Asked when a part of QEMU was found closed."""
        if self._life.is_ending():
            self._on_guest_gone()
        else:
            # A planned end says so before it closes anything.
            with contextlib.suppress(GuestGone):
                self._on_monitor()
        return self._loop.phase in OVER

    def _on_guest_gone(self) -> None:
        # What QEMU said before it ended counts: a shutdown is no failure.
        with contextlib.suppress(GuestGone):
            self._on_monitor()
        self._do(self._loop.on_guest_gone())

    # Acts

    def _buffer(self) -> None:
        self._note.leave()
        self._buffers.install()
        self._talk.prepare()
        trip(Fault.BUFFERED)

    def _unbuffer(self) -> None:
        self._watchdog.arm(_ASKING_SLACK_S)
        trip(Fault.BEFORE_UNBUFFER)
        try:
            self._buffers.remove()
        except GuestGone as gone:
            if not self._life.is_ending():
                # Its output is still held, which is no end: the agent lets it go.
                raise QemuError("to let its output go", str(gone)) from gone
            raise

    def _ask(self) -> None:
        if not self._asks:
            self._asks = True
            LOG.warning("asking to go on alone: %s", self._loop.reason)
        self._control.report("ask_degrade", reason=self._loop.reason)

    def _hand_over(self) -> None:
        self._say(wire.Kind.HAND_OVER)
        trip(Fault.HANDED_OVER)

    def _checkpoint(self) -> None:
        self._memory.begin_capture()
        self._stats.began()
        trip(Fault.BEFORE_SAVE)
        now = self._clock()
        self._checkpoint_deadline = now + _CHECKPOINT_LIMIT_S
        self._watchdog.arm()
        self._precedence.take()
        self._kvmclock.begin()
        self._talk.begin()
        self._selector.register(self._gate, selectors.EVENT_READ, self._on_gate)
        if not self._memory.protects_at_stop:
            self._ignore_monitor()
        trip(Fault.SAVE_SENT)

    def _protect(self) -> None:
        if self._memory.protects_at_stop:
            self._memory.protect()
            self._ignore_monitor()
            trip(Fault.PROTECTED)

    def _capture(self) -> None:
        self._tell_overheard(self._loop.epoch)
        self._loop.on_cut(self._buffers.cut())
        self._talk.current.cut = self._disks.cut()
        trip(Fault.LOG_CUT)
        for pages in self._memory.capture():
            self._talk.current.pages.append(pages)
            self._show_life()
        self._stats.mark(Stage.CAPTURE)
        trip(Fault.CAPTURED)

    def _show_life(self) -> None:
        """A guest that wrote very much keeps both sides waiting, and neither may take that for a death."""
        self._watchdog.arm()
        self._do(self._loop.tick(self._clock()))

    def _open_gate(self) -> None:
        self._kvmclock.forward()
        self._gate.widen()
        trip(Fault.GATE_OPEN)

    def _finish_checkpoint(self) -> None:
        # We keep ours until the epoch has left: that is what all wait for now.
        self._precedence.leave_qemu()
        # The guest runs, and its output waits for us all the same.
        self._watchdog.arm()
        self._selector.unregister(self._gate)
        self._stats.mark(Stage.RESUME)

    def _ship(self) -> None:
        trip(Fault.BEFORE_SHIP)
        hurry_until = self._clock() + _HURRY_S
        for _ in self._freight.ship(self._loop.epoch, self._talk.current):
            self._show_life()
            if self._clock() > hurry_until:
                self._precedence.leave()
        trip(Fault.SHIPPED_HALF)

    def _send_commit(self) -> None:
        checkpoint = self._talk.current
        frames, shipped = self._freight.commit(self._loop.epoch, checkpoint)
        # All in one: the backup wakes up once.
        for packets in self._buffers.covered():
            frames += self._told(wire.Kind.SAID, self._loop.epoch, packets)
        self._send(frames)
        trip(Fault.SHIPPED)
        self._stats.shipped(checkpoint, shipped)
        self._memory.end_capture()

    def _fence(self) -> None:
        """QEMU ends here and now: an agent that dies meanwhile would never hear of it, and the guest would run on."""
        with contextlib.suppress(OSError):  # It is gone.
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        self._control.report("fenced", reason=self._loop.reason)

    def _release(self) -> None:
        trip(Fault.BEFORE_RELEASE)
        self._buffers.release()
        self._released = self._loop.epoch
        self._next_telling = min(self._next_telling, self._clock() + _TELL_SOON_S)
        self._tells_soon = True
        self._talk.prepare()

    def _watch_overheard(self) -> None:
        now = self._clock()
        if self._loop.phase in _TELLING and now >= self._next_telling:
            self._next_telling = now + _TELL_S
            self._tells_soon = False
            self._tell_overheard(Epoch(self._loop.epoch + 1))
            if not self._link.idle:
                self._send([])

    def _tell_overheard(self, covered_by: Epoch) -> None:
        """Should the guest go on from its last checkpoint, it has not heard what came since. Goes with the next frame.
        """
        has_room = self._linked and self._link.idle
        for packets in self._buffers.overheard():
            if has_room:
                self._link.queue(self._told(wire.Kind.HEARD, covered_by, packets))

    def _told(self, kind: wire.Kind, epoch: Epoch, packets: Packets) -> list[Buffer]:
        """The frame that tells of them. What is longer than the backup takes at once is not worth to be told."""
        frame = wire.encode_packets(kind, self._generation, epoch, packets)
        return frame if sum(map(len, frame)) <= self._limit else []

    def _tend_memory(self) -> None:
        now = self._clock()
        if self._loop.phase is Phase.RUNNING and (now >= self._tend_by or self._loop.next_tick() > now + _TEND_ROOM_S):
            self._tend_by = now + _TEND_S
            self._memory.tend(now)

    # The first copy

    def _copies(self) -> bool:
        return self._loop.phase is Phase.COPYING and self._link.idle

    def _copy_some(self) -> None:
        now = self._clock()
        if now < self._copy.due:
            return
        pass_pages = self._copy.step()
        if pass_pages is not None:
            self._do(self._loop.on_live_pass(pass_pages))
        elif now >= self._next_progress:
            self._next_progress = now + _PROGRESS_S
            self._control.report("syncing", percent=round(self._copy.percent, 2))

    # The output

    def _watch_output(self) -> None:
        """Wakes up for what the guest sends, unless it has sent something just now."""
        if self._next_listening is not None and self._clock() >= self._next_listening:
            self._heard_at = None
            self._selector.register(self._buffers, selectors.EVENT_READ, self._on_output)

    @property
    def _next_listening(self) -> float | None:
        if self._heard_at is None:
            return None
        return self._heard_at + (_LISTEN_LATER_S if self._loop.phase in _ON_ITS_WAY else _LISTEN_S)

    # QEMU's words

    def _watch_monitor(self) -> None:
        if self._next_hearing is not None and self._clock() >= self._next_hearing:
            self._listen_to_monitor()

    def _ignore_monitor(self) -> None:
        """QEMU tells of its stop, and of each disk that comes to rest: nobody acts on that before the state comes."""
        if self._next_hearing is None:
            self._selector.unregister(self._monitor)
            self._next_hearing = self._clock() + _UNHEARD_S

    def _listen_to_monitor(self) -> None:
        if self._next_hearing is not None:
            self._next_hearing = None
            self._selector.register(self._monitor, selectors.EVENT_READ, self._on_monitor)

    # The disks

    def _watch_disks(self) -> None:
        """Reads what QEMU writes only while there is room for it."""
        if not self._disks.open:
            return
        wanted = self._disks.may_read(self._loop.phase, self._link.queued)
        if wanted and not self._disks_watched:
            self._selector.register(self._disks, selectors.EVENT_READ, self._on_disks)
        elif self._disks_watched and not wanted:
            self._selector.unregister(self._disks)
        self._disks_watched = wanted
        if not self._disks.has_room(self._link.queued):
            self._loop.on_filling()

    def _lose_hold(self, why: str) -> None:
        """Of a disk's writes or of the output: the backup lives, but no epoch after this can be whole.

        A QEMU that dies closes those as well, after the kernel has said that it dies. That is the backup's hour: to ask
        to go on alone would lose it all.
        """
        if self._has_ended():
            return
        self._unmirror()
        LOG.warning("the guest is not followed any more: %s", why)
        self._do(self._loop.on_peer_lost(why, self._clock()))

    def _unmirror(self) -> None:
        if self._disks.open:
            if self._disks_watched:
                self._disks_watched = False
                self._selector.unregister(self._disks)
            self._watchdog.arm(_ASKING_SLACK_S)
            self._disks.close()

    # The link

    def _say(self, kind: wire.Kind) -> None:
        self._send(wire.encode(kind, self._generation, self._loop.epoch))

    def _send(self, buffers: list[Buffer]) -> None:
        """A peer that is lost here is no error of the act that sends: the loop decides what it means."""
        if not self._linked:
            return
        try:
            self._link.send(buffers)
            self._watch_link()
        except PeerLost as lost:
            self._lose_link(str(lost))

    def _watch_link(self) -> None:
        """Wakes up for room in the socket only while something waits for it."""
        wanted = selectors.EVENT_READ if self._link.idle else selectors.EVENT_READ | selectors.EVENT_WRITE
        if self._linked and self._selector.get_key(self._link).events != wanted:
            self._selector.modify(self._link, wanted, self._on_link)

    def _last_word(self) -> str:
        """A backup that failed may have said why, and its connection have ended before that was read."""
        with contextlib.suppress(PeerLost, ProtocolError):
            return next((_farewell(frame) for frame in self._link.receive() if frame.kind is wire.Kind.BYE), "")
        return ""

    def _lose_link(self, why: str) -> None:
        if self._linked:
            why = self._last_word() or why
            LOG.warning("the backup is lost: %s", why)
            self._linked = False
            self._selector.unregister(self._link)
            self._link.close()
        self._do(self._loop.on_peer_lost(why, self._clock()))


def _farewell(frame: wire.Frame) -> str:
    why = wire.decode_failure(frame)
    return f"the backup failed: {why}" if why else "the backup's agent ended"
