"""engine/primary.py: carries out what the loop decides, in its order, whatever QEMU, the peer and the agent do."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from nova_ftvm.core import wire
from nova_ftvm.core.epoch import EpochLoop, Pace, Phase
from nova_ftvm.core.packets import Packets
from nova_ftvm.core.policy import Policy
from nova_ftvm.core.replica import Acknowledge, Apply, Replica
from nova_ftvm.engine.capture import Checkpoint, Conversation
from nova_ftvm.engine.clockforward import NotForwarded
from nova_ftvm.engine.link import Link
from nova_ftvm.engine.primary import PrimaryEngine
from nova_ftvm.engine.stats import EpochLog, Stage
from nova_ftvm.exception import GuestGone, QemuError
from nova_ftvm.types import Buffer, Epoch
from tests.unit import test_virtualclock
from tests.unit.engine_fakes import (
    Bell,
    Clock,
    FakeBuffer,
    FakeControl,
    FakeGate,
    FakeLife,
    FakeMemory,
    FakeMirror,
    FakeNote,
    FakePrecedence,
    FakeProcessors,
    FakeQemu,
    FakeWatchdog,
    Peer,
    tcp_pair,
)
from tests.unit.frames import DISKS, GENERATION, LIMIT, write

STATE = b"the devices' state"
LOG_LIMIT = 10_000
#: From STOP to RESUME, by QEMU's clock; so long the guest runs at least after it.
PAUSE_S = 0.002
#: Turns wait for events no longer than this.
PACE = Pace(policy=Policy.FIXED, epoch_s=0.001, ack_limit_s=0.5, beat_s=0.001, live_passes=3, live_rest_pages=100)


class FakeKvmClock(NotForwarded):
    """`steps`: what was done, and whether QEMU could start the guest then."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.gate_is_wide = lambda: False

    def _did(self, what: str) -> None:
        self.steps.append(what + (", the gate open" if self.gate_is_wide() else ""))

    def begin(self) -> None:
        self._did("begin")

    def forward(self) -> None:
        self._did("forward")

    def running(self, saved: bool) -> None:
        self.steps.append("saved" if saved else "failed")

    def search(self) -> None:
        self.steps.append("search")

    def on_foreign_pause(self) -> None:
        self.steps.append("foreign pause")


class Bench:
    """An engine with its fakes, turned by hand."""

    def __init__(self, folder: Path, pace: Pace = PACE) -> None:
        ours, theirs = tcp_pair()
        self.clock, self.qemu, self.gate, self.memory = Clock(), FakeQemu(), FakeGate(), FakeMemory()
        self.peer, self.control, self.watchdog, self.pidfd = Peer(theirs), FakeControl(), FakeWatchdog(), Bell()
        self.buffers, self.mirror = FakeBuffer(self.qemu.sent), FakeMirror(DISKS)
        self.note, self.processors, self.life = FakeNote(self.qemu.sent), FakeProcessors(), FakeLife()
        self.precedence = FakePrecedence(self.qemu.sent)
        self.kvmclock = FakeKvmClock()
        self.kvmclock.gate_is_wide = lambda: self.gate.wide
        self.loop = EpochLoop(pace, self.clock.now)
        self.talk = Conversation(self.qemu, self.gate, lambda message: (
            message["event"] if message["event"].startswith("BLOCK_JOB") else ""))
        self.engine = PrimaryEngine(
            generation=GENERATION, loop=self.loop, memory=self.memory, monitor=self.qemu, gate=self.gate,
            talk=self.talk, buffers=self.buffers, mirror=self.mirror, fixed=iter([write(2, 0, b"config")]), shallow={1},
            log_limit=LOG_LIMIT, kvmclock=self.kvmclock, link=Link(ours, GENERATION, LIMIT), note=self.note,
            processors=self.processors, precedence=self.precedence, control=self.control,
            pidfd=self.pidfd.fileno(), life=self.life,
            watchdog=self.watchdog, frame_limit=LIMIT, stats=EpochLog(str(folder / "epochs.jsonl"), self.clock),
            clock=self.clock)
        # The clock stands still, so a turn must not wait by it: only for what is on its way already.
        self.engine._patience = lambda: 0.002

    def turn(self, times: int = 3) -> None:
        for _ in range(times):
            if self.loop.phase in (Phase.ALONE, Phase.ENDED, Phase.FENCED):
                return
            self.engine._turn()

    def copy(self) -> None:
        """Through the first copy, to the first batch."""
        for _ in range(20):
            self.turn(1)
            if self.loop.phase is Phase.STOPPING:
                return
        raise AssertionError("the first copy did not end")

    def stop_guest(self) -> None:
        """And its disks take their time to come to rest."""
        self.qemu.event("STOP", 1)
        self.clock.now += 0.005
        self.turn()

    def begin_state(self) -> None:
        self.gate.fill(STATE)
        self.turn()

    def end_save(self, error: str = "") -> None:
        self.qemu.event("RESUME", 3)
        self.qemu.answer("save", error)
        self.turn()

    def acknowledge(self, epoch: int) -> None:
        self.peer.send(wire.Kind.ACK, epoch)
        self.turn()

    def checkpoint(self) -> None:
        """One whole epoch, to its acknowledgement."""
        if self.loop.phase is Phase.COPYING:
            self.copy()
        while self.loop.phase is Phase.RUNNING:
            self.clock.now += 0.01
            self.turn(1)
        self.stop_guest()
        self.begin_state()
        self.end_save()
        self.acknowledge(self.loop.epoch)
        assert self.loop.phase in (Phase.RUNNING, Phase.STOPPING)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    made.memory.put(0, 1, 11)
    made.memory.put(1, 0, 12)
    yield made
    made.peer.close()


def test_memory_that_gains_by_it_is_protected_at_the_stop_and_before_its_copy(bench: Bench) -> None:
    bench.memory.protects_at_stop = True
    bench.copy()
    bench.stop_guest()
    assert bench.memory.steps == ["protect"]
    bench.begin_state()
    assert bench.memory.steps == ["protect", "capture"]
    bench.end_save()
    bench.acknowledge(1)
    assert bench.loop.phase is Phase.RUNNING


