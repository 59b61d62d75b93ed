"""Both engines, as processes, on a guest that runs natively under KVM: protected, promoted, an engine that dies."""

import time
from collections.abc import Callable

import pytest

from tests.host.machine import Engine, Qemu, wait_for
from tests.host.protection import Protection, protected
from tests.kvm import native
from tests.kvm.native import Native

Launch = Callable[..., Qemu]

MIB = 16
VCPUS = 2
POLICY = {"policy": "fixed", "epoch_ms": 10.0}


def start(launch: Launch, name: str, standby: bool = False) -> Qemu:
    return launch(name, native.rom(MIB, VCPUS), memory_mib=native.memory_mib(MIB, VCPUS), vcpus=VCPUS, standby=standby)


@pytest.fixture
def guest(launch: Launch) -> Qemu:
    made = start(launch, "p")
    Native(made, VCPUS).await_start()
    return made


def works(qemu: Qemu, rounds: int = 50) -> None:
    """The guest writes, a page and its mirror, and each pair that it looks at is what it wrote."""
    guest = Native(qemu, VCPUS)
    before = guest.written()
    for number in range(rounds):
        guest.ask_for(100, repeated=bool(number % 2))
        time.sleep(0.01)
    wait_for("the guest writes", lambda: guest.written() > before + 100)
    assert guest.differed() == 0


def goes_on_in_its_backup(pair: Protection) -> None:
    pair.primary_qemu.kill()
    pair.backup.hear("ask_promotion")
    pair.backup.grant()
    pair.backup.hear("promoted")
    works(pair.standby_qemu)


def test_a_protected_guest_goes_on_in_its_backup_with_all_that_it_wrote(launch: Launch, guest: Qemu) -> None:
    with protected(guest, start(launch, "b", standby=True), **POLICY) as pair:
        works(guest, 200)
        assert b"protected range by range" in pair.primary.log.read_bytes()
        goes_on_in_its_backup(pair)


@pytest.mark.parametrize("how", ["kill", "hang"])
def test_an_engine_that_dies_between_protection_and_copy_costs_the_guest_nothing(launch: Launch, guest: Qemu,
                                                                                 how: str) -> None:
    def harm_is_done(engine: Engine) -> bool:
        works(guest, 5)
        return engine.has_tripped() and engine.ended()

    with protected(guest, start(launch, "b", standby=True), primary_fault=f"protected:{how}:30", **POLICY) as pair:
        wait_for("the engine is dead", lambda: harm_is_done(pair.primary))
        works(guest)
        assert guest.is_running()
    works(guest)


def test_a_guest_is_protected_again_after_its_engine_died_in_a_pause(launch: Launch, guest: Qemu) -> None:
    with protected(guest, start(launch, "b", standby=True), primary_fault="protected:kill:30", **POLICY) as pair:
        wait_for("the engine is dead", lambda: pair.primary.ended())
    with protected(guest, start(launch, "c", standby=True), **POLICY) as pair:
        works(guest)
        goes_on_in_its_backup(pair)
