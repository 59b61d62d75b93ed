"""The replica is the primary's RAM, byte by byte, at every look; and the looks would see it if it were not."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nova_ftvm.core.epoch import Phase
from tests.host.conftest import CHURN, DISK, Launch
from tests.host.inprocess import Comparison, CountingMemory, LooksOnce, LosesAPage
from tests.host.machine import Network, Session

#: Each request takes 5 ms, so that one is under way at most stops. Without ioeventfd it is not waited for before the
#: STOP event but after it, as with every device that has none (IDE, AHCI): what the second scan is for.
SLOW_DISK = ("-blockdev", "null-co,node-name=slow,size=8388608,read-zeroes=on,latency-ns=5000000",
             "-device", "virtio-blk-pci,drive=slow,ioeventfd=off")

PC = {"work": CHURN, "machine_type": "pc", "vcpus": 1, "extra": ()}
Q35 = {"work": f"{CHURN},{DISK}", "machine_type": "q35", "vcpus": 2, "extra": SLOW_DISK}


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


@pytest.mark.parametrize("shape", [PC, Q35], ids=["pc-1-vcpu", "q35-2-vcpus-slow-disk"])
def test_the_replica_equals_the_primarys_ram_at_every_look(shape: dict, launch: Launch, network: Network,
                                                           tmp_path: Path) -> None:
    primary = launch("p", **shape)
    standby = launch("b", **shape, standby=True)
    primary.await_boot()
    comparison = Comparison(primary, standby, tmp_path, looks=6)
    with traffic(network) as session:
        asked = session.count
        assert comparison.run() == []
        assert session.count > asked + 6
    assert comparison.compared == 6
    assert comparison.phase is Phase.ENDED and comparison.promoted is False
    if DISK in shape["work"]:
        assert comparison.late_pages > 0, "the disk was never busy at a stop: the second scan was not exercised"
        primary.await_sound("disk")
    primary.await_sound("churn")
    assert primary.is_running()


@pytest.mark.parametrize(("mutation", "shape"), [(LosesAPage, PC), (LooksOnce, Q35)],
                         ids=["a-page-is-lost", "no-second-scan"])
def test_a_broken_capture_is_seen(mutation: type[CountingMemory], shape: dict, launch: Launch,
                                  tmp_path: Path) -> None:
    primary = launch("p", **shape)
    standby = launch("b", **shape, standby=True)
    primary.await_boot()
    comparison = Comparison(primary, standby, tmp_path, mutation, looks=40, every=4)
    assert comparison.run(), f"{comparison.compared} looks saw nothing"