def test_the_clock_is_set_forward_after_the_capture_and_before_the_gate_opens(bench: Bench) -> None:
    bench.kvmclock.steps = bench.memory.steps
    bench.checkpoint()
    assert bench.memory.steps == ["begin", "capture", "forward", "saved", "search"]


def test_the_clock_is_told_of_a_failed_save_and_of_somebody_elses_pause(bench: Bench) -> None:
    bench.checkpoint()
    bench.kvmclock.steps.clear()
    for event in ("STOP", "RESUME"):
        bench.qemu.event(event)
        bench.turn(1)
    assert bench.kvmclock.steps.count("foreign pause") == 2
    while bench.loop.phase is Phase.RUNNING:
        bench.clock.now += 0.01
        bench.turn(1)
    bench.stop_guest()
    bench.begin_state()
    bench.end_save("no")
    assert bench.kvmclock.steps[-1] == "failed"


def test_memory_that_gains_nothing_by_it_is_not_protected_early(bench: Bench) -> None:
    bench.checkpoint()
    assert bench.memory.steps == ["capture"]


def test_a_stop_that_is_noticed_after_the_state_began_protects_nothing_early(bench: Bench) -> None:
    bench.memory.protects_at_stop = True
    bench.copy()
    bench.qemu.event("STOP", 1)
    bench.gate.fill(STATE)
    bench.engine._on_gate()
    bench.turn()
    assert bench.memory.steps == ["capture"]
    bench.end_save()
    bench.acknowledge(1)
    assert bench.loop.phase is Phase.RUNNING


def test_memory_is_tended_between_checkpoints_only(bench: Bench) -> None:
    bench.copy()
    bench.stop_guest()
    bench.begin_state()
    bench.end_save()
    assert bench.memory.tended == []
    bench.acknowledge(1)
    assert bench.memory.tended


def test_memory_is_tended_once_a_second_though_checkpoints_leave_no_room(bench: Bench) -> None:
    for _ in range(5):
        bench.checkpoint()
    first = len(bench.memory.tended)
    assert first == 1
    bench.clock.now += 1.0
    bench.checkpoint()
    bench.checkpoint()
    assert len(bench.memory.tended) == first + 1


def test_memory_is_told_which_of_its_pages_went_to_the_backup(bench: Bench) -> None:
    for again in (32, 33, 34):
        bench.memory.put(0, 1, 11)
        bench.memory.put(0, 3, again)
        bench.checkpoint()
    assert bench.memory.sent == [(0, [1, 3]), (0, [3])]
    assert bench.memory.ended == 3


def test_the_first_copy_goes_out_before_anything_is_held(bench: Bench) -> None:
    bench.copy()
    assert set(bench.peer.kinds()) == {"PRELOAD", "DISK_PRELOAD"}
    assert [sent for sent in bench.qemu.sent if sent != "transaction"] == [
        "note", "install", "precedence", "save"]
    assert bench.watchdog.armed


def test_an_epoch_goes_out_whole_and_in_order_and_its_output_waits(bench: Bench) -> None:
    bench.copy()
    bench.peer.read()
    bench.memory.put(0, 5, 50)
    bench.stop_guest()
    assert bench.peer.kinds() == [] and not bench.gate.wide
    bench.memory.put(0, 6, 60)
    bench.begin_state()
    assert bench.gate.wide and bench.gate.drained == STATE
    frames = bench.peer.read()
    assert [frame.kind.name for frame in frames] == ["CHANGES"], "its pages, while QEMU writes the rest"
    bench.end_save()
    frames += bench.peer.read()
    assert [frame.kind.name for frame in frames] == ["CHANGES", "DEVICE_CHANGES", "COMMIT"]
    replica = Replica(bench.memory.blocks)
    assert [action for frame in frames for action in replica.on_frame(frame)] == [Acknowledge(Epoch(1)), Apply()]
    assert [p.runs.tolist() for p in replica.apply()] == [[[5, 2]]]
    assert replica.device_state == STATE
    assert "release" not in bench.qemu.sent and bench.control.told == []
    bench.acknowledge(1)
    assert bench.qemu.sent.count("release") == 1 and bench.control.told == ["protected"]


def test_the_device_state_tells_of_the_stop_before_qemus_word_of_it_is_heard(bench: Bench) -> None:
    bench.copy()
    bench.peer.read()
    bench.memory.put(0, 5, 50)
    bench.qemu.event("STOP", 1)
    bench.turn()
    assert bench.qemu.rings() and bench.loop.phase is Phase.STOPPING, "nobody wakes up for it"
    bench.begin_state()
    assert not bench.qemu.rings() and bench.gate.wide and bench.loop.phase is Phase.DRAINING
    bench.end_save()
    assert bench.loop.phase is Phase.UNACKNOWLEDGED and bench.talk.current.pause_ms == 2.0
    assert bench.peer.kinds()[-1] == "COMMIT"


def test_what_the_virtual_clock_lost_beyond_the_pause_is_waited_for(bench: Bench) -> None:
    bench.copy()
    owed_s = []
    for stop_ms, clock_ms in ((1, 1), (41, 11)):
        while bench.loop.phase is Phase.RUNNING:
            bench.clock.now += 0.01
            bench.turn(1)
        bench.qemu.event("STOP", stop_ms)
        bench.gate.fill(test_virtualclock.state(clock_ms * 1_000_000))
        bench.turn()
        bench.qemu.event("RESUME", stop_ms + 2)
        bench.qemu.answer("save")
        bench.turn()
        owed_s.append(bench.loop._seen.owed_s)
        bench.acknowledge(bench.loop.epoch)
    # The clock advanced by 10 ms in 40.
    assert bench.talk.current.excess_s == pytest.approx(0.028)
    assert owed_s[1] >= owed_s[0] + 0.028 and bench.loop._seen.pause_s == PAUSE_S


def test_a_save_that_is_refused_at_once_is_heard_of_within_a_bound(bench: Bench) -> None:
    bench.copy()
    bench.qemu.answer("save", "no space")
    bench.turn()
    assert bench.loop.phase is Phase.STOPPING
    bench.clock.now += 0.005
    bench.turn()
    assert bench.loop.phase is Phase.HOLDING and bench.control.told == ["ask_degrade"]


