"""core/virtualclock.py: the virtual clock in a device state, and what it lost beyond the counted pauses."""

import pytest

from nova_ftvm.core.virtualclock import MOST_EXCESS_S, ClockExcess, virtual_clock_ns
from nova_ftvm.engine.capture import Checkpoint, Conversation, GuestEvent
from tests.unit.engine_fakes import FakeGate, FakeQemu

HEAD = b"QEVM\0\0\0\x03"


def section(clock_ns: int, version: int = 2, number: int = 0, footer: int | None = None) -> bytes:
    """As QEMU writes it, other sections around it left out."""
    end = number if footer is None else footer
    return (b"\x04" + number.to_bytes(4) + b"\x05timer" + bytes(4) + version.to_bytes(4)
            + (-123456789).to_bytes(8, signed=True) + bytes(8) + clock_ns.to_bytes(8, signed=True)
            + b"\x7e" + end.to_bytes(4))


def state(clock_ns: int) -> bytes:
    return HEAD + section(clock_ns) + b"\x04\0\0\0\x01\x03cpu"


# Parsed


@pytest.mark.parametrize("clock_ns", [0, 1, 123_456_789_012, -5])
def test_the_virtual_clock_is_read_from_the_state(clock_ns: int) -> None:
    assert virtual_clock_ns(state(clock_ns)) == clock_ns
    assert virtual_clock_ns(bytearray(HEAD + b"\x05timer\0" + section(clock_ns, number=0x7E04))) == clock_ns


@pytest.mark.parametrize("damaged", [
    b"", HEAD, b"\x05timer\0", HEAD + section(7)[:-1], HEAD + section(7, version=1), HEAD + section(7, footer=1),
    HEAD + section(7)[1:], HEAD + section(7)[:-5] + b"\x05\x05timer" + section(7)[-5:], state(7) + section(8)])
def test_a_section_that_is_missing_damaged_or_there_twice_tells_no_clock(damaged: bytes) -> None:
    assert virtual_clock_ns(damaged) is None


# Counted


class World:
    """A guest whose clock stops `early_us` before STOP, and starts at RESUME."""

    def __init__(self) -> None:
        self.wall_us, self.clock_us = 1_000_000, 77_000
        self.excess = ClockExcess()

    def checkpoint(self, early_us: int, pause_us: int = 800, runs_us: int = 10_000) -> float:
        self.clock_us += runs_us
        stopped_us = self.wall_us + runs_us + early_us
        self.wall_us = stopped_us + pause_us
        return self.excess.on_checkpoint(stopped_us, self.wall_us, state(self.clock_us * 1000))


def test_the_excess_is_what_the_clock_lost_before_the_stop_was_told() -> None:
    world = World()
    assert world.checkpoint(500) == 0.0, "the first one has nothing to be compared with"
    assert [world.checkpoint(early_us) for early_us in (0, 200, 600, 12_000)] == pytest.approx(
        [0.0, 200e-6, 600e-6, 12e-3], abs=1e-9)


def test_many_checkpoints_sum_up_to_the_whole_loss() -> None:
    world = World()
    world.checkpoint(0)
    wall_us, clock_us = world.wall_us, world.clock_us
    told_s = sum(world.checkpoint(number % 700, pause_us=500 + number) + (500 + number) / 1e6 for number in range(1000))
    assert told_s == pytest.approx((world.wall_us - wall_us - (world.clock_us - clock_us)) / 1e6, abs=1e-6)


@pytest.mark.parametrize("step_us", [-3_600_000_000, -5000, round(MOST_EXCESS_S * 1e6) + 1, 3_600_000_000])
def test_a_host_clock_that_is_set_is_no_loss_and_spoils_one_checkpoint(step_us: int) -> None:
    world = World()
    world.checkpoint(0)
    world.wall_us += step_us
    assert world.checkpoint(400) == 0.0
    assert world.checkpoint(400) == pytest.approx(400e-6)


def test_what_others_stopped_is_not_ours() -> None:
    world = World()
    world.checkpoint(300)
    world.wall_us += 50_000
    world.excess.forget()
    assert world.checkpoint(300) == 0.0
    assert world.checkpoint(300) == pytest.approx(300e-6)


def test_without_a_clock_in_the_state_the_pauses_alone_count() -> None:
    world = World()
    world.checkpoint(300)
    assert world.excess.on_checkpoint(5_000_000, 5_000_800, b"no clock") == 0.0
    assert world.checkpoint(300) == 0.0
    assert world.checkpoint(300) == pytest.approx(300e-6)


# In the conversation with QEMU


class Talk:
    def __init__(self) -> None:
        self.qemu, self.gate = FakeQemu(), FakeGate()
        self.talk = Conversation(self.qemu, self.gate, lambda message: "")

    def checkpoint(self, stop_ms: float, resume_ms: float, clock_ms: float, error: str = "") -> Checkpoint:
        self.talk.prepare()
        self.talk.begin()
        self.qemu.event("STOP", stop_ms)
        self.gate.fill(state(round(clock_ms * 1e6)))
        self.qemu.event("RESUME", resume_ms)
        self.qemu.answer("save", error)
        assert list(self.talk.events())[-1] is (GuestEvent.SAVE_FAILED if error else GuestEvent.RESUMED)
        return self.talk.current


def test_a_checkpoint_knows_what_its_clock_lost_and_its_pause_is_as_it_was() -> None:
    talk = Talk()
    assert talk.checkpoint(10, 11, 10).excess_s == 0.0
    second = talk.checkpoint(21.5, 22.5, 20)
    assert second.excess_s == pytest.approx(0.5e-3) and second.pause_ms == 1.0


@pytest.mark.parametrize("other", ["STOP", "RESUME"])
def test_a_pause_by_an_operator_is_not_taken_for_ours(other: str) -> None:
    talk = Talk()
    talk.checkpoint(10, 11, 10)
    talk.qemu.event(other, 15)
    list(talk.talk.events())
    assert talk.checkpoint(61.5, 62.5, 20).excess_s == 0.0
    assert talk.checkpoint(73, 74, 30).excess_s == pytest.approx(0.5e-3)


def test_after_a_checkpoint_that_failed_nothing_is_compared() -> None:
    talk = Talk()
    talk.checkpoint(10, 11, 10)
    talk.checkpoint(21, 22, 20, error="no space")
    assert talk.checkpoint(33, 34, 30).excess_s == 0.0
