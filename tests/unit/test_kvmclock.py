"""core/kvmclock.py and engine/clockforward.py: kvmclock is set forward by what a pause took, or left alone."""

import dataclasses
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from nova_ftvm.core import kvmclock
from nova_ftvm.core.kvmclock import MOST_PASSES, PROOFS, Forwarding, Phase, Reason
from nova_ftvm.core.losttime import Figures, GuestClock
from nova_ftvm.engine.capture import Checkpoint, Conversation
from nova_ftvm.engine.clockforward import ClockForward
from nova_ftvm.engine.stats import EpochLog, Stage
from nova_ftvm.exception import GuestGone
from nova_ftvm.host.kvmclock import QemuHeap
from nova_ftvm.types import RamBlock
from tests.unit.engine_fakes import Clock, FakeGate, FakeQemu

US, MS, S = 10**3, 10**6, 10**9
PLACE = 0x5000
#: What kvmclock is when the host's clock is 0.
AHEAD = 77 * S


def section(number: int, section_id: int = 4, reliable: bool = True) -> bytes:
    sub = b"\x05\x1akvmclock/clock_is_reliable" + struct.pack(">IB", 1, 1) if reliable else b""
    return (b"\x04" + struct.pack(">I", section_id) + b"\x08kvmclock" + struct.pack(">IIQ", 0, 1, number) + sub
            + b"\x7e" + struct.pack(">I", section_id))


def test_the_number_is_found_in_a_state_and_in_its_beginning() -> None:
    state = b"QEVM" + b"\x04" * 5000 + section(12345) + b"\x04\0\0\0\x05\x04more"
    assert kvmclock.saved(state) == [12345]
    assert kvmclock.saved(bytearray(state)) == [12345]
    assert kvmclock.saved(state[:-10]) == [12345]


def test_a_number_whose_bytes_look_like_lines_is_found() -> None:
    number = int.from_bytes(b"\n\x04\x0a\x7e\x00\n\xff\x04")
    assert kvmclock.saved(section(number, 0x0a0a0a0a)) == [number]


@pytest.mark.parametrize("state", [
    b"", b"\x08kvmclock\0", section(5)[:-1], section(5, reliable=False), section(5)[1:],
    section(5).replace(b"\x7e\0\0\0\x04", b"\x7e\0\0\0\x05"), section(5).replace(b"\0\0\0\x01", b"\0\0\0\x02")])
def test_what_is_no_whole_section_has_no_number(state: bytes) -> None:
    assert kvmclock.saved(state) == []


def test_a_second_section_is_seen() -> None:
    assert kvmclock.saved(section(5) + section(6)) == [5, 6]


class Guest:
    """A kvmclock that stands in pauses, its place in the heap, and a host's clock that the test moves."""

    def __init__(self, what: Forwarding) -> None:
        self.what = what
        self.now = 0
        self.number = AHEAD
        self.written: list[int] = []

    def run(self, ns: int) -> None:
        self.now += ns
        self.number += ns

    def pause_from_within(self, ns: int) -> int | None:
        """From the stop to the start."""
        self.saved = self.number
        self.now += ns
        wrote = self.what.on_saved(self.now, self.saved, self.saved)
        self.number = self.number if wrote is None else wrote
        return wrote

    def pause(self, ns: int, found: int | None = None, numbers: Sequence[int] | None = ()) -> int | None:
        """One checkpoint; what was written."""
        self.what.on_began(self.now)
        saved = self.number
        self.now += ns // 2
        wrote = self.what.on_saved(self.now, saved, saved if found is None else found)
        if wrote is not None:
            self.number = wrote
            self.written.append(wrote)
        self.now += ns - ns // 2
        self.what.on_running(self.now, [saved] if numbers == () else numbers)
        return wrote

    @property
    def late(self) -> int:
        """What the clock has lost."""
        return AHEAD + self.now - self.number


@pytest.fixture
def guest() -> Guest:
    """One whose place is proven, after its anchor."""
    made = Guest(Forwarding())
    made.what.on_pass([PLACE])
    for _ in range(PROOFS + 1):
        made.run(10 * MS)
        assert made.pause(MS) is None
    assert made.what.phase is Phase.FORWARDING
    return made