@pytest.mark.parametrize("late_ms, stages", [(0.0, (3.0, 7.0)), (-1e6, (0.0, 10.0)), (1e6, (10.0, 0.0))])
def test_when_the_guest_stopped_only_qemu_knows_by_a_clock_that_may_be_set(bench: Bench, late_ms: float,
                                                                           stages: tuple[float, float]) -> None:
    stats, checkpoint = bench.engine._stats, Checkpoint()
    stats.began()
    checkpoint.stopped_us = stats._began_us + 3000 + int(late_ms * 1000)
    bench.clock.now += 0.01
    stats.mark(Stage.REST)
    stats.shipped(checkpoint, 0)
    assert (stats._row["stop_ms"], stats._row["rest_ms"]) == stages


@pytest.mark.parametrize("error", ["", "no space"])
def test_qemu_has_precedence_until_the_guest_runs_again_and_the_engine_until_the_epoch_has_left(
        bench: Bench, error: str) -> None:
    bench.copy()
    bench.stop_guest()
    bench.begin_state()
    assert bench.precedence.taken and bench.precedence.qemu_has_it
    had = []
    send = bench.engine._send

    def told(frames: list[Buffer]) -> None:
        had.append((bench.precedence.taken, bench.precedence.qemu_has_it))
        send(frames)

    bench.engine._send = told
    bench.end_save(error)
    assert had[:1] == ([] if error else [(True, False)])
    assert not bench.precedence.taken and not bench.precedence.qemu_has_it


@pytest.mark.parametrize("seconds", [0.001, 0.01])
def test_a_long_epoch_is_shipped_without_precedence(bench: Bench, seconds: float) -> None:
    bench.copy()
    bench.stop_guest()
    send = bench.engine._freight._send

    def take_time(frame: list[Buffer]) -> None:
        bench.clock.now += seconds
        send(frame)

    bench.engine._freight._send = take_time
    bench.memory.put(0, 5, 50)
    bench.begin_state()
    assert bench.precedence.taken == (seconds < 0.002)


def test_an_engine_that_fails_in_a_pause_gives_its_precedence_back(bench: Bench) -> None:
    bench.copy()
    bench.stop_guest()
    bench.clock.now += 31
    with pytest.raises(QemuError, match="not done"):
        bench.engine.run()
    assert not bench.precedence.taken


def test_what_the_guest_sends_brings_the_next_checkpoint_and_is_covered_up_to_its_stop(tmp_path: Path) -> None:
    bench = Bench(tmp_path, dataclasses.replace(PACE, policy=Policy.EVENT))
    bench.checkpoint()
    bench.clock.now += PAUSE_S
    bench.turn(10)
    assert bench.loop.phase is Phase.RUNNING, "nothing was sent"
    bench.buffers.ring()
    bench.turn()
    assert bench.loop.phase is Phase.STOPPING
    bench.buffers.ring()
    bench.stop_guest()
    bench.begin_state()
    assert bench.qemu.sent[-1] == "cut"
    bench.end_save()
    bench.acknowledge(2)
    bench.turn(10)
    assert bench.loop.phase is Phase.RUNNING, "what was sent before the guest stood is covered"
    bench.clock.now += PAUSE_S
    bench.buffers.ring()
    bench.turn()
    bench.clock.now += 0.001
    bench.stop_guest()
    bench.begin_state()
    bench.buffers.ring()
    bench.end_save()
    bench.clock.now += PAUSE_S
    bench.acknowledge(3)
    assert bench.loop.phase is Phase.STOPPING and bench.loop.epoch == 4, "sent after it: the next epoch's"


CAME, SENT = Packets(b"\x52\0\0\0\0\1", b"came"), Packets(b"\x52\0\0\0\0\1", b"sent")


def told(bench: Bench) -> list[tuple[str, int, Packets]]:
    """What the backup was told of packets under way."""
    return [(frame.kind.name, frame.epoch, wire.decode_packets(frame)) for frame in bench.peer.read()
            if frame.kind in (wire.Kind.HEARD, wire.Kind.SAID)]


def test_the_backup_is_told_what_its_guest_would_not_have_heard_and_what_may_not_have_left(bench: Bench) -> None:
    bench.checkpoint()
    bench.engine._loop._pace = dataclasses.replace(PACE, epoch_s=100.0)
    assert told(bench) == []
    bench.buffers.came.append(CAME)
    bench.clock.now += 0.01
    bench.turn()
    assert told(bench) == [("HEARD", 2, CAME)], "the next epoch will cover it"
    bench.turn()
    assert told(bench) == []
    bench.loop.on_filling()
    bench.turn()
    bench.buffers.came.append(CAME)
    bench.buffers.sent_last.append(SENT)
    bench.memory.put(0, 5, 50)
    bench.clock.now += 0.01
    bench.stop_guest()
    bench.begin_state()
    assert told(bench) == [("HEARD", 2, CAME)], "until the checkpoint that covers it is committed"
    bench.end_save()
    assert told(bench) == [("SAID", 2, SENT)]
    bench.buffers.came.append(CAME)
    bench.clock.now += 0.01
    bench.turn()
    assert told(bench) == [("HEARD", 3, CAME)]


def test_clients_that_send_again_after_a_release_are_told_of_soon(bench: Bench) -> None:
    bench.checkpoint()
    bench.engine._loop._pace = dataclasses.replace(PACE, epoch_s=100.0)
    bench.clock.now += 0.01
    bench.turn()
    bench.loop.on_filling()
    bench.checkpoint()
    del bench.engine._patience
    assert bench.engine._patience() == pytest.approx(0.001)
    bench.buffers.came.append(CAME)
    bench.clock.now += 0.001
    bench.turn(1)
    assert told(bench) == [("HEARD", 3, CAME)]


