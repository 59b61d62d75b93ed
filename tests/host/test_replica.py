"""The replica is the primary's RAM, byte by byte, at every look; and the looks would see it if it were not."""

import dataclasses
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nova_ftvm.core.epoch import Phase
from tests.host.conftest import CHURN, Launch
from tests.host.images import MIB, Image, Shape, can_be_slowed, fill, slow_disk
from tests.host.inprocess import (
    Comparison,
    CopiesAtTheStop,
    LooksAtTheStop,
    LooksOnce,
    LosesAPage,
    Observed,
    ObservedMemory,
    ObservedRanged,
)
from tests.host.machine import Network, Qemu, Session, guest_folder

PC = {"work": CHURN, "machine_type": "pc", "vcpus": 1}
Q35 = {"work": f"{CHURN},reads:vda", "machine_type": "q35", "vcpus": 2}
#: So that transfers into the guest's memory are under way at each stop, and end after the STOP event.
DIRECT = Shape("raw", size=16 * MIB, ioeventfd=False)
#: The pages of such a transfer are written when it ends, not when it begins.
CACHED = dataclasses.replace(DIRECT, cache="writeback")
SLOW_BYTES_S = 40 * MIB
LOOKS = 5

slowed = pytest.mark.skipif(not can_be_slowed(guest_folder()), reason="no control group can slow this disk down")


@contextmanager
def traffic(network: Network) -> Iterator[Session]:
    """A client that asks all the time, and checks every answer."""
    session = Session(network)
    over = threading.Event()
    failure: list[BaseException] = []

    def ask() -> None:
        try:
            while not over.is_set():
                session.exchange()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield session
    finally:
        over.set()
        thread.join(20.0)
        session.close()
    assert not failure, failure


@contextmanager
def uncached(path: Path) -> Iterator[None]:
    """The host's cache forgets a file all the time."""
    over = threading.Event()

    def forget() -> None:
        with path.open("rb") as file:
            while not over.wait(0.005):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    thread = threading.Thread(target=forget)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.fixture
def busy_disk(request: pytest.FixtureRequest, launch: Launch, image_folder: Path) -> Iterator[tuple[Qemu, Qemu]]:
    """Primary and standby of a guest that reads a slow disk all the time."""
    shape = request.param
    contents = image_folder / "contents"
    fill(contents, "a", shape.size, hole_each=0)
    (image_folder / "b").mkdir()
    ours, theirs = Image(image_folder, 0, shape, contents), Image(image_folder / "b", 0, shape)
    primary = launch("p", **Q35, extra=ours.arguments())
    standby = launch("b", **Q35, extra=theirs.arguments(), standby=True)
    primary.await_boot()
    primary.await_sound("reads vda")
    with slow_disk(ours.path, primary.pid, rbps=SLOW_BYTES_S), uncached(ours.path):
        yield primary, standby


@pytest.mark.parametrize("memory", [ObservedMemory, ObservedRanged])
def test_the_replica_equals_the_primarys_ram_at_every_look(launch: Launch, network: Network, tmp_path: Path,
                                                           memory: Observed) -> None:
    primary, standby = launch("p", **PC), launch("b", **PC, standby=True)
    primary.await_boot()
    compares_whole(Comparison(primary, standby, tmp_path, memory, looks=LOOKS), network)
    primary.await_sound("churn")
    assert primary.is_running()


@slowed
@pytest.mark.parametrize(("busy_disk", "memory"), [
    (DIRECT, ObservedMemory), (CACHED, ObservedMemory), (DIRECT, ObservedRanged), (CACHED, ObservedRanged)],
    ids=["direct", "cached", "direct-ranged", "cached-ranged"], indirect=["busy_disk"])
def test_the_replica_equals_the_primarys_ram_while_a_disk_transfers(busy_disk: tuple[Qemu, Qemu], network: Network,
                                                                    tmp_path: Path, memory: Observed) -> None:
    """Also at the first epoch: a transfer that began before a pass of the first copy may end after its pages were
    copied."""
    primary, standby = busy_disk
    compares_whole(Comparison(primary, standby, tmp_path, memory, looks=LOOKS), network)
    primary.await_sound("churn")
    primary.await_sound("reads vda")


def compares_whole(comparison: Comparison, network: Network) -> None:
    with traffic(network) as session:
        asked = session.count
        assert comparison.run() == []
        assert session.count > asked + LOOKS
    assert comparison.compared == LOOKS
    assert comparison.phase is Phase.ENDED and comparison.promoted is False


def test_a_lost_page_is_seen(launch: Launch, tmp_path: Path) -> None:
    primary, standby = launch("p", **PC), launch("b", **PC, standby=True)
    primary.await_boot()
    sees_a_difference(Comparison(primary, standby, tmp_path, LosesAPage, looks=40, every=4))


@slowed
@pytest.mark.parametrize(("mutation", "busy_disk"), [
    (LooksAtTheStop, CACHED), (CopiesAtTheStop, DIRECT), (LooksOnce, CACHED)],
    ids=["looks-at-the-stop", "copies-at-the-stop", "looks-once"], indirect=["busy_disk"])
def test_a_capture_that_does_not_mind_the_disks_is_seen(mutation: Observed, busy_disk: tuple[Qemu, Qemu],
                                                        tmp_path: Path) -> None:
    """So the disks above are busy when the guest is stopped."""
    sees_a_difference(Comparison(*busy_disk, tmp_path, mutation, looks=40, every=4))


def sees_a_difference(comparison: Comparison) -> None:
    assert comparison.run(), f"{comparison.compared} looks saw nothing"