def test_nothing_is_written_before_the_place_followed_the_state_for_some_pauses() -> None:
    what = Forwarding()
    guest = Guest(what)
    assert guest.pause(MS) is None and what.phase is Phase.SEARCHING
    what.on_pass([PLACE])
    for _ in range(PROOFS):
        assert what.phase is Phase.PROVING
        guest.run(MS)
        guest.pause(MS)
    assert guest.written == [] and what.phase is Phase.FORWARDING


def test_a_clock_that_is_set_forward_loses_no_more_than_half_of_the_last_pause(guest: Guest) -> None:
    lost = guest.late
    for _ in range(500):
        guest.run(10 * MS)
        before = guest.number
        wrote = guest.pause(MS)
        assert wrote is not None and before < wrote
        assert guest.late <= lost
    assert guest.late == lost, "all but what was lost before is made up for"


def test_a_clock_is_never_ahead_of_the_time_since_the_anchor(guest: Guest) -> None:
    anchored_late = guest.late
    for pause in (MS, 30 * MS, 5 * US, 200 * MS):
        guest.run(3 * MS)
        guest.pause(pause)
        # At its start the guest has what the second half of this pause took still before it.
        assert guest.late >= anchored_late - MS // 2


def test_a_step_is_no_more_than_what_was_lost_since_the_last_one(guest: Guest) -> None:
    guest.run(10 * MS)
    guest.pause(MS)
    guest.run(10 * MS)
    before = guest.number
    wrote = guest.pause(4 * MS)
    assert wrote is not None and wrote - before == MS // 2 + 2 * MS


def refused(guest: Guest, reason: Reason) -> None:
    """For good, and nothing was written."""
    assert guest.what.reason is reason and guest.what.phase is Phase.STOPPED
    written = list(guest.written)
    for _ in range(10):
        guest.run(10 * MS)
        assert guest.pause(MS) is None
    assert guest.written == written and guest.what.reason is reason


def test_a_place_with_another_number_than_the_state_is_not_written_to(guest: Guest) -> None:
    guest.run(10 * MS)
    assert guest.pause(MS, found=guest.number + 1) is None
    refused(guest, Reason.DIFFERS)


def test_a_place_that_does_not_follow_the_state_is_not_written_to() -> None:
    guest = Guest(Forwarding())
    guest.what.on_pass([PLACE])
    guest.pause(MS)
    assert guest.pause(MS, found=5) is None
    refused(guest, Reason.DIFFERS)


def test_a_clock_that_does_not_go_on_from_what_was_written_is_left_alone(guest: Guest) -> None:
    guest.run(10 * MS)
    wrote = guest.pause(MS)
    assert wrote is not None
    guest.number = wrote - 1
    assert guest.pause(MS) is None
    refused(guest, Reason.NO_EFFECT)


@pytest.mark.parametrize("latency", [0, 300 * US, 3 * MS])
def test_writes_that_change_nothing_end_it(guest: Guest, latency: int) -> None:
    """latency: from what QEMU does to when the engine sees it."""
    pauses = 0
    while not guest.what.reason and pauses < 200:
        pauses += 1
        guest.run(10 * MS)
        guest.what.on_began(guest.now)
        guest.run(latency)
        standing, guest.now = guest.number, guest.now + MS
        guest.what.on_saved(guest.now, standing, standing)
        guest.now += MS
        guest.run(latency)
        guest.what.on_running(guest.now, [standing])
    assert guest.what.reason in (Reason.NO_EFFECT, Reason.TOO_FAR)
    assert pauses <= (3 if latency < MS else 60)


def brief(guest: Guest, saved: int | None = None) -> None:
    """A pause of 1 ms in which nothing is done, and a run after it."""
    guest.what.on_began(guest.now)
    standing, guest.now = guest.number, guest.now + MS
    guest.what.on_running(guest.now, [standing if saved is None else saved])
    guest.run(10 * MS)


