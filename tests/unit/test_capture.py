"""engine/capture.py: what QEMU says, in its order, and what it means."""

import pytest

from nova_ftvm.engine.capture import Checkpoint, Conversation, GuestEvent
from tests.unit.engine_fakes import FakeGate, FakeQemu


class Bench:
    def __init__(self) -> None:
        self.qemu, self.gate = FakeQemu(), FakeGate()
        self.talk = Conversation(self.qemu, self.gate,
                                 lambda message: "cancelled" if message["event"] == "BLOCK_JOB_CANCELLED" else "")
        self.talk.prepare()

    def events(self) -> list[GuestEvent]:
        return list(self.talk.events())


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_the_save_goes_through_a_narrow_gate(bench: Bench) -> None:
    bench.gate.wide = True
    assert not bench.qemu.sent
    bench.talk.begin()
    assert bench.qemu.sent == ["save"] and not bench.gate.wide


def test_a_checkpoint_is_stop_then_the_answer_after_resume(bench: Bench) -> None:
    bench.talk.begin()
    bench.qemu.event("STOP", 10)
    assert bench.events() == [GuestEvent.STOPPED]
    bench.gate.fill(b"first ")
    bench.talk.read_state()
    bench.gate.fill(b"last")
    bench.qemu.event("RESUME", 12.5)
    assert bench.events() == []
    bench.qemu.answer("save")
    assert bench.events() == [GuestEvent.RESUMED]
    assert bytes(bench.talk.current.state) == b"first last"
    assert bench.talk.current.pause_ms == 2.5 and bench.talk.current.failure == ""


def test_a_new_checkpoint_knows_nothing_of_the_last(bench: Bench) -> None:
    bench.talk.begin()
    bench.qemu.answer("save")
    bench.events()
    last = bench.talk.current
    last.state += b"x"
    bench.talk.begin()
    assert bench.talk.current is not last and bench.talk.current == Checkpoint()


def test_a_save_that_qemu_refuses_is_a_failure_and_not_a_pause_by_somebody(bench: Bench) -> None:
    bench.talk.begin()
    bench.qemu.answer("save", error="there is no space")
    assert bench.events() == [GuestEvent.SAVE_FAILED]
    assert "there is no space" in bench.talk.current.failure


def test_stops_and_starts_of_others_are_told_apart_from_ours(bench: Bench) -> None:
    bench.qemu.event("STOP")
    bench.qemu.event("RESUME")
    assert bench.events() == [GuestEvent.PAUSED, GuestEvent.UNPAUSED]


def test_a_save_of_a_guest_that_another_one_stopped_leaves_it_paused(bench: Bench) -> None:
    bench.talk.begin()
    bench.qemu.event("STOP", 10)
    bench.qemu.answer("save")
    assert bench.events() == [GuestEvent.STOPPED, GuestEvent.RESUMED, GuestEvent.PAUSED]
    assert bench.talk.current.pause_ms == 0.0


def test_a_guests_own_end_is_told(bench: Bench) -> None:
    bench.qemu.event("SHUTDOWN")
    assert bench.events() == [GuestEvent.SHUTDOWN]


def test_what_does_not_concern_checkpoints_is_no_event(bench: Bench) -> None:
    for name in ("NIC_RX_FILTER_CHANGED", "RTC_CHANGE", "BALLOON_CHANGE"):
        bench.qemu.event(name)
    bench.qemu.answer("somebody's")
    assert bench.events() == []
