"""engine/backup.py: nothing is acknowledged before it is written, nothing is promoted without a grant."""

import contextlib
import dataclasses
import socket
import struct
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from nova_ftvm.core import wire
from nova_ftvm.core.lease import Lease, Watch
from nova_ftvm.core.packets import Packets
from nova_ftvm.core.reminders import STEPS
from nova_ftvm.engine import backup as backups
from nova_ftvm.engine import link as links
from nova_ftvm.engine.backup import BackupEngine
from nova_ftvm.exception import GuestGone, ProtocolError
from nova_ftvm.types import Disk, Epoch
from tests.unit import test_reminders
from tests.unit.engine_fakes import (
    Bell,
    Clock,
    FakeControl,
    FakeLife,
    FakeMemory,
    FakeQemu,
    FakeReplicaDisks,
    Peer,
)
from tests.unit.frames import (
    BLOCKS,
    DISKS,
    GENERATION,
    LIMIT,
    disk_frames,
    epoch_frames,
    join,
    page_frames,
    pages,
    write,
)
from tests.unit.test_packets import framed, unframed

HELLO = wire.Hello("pair", "pc-i440fx-10.0", tuple(BLOCKS), disks=tuple(DISKS))
BACKLOG_LIMIT = 10_000
STATE = b"QEVM\0\0\0\3devices"


class FakeReplay:
    """ports.Replay."""

    said_again: tuple[Mapping[bytes, bytes], Mapping[bytes, bytes]] | None = None
    reminders: Mapping[bytes, bytes] | None = None

    def replay(self, heard: Mapping[bytes, bytes], said: Mapping[bytes, bytes],
               reminders: Mapping[bytes, bytes]) -> None:
        self.said_again, self.reminders = (heard, said), reminders


class Bench:
    """A backup's engine, turned by hand, and a primary of the test's own."""

    def __init__(self, folder: Path) -> None:
        self.clock, self.qemu, self.memory = Clock(), FakeQemu(), FakeMemory()
        self.control, self.pidfd, self.disks = FakeControl(), Bell(), FakeReplicaDisks(DISKS)
        self.replay, self.life = FakeReplay(), FakeLife()
        self.listener = links.listen("127.0.0.1")
        self.lease = Lease(GENERATION, 0.3, self.clock.now)
        self.stream_path = str(folder / "incoming.sock")
        self.engine = BackupEngine(
            generation=GENERATION, token="token", expected=HELLO, memory=self.memory, monitor=self.qemu,
            disks=self.disks, backlog_limit=BACKLOG_LIMIT,
            replay=self.replay, listener=self.listener, control=self.control,
            pidfd=self.pidfd.fileno(), life=self.life,
            lease=self.lease, beat_s=0.1, frame_limit=LIMIT, stream_path=self.stream_path, clock=self.clock,
            wall_clock=lambda: 1000.0)
        self.engine._patience = lambda: 0.002
        self.peer: Peer | None = None

    def turn(self, times: int = 3) -> None:
        for _ in range(times):
            if self.lease.watch is Watch.OVER or self.engine._failure or self.engine._promoted:
                return
            self.engine._turn()

    def connect(self, token: str = "token", hello: wire.Hello = HELLO) -> Peer:
        """As the primary does; the greeting needs both sides at once."""
        made: list[links.Link] = []

        def dial() -> None:
            with contextlib.suppress(links.PeerLost, ProtocolError):
                link, self.shallow = links.dial("127.0.0.1", self.listener.getsockname()[1], GENERATION, hello, token,
                                                LIMIT)
                made.append(link)

        thread = threading.Thread(target=dial)
        thread.start()
        while thread.is_alive():
            self.engine._turn()
        thread.join()
        if not made:
            raise ConnectionRefusedError
        # Kept: a link that nobody holds would close its socket.
        self._link = made[0]
        self.peer = Peer(socket.socket(fileno=socket.dup(made[0].fileno())))
        return self.peer

    def send(self, *frames: bytes) -> None:
        assert self.peer is not None
        self.peer.raw(b"".join(frames))
        self.turn()

    def protect(self) -> Peer:
        peer = self.connect()
        self.send(*epoch_frames(1, [pages([1], 11)], STATE))
        assert [(f.kind.name, f.epoch) for f in peer.read()] == [("ACK", 1)]
        return peer

    def ask(self) -> None:
        """To the question: the primary is silent."""
        self.clock.now += 0.4
        self.turn(1)
        assert self.lease.watch is Watch.ASKING


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.listener.close()


