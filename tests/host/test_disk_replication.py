"""The replica's disks are the primary's, byte by byte, at every look; and the guest that goes on finds its own disks.

The guests keep a ledger of their disks (guest/storage.c): what each sector may hold, as their memory knows it.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nova_ftvm.core.disk import DiskOp, DiskWrite
from nova_ftvm.core.epoch import Phase
from nova_ftvm.engine.diskstream import Cut
from nova_ftvm.engine.faults import Fault
from nova_ftvm.engine.primary import PrimaryEngine
from nova_ftvm.host.disks import DiskMirror, StandbyDisks
from tests.host.conftest import Launch, keeps_ledgers
from tests.host.images import MIB, Shape, primarys, standbys
from tests.host.inprocess import Comparison
from tests.host.machine import BOOT_S, Network, Qemu, Session, wait_for
from tests.host.protection import Protection, protected

Pair = tuple[Qemu, Qemu]

#: Points at which hosts die, and how often each is passed before: checkpoints, or pieces of what the guest writes.
DEATHS = {None: 0, Fault.DISK_SHIPPED: 3000, Fault.LOG_CUT: 30, Fault.SHIPPED_HALF: 30}

BACKED = Shape("backed")
#: Nova's own: one that lies on its image's base, one that does not, and a config drive.
NOVAS = (BACKED, Shape("raw"), Shape("raw", "cdrom", size=2 * MIB))
#: A SCSI disk; a disk whose requests end after the STOP event.
OTHERS = (Shape("qcow2", "scsi"), Shape("raw", ioeventfd=False, aio="native"))


def start(launch: Launch, folder: Path, shapes: Sequence[Shape], tags: str, names: Sequence[str]) -> Pair:
    """Primary, with its ledgers begun, and standby."""
    return (keeps_ledgers(launch, "p", primarys(folder, shapes, tags), names),
            keeps_ledgers(launch, "b", standbys(folder, shapes, tags), names, standby=True))


@pytest.mark.parametrize(("shapes", "tags", "names"), [
    (NOVAS, "abr", ("vda", "vdb")), (OTHERS, "aa", ("sda", "vda"))], ids=["novas", "others"])
def test_the_replicas_disks_equal_the_primarys_at_every_look(shapes: Sequence[Shape], tags: str, names: Sequence[str],
                                                             launch: Launch, image_folder: Path,
                                                             tmp_path: Path) -> None:
    primary, standby = start(launch, image_folder, shapes, tags, names)
    comparison = Comparison(primary, standby, tmp_path, looks=5)
    assert comparison.run() == []
    assert comparison.compared == 5 and comparison.phase is Phase.ENDED
    assert comparison.shallow == {number for number, shape in enumerate(shapes) if shape.form == "backed"}
    primary.await_sound_disks(*names)
    assert primary.mirrors() == []


def test_a_guest_keeps_its_disks_from_host_to_host(launch: Launch, network: Network, image_folder: Path) -> None:
    """Each host dies at another point of the protocol; whoever was the standby is the next primary."""
    names = ("vda", "vdb")
    guest = keeps_ledgers(launch, "p", primarys(image_folder, NOVAS, "abr"), names)
    session = Session(network)
    for number, (fault, passes) in enumerate(DEATHS.items()):
        disks = standbys(image_folder, NOVAS, "abr", f"b{number}")
        standby = keeps_ledgers(launch, "bp"[number % 2], disks, names, standby=True)
        with passing_on(guest, standby, primary_fault=f"{fault.value}:kill:{passes}" if fault else "") as pair:
            session.exchange(5)
            if fault:
                wait_for("the primary's engine dies", lambda pair=pair: pair.primary.ended(), BOOT_S)
            unanswered = session.send()
            guest.kill()
            pair.backup.hear("ask_promotion")
            pair.backup.grant()
            pair.backup.hear("promoted")
            session.receive(unanswered)
            session.exchange(5)
        assert standby.exports() == []
        guest = standby
        guest.await_sound_disks(*names)
    session.close()
    assert disks[2].path.read_bytes() == (image_folder / "p" / "disk2").read_bytes()
    guest.operator.command("system_reset")
    guest.await_log("ledger vda begins")
    guest.await_sound_disks("vda")


@contextmanager
def passing_on(guest: Qemu, standby: Qemu, **settings: Any) -> Iterator[Protection]:
    """A protection whose standby lives on."""
    pair = Protection(guest, standby, **settings)
    try:
        yield pair
    finally:
        pair.end_engines()


def test_a_planned_end_leaves_nothing_behind(writer: Pair, launch: Launch, image_folder: Path) -> None:
    primary, _ = writer
    for number in range(2):
        folder = image_folder / str(number)
        folder.mkdir()
        standby = keeps_ledgers(launch, "c", standbys(folder, (BACKED,), "a"), ("vda",), standby=True)
        with protected(primary, standby) as pair:
            pair.primary.order("stop", reason="switched off")
            assert pair.primary.hear("ended")["phase"] == "ended"
            assert pair.backup.hear("ended")["phase"] == "given up"
            assert primary.mirrors() == [] and standby.exports() == []
            primary.await_sound_disks("vda")


# The looks, and the ledger, would see it if it were not so


def test_a_ledger_notices_sectors_of_another_moment(launch: Launch, image_folder: Path) -> None:
    (disk,) = primarys(image_folder, (Shape("raw"),), "a")
    guest = keeps_ledgers(launch, "c", [disk], ("vda",))
    earlier = disk.path.read_bytes()[:MIB]
    guest.await_sound_disks("vda")
    guest.operator.command("stop")
    with disk.path.open("r+b", buffering=0) as file:
        file.write(earlier)
        os.fsync(file.fileno())
    guest.operator.command("cont")
    guest.await_log("CORRUPT ledger vda")


class LosesAWrite(DiskMirror):
    """Mutation: now and then a write does not get into the log."""

    _count = 0

    def receive(self) -> list[DiskWrite]:
        kept = []
        for write in super().receive():
            self._count += 1
            if self._count % 50:
                kept.append(write)
        return kept


class AnswersEarly(DiskMirror):
    """Mutation: QEMU is answered before the log has the write, so that a cut may come too early for it."""

    _answered: list[DiskWrite] = []

    def receive(self) -> list[DiskWrite]:
        writes, self._answered = self._answered, super().receive()
        return writes


class CutsLate(PrimaryEngine):
    """Mutation: an epoch's disk writes end when it is sent. The guest runs by then."""

    def _capture(self) -> None:
        cut, self._disks.cut = self._disks.cut, Cut
        super()._capture()
        self._disks.cut = cut

    def _send_commit(self) -> None:
        time.sleep(0.03)
        self._disks.take(preload=False)
        self._talk.current.cut = self._disks.cut()
        super()._send_commit()