def test_a_clock_is_set_forward_only_once_it_lost_enough(guest: Guest) -> None:
    guest.run(10 * MS)
    assert guest.pause(MS) is not None
    guest.run(10 * MS)
    due = []
    for _ in range(10):
        due.append(guest.what.is_due())
        if due[-1]:
            assert guest.pause(MS) is not None
            guest.run(10 * MS)
        else:
            brief(guest)
    assert due.count(True) in (2, 3) and guest.what.reason is None
    assert guest.late < 8 * MS


def test_a_write_without_effect_is_seen_in_a_pause_in_which_nothing_is_due(guest: Guest) -> None:
    guest.run(10 * MS)
    standing = guest.number
    assert guest.pause(MS) is not None
    guest.number = standing
    guest.run(10 * MS)
    assert not guest.what.is_due()
    brief(guest)
    refused(guest, Reason.NO_EFFECT)


def test_writes_with_an_effect_do_not_end_it_whatever_the_latency(guest: Guest) -> None:
    for _ in range(200):
        guest.run(10 * MS)
        guest.what.on_began(guest.now)
        guest.run(3 * MS)
        wrote = guest.pause_from_within(MS)
        guest.run(3 * MS)
        guest.what.on_running(guest.now, [guest.saved])
        assert wrote is not None and guest.what.reason is None


def test_a_clock_that_is_ahead_is_left_alone(guest: Guest) -> None:
    guest.run(10 * MS)
    guest.number += 5 * MS
    assert guest.pause(MS) is None
    refused(guest, Reason.AHEAD)


def test_a_clock_a_little_ahead_is_not_set_back(guest: Guest) -> None:
    guest.run(10 * MS)
    guest.pause(MS)
    guest.number = guest.what._anchor + guest.now + 20 * US  # type: ignore[operator]
    assert guest.pause(10 * US) is None
    assert guest.what.phase is Phase.FORWARDING


def test_time_that_somebody_elses_pause_took_stays_lost(guest: Guest) -> None:
    guest.run(10 * MS)
    guest.now += 3 * S
    guest.what.on_foreign_pause()
    before = guest.late
    assert guest.pause(MS) is None
    guest.run(10 * MS)
    assert guest.pause(MS) is not None
    assert guest.late >= before


def test_time_that_nobody_knows_of_stays_lost(guest: Guest) -> None:
    guest.run(10 * MS)
    guest.now += 3 * S
    before = guest.late
    assert guest.pause(MS) is None
    guest.run(10 * MS)
    assert guest.pause(MS) is not None
    assert guest.late >= before
    assert guest.what.phase is Phase.FORWARDING


def test_a_clock_that_always_loses_more_than_the_pauses_is_left_alone(guest: Guest) -> None:
    written = len(guest.written)
    for _ in range(20):
        guest.run(10 * MS)
        guest.now += 2 * MS
        guest.pause(MS)
    assert len(guest.written) == written
    refused(guest, Reason.TOO_FAR)


def test_a_pause_in_which_the_number_came_too_late_is_made_up_for_in_the_next(guest: Guest) -> None:
    guest.run(10 * MS)
    guest.pause(MS)
    lost = guest.late
    guest.run(10 * MS)
    guest.what.on_began(guest.now)
    guest.now += 7 * MS
    guest.what.on_late()
    guest.what.on_running(guest.now, [guest.number])
    guest.run(10 * MS)
    assert guest.pause(MS) is not None
    assert guest.late == lost


def test_numbers_that_come_too_late_on_a_busy_host_do_not_end_it(guest: Guest) -> None:
    for pause in range(500):
        guest.run(10 * MS)
        if pause % 5:
            guest.pause(MS)
        else:
            guest.what.on_began(guest.now)
            guest.now += 5 * MS
            guest.what.on_late()
            guest.what.on_running(guest.now, [guest.number])
    assert guest.what.phase is Phase.FORWARDING


