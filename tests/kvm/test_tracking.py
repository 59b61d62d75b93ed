"""Dirty tracking of a guest that runs natively under KVM: nothing missed, and its mappings left to it."""

import contextlib
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from nova_ftvm.host.memory import RangedMemory, TrackedMemory
from tests.host.machine import Qemu
from tests.kvm import native
from tests.kvm.checkpoints import Checkpoints, load
from tests.kvm.machine import huge_mib, small_pages
from tests.kvm.native import Native, Processor

Launch = Callable[..., Qemu]

MIB = 16
#: What shows whose page a fault was: the guest reads all of its working set between two checkpoints.
EPOCH_S = 0.01

def start(launch: Launch, vcpus: int = 1) -> tuple[Qemu, Native]:
    qemu = launch("p", native.rom(MIB, vcpus), memory_mib=native.memory_mib(MIB, vcpus), vcpus=vcpus)
    guest = Native(qemu, vcpus)
    guest.await_start()
    return qemu, guest


@contextlib.contextmanager
def protected(qemu: Qemu, memory: type[TrackedMemory] = RangedMemory) -> Iterator[Checkpoints]:
    with contextlib.closing(Checkpoints(qemu, memory)) as checkpoints:
        yield checkpoints


@pytest.mark.parametrize(("memory", "vcpus", "huge"), [
    (RangedMemory, 1, True), (RangedMemory, 2, True), (RangedMemory, 2, False), (TrackedMemory, 2, True)],
    ids=["ranged-1-huge", "ranged-2-huge", "ranged-2-small", "whole-2-huge"])
def test_no_page_is_missed_in_hundreds_of_checkpoints(launch: Launch, memory: type[TrackedMemory], vcpus: int,
                                                      huge: bool) -> None:
    with contextlib.nullcontext() if huge else small_pages():
        qemu, guest = start(launch, vcpus)
    assert (huge_mib(qemu) >= MIB) is huge
    random = np.random.default_rng(1)
    pages = 0
    with protected(qemu, memory) as checkpoints:
        for _ in range(10):
            for _ in range(50):
                guest.ask_for(2 * int(random.integers(1, 200)), repeated=bool(random.integers(2)))
                time.sleep(random.integers(3) / 1000)
                pages += checkpoints.take().pages
            assert checkpoints.missed() == {}
    assert guest.differed() == 0
    assert pages > 10_000


def test_faults_are_for_the_written_pages_and_no_others(launch: Launch) -> None:
    """The guest reads all pages again and again, so each that KVM forgot would be a fault: two for a page that was
    written, as it is mapped for reading first."""
    qemu, guest = start(launch)
    processor = Processor(qemu)
    with protected(qemu) as checkpoints:
        checkpoints.run(1.0, EPOCH_S, lambda: guest.ask_for(100))
        faults, written = processor.faults(), guest.written()
        taken = checkpoints.run(2.0, EPOCH_S, lambda: guest.ask_for(100))
        faults, written = processor.faults() - faults, guest.written() - written
    assert written > 40 * len(taken)
    assert faults <= 2.2 * written


def test_a_scan_that_protects_everything_would_be_seen(launch: Launch) -> None:
    qemu, guest = start(launch)
    processor = Processor(qemu)
    with protected(qemu, TrackedMemory) as checkpoints:
        checkpoints.run(1.0, EPOCH_S, lambda: guest.ask_for(100))
        faults, written = processor.faults(), guest.written()
        checkpoints.run(2.0, EPOCH_S, lambda: guest.ask_for(100))
        faults, written = processor.faults() - faults, guest.written() - written
    assert faults > 4 * written


def test_pages_that_are_written_in_every_epoch_cost_no_fault(launch: Launch) -> None:
    qemu, guest = start(launch)
    processor = Processor(qemu)
    with protected(qemu) as checkpoints:
        checkpoints.run(1.0, EPOCH_S, lambda: guest.ask_for(100, repeated=True))
        faults, written = processor.faults(), guest.written()
        taken = checkpoints.run(2.0, EPOCH_S, lambda: guest.ask_for(100, repeated=True))
        faults, written = processor.faults() - faults, guest.written() - written
        assert checkpoints.missed() == {}
    assert written > 90 * len(taken)
    assert faults < 0.05 * written


def test_a_guest_that_writes_nothing_has_no_faults(launch: Launch) -> None:
    qemu, _ = start(launch)
    processor = Processor(qemu)
    with protected(qemu) as checkpoints:
        checkpoints.run(1.0, EPOCH_S)
        faults = processor.faults()
        taken = checkpoints.run(1.0, EPOCH_S)
        # Its own pass counter is one page, which is hot.
        assert processor.faults() - faults <= len(taken) // 10


def test_a_promoted_guest_goes_on_with_the_memory_of_its_checkpoint(launch: Launch) -> None:
    qemu, guest = start(launch, 2)
    with protected(qemu) as checkpoints:
        checkpoints.run(1.0, EPOCH_S, lambda: guest.ask_for(200))
        guest.ask_for(200)
        state = checkpoints.take().state
    qemu.kill()
    standby = launch("b", native.rom(MIB, 2), memory_mib=native.memory_mib(MIB, 2), vcpus=2, standby=True)
    load(standby, checkpoints.blocks, checkpoints.copy, state)
    promoted = Native(standby, 2)
    passes, written = [promoted.passes(processor) for processor in range(2)], promoted.written()
    promoted.ask_for(4000)
    time.sleep(1.0)
    assert all(promoted.passes(processor) > before for processor, before in enumerate(passes))
    assert promoted.written() > written
    assert promoted.differed() == 0
