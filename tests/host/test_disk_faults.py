"""Whatever fails around the disks: the guest's own reads and writes go on, and its ledger stays true.

One guest lives through all of it. What a guest finds on the host that it moves to: test_disk_replication.py.
"""

import contextlib
import itertools
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nova_ftvm.engine.faults import Fault
from nova_ftvm.host.disks import remove_mirrors
from tests.host.conftest import Launch, keeps_ledgers
from tests.host.images import Shape, primarys, standbys
from tests.host.machine import BOOT_S, Bench, Network, Qemu, wait_for
from tests.host.protection import Line, Protection, protected

#: The ledger's, and one that can be written to as fast as it goes.
SHAPES, TAGS = (Shape("backed"), Shape("backed")), "ab"
NAMES = ("vda",)
#: How often a point is passed before it harms. Pieces of the first copy count, too.
PASSES = {Fault.MIRROR_STARTED: 0, Fault.DISK_SHIPPED: 600}

#: For links and disks that are slow, and shall not be taken for dead.
PATIENT = {"ack_limit_ms": 60000.0, "beat_misses": 600}

Standby = Callable[[], Qemu]


@pytest.fixture(scope="module")
def primary(module_launch: Launch, module_images: Path) -> Qemu:
    return keeps_ledgers(module_launch, "p", primarys(module_images, SHAPES, TAGS), NAMES, work="churn,bench")


@pytest.fixture
def new_standby(launch: Launch, image_folder: Path) -> Standby:
    """A standby on blank images each time."""
    numbers = itertools.count()

    def make() -> Qemu:
        folder = image_folder / str(next(numbers))
        folder.mkdir()
        return keeps_ledgers(launch, "b", standbys(folder, SHAPES, TAGS), NAMES, standby=True)

    return make


def writes_on(primary: Qemu) -> None:
    """The guest waits for nobody: its disks are its own again."""
    primary.await_sound_disks("vda")
    assert primary.is_running()


def goes_on_alone(pair: Protection) -> None:
    """By grant, after it asked."""
    assert pair.primary.hear("ask_degrade")["reason"]
    pair.primary.grant()
    assert pair.primary.hear("ended")["phase"] == "alone"
    wait_for("the primary's engine ends", lambda: pair.primary.ended())
    assert pair.primary.process.returncode == 0
    assert pair.primary_qemu.mirrors() == []


@pytest.mark.parametrize("how", ["kill", "stop"])
@pytest.mark.parametrize("fault", PASSES, ids=lambda fault: fault.value)
def test_the_guest_writes_on_when_the_engine_that_takes_its_writes_fails(fault: Fault, how: str, primary: Qemu,
                                                                        new_standby: Standby,
                                                                        network: Network) -> None:
    armed = f"{fault.value}:{how}:{PASSES[fault]}"
    with protected(primary, new_standby(), primary_fault=armed, until="") as pair:
        wait_for("the primary's engine dies", lambda: pair.primary.ended(), BOOT_S)
        writes_on(primary)
    # A mirror of a disk that nobody writes to notices with the next write.
    bench = Bench(network)
    bench.start("vdb", "rand", 4096, sync=True, seconds=0.2, depth=1, span_mib=32)
    assert bench.result()[0] > 0
    bench.close()
    wait_for("the mirrors end", lambda: not primary.operator.command("query-jobs"))


def test_the_next_engine_takes_a_dead_ones_leftovers_away(primary: Qemu, new_standby: Standby) -> None:
    with protected(primary, new_standby()) as pair:
        pair.primary.kill()
        assert primary.mirrors()
    with protected(primary, new_standby()):
        primary.await_sound_disks("vda")
        assert len(primary.mirrors()) == 2 * len(SHAPES)


def test_an_agent_takes_a_dead_engines_mirrors_away_also_of_disks_that_nobody_writes_to(primary: Qemu,
                                                                                    new_standby: Standby) -> None:
    with protected(primary, new_standby()) as pair:
        pair.primary.kill()
        assert primary.mirrors()
        with primary.monitor() as monitor:
            remove_mirrors(monitor)
        assert primary.mirrors() == []
        writes_on(primary)


def test_the_guest_writes_on_when_the_standbys_qemu_dies(primary: Qemu, new_standby: Standby) -> None:
    with protected(primary, new_standby()) as pair:
        pair.standby_qemu.kill()
        goes_on_alone(pair)
        writes_on(primary)


def test_the_guest_writes_on_when_the_backups_host_dies_in_mid_copy(primary: Qemu, new_standby: Standby) -> None:
    with protected(primary, new_standby(), until="syncing", disk_copy_mib_s=1) as pair:
        assert not all(job["ready"] for job in primary.operator.command("query-block-jobs"))
        pair.backup.process.kill()
        pair.standby_qemu.kill()
        goes_on_alone(pair)
        writes_on(primary)


