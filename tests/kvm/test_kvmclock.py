"""kvmclock, set forward in the pauses by the engines themselves, and by the same parts without engines.

The guest watches over all of its processors that no clock steps back. A window on a busy machine may be spoilt, so the
best of some counts for the share.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from nova_ftvm.core import kvmclock
from nova_ftvm.host import kvmclock as heaps
from nova_ftvm.host import procmem
from tests.host.machine import Qemu, wait_for
from tests.host.protection import Protection, protected
from tests.kvm import clocks
from tests.kvm.checkpoints import Checkpoints
from tests.kvm.clocks import EPOCH_S, Clocks
from tests.kvm.test_clocks import best_shares, stepped_back

Launch = Callable[..., Qemu]

WINDOW_S = 5.0
SHARE = 0.999
#: Looks and readings of an emulated guest, s.
READ_S = 0.005
POLICY = {"policy": "fixed", "epoch_ms": EPOCH_S * 1000}
FORWARDS, GIVEN_UP = b"kvmclock is set forward", b"kvmclock is not set forward"
#: The last checkpoint before a death may be so old, and a promotion's report so late.
SLACK_S = 0.05


class Guest:
    """A guest that watches its clocks, wherever it runs."""

    def __init__(self, launch: Launch, kind: str, vcpus: int) -> None:
        self.vcpus = vcpus
        self._launch = launch
        self._settings: dict[str, Any] = {"machine_type": clocks.machine_type(kind), "vcpus": vcpus,
                                          "cpu": clocks.cpu()}
        self.qemu = self.start("p")
        self.clocks = Clocks(self.qemu)
        self.clocks.await_start(vcpus)

    def start(self, name: str, standby: bool = False) -> Qemu:
        return self._launch(name, clocks.rom(self.vcpus), standby=standby, **self._settings)

    @contextmanager
    def protected(self, standby: str, **settings: Any) -> Iterator[Protection]:
        with protected(self.qemu, self.start(standby, standby=True), **POLICY, **settings) as pair:
            yield pair

    def promote(self, pair: Protection) -> None:
        """The guest dies, and goes on in its backup. Its clock must be late by no more than that took."""
        last = self.clocks.fresh()
        began = time.monotonic()
        self.qemu.kill()
        pair.backup.hear("ask_promotion")
        pair.backup.grant()
        pair.backup.hear("promoted")
        took_s = time.monotonic() - began + SLACK_S
        self.qemu = pair.standby_qemu
        self.clocks = Clocks(self.qemu)
        now = self.clocks.fresh()
        passed_s, counted_s = now.at_s - last.at_s, (now.kvmclock_ns - last.kvmclock_ns) / 1e9
        assert passed_s - took_s < counted_s <= passed_s + READ_S, (passed_s, counted_s, took_s)

    def share(self, go_on: Callable[[], object] = lambda: time.sleep(WINDOW_S)) -> float:
        return best_shares(self.clocks, go_on, lambda share: share["kvmclock"] >= SHARE)["kvmclock"]

    def never_stepped_back(self) -> None:
        assert stepped_back(self.clocks, self.vcpus) == [(0, 0)] * self.vcpus


def log(pair: Protection) -> bytes:
    return pair.primary.log.read_bytes()


def await_forwarding(pair: Protection, times: int = 1) -> None:
    wait_for("the engine sets kvmclock forward", lambda: log(pair).count(FORWARDS) >= times)


@pytest.mark.parametrize(("kind", "vcpus"), [("pc", 1), ("q35", 2)])
def test_kvmclock_keeps_real_time_before_and_after_a_promotion(launch: Launch, kind: str, vcpus: int) -> None:
    guest = Guest(launch, kind, vcpus)
    with guest.protected("b") as pair:
        await_forwarding(pair)
        before = guest.share()
        assert SHARE <= before < 2 - SHARE
        guest.never_stepped_back()
        assert GIVEN_UP not in log(pair)
        guest.promote(pair)
        guest.never_stepped_back()


def test_kvmclock_is_set_forward_again_in_the_next_generation(launch: Launch) -> None:
    guest = Guest(launch, "q35", 2)
    with guest.protected("b") as first:
        await_forwarding(first)
        time.sleep(0.5)
        guest.promote(first)
        first.end_engines()
        with guest.protected("c", generation=2) as second:
            await_forwarding(second)
            assert SHARE <= guest.share() < 2 - SHARE
            guest.never_stepped_back()
            guest.promote(second)
            guest.never_stepped_back()


def test_kvmclock_stands_in_pauses_where_it_is_not_to_be_set(launch: Launch) -> None:
    guest = Guest(launch, "pc", 1)
    with guest.protected("b", forward_kvmclock=False) as pair:
        first = guest.clocks.at_tick()
        time.sleep(2.0)
        assert clocks.shares(first, guest.clocks.at_tick())["kvmclock"] < 0.995
        assert FORWARDS not in log(pair) and GIVEN_UP not in log(pair)


@pytest.mark.parametrize("how", ["kill", "hang"])
@pytest.mark.parametrize("point", ["before-forward", "forwarded"])
def test_an_engine_that_fails_around_the_write_leaves_a_guest_whose_clock_goes_on(launch: Launch, point: str,
                                                                                  how: str) -> None:
    guest = Guest(launch, "q35", 2)
    with guest.protected("b", primary_fault=f"{point}:{how}:30") as pair:
        wait_for("the fault comes", pair.primary.has_tripped)
        wait_for("the engine is dead", pair.primary.ended)
        assert guest.qemu.is_running()
        guest.never_stepped_back()
        assert SHARE <= guest.share() < 1.01
    with guest.protected("c") as pair:
        await_forwarding(pair, 2)
        guest.never_stepped_back()


# Without engines


class Recorded(heaps.QemuHeap):
    """The heap, with what is written to it: (place, what was there, what was written)."""

    def watch(self, before_look: Callable[[int], None] = lambda number: None) -> None:
        self.writes: list[tuple[int, int, int]] = []
        self._before_look = before_look

    def look(self, number: int) -> bool:
        self._before_look(number)
        return super().look(number)

    def write(self, place: int, number: int) -> None:
        self.writes.append((place, self.read(place), number))
        super().write(place, number)


@contextmanager
def recorded(qemu: Qemu, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Checkpoints, Recorded]]:
    made: list[Recorded] = []

    def heap(*arguments: Any) -> Recorded:
        made.append(Recorded(*arguments))
        made[0].watch()
        return made[0]

    monkeypatch.setattr("tests.kvm.checkpoints.QemuHeap", heap)
    with contextlib.closing(Checkpoints(qemu, forward=True)) as checkpoints:
        yield checkpoints, made[0]


def test_a_step_is_no_more_than_what_the_pauses_took(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = Guest(launch, "q35", 2)
    with recorded(guest.qemu, monkeypatch) as (checkpoints, heap):
        # Since the write before: its own pause may have gone on after it.
        taken, written, stood_ms = 0, 0, 0.0
        while written < 60:
            time.sleep(EPOCH_S)
            pause = checkpoints.take()
            taken, stood_ms = taken + 1, stood_ms + pause.pause_ms
            if len(heap.writes) > written:
                written = len(heap.writes)
                _, before, after = heap.writes[-1]
                assert 0 < after - before < stood_ms * 1e6 + 300_000
                assert kvmclock.saved(pause.state) == [before]
                stood_ms = pause.pause_ms
            assert taken < 600, "few pauses are made up for"
    guest.never_stepped_back()


def test_guests_memory_that_has_the_number_is_never_written_to(launch: Launch,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    guest = Guest(launch, "pc", 1)
    with recorded(guest.qemu, monkeypatch) as (checkpoints, heap):
        ram = next(block for block in checkpoints.blocks if block.name == "pc.ram")
        word, planted = procmem.Word(guest.qemu.pid), ram.address + (16 << 20)
        heap.watch(lambda number: word.write(planted, number))
        while len(heap.writes) < 50:
            number = kvmclock.saved(checkpoints.take().state)[0]
            word.write(planted, number)
            time.sleep(EPOCH_S)
            assert word.read(planted) == number
        assert all(not block.address <= place < block.address + block.size
                   for place, _, _ in heap.writes for block in checkpoints.blocks)


def test_a_number_in_two_places_of_the_heap_is_not_written_over(launch: Launch,
                                                                monkeypatch: pytest.MonkeyPatch,
                                                                caplog: pytest.LogCaptureFixture) -> None:
    guest = Guest(launch, "pc", 1)
    with recorded(guest.qemu, monkeypatch) as (checkpoints, heap):
        # The end of the heap is malloc's, and nobody has it.
        word, planted = procmem.Word(guest.qemu.pid), heaps._heap(guest.qemu.pid)[1] - 8
        heap.watch(lambda number: word.write(planted, number))
        wait_for("it is given up", lambda: checkpoints.run(0.1, EPOCH_S) and "more than one place" in caplog.text)
        checkpoints.run(1.0, EPOCH_S)
        assert heap.writes == []
        assert word.read(planted) not in (0, kvmclock.saved(checkpoints.take().state)[0])
        assert kvmclock.Reason.SOME_PLACES in caplog.text
    guest.never_stepped_back()


def test_writes_that_do_not_reach_qemus_clock_end_it(launch: Launch, monkeypatch: pytest.MonkeyPatch,
                                                    caplog: pytest.LogCaptureFixture) -> None:
    guest = Guest(launch, "pc", 1)
    with recorded(guest.qemu, monkeypatch) as (checkpoints, heap):
        monkeypatch.setattr(heaps.QemuHeap, "write", lambda *arguments: None)
        wait_for("it is given up", lambda: checkpoints.run(0.1, EPOCH_S) and GIVEN_UP.decode() in caplog.text)
        assert 0 < len(heap.writes) < 50
        written = len(heap.writes)
        checkpoints.run(0.3, EPOCH_S)
        assert len(heap.writes) == written


def test_a_place_that_changes_later_is_not_written_to_any_more(launch: Launch, monkeypatch: pytest.MonkeyPatch,
                                                               caplog: pytest.LogCaptureFixture) -> None:
    """As if the heap had moved: the place that is read is another."""
    guest = Guest(launch, "pc", 1)
    with recorded(guest.qemu, monkeypatch) as (checkpoints, heap):
        wait_for("it is set forward", lambda: checkpoints.run(0.1, EPOCH_S) and len(heap.writes) > 5)
        end = heaps._heap(guest.qemu.pid)[1]
        checkpoints.kvmclock._what.place = end - 8
        written = len(heap.writes)
        checkpoints.run(0.5, EPOCH_S)
        assert len(heap.writes) == written
        assert kvmclock.Reason.DIFFERS in caplog.text
        assert procmem.Word(guest.qemu.pid).read(end - 8) == 0
    guest.never_stepped_back()
    assert SHARE <= guest.share() < 1.01
