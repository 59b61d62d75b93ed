"""The backup's engine: takes epochs, acknowledges them, watches the primary, and promotes when the arbiter says so.

Called by cmd/engine.py with its ports joined; one guest, one thread. It cannot disturb the primary: all that the
primary waits for is an acknowledgement, and that wait is bounded there. Between epochs it sleeps.
"""

import contextlib
import logging
import selectors
import socket
import time
from collections.abc import Callable

from nova_ftvm import ports
from nova_ftvm.core import stream, wire
from nova_ftvm.core.lease import HOLDS_REPLICA, Lease, Verdict, Watch
from nova_ftvm.core.packets import InFlight
from nova_ftvm.core.reminders import reminders
from nova_ftvm.core.replica import Acknowledge, Apply, Replica, Write, WriteDisks
from nova_ftvm.engine import link as links
from nova_ftvm.engine.faults import Fault, trip
from nova_ftvm.engine.link import Link, PeerLost
from nova_ftvm.engine.promote import promote
from nova_ftvm.exception import FtvmError, GuestGone, ProtocolError, ReplicaFailed
from nova_ftvm.types import Epoch, Generation, Grant

LOG = logging.getLogger(__name__)

#: A standby whose primary never comes is not kept.
_FIRST_CONTACT_S = 60.0
#: What is kept of packets that are under way, in each direction.
_IN_FLIGHT_BYTES = 1 << 20
#: What is committed and not yet written to the disks must be written before the guest runs; it is bounded.
_SETTLE_S = 10.0