def test_the_guest_writes_on_when_the_backups_disk_is_full(primary: Qemu, launch: Launch, image_folder: Path,
                                                           network: Network) -> None:
    bench = Bench(network)
    with small_disk(image_folder / "small", 64) as place:
        disks = standbys(image_folder, SHAPES, TAGS)
        for disk in disks:
            disk.move_to(place)
        standby = keeps_ledgers(launch, "b", disks, NAMES, standby=True)
        with protected(primary, standby) as pair:
            with contextlib.suppress(OSError), (place / "rest").open("wb", 0) as file:
                while True:
                    file.write(bytes(1 << 20))
            # The ledger may have all its blocks by now.
            bench.start("vdb", "seq", 1 << 20, sync=False, seconds=0.5, depth=4, span_mib=32)
            assert "No space left" in pair.backup.hear("failed")["reason"]
            goes_on_alone(pair)
            writes_on(primary)
    bench.result()
    bench.close()


@contextlib.contextmanager
def small_disk(place: Path, mib: int) -> Iterator[Path]:
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "small", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


@pytest.fixture
def line() -> Iterator[Line]:
    made = Line()
    yield made
    made.close()


def test_the_guest_writes_on_when_the_link_stalls(primary: Qemu, new_standby: Standby, line: Line) -> None:
    with protected(primary, new_standby(), line=line) as pair:
        line.stall()
        goes_on_alone(pair)
        writes_on(primary)


def test_a_stall_that_is_put_up_with_holds_the_guests_writes_and_loses_nothing(primary: Qemu, new_standby: Standby,
                                                                              line: Line) -> None:
    with protected(primary, new_standby(), line=line, disk_log_mib=1, **PATIENT) as pair:
        line.stall()
        waits(primary)
        line.go_on()
        primary.await_sound_disks("vda")
        assert not pair.primary.ended() and not pair.backup.ended()
        assert pair.primary.heard("ask_degrade") is None


def waits(primary: Qemu) -> None:
    """The guest runs, but its writes stand still."""
    seen = ""

    def stands_still() -> bool:
        nonlocal seen
        seen, before = written(primary), seen
        return seen == before

    wait_for("the guest's writes wait", stands_still, 30.0, 2.0)
    primary.await_ticks()


def written(guest: Qemu) -> str:
    """Counts of what the guest wrote to its disks."""
    stats = guest.operator.command("query-blockstats")
    return str([(one["stats"]["wr_operations"], one["stats"]["wr_bytes"]) for one in stats])


def test_a_flood_waits_in_the_guest_and_not_in_the_engines_memory(primary: Qemu, new_standby: Standby, line: Line,
                                                                  network: Network) -> None:
    """And then the engine dies, its log full."""
    bench = Bench(network)
    with protected(primary, new_standby(), line=line, disk_log_mib=8, **PATIENT) as pair:
        at_rest = pair.primary.resident_mib()
        line.rate = 64 << 10
        bench.start("vdb", "seq", 1 << 20, sync=False, seconds=5.0, depth=4, span_mib=32)
        waits(primary)
        # The log, what is being received from 2 disks, one frame of each kind, and what Python keeps.
        assert pair.primary.resident_mib() < at_rest + 8 + 32
        os.kill(pair.primary.process.pid, signal.SIGKILL)
        writes_on(primary)
    bench.result()
    bench.close()


def test_a_flood_waits_for_slow_replicas_and_not_in_the_backups_memory(primary: Qemu, new_standby: Standby,
                                                                       network: Network) -> None:
    bench = Bench(network)
    with protected(primary, new_standby(), disk_log_mib=8, replica_backlog_mib=8, **PATIENT) as pair:
        at_rest = pair.backup.resident_mib()
        pair.standby_qemu.process.send_signal(signal.SIGSTOP)
        bench.start("vdb", "seq", 1 << 20, sync=False, seconds=5.0, depth=4, span_mib=32)
        waits(primary)
        assert pair.backup.resident_mib() < at_rest + 8 + 2 * 8 + 32
        pair.standby_qemu.process.send_signal(signal.SIGCONT)
        primary.await_sound_disks("vda")
        assert not pair.primary.ended() and not pair.backup.ended()
    bench.result()
    bench.close()


@pytest.mark.parametrize("fault", [Fault.BEFORE_SETTLE, Fault.SETTLED], ids=lambda fault: fault.value)
def test_a_promotion_that_dies_around_the_disks_leaves_no_running_guest(fault: Fault, primary: Qemu,
                                                                        new_standby: Standby) -> None:
    with protected(primary, new_standby(), backup_fault=f"{fault.value}:kill") as pair:
        pair.primary.kill()
        pair.backup.hear("ask_promotion")
        pair.backup.grant()
        wait_for("the backup's engine dies", lambda: pair.backup.ended())
        assert pair.backup.heard("promoted") is None
        assert pair.standby_qemu.operator.command("query-status")["status"] == "inmigrate"
        writes_on(primary)