def test_packets_that_are_more_than_a_frame_takes_are_not_told(bench: Bench) -> None:
    bench.checkpoint()
    bench.engine._loop._pace = dataclasses.replace(PACE, epoch_s=100.0)
    room = LIMIT - wire.HEADER_BYTES - len(CAME.mac)
    for length, kinds in ((room, ["HEARD"]), (room + 1, [])):
        bench.buffers.came.append(Packets(CAME.mac, bytes(length)))
        bench.clock.now += 0.01
        bench.turn()
        assert [kind for kind, _, _ in told(bench)] == kinds


def test_a_beat_tells_the_last_epoch_whose_output_has_left(bench: Bench) -> None:
    def beats() -> set[int]:
        bench.clock.now += 0.002
        bench.turn()
        return {frame.epoch for frame in bench.peer.read(beats=True) if frame.kind is wire.Kind.BEAT}

    bench.engine._loop._pace = dataclasses.replace(PACE, epoch_s=100.0)
    bench.checkpoint()
    assert beats() >= {1}
    bench.loop.on_filling()
    bench.turn()
    bench.stop_guest()
    bench.begin_state()
    bench.end_save()
    assert bench.loop.phase is Phase.UNACKNOWLEDGED and beats() == {1}
    bench.acknowledge(2)
    assert beats() >= {2}


def test_what_came_is_told_in_portions_and_taken_from_qemu_though_there_is_nobody_to_tell(bench: Bench) -> None:
    bench.checkpoint()
    bench.engine._loop._pace = dataclasses.replace(PACE, epoch_s=100.0)
    bench.clock.now += 0.01
    for _ in range(3):
        bench.buffers.came.append(CAME)
        bench.turn()
    assert [kind for kind, _, _ in told(bench)] == ["HEARD"], "each wakes the backup up"
    bench.peer.close()
    bench.turn()
    assert bench.loop.phase is Phase.HOLDING
    bench.clock.now += 0.01
    bench.turn()
    assert bench.buffers.came == [], "QEMU would wait when nobody reads"


def test_much_that_is_held_brings_a_checkpoint_whatever_the_policy_says(tmp_path: Path) -> None:
    bench = Bench(tmp_path, dataclasses.replace(PACE, epoch_s=100.0))
    bench.checkpoint()
    bench.buffers.ring()
    bench.turn()
    assert bench.loop.phase is Phase.RUNNING
    bench.buffers.is_filling = True
    bench.buffers.ring()
    bench.clock.now += PAUSE_S
    bench.turn()
    assert bench.loop.phase is Phase.STOPPING


def test_processors_are_looked_at_while_output_is_gathered(tmp_path: Path) -> None:
    bench = Bench(tmp_path, dataclasses.replace(PACE, policy=Policy.ADAPTIVE))
    bench.checkpoint()
    bench.loop._seen.busy_s = 0.005
    bench.buffers.ring()
    bench.turn()
    assert bench.loop.phase is Phase.RUNNING
    bench.clock.now += 0.003
    bench.turn()
    assert bench.loop.phase is Phase.RUNNING, "they are busy: more may come"
    bench.processors.is_asleep = True
    for _ in range(2):
        assert bench.loop.phase is Phase.RUNNING, "they may nod off for a moment"
        bench.clock.now += 0.0003
        bench.turn()
    assert bench.loop.phase is Phase.STOPPING


def test_the_policy_learns_whether_the_guest_ran_dry_before_its_epoch_was_acknowledged(tmp_path: Path) -> None:
    bench = Bench(tmp_path, dataclasses.replace(PACE, policy=Policy.ADAPTIVE))
    bench.checkpoint()
    learned = []
    for is_asleep in (True, False):
        bench.processors.is_asleep = is_asleep
        bench.loop._seen.gather_s, bench.loop._seen.busy_s = 0.01, 0.02
        bench.loop.on_filling()
        bench.checkpoint()
        learned.append(bench.loop._seen.gather_s)
    assert learned[0] < 0.01 < learned[1]


def test_nobody_wakes_up_for_each_packet(tmp_path: Path) -> None:
    bench = Bench(tmp_path, dataclasses.replace(PACE, epoch_s=100.0))
    bench.checkpoint()
    for waits, heard in ((0.0, True), (0.0005, False), (0.001, True)):
        bench.clock.now += waits
        bench.buffers.ring()
        bench.turn(1)
        assert bench.buffers.rings() is not heard


def test_what_is_said_while_an_epoch_is_on_its_way_wakes_nobody_and_is_known_at_the_release(bench: Bench) -> None:
    bench.copy()
    bench.stop_guest()
    bench.begin_state()
    bench.buffers.ring()
    bench.turn()
    bench.end_save()
    assert bench.loop.phase is Phase.UNACKNOWLEDGED
    bench.buffers.ring()
    bench.turn(1)
    bench.buffers.ring()
    bench.turn()
    assert bench.buffers.rings()
    bench.acknowledge(1)
    assert not bench.buffers.rings() and bench.loop._seen.output_since is not None


def test_an_acknowledgement_of_another_epoch_releases_nothing(bench: Bench) -> None:
    bench.checkpoint()
    bench.qemu.sent.clear()
    while bench.loop.phase is Phase.RUNNING:
        bench.clock.now += 0.01
        bench.turn(1)
    bench.stop_guest()
    bench.begin_state()
    bench.end_save()
    for other in (1, 3):
        bench.acknowledge(other)
    assert "release" not in bench.qemu.sent and bench.loop.phase is Phase.UNACKNOWLEDGED
    bench.acknowledge(2)
    assert "release" in bench.qemu.sent


@pytest.mark.parametrize("bad", ["garbage", "commit", "old generation", "bye", "close"])
def test_a_peer_that_goes_wrong_is_lost_and_the_output_stays_held(bench: Bench, bad: str) -> None:
    bench.checkpoint()
    released = bench.qemu.sent.count("release")
    if bad == "close":
        bench.peer.close()
    elif bad == "garbage":
        bench.peer.raw(b"GET / HTTP/1.1\r\n" * 10)
    else:
        bench.peer.generation = 3 if bad == "old generation" else GENERATION
        bench.peer.send(wire.Kind.BYE if bad == "bye" else wire.Kind.COMMIT)
    for _ in range(5):
        if bench.loop.phase is Phase.STOPPING:
            bench.stop_guest()
            bench.begin_state()
            bench.end_save()
        bench.turn()
    assert bench.loop.phase is Phase.HOLDING and bench.control.told == ["protected", "ask_degrade"]
    assert bench.qemu.sent.count("release") == released and bench.buffers.installed
    bench.control.grant(True)
    assert bench.engine.run() is Phase.ALONE
    assert not bench.buffers.installed


