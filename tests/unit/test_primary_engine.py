"""engine/primary.py: carries out what the loop decides, in its order, whatever QEMU, the peer and the agent do."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from nova_ftvm.core import wire
from nova_ftvm.core.epoch import EpochLoop, Pace, Phase
from nova_ftvm.core.replica import Replica, Write
from nova_ftvm.engine.capture import Conversation
from nova_ftvm.engine.link import Link
from nova_ftvm.engine.primary import PrimaryEngine
from nova_ftvm.engine.stats import EpochLog
from tests.unit.engine_fakes import (
    Bell,
    Clock,
    FakeBuffers,
    FakeControl,
    FakeGate,
    FakeMemory,
    FakeQemu,
    FakeWatchdog,
    Peer,
    tcp_pair,
)
from tests.unit.frames import GENERATION, LIMIT

STATE = b"the devices' state"
#: Turns wait for events no longer than this.
PACE = Pace(epoch_s=0.001, ack_limit_s=0.5, beat_s=0.001, live_passes=3, live_rest_pages=100)


class Bench:
    """An engine with its fakes, turned by hand."""

    def __init__(self, folder: Path) -> None:
        ours, theirs = tcp_pair()
        self.clock, self.qemu, self.gate, self.memory = Clock(), FakeQemu(), FakeGate(), FakeMemory()
        self.peer, self.control, self.watchdog, self.pidfd = Peer(theirs), FakeControl(), FakeWatchdog(), Bell()
        self.buffers = FakeBuffers(self.qemu.sent)
        self.loop = EpochLoop(PACE, self.clock.now)
        self.engine = PrimaryEngine(
            generation=GENERATION, loop=self.loop, memory=self.memory, monitor=self.qemu, gate=self.gate,
            talk=Conversation(self.qemu, self.gate, self.buffers, b'{"id":"save"}\n'), buffers=self.buffers,
            link=Link(ours, GENERATION, LIMIT), control=self.control, pidfd=self.pidfd.fileno(),
            watchdog=self.watchdog, stats=EpochLog(str(folder / "epochs.jsonl"), self.clock), frame_limit=LIMIT,
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
        self.qemu.event("STOP", 1)
        self.turn()

    def begin_state(self) -> None:
        self.gate.fill(STATE)
        self.turn()

    def end_save(self, error: str = "") -> None:
        self.qemu.answer("barrier")
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


def test_the_first_copy_goes_out_before_anything_is_held(bench: Bench) -> None:
    bench.copy()
    assert set(bench.peer.kinds()) == {"PRELOAD"}
    assert bench.qemu.sent == ["install", "barrier", "save"]
    assert bench.watchdog.armed


def test_an_epoch_goes_out_whole_and_in_order_and_its_output_waits(bench: Bench) -> None:
    bench.copy()
    bench.peer.read()
    bench.memory.put(0, 5, 50)
    bench.stop_guest()
    assert bench.peer.kinds() == [] and not bench.gate.wide
    bench.memory.put(0, 6, 60)
    bench.begin_state()
    assert bench.gate.wide and bench.gate.drained == STATE and bench.peer.kinds() == []
    bench.end_save()
    assert not bench.watchdog.armed
    frames = bench.peer.read()
    assert [frame.kind.name for frame in frames] == ["PAGES", "PAGES", "DEVICE", "COMMIT"]
    replica = Replica(bench.memory.blocks)
    actions = [action for frame in frames for action in replica.on_frame(frame)]
    assert isinstance(actions[0], Write) and [p.runs.tolist() for p in actions[0].pages] == [[[5, 1]], [[6, 1]]]
    assert replica.device_state == STATE
    assert "release" not in bench.qemu.sent and bench.control.told == []
    bench.acknowledge(1)
    assert bench.qemu.sent.count("release") == 1 and bench.control.told == ["protected"]


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
    assert not bench.watchdog.armed and bench.loop.phase is Phase.HOLDING
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
    assert bench.loop.phase is Phase.HOLDING and not bench.watchdog.armed
    assert "no space left" in bench.control.reports[-1]["reason"]
    assert bench.qemu.sent.count("release") == released


@pytest.mark.parametrize("what", ["barrier", "release"])
def test_a_buffer_that_does_not_obey_ends_the_trust_in_it(bench: Bench, what: str) -> None:
    bench.checkpoint()
    while bench.loop.phase is Phase.RUNNING:
        bench.clock.now += 0.01
        bench.turn(1)
    bench.qemu.answer(what, error="no such filter")
    bench.stop_guest()
    bench.begin_state()
    bench.end_save()
    assert bench.loop.phase is Phase.HOLDING and "no such filter" in bench.loop.reason


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


def test_an_order_that_is_unknown_changes_nothing(bench: Bench) -> None:
    bench.copy()
    phase, sent = bench.loop.phase, list(bench.qemu.sent)
    bench.control.give("seen")
    bench.turn()
    assert (bench.loop.phase, bench.qemu.sent) == (phase, sent)


@pytest.mark.parametrize("how", ["pidfd", "monitor"])
def test_a_qemu_that_dies_is_told_to_the_backup(bench: Bench, how: str) -> None:
    bench.checkpoint()
    bench.peer.read()
    bench.qemu.gone = True
    (bench.pidfd if how == "pidfd" else bench.qemu).ring()
    bench.turn()
    assert bench.loop.phase is Phase.ENDED and bench.peer.kinds()[-1] == "GUEST_GONE"


def test_a_qemu_and_a_link_that_die_together_end_the_engine_in_peace(bench: Bench) -> None:
    bench.checkpoint()
    bench.qemu.gone = True
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
