"""The guest's huge pages: a write to a protected one takes it apart; once it is cold it is made whole again, and no
write that falls into that moment is lost."""

import contextlib
import time
from collections.abc import Callable

import numpy as np
import pytest

from nova_ftvm.core.coldregions import COLD_S, REFUSED_S, REGION
from nova_ftvm.host import hugepages
from nova_ftvm.host.hugepages import Collapse
from nova_ftvm.host.memory import RangedMemory
from tests.host.machine import Qemu, wait_for
from tests.kvm import native
from tests.kvm.checkpoints import Checkpoints
from tests.kvm.machine import huge_mib
from tests.kvm.native import Native, Processor

Launch = Callable[..., Qemu]

MIB = 32
REGIONS = (MIB << 20) // REGION


@pytest.fixture
def guest(launch: Launch) -> Native:
    made = Native(launch("p", native.rom(MIB), memory_mib=native.memory_mib(MIB)))
    made.await_start()
    assert huge_mib(made.qemu) >= MIB
    return made


def tend_all(checkpoints: Checkpoints) -> None:
    """As if all that was written so far were cold, and there were time for all of it, and for what is busy at first."""
    for round_number in range(4 * REGIONS):
        checkpoints.memory.tend(time.monotonic() + COLD_S + 1 + round_number)


def test_huge_pages_that_a_write_took_apart_are_whole_again_once_they_are_cold(guest: Native) -> None:
    with contextlib.closing(Checkpoints(guest.qemu)) as checkpoints:
        guest.ask_for(20 * REGIONS)
        checkpoints.run(0.5, 0.02)
        assert huge_mib(guest.qemu) < MIB / 4
        checkpoints.memory.tend(time.monotonic())
        assert huge_mib(guest.qemu) < MIB / 4, "what was just written is not cold"
        tend_all(checkpoints)
        assert huge_mib(guest.qemu) >= MIB
        # Still protected, each as one: a fault maps each anew, or each page of one that was busy at the last try.
        processor = Processor(guest.qemu)
        faults = processor.faults()
        checkpoints.run(0.5, 0.02)
        assert processor.faults() - faults < 100 * REGIONS
        assert checkpoints.missed() == {}


class WritesInBetween(RangedMemory):
    """The guest writes while nothing tells of it: between the end of the protection and its return."""

    guest: Native
    in_between = 0

    def _rebuild(self, block: int, first: int) -> Collapse:
        written = self.guest.written()
        lift = self._protection.lift

        def lift_and_write(start: int, end: int) -> None:
            lift(start, end)
            self.guest.ask_for(40 * REGIONS)
            wait_for("the guest has written", lambda: self.guest.written() >= written + 40 * REGIONS, pause_s=0.001)
            self.in_between += 1

        self._protection.lift = lift_and_write
        try:
            return super()._rebuild(block, first)
        finally:
            self._protection.lift = lift


class ForgetsInBetween(WritesInBetween):
    """Mutation: the region is not part of the next epoch."""

    def _rebuild(self, block: int, first: int) -> Collapse:
        rebuilt = super()._rebuild(block, first)
        self._rebuilt.clear()
        return rebuilt


def rebuild_one(guest: Native, memory: type[WritesInBetween]) -> dict[str, list[int]]:
    memory.guest = guest
    with contextlib.closing(Checkpoints(guest.qemu, memory)) as checkpoints:
        guest.ask_for(20 * REGIONS)
        checkpoints.run(0.3, 0.02)
        checkpoints.memory.tend(time.monotonic() + COLD_S + 1)
        assert checkpoints.memory.in_between == 1
        return checkpoints.missed()


def test_what_is_written_while_a_region_is_rebuilt_is_part_of_the_next_epoch(guest: Native) -> None:
    assert rebuild_one(guest, WritesInBetween) == {}
    assert guest.differed() == 0


def test_a_rebuild_that_forgot_those_writes_would_be_seen(guest: Native) -> None:
    assert rebuild_one(guest, ForgetsInBetween) != {}


def test_no_page_is_missed_while_regions_are_rebuilt_all_the_time(guest: Native,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nova_ftvm.core.coldregions.COLD_S", 0.0)
    random = np.random.default_rng(3)
    with contextlib.closing(Checkpoints(guest.qemu)) as checkpoints:
        for _ in range(6):
            for number in range(40):
                guest.ask_for(2 * int(random.integers(1, 30)), repeated=bool(random.integers(2)))
                checkpoints.take()
                checkpoints.memory.tend(time.monotonic() + number)
            assert checkpoints.missed() == {}
    assert guest.differed() == 0


def test_a_kernel_that_gives_no_huge_page_is_not_asked_again_for_a_while(guest: Native,
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def collapse(pidfd: int, start: int, length: int) -> Collapse:
        asked.append(start)
        return Collapse.NO_MEMORY

    monkeypatch.setattr(hugepages, "collapse", collapse)
    with contextlib.closing(Checkpoints(guest.qemu)) as checkpoints:
        guest.ask_for(20 * REGIONS)
        checkpoints.run(0.3, 0.02)
        now = time.monotonic() + COLD_S + 1
        for second in range(int(REFUSED_S)):
            checkpoints.memory.tend(now + second)
        assert len(asked) == 1
        checkpoints.memory.tend(now + REFUSED_S)
        assert len(asked) == 2
        assert checkpoints.missed() == {}