def test_an_epoch_is_acknowledged_when_it_is_whole_and_written_after_that(bench: Bench,
                                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    peer = bench.connect()
    first, *rest = epoch_frames(1, [pages([1], 11), pages([2], 12)], STATE)
    bench.send(first, *rest[:-1])
    assert bench.memory.pages == {} and peer.read() == []
    seen: list[list[str]] = []
    write = bench.memory.write
    monkeypatch.setattr(bench.memory, "write", lambda p: (seen.append(peer.kinds()), write(p)))
    bench.send(rest[-1])
    assert seen == [["ACK"], []] and bench.memory.pages == {(0, 1): 11, (0, 2): 12}
    assert peer.read() == []


def test_a_backup_that_cannot_write_what_it_has_acknowledged_says_so(bench: Bench,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    peer = bench.protect()

    def fails(_: object) -> None:
        raise GuestGone("process 1 ended")

    monkeypatch.setattr(bench.memory, "write", fails)
    bench.send(*epoch_frames(2, [pages([2])], STATE))
    assert not bench.engine.run()
    assert peer.kinds() == ["ACK", "BYE"] and bench.control.told[-1] == "failed"


def test_preloaded_pages_are_written_and_answered_with_nothing(bench: Bench) -> None:
    peer = bench.connect()
    bench.send(*page_frames(wire.Kind.PRELOAD, 0, pages([3], 33)))
    assert bench.memory.pages == {(0, 3): 33} and peer.read() == []


@pytest.mark.parametrize("bad", [b"GET / HTTP/1.1\r\n" * 10, epoch_frames(5, [])[0], epoch_frames(2, [pages([9])])[-1]],
                         ids=["garbage", "another-epoch", "commit-of-nothing"])
def test_a_primary_that_goes_wrong_is_cut_off_and_nothing_of_it_stays(bench: Bench, bad: bytes) -> None:
    peer = bench.protect()
    before = dict(bench.memory.pages)
    bench.send(bad)
    assert bench.memory.pages == before and peer.read() == [] and bench.engine._link is None
    assert bench.lease.watch is Watch.WATCHING and bench.control.told == []
    bench.ask()
    assert bench.control.told == ["ask_promotion"]


def test_silence_asks_and_no_answer_asks_again_and_promotes_nothing(bench: Bench) -> None:
    bench.protect()
    bench.ask()
    for _ in range(4):
        bench.clock.now += 0.6
        bench.turn(1)
    assert bench.control.told == ["ask_promotion"] * 5
    assert "cont" not in bench.qemu.sent and "migrate-incoming" not in bench.qemu.sent


def test_what_comes_whole_while_the_arbiter_is_asked_is_taken_and_acknowledged(bench: Bench) -> None:
    peer = bench.protect()
    bench.ask()
    bench.send(*epoch_frames(2, [pages([2], 22)], STATE))
    assert [(f.kind.name, f.epoch) for f in peer.read()] == [("ACK", 2)]
    assert bench.memory.pages[0, 2] == 22 and bench.lease.watch is Watch.ASKING


def test_a_grant_loads_the_last_whole_epoch_and_resumes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.protect()
    bench.send(*epoch_frames(2, [pages([2], 22)], STATE)[:-1])
    bench.ask()
    streams: list[bytes] = []
    monkeypatch.setattr(backups, "promote", lambda monitor, stream, path: streams.append(stream))
    bench.control.grant(True)
    bench.turn()
    assert bench.engine.run() is True
    assert len(streams) == 1 and streams[0].endswith(STATE[8:] + b"\x06\0\0\0\0")
    assert bench.memory.pages == {(0, 1): 11}
    assert bench.control.reports[-1] == {"event": "promoted", "timeline": {
        "detected_at": 1000.0, "granted_at": 1000.0, "running_at": 1000.0}}


def test_a_promotion_that_fails_is_told_and_no_guest_runs(bench: Bench) -> None:
    bench.protect()
    bench.ask()
    bench.control.grant(True)
    bench.turn()
    assert bench.engine.run() is False
    assert bench.control.told[-1] == "failed" and bench.control.reports[-1]["granted"]
    assert "cont" not in bench.qemu.sent


def test_nothing_is_acknowledged_after_the_grant_not_even_when_the_promotion_fails(bench: Bench) -> None:
    peer = bench.protect()
    bench.ask()
    peer.raw(b"".join(epoch_frames(2, [pages([2], 22)], STATE)))
    bench.control.grant(True)
    bench.engine._on_control()
    bench.engine._on_link()
    assert bench.control.told[-1] != "promoted" and bench.lease.watch is Watch.PROMOTING
    assert "ACK" not in peer.kinds() and bench.memory.pages == {(0, 1): 11}


def test_the_primarys_word_that_qemu_ended_asks_at_once(bench: Bench) -> None:
    peer = bench.protect()
    peer.send(wire.Kind.GUEST_GONE, 1)
    bench.turn()
    assert bench.control.reports == [{"event": "ask_promotion", "evidence": "the primary's agent saw QEMU end"}]


def test_a_guest_that_is_handed_over_is_asked_for_at_once(bench: Bench) -> None:
    peer = bench.protect()
    peer.send(wire.Kind.HAND_OVER, 1)
    bench.turn()
    assert bench.control.reports == [{"event": "ask_promotion", "evidence": "the server is moved here"}]


@pytest.mark.parametrize("how", ["bye", "stop"])
def test_a_planned_end_gives_the_standby_up(bench: Bench, how: str) -> None:
    peer = bench.protect()
    if how == "bye":
        peer.send(wire.Kind.BYE, 1)
    else:
        bench.control.give("stop", reason="switched off")
    assert bench.engine.run() is False
    assert bench.control.told == [] and "cont" not in bench.qemu.sent


def test_a_primary_that_is_lost_before_the_first_epoch_is_not_asked_for(bench: Bench) -> None:
    bench.connect()
    bench.send(*page_frames(wire.Kind.PRELOAD, 0, pages([3])))
    bench.peer.close()
    bench._link.close()
    assert bench.engine.run() is False
    assert bench.control.told == []


def test_a_standby_whose_primary_never_comes_ends(bench: Bench) -> None:
    bench.clock.now += 61
    assert bench.engine.run() is False
    assert "did not connect" in bench.control.reports[-1]["reason"]


@pytest.mark.parametrize(("token", "hello"), [
    ("wrong", HELLO), ("token", wire.Hello("another", HELLO.machine, HELLO.blocks, "")),
    ("token", wire.Hello("pair", "pc-q35-10.0", HELLO.blocks, "")),
    ("token", wire.Hello("pair", HELLO.machine, HELLO.blocks[:1], ""))],
    ids=["token", "pair", "machine", "blocks"])
def test_a_peer_that_does_not_fit_is_refused_and_the_right_one_is_still_welcome(bench: Bench, token: str,
                                                                               hello: wire.Hello) -> None:
    with pytest.raises(ConnectionRefusedError):
        bench.connect(token, hello)
    assert bench.engine._link is None and bench.control.told == []
    bench.protect()


def test_a_second_primary_is_refused_while_the_first_is_there_and_after_it_was_lost(bench: Bench) -> None:
    bench.protect()
    with pytest.raises(ConnectionRefusedError):
        bench.connect()
    bench.peer.close()
    bench._link.close()
    bench.turn()
    assert bench.engine._link is None
    with pytest.raises(ConnectionRefusedError):
        bench.connect()


def test_a_stranger_does_not_keep_the_watch_from_asking(bench: Bench) -> None:
    """A connection that says nothing, after the primary was lost: the question must not wait for its greeting."""
    bench.protect()
    bench.peer.close()
    bench._link.close()
    bench.turn()
    with socket.create_connection(bench.listener.getsockname()):
        bench.ask()
    assert bench.control.told == ["ask_promotion"]


@pytest.mark.parametrize("busy", [False, True])
def test_a_standby_that_dies_in_silence_is_a_failure_within_a_beat(bench: Bench, busy: bool) -> None:
    """While it dumps its core its memory can still be written, for seconds."""
    peer = bench.protect()
    bench.life.ending = True
    if busy:
        bench.clock.now += 0.1
        bench.peer.raw(b"".join(epoch_frames(2, [pages([1], 12)], STATE)))
        bench.turn(1)
    else:
        bench.turn()
    told_before: list[str] = []
    close = bench.disks.close

    def told() -> None:
        told_before.extend(peer.kinds())
        close()

    bench.disks.close = told
    assert bench.engine.run() is False
    assert bench.control.reports[-1]["reason"] == "the standby ended: QEMU is ending"
    assert told_before[-1] == "BYE" and bench.lease.watch is Watch.WATCHING


def test_a_standby_that_dies_is_a_failure(bench: Bench) -> None:
    bench.protect()
    bench.pidfd.ring()
    assert bench.engine.run() is False
    assert "the standby ended" in bench.control.reports[-1]["reason"]


# Disks


def test_the_greeting_tells_which_replicas_lie_on_the_same_base(bench: Bench) -> None:
    ours = [dataclasses.replace(disk, base=base) for disk, base in zip(DISKS, ("a", "", "c"), strict=True)]
    theirs = [dataclasses.replace(disk, base=base) for disk, base in zip(DISKS, ("a", "", "other"), strict=True)]
    bench.engine._expected = dataclasses.replace(HELLO, disks=tuple(ours))
    bench.connect(hello=dataclasses.replace(HELLO, disks=tuple(theirs)))
    assert bench.shallow == {0}


@pytest.mark.parametrize("other", [
    DISKS[:1], DISKS[::-1], [dataclasses.replace(DISKS[0], size=1 << 19), *DISKS[1:]],
    [dataclasses.replace(DISKS[0], read_only=True), *DISKS[1:]]])
def test_a_primary_with_other_disks_is_refused(bench: Bench, other: list[Disk]) -> None:
    with pytest.raises(ConnectionRefusedError):
        bench.connect(hello=dataclasses.replace(HELLO, disks=tuple(other)))


def test_an_epochs_disk_writes_are_handed_over_at_its_commit_only(bench: Bench) -> None:
    bench.protect()
    *parts, commit = epoch_frames(2, [pages([1], 12)], STATE, writes=[write(0, 0, b"a"), write(1, 9, b"b")])
    bench.send(*parts)
    assert bench.disks.done == []
    bench.send(commit)
    assert [(w.disk, w.offset, bytes(w.contents)) for w in bench.disks.done] == [(0, 0, b"a"), (1, 9, b"b")]


def test_what_is_copied_first_is_written_at_once(bench: Bench) -> None:
    bench.connect()
    bench.send(*disk_frames(wire.Kind.DISK_PRELOAD, 0, [write(2, 0, b"config")]))
    assert [bytes(w.contents) for w in bench.disks.done] == [b"config"]


def test_disks_that_cannot_keep_up_hold_the_acknowledgement_back_and_nothing_else(bench: Bench) -> None:
    peer = bench.protect()
    bench.disks.stuck = True
    bench.send(*epoch_frames(2, [], STATE, writes=[write(0, 0, b"x" * (BACKLOG_LIMIT + 1))]))
    assert peer.read() == [] and bench.lease.watch is Watch.WATCHING
    bench.send(*disk_frames(wire.Kind.DISK, 3, [write(0, 0, b"y")]))
    bench.disks.stuck = False
    bench.disks.ring()
    bench.turn()
    assert [(f.kind.name, f.epoch) for f in peer.read()] == [("ACK", 2)]


def test_the_first_copy_is_read_no_faster_than_it_is_written(bench: Bench) -> None:
    bench.connect()
    bench.disks.stuck = True
    bench.send(*disk_frames(wire.Kind.DISK_PRELOAD, 0, [write(0, 0, b"x" * (BACKLOG_LIMIT + 1))]))
    bench.send(*disk_frames(wire.Kind.DISK_PRELOAD, 0, [write(0, 0, b"later")]))
    assert len(bench.disks.submitted) == 1
    bench.disks.stuck = False
    bench.disks.ring()
    bench.turn()
    assert len(bench.disks.done) == 2


def test_disks_that_fail_end_the_backup_with_the_reason(bench: Bench) -> None:
    bench.protect()
    bench.disks.failure = "the replica of disk 0 cannot be written: No space left on device"
    bench.disks.ring()
    bench.turn()
    bench.engine.run()
    assert bench.control.reports[-1]["event"] == "failed" and "No space" in bench.control.reports[-1]["reason"]
    assert not bench.control.reports[-1]["granted"]
    assert bench.disks.closed and not bench.engine._promoted
    (*_, last) = bench.peer.read()
    assert last.kind is wire.Kind.BYE and b"No space" in bytes(last.payload), "the primary is told"


def test_a_promotion_waits_until_all_committed_writes_are_done(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.protect()
    bench.disks.stuck = True
    bench.send(*epoch_frames(2, [], STATE, writes=[write(0, 0, b"last")]))
    seen: list[int] = []
    monkeypatch.setattr(backups, "promote", lambda *_: seen.append(len(bench.disks.done)))
    bench.ask()
    bench.control.grant(True)
    bench.turn()
    assert seen == [1] and bench.control.told[-1] == "promoted"


def test_a_promotion_whose_disks_fail_is_none(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.protect()
    bench.ask()
    bench.disks.failure = "the replica of disk 0 cannot be written: No space left on device"
    monkeypatch.setattr(backups, "promote", lambda *_: pytest.fail("promoted with a disk that is of no use"))
    bench.control.grant(True)
    bench.turn()
    assert not bench.engine.run() and "No space" in bench.control.reports[-1]["reason"]


# Packets under way

MAC = test_reminders.MAC


def packet_frame(kind: wire.Kind, epoch: int, text: bytes) -> bytes:
    return join(wire.encode_packets(kind, GENERATION, Epoch(epoch), Packets(MAC, text)))


def test_a_promoted_guest_hears_what_came_since_its_checkpoint_and_says_what_that_covers(
        bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.protect()
    bench.send(packet_frame(wire.Kind.HEARD, 2, b"old"), *epoch_frames(2, [], STATE),
               packet_frame(wire.Kind.SAID, 2, b"said"), packet_frame(wire.Kind.HEARD, 3, b"new"))
    order: list[str] = []
    monkeypatch.setattr(backups, "promote", lambda *_: order.append("promoted"))
    bench.ask()
    bench.control.grant(True)
    assert bench.replay.said_again is None
    bench.turn()
    assert order == ["promoted"] and bench.replay.said_again == ({MAC: b"new"}, {MAC: b"said"})


def test_a_promoted_guests_clients_are_reminded_of_what_committed_epochs_said(
        bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.protect()
    said = {port: framed(test_reminders.said(port, acknowledged)) for port, acknowledged in ((5000, 1), (5001, 2))}
    for epoch in (2, 3):
        bench.send(*epoch_frames(epoch, [], STATE), packet_frame(wire.Kind.SAID, epoch, said[4998 + epoch]))
        bench.send(join(wire.encode(wire.Kind.BEAT, GENERATION, Epoch(epoch))))
    for lost in (test_reminders.said(5000, 9), test_reminders.said(5002)):
        bench.send(packet_frame(wire.Kind.SAID, 4, framed(lost)))
    monkeypatch.setattr(backups, "promote", lambda *_: None)
    bench.ask()
    bench.control.grant(True)
    bench.turn()
    assert bench.replay.said_again == ({}, {}) and bench.replay.reminders is not None
    assert [test_reminders.quoted(packet) for packet in unframed(bytes(bench.replay.reminders[MAC]))] == \
        [(5001, 2)] * STEPS + [(5000, 1)] * STEPS


def test_packets_change_nothing_of_the_epochs(bench: Bench) -> None:
    peer = bench.protect()
    *parts, commit = epoch_frames(2, [pages([2], 22)], STATE)
    for number, part in enumerate(parts):
        bench.send(packet_frame(wire.Kind.HEARD, 2, b"%d" % number), part)
    bench.send(packet_frame(wire.Kind.HEARD, 3, b"later"), commit)
    assert [(f.kind.name, f.epoch) for f in peer.read()] == [("ACK", 2)] and bench.memory.pages[0, 2] == 22


def test_packets_that_cannot_be_read_cost_the_connection(bench: Bench) -> None:
    bench.protect()
    bench.send(join(wire.encode(wire.Kind.HEARD, GENERATION, Epoch(2), (b"short",))))
    assert bench.engine._link is None


def test_what_a_primary_said_before_it_died_counts_though_it_cannot_be_answered(bench: Bench) -> None:
    peer = bench.protect()
    peer.raw(b"".join([*epoch_frames(2, [pages([2], 22)], STATE), packet_frame(wire.Kind.HEARD, 3, b"new")]))
    # With something unread its end is a reset: whatever is sent from now on fails at once.
    bench.engine._say(wire.Kind.BEAT)
    reset = struct.pack("ii", 1, 0)
    for end in (peer.connection, bench._link._socket):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        end.close()
    bench.clock.now += 0.2
    bench.engine._beat()
    bench.turn()
    assert bench.engine._link is None
    assert bench.memory.pages[0, 2] == 22 and bench.engine._in_flight.heard == {MAC: b"new"}