WHY = wire.encode_failure(GENERATION, "No space left on device")


@pytest.mark.parametrize("noticed_by", ["reading", "sending"])
@pytest.mark.parametrize("said", [None, 1, wire.HEADER_BYTES + 3])
def test_a_backup_that_says_why_it_failed_is_quoted_unless_it_dies_over_it(said: int | None, noticed_by: str,
                                                                         bench: Bench) -> None:
    """said: so many bytes of it."""
    bench.checkpoint()
    bench.peer.raw(b"".join(map(bytes, WHY))[:said])
    bench.peer.close()
    if noticed_by == "sending":
        bench.engine._lose_link("the connection broke: Broken pipe")
    else:
        bench.turn()
    assert bench.loop.phase is Phase.HOLDING and bench.control.told[-1] == "ask_degrade"
    assert (bench.loop.reason == "the backup failed: No space left on device") == (said is None)
    assert bench.loop.reason


@pytest.mark.parametrize("after", ["batch", "stop", "state"])
def test_a_link_that_breaks_in_a_checkpoint_lets_it_end_first(bench: Bench, after: str) -> None:
    bench.checkpoint()
    while bench.loop.phase is Phase.RUNNING:
        bench.clock.now += 0.01
        bench.turn(1)
    if after != "batch":
        bench.stop_guest()
    if after == "state":
        bench.begin_state()
    bench.peer.close()
    bench.turn()
    assert bench.watchdog.armed and "ask_degrade" not in bench.control.told
    if after == "batch":
        bench.stop_guest()
    if after != "state":
        bench.begin_state()
    bench.end_save()
    assert bench.loop.phase is Phase.HOLDING
    assert bench.control.told == ["protected", "ask_degrade"]
    assert bench.gate.drained == STATE * 2


def test_silence_asks_again_and_again_and_a_refusal_fences(bench: Bench) -> None:
    bench.checkpoint()
    while bench.loop.phase is Phase.RUNNING:
        bench.clock.now += 0.01
        bench.turn(1)
    bench.stop_guest()
    bench.begin_state()
    bench.end_save()
    for _ in range(3):
        bench.clock.now += 0.6
        bench.turn(1)
    assert bench.control.told == ["protected"] + ["ask_degrade"] * 3
    assert bench.buffers.installed
    bench.control.grant(False, reason="the backup speaks")
    assert bench.engine.run() is Phase.FENCED
    assert bench.control.told[-1] == "fenced" and bench.buffers.installed


def test_a_save_that_fails_holds_the_output(bench: Bench) -> None:
    bench.checkpoint()
    released = bench.qemu.sent.count("release")
    while bench.loop.phase is Phase.RUNNING:
        bench.clock.now += 0.01
        bench.turn(1)
    bench.stop_guest()
    bench.end_save(error="no space left")
    assert bench.loop.phase is Phase.HOLDING and bench.watchdog.armed
    assert "no space left" in bench.control.reports[-1]["reason"]
    assert bench.qemu.sent.count("release") == released


@pytest.mark.parametrize("when", ["running", "stopped"])
def test_output_that_is_not_under_our_control_is_covered_by_no_later_epoch(bench: Bench, when: str) -> None:
    bench.checkpoint()
    released = bench.qemu.sent.count("release")
    if when == "stopped":
        to_batch(bench)
        bench.stop_guest()
    bench.buffers.lose("QEMU closed the filter of net0")
    bench.turn()
    if bench.loop.phase is Phase.STOPPED:
        bench.begin_state()
        bench.end_save()
    assert bench.loop.phase is Phase.HOLDING and bench.mirror.closed
    assert "closed the filter" in bench.control.reports[-1]["reason"]
    assert bench.qemu.sent.count("release") == released


def test_the_agents_stop_says_bye_and_lets_all_go(bench: Bench) -> None:
    bench.copy()
    bench.control.give("stop", reason="switched off")
    bench.turn()
    bench.stop_guest()
    bench.begin_state()
    bench.end_save()
    assert bench.loop.phase is Phase.ENDED and not bench.buffers.installed
    assert bench.peer.kinds()[-1] == "BYE"


def test_a_planned_end_lets_all_go_even_if_the_peer_just_died(bench: Bench) -> None:
    """The BYE meets a connection that is reset: the guest's output must not stay held for that."""
    bench.checkpoint()
    if bench.loop.phase is Phase.STOPPING:
        bench.stop_guest()
        bench.begin_state()
        bench.end_save()
    bench.engine._link.close()
    bench.control.give("stop", reason="switched off")
    bench.engine._on_control()
    assert bench.loop.phase is Phase.ENDED and not bench.buffers.installed


def test_the_agents_fence_ends_it_with_the_output_held(bench: Bench) -> None:
    bench.checkpoint()
    bench.peer.read()
    released = bench.qemu.sent.count("release")
    bench.control.give("fence", reason="generation 8 is over")
    bench.turn()
    assert bench.loop.phase is Phase.FENCED and bench.buffers.installed
    assert bench.control.reports[-1] == {"event": "fenced", "reason": "generation 8 is over"}
    assert bench.qemu.sent.count("release") == released


# The note


def holding(bench: Bench) -> None:
    """The backup is lost, and nobody answers."""
    bench.checkpoint()
    bench.peer.close()
    bench.turn()
    if bench.loop.phase is Phase.STOPPING:
        bench.stop_guest()
        bench.begin_state()
        bench.end_save()
    assert bench.loop.phase is Phase.HOLDING