class WritesBackwards(StandbyDisks):
    """Mutation: a later write is done before an earlier one, also where they overlap."""

    def submit(self, writes: Sequence[DiskWrite]) -> None:
        super().submit(writes[::-1])


class KeepsWhatIsDiscarded(StandbyDisks):
    """Mutation: what the guest zeroed or discarded is there again after a failover."""

    def submit(self, writes: Sequence[DiskWrite]) -> None:
        super().submit([write for write in writes if write.op is DiskOp.WRITE])


@pytest.fixture(scope="module")
def writer(module_launch: Launch, module_images: Path) -> Pair:
    return start(module_launch, module_images, (BACKED,), "a", ("vda",))


@pytest.mark.parametrize("kinds", [
    {"mirror": LosesAWrite}, {"mirror": AnswersEarly}, {"engine": CutsLate}, {"replica": WritesBackwards},
    {"replica": KeepsWhatIsDiscarded}], ids=lambda kinds: next(iter(kinds.values())).__name__)
def test_a_broken_replication_is_seen(kinds: dict[str, type], writer: Pair, tmp_path: Path) -> None:
    comparison = Comparison(*writer, tmp_path, looks=30, every=4, **kinds)
    assert any(name.startswith("/machine") for name, _ in comparison.run()), f"{comparison.compared} looks saw nothing"
    writer[0].await_sound_disks("vda")


def test_replicas_that_were_written_to_are_copied_whole(writer: Pair, tmp_path: Path) -> None:
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        comparison = Comparison(*writer, folder, looks=2)
        assert comparison.run() == []
    assert comparison.compared == 2 and comparison.shallow == frozenset()