class BackupEngine:
    """One standby. `run()` returns True when it was promoted: the domain is the guest now."""

    def __init__(self, *, generation: Generation, token: str, expected: wire.Hello, memory: ports.WritableMemory,
                 disks: ports.ReplicaDisks, backlog_limit: int, monitor: ports.Monitor,
                 replay: ports.Replay, listener: socket.socket, control: ports.Control, pidfd: int,
                 life: ports.Life, lease: Lease, beat_s: float, frame_limit: int, stream_path: str,
                 clock: Callable[[], float] = time.monotonic, wall_clock: Callable[[], float] = time.time) -> None:
        """backlog_limit: bytes that may wait for the standby's disks; more than that holds the acknowledgement back."""
        self._generation = generation
        self._token = token
        self._expected = expected
        self._memory = memory
        self._disks = disks
        self._backlog_limit = backlog_limit
        self._monitor = monitor
        self._replay = replay
        self._in_flight = InFlight(_IN_FLIGHT_BYTES)
        self._listener = listener
        self._control = control
        self._life = life
        self._lease = lease
        self._beat_s = beat_s
        self._limit = frame_limit
        self._stream_path = stream_path
        self._clock = clock
        self._wall_clock = wall_clock
        self._replica = Replica(memory.blocks, disks.disks)
        #: The epoch whose acknowledgement waits for the disks.
        self._owed: Epoch | None = None
        self._link: Link | None = None
        self._next_beat = 0.0
        self._contact_deadline = clock() + _FIRST_CONTACT_S
        self._timeline: dict[str, float] = {}
        self._failure = ""
        self._promoted = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ, self._on_connection)
        self._selector.register(control, selectors.EVENT_READ, self._on_control)
        self._selector.register(monitor, selectors.EVENT_READ, self._on_monitor)
        self._selector.register(disks, selectors.EVENT_READ, self._on_disks)
        self._selector.register(pidfd, selectors.EVENT_READ, self._on_standby_gone)

    def run(self) -> bool:
        try:
            while self._lease.watch is not Watch.OVER and not self._failure and not self._promoted:
                self._turn()
            if self._failure:
                # At once: a QEMU that dies does not answer that its exports have ended, which is waited for.
                self._say_why()
        finally:
            self._disks.close()
        if self._failure:
            self._control.report("failed", reason=self._failure, granted=self._lease.watch is Watch.PROMOTING)
        LOG.info("the backup's part ended: %s", "promoted" if self._promoted else self._failure or "given up")
        return self._promoted

    def _turn(self) -> None:
        try:
            self._watch_link()
            ready = self._selector.select(self._patience())
            for key, _ in ready:
                key.data()
            if not ready:
                self._watch_standby()
            self._beat()
            if self._link is None and self._lease.watch is Watch.SYNCING and self._clock() >= self._contact_deadline:
                self._failure = f"the primary did not connect within {_FIRST_CONTACT_S:g} s"
            self._follow(self._lease.tick(self._clock()))
        except (PeerLost, ProtocolError) as lost:
            LOG.warning("the primary's connection ended: %s", lost)
            self._lose_link()
        except GuestGone as gone:
            self._failure = f"the standby ended: {gone}"
        except ReplicaFailed as failed:
            self._failure = str(failed)

    def _patience(self) -> float:
        due = [self._next_beat if self._link else self._contact_deadline]
        if (silence := self._lease.next_tick()) is not None:
            due.append(silence)
        return max(0.0, min(due) - self._clock())

    # Events

    def _on_connection(self) -> None:
        try:
            connection, peer = self._listener.accept()
        except BlockingIOError:
            return
        if self._link is not None:
            LOG.warning("refused a second connection, from %s", peer[0])
            connection.close()
            return
        if self._replica.committed:
            # A replica's epochs are of one connection; a new one begins with a new generation. Refused before the
            # greeting, which takes time: the watch over the primary must not wait for a stranger.
            LOG.warning("refused a primary that came back, from %s", peer[0])
            connection.close()
            return
        try:
            link = links.answer(connection, self._generation, self._token, self._expected, self._limit)
        except (PeerLost, ProtocolError) as refused:
            LOG.warning("refused a connection from %s: %s", peer[0], refused)
            return
        self._link = link
        self._lease.on_heard(self._clock())

    def _on_link(self) -> None:
        assert self._link is not None
        with contextlib.suppress(PeerLost):
            self._link.flush()
        for frame in self._link.receive():
            self._lease.on_heard(self._clock())
            if frame.kind is wire.Kind.GUEST_GONE:
                self._follow(self._lease.on_guest_gone(self._clock()))
            elif frame.kind is wire.Kind.HAND_OVER:
                self._follow(self._lease.on_handed_over(self._clock()))
            elif frame.kind is wire.Kind.BYE:
                self._follow(self._lease.on_bye())
            elif frame.kind is wire.Kind.HEARD:
                self._in_flight.on_heard(frame.epoch, wire.decode_packets(frame))
            elif frame.kind is wire.Kind.SAID:
                self._in_flight.on_said(frame.epoch, wire.decode_packets(frame))
            elif frame.kind is wire.Kind.BEAT:
                self._in_flight.on_released(frame.epoch)
            elif self._lease.watch in HOLDS_REPLICA:
                self._take(frame)

    def _take(self, frame: wire.Frame) -> None:
        for action in self._replica.on_frame(frame):
            if isinstance(action, Write):
                for pages in action.pages:
                    self._memory.write(pages)
            elif isinstance(action, WriteDisks):
                self._disks.submit(action.writes)
                self._disks.advance()
            elif isinstance(action, Acknowledge):
                self._lease.on_committed()
                self._in_flight.on_committed(action.epoch)
                self._owed = action.epoch
                self._acknowledge()
            elif isinstance(action, Apply):
                trip(Fault.BEFORE_APPLY)
                for pages in self._replica.apply():
                    self._memory.write(pages)
                trip(Fault.APPLIED)
                # That took time in which nothing was read: it was not the primary's silence.
                self._lease.on_heard(self._clock())

    def _acknowledge(self) -> None:
        """An epoch is committed once it is here; but a primary that is faster than these disks has to wait."""
        if self._owed is not None and self._link is not None and self._disks.backlog <= self._backlog_limit:
            self._say(wire.Kind.ACK, self._owed)
            self._owed = None

    def _on_disks(self) -> None:
        self._disks.advance()
        self._acknowledge()

    def _watch_link(self) -> None:
        """The first copy, which no acknowledgement slows down, is read no faster than it can be written."""
        if self._link is None:
            return
        watched = self._link in self._selector.get_map()
        wanted = self._replica.committed > 0 or self._disks.backlog <= self._backlog_limit
        if wanted and not watched:
            self._selector.register(self._link, selectors.EVENT_READ, self._on_link)
        elif watched and not wanted:
            self._selector.unregister(self._link)
        if not wanted:
            # Nothing is heard of the primary because nobody listens.
            self._lease.on_heard(self._clock())

    def _on_control(self) -> None:
        for order in self._control.orders():
            if order["do"] == "grant":
                grant = Grant(order["granted"], Generation(order["generation"]), order["reason"])
                self._follow(self._lease.on_grant(grant, self._clock()))
            elif order["do"] == "stop":
                self._follow(self._lease.on_bye())

    def _on_monitor(self) -> None:
        self._monitor.receive()

    def _watch_standby(self) -> None:
        """Whenever nothing has come, and with every beat: a standby that dies is silent until its memory is given back,
        and while it dumps its core it even takes pages. Epochs would be acknowledged that nobody can promote."""
        if self._life.is_ending():
            raise GuestGone("QEMU is ending")

    def _on_standby_gone(self) -> None:
        raise GuestGone("QEMU exited")

    # Acts

    def _follow(self, verdict: Verdict | None) -> None:
        if verdict is Verdict.ASK:
            self._timeline.setdefault("detected_at", self._wall_clock())
            self._control.report("ask_promotion", evidence=self._lease.evidence)
            trip(Fault.ASKED)
        elif verdict is Verdict.PROMOTE:
            self._promote()

    def _promote(self) -> None:
        self._timeline["granted_at"] = self._wall_clock()
        LOG.info("promoting epoch %d: %s", self._replica.committed, self._lease.evidence)
        try:
            trip(Fault.BEFORE_SETTLE)
            self._disks.settle(_SETTLE_S)
            trip(Fault.SETTLED)
            promote(self._monitor, stream.incoming(
                self._expected.machine, self._memory.blocks, self._replica.device_state), self._stream_path)
        except FtvmError as failed:
            self._failure = str(failed)
            return
        self._timeline["running_at"] = self._wall_clock()
        self._promoted = True
        self._control.report("promoted", timeline=self._timeline)
        self._replay.replay(self._in_flight.heard, self._in_flight.said, reminders(self._in_flight.spoken))

    def _beat(self) -> None:
        if self._link is not None and self._clock() >= self._next_beat:
            self._next_beat = self._clock() + self._beat_s
            self._watch_standby()
            self._say(wire.Kind.BEAT)

    def _say(self, kind: wire.Kind, epoch: Epoch = Epoch(0)) -> None:
        """A primary that is gone is lost at the end of what it has said, and not here: that may be a whole epoch."""
        assert self._link is not None
        with contextlib.suppress(PeerLost):
            self._link.send_bare(kind, epoch)

    def _say_why(self) -> None:
        """The primary tells its owner; of itself it would know only that the connection ended."""
        if self._link is not None:
            with contextlib.suppress(PeerLost):
                self._link.send(wire.encode_failure(self._generation, self._failure))

    def _lose_link(self) -> None:
        if self._link is not None:
            if self._link in self._selector.get_map():
                self._selector.unregister(self._link)
            self._link.close()
            self._link = None
        self._follow(self._lease.on_peer_lost(self._clock()))