def test_numbers_that_always_come_too_late_end_it(guest: Guest) -> None:
    for _ in range(30):
        assert guest.what.reason is None
        guest.what.on_began(guest.now)
        guest.what.on_late()
    refused(guest, Reason.LATE)


@pytest.mark.parametrize(("numbers", "reason"), [
    ([], Reason.NOT_SAVED), ([1, 2], Reason.SAVED_TWICE), ([1], Reason.CHANGED)])
def test_a_whole_state_that_says_something_else_ends_it(guest: Guest, numbers: list[int], reason: Reason) -> None:
    guest.run(10 * MS)
    guest.pause(MS, numbers=numbers)
    refused(guest, reason)


def test_a_checkpoint_that_failed_counts_as_a_pause_all_the_same(guest: Guest) -> None:
    guest.run(10 * MS)
    guest.pause(MS)
    lost = guest.late
    guest.pause(2 * MS, numbers=None)
    assert guest.what.number is None
    guest.run(MS)
    guest.pause(MS)
    assert guest.late == lost


@pytest.mark.parametrize(("places", "reason"), [
    ([], Reason.NO_PLACE), ([PLACE, 2 * PLACE], Reason.SOME_PLACES)])
def test_without_exactly_one_place_nothing_is_written(places: list[int], reason: Reason) -> None:
    guest = Guest(Forwarding())
    for _ in range(MOST_PASSES):
        assert guest.what.reason is None
        guest.pause(MS)
        guest.what.on_pass(places)
    refused(guest, reason)


def test_a_place_that_is_not_aligned_is_not_written_to() -> None:
    guest = Guest(Forwarding())
    guest.what.on_pass([PLACE + 4])
    refused(guest, Reason.NOT_ALIGNED)


def test_a_second_pass_may_find_what_the_first_did_not() -> None:
    what = Forwarding()
    what.on_pass([])
    what.on_pass([PLACE])
    assert what.phase is Phase.PROVING and what.place == PLACE


# In the engine


class FakeHeap:
    """ports.ClockPlaces, in a dict."""

    def __init__(self) -> None:
        self.words: dict[int, int] = {}
        self.places: list[int] = []
        self.refusal: Reason | None = None
        self.trouble: Exception | None = None
        self.writes: list[tuple[int, int]] = []
        self._parts = 0

    def begin(self) -> Reason | None:
        self.places, self._parts = [], 3
        return self.refusal

    def look(self, number: int) -> bool:
        self._parts -= 1
        if self._parts == 0:
            self.places = [place for place, value in self.words.items() if value == number]
        return self._parts > 0

    def read(self, place: int) -> int:
        if self.trouble:
            raise self.trouble
        return self.words[place]

    def write(self, place: int, number: int) -> None:
        self.writes.append((place, number))
        self.words[place] = number


@dataclasses.dataclass
class Time:
    ns: int = 5 * S

    def __call__(self) -> int:
        return self.ns


class Pauses:
    """An engine's checkpoints, as far as kvmclock goes."""

    def __init__(self) -> None:
        self.heap, self.qemu, self.gate, self.time = FakeHeap(), FakeQemu(), FakeGate(), Time()
        self.talk = Conversation(self.qemu, self.gate, lambda message: "")
        self.goes_on: list[bool] = []
        self.forward = ClockForward(self.heap, self.talk, self.gate, self.goes_on.append, self.time)
        self.heap.words[PLACE] = AHEAD

    def checkpoint(self, before: bytes = b"QEVM", state: Callable[[int], bytes] = section) -> None:
        self.heap.words[PLACE] += 10 * MS
        self.time.ns += 10 * MS
        self.forward.begin()
        self.talk.current.state.clear()
        self.gate.fill(before)
        self.gate.fill(state(self.heap.words[PLACE]))
        self.time.ns += MS
        self.forward.forward()
        self.talk.read_state()
        self.time.ns += MS
        self.forward.running(saved=True)
        self.forward.search()


@pytest.fixture
def pauses() -> Iterator[Pauses]:
    made = Pauses()
    yield made
    for end in (made.gate._in, made.gate._out):
        os.close(end)