@pytest.mark.parametrize("end", ["grant", "refusal", "stop", "fence", "shutdown"])
def test_a_planned_end_leaves_no_note(bench: Bench, end: str) -> None:
    holding(bench)
    assert bench.note.text == "held"
    {"grant": lambda: bench.control.grant(True), "refusal": lambda: bench.control.grant(False),
     "stop": lambda: bench.control.give("stop", reason="x"), "fence": lambda: bench.control.give("fence", reason="x"),
     "shutdown": lambda: bench.qemu.event("SHUTDOWN")}[end]()
    bench.engine.run()
    assert bench.note.text is None


def test_an_engine_that_fails_leaves_its_note(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    holding(bench)

    def refuse() -> None:
        raise QemuError("object-del", "not now")

    monkeypatch.setattr(bench.buffers, "remove", refuse)
    bench.control.grant(True)
    with pytest.raises(QemuError):
        bench.engine.run()
    assert bench.note.text == "held"


def test_an_order_that_is_unknown_changes_nothing(bench: Bench) -> None:
    bench.copy()
    phase, sent = bench.loop.phase, list(bench.qemu.sent)
    bench.control.give("seen")
    bench.turn()
    assert (bench.loop.phase, bench.qemu.sent) == (phase, sent)


def test_a_handed_over_guest_keeps_its_disks_and_its_output_is_held(bench: Bench) -> None:
    bench.checkpoint()
    bench.peer.read()
    bench.control.give("hand_over")
    bench.turn()
    assert bench.loop.phase is Phase.HOLDING and bench.peer.kinds()[-1] == "HAND_OVER"
    assert bench.buffers.installed and bench.mirror.closed


@pytest.mark.parametrize("how", ["pidfd", "monitor"])
def test_a_qemu_that_dies_is_told_to_the_backup(bench: Bench, how: str) -> None:
    bench.checkpoint()
    bench.peer.read()
    bench.qemu.gone = bench.life.ending = True
    (bench.pidfd if how == "pidfd" else bench.qemu).ring()
    bench.turn()
    assert bench.loop.phase is Phase.ENDED and bench.peer.kinds()[-1] == "GUEST_GONE"


def test_a_qemu_and_a_link_that_die_together_end_the_engine_in_peace(bench: Bench) -> None:
    bench.checkpoint()
    bench.qemu.gone = bench.life.ending = True
    bench.peer.close()
    bench.pidfd.ring()
    assert bench.engine.run() is Phase.ENDED


def test_a_guest_that_shuts_down_is_a_planned_end(bench: Bench) -> None:
    bench.checkpoint()
    bench.peer.read()
    bench.qemu.event("SHUTDOWN")
    bench.turn()
    assert bench.loop.phase is Phase.ENDED and "guest_shutdown" in bench.control.told
    assert bench.peer.kinds()[-1] == "BYE"


@pytest.mark.parametrize("first", ["pidfd", "monitor"])
def test_a_guest_that_shuts_down_and_is_gone_at_once_is_a_planned_end_too(bench: Bench, first: str) -> None:
    """QEMU may have exited before its last words are read: the backup must not take it for a death."""
    bench.checkpoint()
    bench.peer.read()
    bench.qemu.event("SHUTDOWN")
    bench.pidfd.ring()
    bench.engine._on_guest_gone() if first == "pidfd" else bench.turn()
    assert bench.loop.phase is Phase.ENDED and "guest_shutdown" in bench.control.told
    assert bench.peer.kinds() == ["BYE"]


def test_a_guest_that_somebody_stopped_before_our_batch_is_left_alone(bench: Bench) -> None:
    """The STOP event looks like ours, but no RESUME follows: the guest stays as the other one wants it."""
    bench.checkpoint()
    while bench.loop.phase is Phase.RUNNING:
        bench.clock.now += 0.01
        bench.turn(1)
    bench.stop_guest()
    bench.begin_state()
    bench.qemu.answer("save")
    bench.turn()
    epoch = bench.loop.epoch
    bench.acknowledge(epoch)
    sent = bench.qemu.sent.count("save")
    for _ in range(5):
        bench.clock.now += 0.05
        bench.turn(1)
    assert bench.qemu.sent.count("save") == sent and bench.loop.epoch == epoch
    bench.qemu.event("RESUME")
    bench.clock.now += 0.05
    bench.turn()
    assert bench.qemu.sent.count("save") == sent + 1


def test_a_refusal_for_now_is_no_fence(bench: Bench) -> None:
    """An answer of our own generation says 'ask again': the guest is not destroyed for it."""
    bench.checkpoint()
    bench.peer.close()
    for _ in range(5):
        if bench.loop.phase is Phase.STOPPING:
            bench.stop_guest()
            bench.begin_state()
            bench.end_save()
        bench.turn()
    assert bench.loop.phase is Phase.HOLDING
    bench.control.grant(False, generation=GENERATION, reason="the pair changes too fast: ask again")
    bench.turn()
    assert bench.loop.phase is Phase.HOLDING and "fenced" not in bench.control.told and bench.buffers.installed
    asked = bench.control.told.count("ask_degrade")
    bench.clock.now += 0.6
    bench.turn(1)
    assert bench.control.told.count("ask_degrade") == asked + 1


# Disks


def running(bench: Bench) -> None:
    """Between two checkpoints, the peer's frames read."""
    bench.checkpoint()
    if bench.loop.phase is Phase.STOPPING:
        bench.stop_guest()
        bench.begin_state()
        bench.end_save()
        bench.acknowledge(bench.loop.epoch)
    bench.peer.read()


def disk_writes(bench: Bench) -> list[tuple[str, int, int, bytes]]:
    """(kind, epoch, offset, contents) of what the peer was told."""
    return [(frame.kind.name, frame.epoch, told.offset, bytes(told.contents))
            for frame in bench.peer.read() if frame.kind in (wire.Kind.DISK, wire.Kind.DISK_PRELOAD)
            for told in wire.decode_disk(frame, DISKS)]


def to_batch(bench: Bench) -> None:
    while bench.loop.phase is Phase.RUNNING:
        bench.clock.now += 0.01
        bench.turn(1)


def test_disks_are_copied_before_ram(bench: Bench) -> None:
    bench.mirror.is_followed = False
    bench.engine._mirror.start({1})
    bench.mirror.write(write(0, 512, b"old"))
    bench.clock.now += 1.0
    bench.turn(6)
    assert bench.loop.phase is Phase.COPYING
    frames = bench.peer.read()
    assert {bytes(told.contents) for frame in frames for told in wire.decode_disk(frame, DISKS)} == {b"config", b"old"}
    assert {frame.kind for frame in frames} == {wire.Kind.DISK_PRELOAD}
    bench.mirror.is_followed = True
    bench.clock.now += 0.2
    bench.copy()
    assert set(bench.peer.kinds()) == {"PRELOAD"}


def test_each_pass_over_ram_is_read_after_the_disks_transfers_are_over(bench: Bench,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    for name in ("take_existing", "take_written", "read"):
        original = getattr(bench.memory, name)
        monkeypatch.setattr(bench.memory, name, lambda *a, n=name, o=original: (done.append(n), o(*a))[1])
    command = bench.qemu.command
    monkeypatch.setattr(bench.qemu, "command", lambda c, **facts: (done.append(c), command(c, **facts))[1])
    bench.copy()
    assert done[:3] == ["take_existing", "transaction", "read"] and done[-1] != "take_written"


def test_the_first_copys_progress_counts_the_disks(bench: Bench) -> None:
    bench.mirror.is_followed = False
    for _ in range(5):
        bench.clock.now += 1.0
        bench.turn(2)
        bench.peer.send(wire.Kind.BEAT)
    told = [report["percent"] for report in bench.control.reports if report["event"] == "syncing"]
    assert told and 0 < told[-1] < 40


def test_a_write_is_answered_when_it_is_logged_and_goes_out_while_the_guest_runs(bench: Bench) -> None:
    running(bench)
    bench.loop.on_paused(True)
    bench.mirror.write(write(0, 0, b"a"), write(1, 5, b"b"))
    bench.turn()
    epoch = bench.loop.epoch + 1
    assert disk_writes(bench) == [("DISK", epoch, 0, b"a"), ("DISK", epoch, 5, b"b")]
    assert bench.mirror.answered == 2


def test_the_epoch_is_cut_when_the_disks_are_at_rest(bench: Bench) -> None:
    running(bench)
    to_batch(bench)
    epoch = bench.loop.epoch
    bench.mirror.write(write(0, 1, b"before the stop"))
    bench.turn()
    bench.stop_guest()
    bench.mirror.write(write(0, 2, b"drained"))
    bench.turn()
    bench.begin_state()
    bench.mirror.write(write(0, 3, b"of the next epoch"))
    bench.turn()
    assert bench.mirror.answered == 2
    bench.end_save()
    frames = bench.peer.read()
    assert [(f.kind.name, f.epoch) for f in frames if f.kind is not wire.Kind.PAGES] == [
        ("DISK", epoch), ("DISK", epoch), ("DEVICE_CHANGES", epoch), ("COMMIT", epoch), ("DISK", epoch + 1)]
    commit = next(frame for frame in frames if frame.kind is wire.Kind.COMMIT)
    assert wire.decode_commit(commit)[2] == 2


def test_a_full_log_makes_the_guest_wait_brings_a_checkpoint_and_lets_qemu_drain(tmp_path: Path) -> None:
    bench = Bench(tmp_path, dataclasses.replace(PACE, epoch_s=100.0))
    running(bench)
    epoch = bench.loop.epoch
    bench.mirror.write(write(0, 0, b"x" * LOG_LIMIT))
    bench.turn(1)
    bench.mirror.write(write(0, 0, b"waits"))
    bench.turn(5)
    assert bench.mirror.answered == 1 and bench.loop.phase is Phase.RUNNING, "the guest has its share of the time"
    bench.clock.now += PAUSE_S
    bench.turn(1)
    assert bench.loop.phase is Phase.STOPPING and bench.loop.epoch == epoch + 1
    bench.turn()
    assert bench.mirror.answered == 2
    bench.stop_guest()
    bench.begin_state()
    bench.end_save()
    bench.mirror.write(write(0, 0, b"waits for the acknowledgement"))
    bench.turn()
    assert bench.mirror.answered == 2 and bench.loop.phase is Phase.UNACKNOWLEDGED
    bench.acknowledge(epoch + 1)
    bench.turn()
    assert bench.mirror.answered == 3


def test_the_first_copy_is_read_no_faster_than_the_connection_takes_it(bench: Bench) -> None:
    bench.mirror.is_followed = False
    bench.turn()
    for _ in range(100):
        bench.mirror.write(*(write(0, n << 14, b"y" * (1 << 14)) for n in range(64)))
        bench.turn(1)
    answered = bench.mirror.answered
    assert answered < 6400
    bench.mirror.write(write(0, 0, b"z"))
    for _ in range(5):
        bench.turn(1)
    assert bench.mirror.answered == answered
    while bench.mirror.answered == answered:
        bench.peer.read()
        bench.turn(1)


@pytest.mark.parametrize("how", ["connection", "event"])
@pytest.mark.parametrize("when", ["running", "stopped"])
def test_a_mirror_that_ends_holds_the_output_and_lets_the_guest_write(bench: Bench, how: str, when: str) -> None:
    running(bench)
    released = bench.qemu.sent.count("release")
    if when == "stopped":
        to_batch(bench)
        bench.stop_guest()
    if how == "event":
        bench.qemu.event("BLOCK_JOB_CANCELLED")
    else:
        bench.mirror.lose("QEMU closed disk 0")
    bench.turn()
    assert bench.mirror.closed
    if bench.loop.phase is Phase.STOPPED:
        bench.begin_state()
        bench.end_save()
    bench.turn()
    assert bench.loop.phase is Phase.HOLDING and bench.control.told[-1] == "ask_degrade"
    assert ("BLOCK_JOB" if how == "event" else "disk 0") in bench.control.reports[-1]["reason"]
    assert bench.qemu.sent.count("release") == released
    bench.control.grant(True)
    assert bench.engine.run() is Phase.ALONE


@pytest.mark.parametrize("part", ["mirror", "output", "monitor"])
def test_a_qemu_that_dies_is_told_as_dead_whatever_of_it_closes_first(bench: Bench, part: str) -> None:
    """Else the primary would ask to go on alone, with nobody there, and keep the backup from going on."""
    running(bench)
    bench.life.ending = True
    if part == "monitor":
        bench.qemu.gone = True
        bench.qemu.ring()
    else:
        (bench.mirror if part == "mirror" else bench.buffers).lose(f"QEMU closed its {part}")
    bench.turn(1)
    assert bench.loop.phase is Phase.ENDED and bench.peer.kinds()[-1] == "GUEST_GONE"
    assert "ask_degrade" not in bench.control.told
    assert not bench.mirror.closed, "to end it in order takes time, and can wait"


@pytest.mark.parametrize("phase", [Phase.COPYING, Phase.STOPPING, Phase.STOPPED, Phase.UNACKNOWLEDGED, Phase.RUNNING])
def test_a_qemu_that_dies_in_silence_is_told_as_dead_as_soon_as_nothing_else_happens(bench: Bench,
                                                                                  phase: Phase) -> None:
    """Its memory is given back before it closes anything: that may take seconds."""
    if phase is Phase.COPYING:
        bench.mirror.is_followed = False
        bench.turn()
    else:
        running(bench)
        if phase is not Phase.RUNNING:
            to_batch(bench)
        if phase in (Phase.STOPPED, Phase.UNACKNOWLEDGED):
            bench.stop_guest()
        if phase is Phase.STOPPED:
            bench.qemu.event("STOP", 1)
            bench.engine._on_monitor()
        if phase is Phase.UNACKNOWLEDGED:
            bench.begin_state()
            bench.end_save()
    bench.peer.read()
    assert bench.loop.phase is phase
    released = bench.qemu.sent.count("release")
    bench.life.ending = True
    bench.turn(2)
    assert bench.loop.phase is Phase.ENDED and bench.peer.kinds()[-1] == "GUEST_GONE"
    assert "ask_degrade" not in bench.control.told and bench.qemu.sent.count("release") == released


def test_a_backup_that_is_always_busy_hides_no_death_of_a_qemu_for_longer_than_a_beat(bench: Bench) -> None:
    running(bench)
    bench.life.ending = True
    bench.clock.now += 0.1
    bench.peer.send(wire.Kind.BEAT)
    bench.turn(1)
    assert bench.loop.phase is Phase.ENDED and bench.peer.kinds()[-1] == "GUEST_GONE"


def test_a_planned_end_that_closes_a_mirror_before_its_word_is_read_is_a_planned_end(bench: Bench) -> None:
    running(bench)
    bench.qemu._messages.append({"event": "SHUTDOWN", "timestamp": {"seconds": 1, "microseconds": 0}})
    bench.mirror.lose("QEMU closed disk 0")
    bench.turn(1)
    assert bench.loop.phase is Phase.ENDED and bench.peer.kinds() == ["BYE"]
    assert bench.control.told[-1] == "guest_shutdown"


@pytest.mark.parametrize("why", ["QEMU's monitor gave no answer within 5 s", "a processor's thread is gone"])
def test_a_qemu_that_lives_is_never_told_as_dead(bench: Bench, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine ends, and its agent asks for the guest that is still there."""
    running(bench)

    def fail() -> list[dict[str, object]]:
        raise GuestGone(why)

    monkeypatch.setattr(bench.qemu, "receive", fail)
    bench.qemu.ring()
    with pytest.raises(GuestGone, match=why):
        bench.engine.run()
    assert "GUEST_GONE" not in bench.peer.kinds() and bench.note.text == "held"


def test_output_that_a_silent_qemu_still_holds_is_not_forgotten(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may speak again, and is not heard: its agent has to know, now or after its own restart."""
    running(bench)

    def fail() -> None:
        raise GuestGone("QEMU's monitor gave no answer within 5 s")

    monkeypatch.setattr(bench.buffers, "remove", fail)
    bench.control.give("stop", reason="enough")
    with pytest.raises(QemuError, match="no answer within 5 s"):
        bench.engine.run()
    assert bench.note.text == "held"


def test_a_lost_backup_lets_the_guest_write_before_the_arbiter_answers(bench: Bench) -> None:
    running(bench)
    bench.peer.close()
    bench.turn()
    if bench.loop.phase is Phase.STOPPING:
        assert not bench.mirror.closed
        bench.stop_guest()
        bench.begin_state()
        bench.end_save()
    assert bench.loop.phase is Phase.HOLDING and bench.mirror.closed and bench.buffers.installed


def test_the_watchdog_is_armed_as_long_as_the_guest_may_wait_for_us(bench: Bench) -> None:
    running(bench)
    bench.loop.on_paused(True)
    bench.turn()
    assert bench.watchdog.armed
    bench.mirror.lose("gone")
    bench.turn(4)
    assert bench.loop.phase is Phase.HOLDING and bench.watchdog.armed, "its output has to be taken"
    bench.control.grant(True)
    assert bench.engine.run() is Phase.ALONE and not bench.watchdog.armed


def test_a_checkpoint_that_qemu_does_not_end_is_given_up(bench: Bench) -> None:
    running(bench)
    to_batch(bench)
    bench.clock.now += 29.0
    bench.turn(1)
    assert bench.watchdog.armed and bench.loop.phase is Phase.STOPPING
    bench.clock.now += 2.0
    with pytest.raises(QemuError, match="not done within 30 s"):
        bench.engine.run()
    assert bench.mirror.closed


def test_the_watchdog_is_armed_before_the_first_mirror(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    armed: list[bool] = []
    monkeypatch.setattr(bench.mirror, "start", lambda _: armed.append(bench.watchdog.armed))
    bench.control.give("fence", reason="over")
    bench.engine.run()
    assert armed == [True] and not bench.watchdog.armed


def test_every_end_lets_the_mirrors_go(bench: Bench) -> None:
    bench.copy()
    bench.control.give("fence", reason="over")
    assert bench.engine.run() is Phase.FENCED
    assert bench.mirror.closed and bench.mirror.shallow == {1}