def test_a_guests_clock_goes_on_once_its_place_is_found(pauses: Pauses) -> None:
    for _ in range(20):
        pauses.checkpoint()
    assert pauses.goes_on == [True]
    # A pause takes 2 ms: the loss of two is worth the work.
    assert len(pauses.heap.writes) > 5
    assert {place for place, _ in pauses.heap.writes} == {PLACE}
    # But for the last pause's second half the clock is on the anchor's line.
    (_, first), (_, last) = pauses.heap.writes[0], pauses.heap.writes[-1]
    assert last - first == (len(pauses.heap.writes) - 1) * 2 * 12 * MS


def test_the_state_is_whole_though_its_beginning_was_taken_in_the_pause(pauses: Pauses) -> None:
    for _ in range(20):
        pauses.checkpoint(b"QEVM" + bytes(9000))
    assert bytes(pauses.talk.current.state).startswith(b"QEVM" + bytes(9000) + b"\x04")


@pytest.mark.parametrize("state", [lambda number: section(number + 1), lambda number: b"no such device"])
def test_a_state_that_says_something_else_later_ends_it(pauses: Pauses, state: Callable[[int], bytes]) -> None:
    for _ in range(12):
        pauses.checkpoint()
    written = len(pauses.heap.writes)
    assert written
    for _ in range(3):
        pauses.checkpoint(state=state)
    assert pauses.goes_on == [True, False]
    assert len(pauses.heap.writes) == written


def test_two_places_are_none(pauses: Pauses) -> None:
    for _ in range(20):
        pauses.heap.words[2 * PLACE] = pauses.heap.words[PLACE] + 10 * MS
        pauses.checkpoint()
    assert pauses.goes_on == [False] and not pauses.heap.writes


def test_a_heap_that_is_refused_is_not_looked_through(pauses: Pauses) -> None:
    pauses.heap.refusal = Reason.TOO_LARGE
    for _ in range(10):
        pauses.checkpoint()
    assert pauses.goes_on == [False] and not pauses.heap.writes


def test_a_heap_that_cannot_be_read_any_more_ends_it_and_nothing_else(pauses: Pauses) -> None:
    for _ in range(12):
        pauses.checkpoint()
    written = len(pauses.heap.writes)
    pauses.heap.trouble = PermissionError()
    pauses.checkpoint()
    pauses.heap.trouble = None
    pauses.checkpoint()
    assert pauses.goes_on == [True, False] and len(pauses.heap.writes) == written


def test_a_qemu_that_ended_in_the_pause_is_told_to_the_engine(pauses: Pauses) -> None:
    for _ in range(12):
        pauses.checkpoint()
    pauses.heap.trouble = GuestGone("QEMU ended")
    with pytest.raises(GuestGone):
        pauses.checkpoint()


# QEMU's heap, this process in its place


def test_the_heap_is_left_alone_if_guests_ram_is_in_it() -> None:
    heap = QemuHeap(os.getpid(), [RamBlock("pc.ram", 1 << 62, 0x1000)])
    assert heap.begin() is Reason.NO_PLACE
    assert heap.look(0) is False and heap.places == []


def test_a_process_that_is_gone_has_no_heap_to_look_through() -> None:
    assert QemuHeap((1 << 22) + 1, []).begin() is Reason.UNREADABLE


# What a pair's figures say


def test_figures_say_that_the_clock_goes_on_while_kvmclock_is_set_forward(tmp_path: Path) -> None:
    told: list[Figures] = []
    clock = Clock()
    stats = EpochLog(str(tmp_path / "epochs.jsonl"), clock, GuestClock.STANDS, told.append)

    def clock_told() -> str:
        stats.began()
        stats.mark(Stage.REST)
        stats.shipped(Checkpoint(), 0)
        clock.now += 2.0
        stats.committed()
        return told[-1].clock

    assert clock_told() == GuestClock.STANDS
    stats.on_kvmclock(True)
    assert clock_told() == GuestClock.GOES_ON
    stats.on_kvmclock(False)
    assert clock_told() == GuestClock.STANDS
    stats.close()
