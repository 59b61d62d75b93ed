"""host/disks.py and host/nbd.py: mirrors and replicas in real QEMUs, with the test in the engine's place.

Most guests here have no system: QEMU itself is asked to write (`qemu-io` on the device, so through whatever stands
before its image).
"""

import itertools
import os
import random
import selectors
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from nova_ftvm.core.disk import DiskOp, DiskWrite
from nova_ftvm.exception import InTheWay, MirrorLost, ReplicaFailed, Unsupported
from nova_ftvm.host import disks as host_disks
from nova_ftvm.host import qmp
from nova_ftvm.host.disks import (
    AttendedMonitor,
    DiskMirror,
    StandbyDisks,
    ended_mirror,
    guest_disks,
    is_blank,
    read_only_contents,
    replicas,
)
from nova_ftvm.types import Disk
from tests.host.conftest import Launch
from tests.host.images import MIB, SECTOR, Image, Shape, fill
from tests.host.machine import Qemu, wait_for

KIB = 1 << 10
OWNER = (os.getuid(), os.getgid())
#: Without a kernel.
MACHINE = ("-M", "pc", "-accel", "tcg", "-m", "32", "-nodefaults", "-display", "none")
SIZE = 40 * MIB + 3 * SECTOR
#: QEMU's O_DIRECT wants whole blocks of the host's file system.
RAW = Shape("raw", size=SIZE, cache="writeback")
QCOW2, BACKED = Shape("qcow2", size=SIZE), Shape("backed", size=SIZE)
SHAPES = {"raw": RAW, "qcow2": QCOW2, "backed": BACKED, "iothread": Shape("backed", "iothread", size=SIZE),
          "scsi": Shape("qcow2", "scsi", size=SIZE)}
WRITE, ZERO, DISCARD = DiskOp.WRITE, DiskOp.ZERO, DiskOp.DISCARD

Boot = Callable[..., Qemu]


@pytest.fixture
def boot(tmp_path: Path, needs_guests: None) -> Iterator[Boot]:
    """boot(arguments, standby): a QEMU that ends with the test."""
    numbers = itertools.count(1)
    with ExitStack() as stack:
        def launch(arguments: Sequence[str], *, standby: bool = False) -> Qemu:
            folder = tmp_path / f"qemu{next(numbers)}"
            folder.mkdir()
            qemu = Qemu(folder, [*MACHINE, *arguments, *(["-incoming", "defer", "-S"] if standby else [])])
            stack.callback(qemu.kill)
            return qemu
        yield launch


@pytest.fixture
def contents(tmp_path: Path) -> Path:
    """A raw image; each fourth MiB is a hole."""
    path = tmp_path / "contents"
    fill(path, "a", SIZE)
    return path


class Primary:
    """A guest whose disks are told to the test."""

    def __init__(self, qemu: Qemu, monitor: AttendedMonitor, speed: int = 0) -> None:
        self.qemu = qemu
        self.monitor = monitor
        self.disks = guest_disks(monitor)
        self.mirror = DiskMirror(monitor, self.disks, str(qemu.folder / "disks.sock"), OWNER, speed, MIB)
        self.log: list[DiskWrite] = []

    def serve(self) -> None:
        """As the engine does it: what came is in the log before QEMU may go on."""
        self.log += self.mirror.receive()
        self.mirror.confirm()

    def told(self) -> list[DiskWrite]:
        """What came since the last call."""
        told, self.log = self.log, []
        return told

    def follow(self, *shallow: int) -> list[DiskWrite]:
        """Returns what the first copy told."""
        self.mirror.start(shallow)
        wait_for("the mirrors follow", lambda: self.serve() or self.mirror.progress()[2], pause_s=0.001)
        self.serve()
        return self.told()

    def begin(self, command: str, disk: int = 0) -> None:
        """qemu-io, through the mirror. QEMU does it within the command, and waits for whoever follows the disk."""
        self.qemu.operator.send(qmp.encode("human-monitor-command", {
            "command-line": f'qemu-io -d {self.disks[disk].device} "{command}"'}, "io"))

    def ended(self) -> bool:
        return any(message.get("id") == "io" for message in self.qemu.operator.receive())

    def write(self, command: str, disk: int = 0) -> None:
        self.begin(command, disk)
        wait_for(command, lambda: self.serve() or self.ended(), pause_s=0.0003)

    def jobs(self) -> list[str]:
        return [job["device"] for job in self.qemu.operator.command("query-block-jobs")]

    def nodes(self) -> list[str]:
        """All that have a name, but for the images' own."""
        return [node["node-name"] for node in self.qemu.operator.command("query-named-block-nodes", flat=True)
                if not node["node-name"].startswith(("#", "libvirt-"))]


@contextmanager
def followed(qemu: Qemu, speed: int = 0) -> Iterator[Primary]:
    with qemu.monitor() as monitor:
        primary = Primary(qemu, monitor, speed)
        with closing(primary.mirror):
            yield primary


def place(folder: Path, shape: Shape, contents: Path | None = None, number: int = 0) -> Image:
    folder.mkdir(exist_ok=True)
    return Image(folder, number, shape, contents)


def base_of(shape: Shape, contents: Path) -> Path | None:
    return contents if shape.form == "backed" else None


def spans(writes: Sequence[DiskWrite]) -> list[tuple[DiskOp, int, int]]:
    return [(write.op, write.offset, write.length) for write in writes]


def told_bytes(writes: Sequence[DiskWrite], op: DiskOp) -> int:
    return sum(write.length for write in writes if write.op is op)


def readable(mirror: DiskMirror, timeout_s: float = 5.0) -> bool:
    """Its descriptor is an epoll; the engine waits for it in another one."""
    with selectors.DefaultSelector() as selector:
        selector.register(mirror, selectors.EVENT_READ)
        return bool(selector.select(timeout_s))


def goes_on_alone(primary: Primary, commands: int) -> None:
    """After so many commands the guest's writes end, the next agent takes the mirrors away, and the guest writes on."""
    said = 0

    def is_done() -> bool:
        nonlocal said
        said += sum(message.get("id") == "io" for message in primary.qemu.operator.receive())
        return said >= commands

    wait_for("all is answered", is_done)
    primary.mirror.remove()
    assert not primary.jobs() and not primary.nodes()
    for command in ("aio_flush", "write -P 8 4M 4M"):
        primary.begin(command)
        wait_for("the guest writes on", primary.ended)
    assert primary.qemu.is_running()
    quit_cleanly(primary.qemu)


def quit_cleanly(qemu: Qemu) -> None:
    """So that the image is whole on its file system."""
    qemu.operator.command("quit")
    qemu.process.wait(10)


def same(first: Path, second: Path) -> bool:
    return subprocess.run(["qemu-img", "compare", "-q", first, second]).returncode == 0


def read(image: Image, folder: Path) -> bytes:
    """What the guest of an ended QEMU sees."""
    flat = folder / "flat"
    subprocess.run(["qemu-img", "convert", "-O", "raw", image.path, flat], check=True)
    return flat.read_bytes()


# What there is


def test_disks_are_told_by_device_with_size_and_base(boot: Boot, tmp_path: Path, contents: Path) -> None:
    images = [place(tmp_path, BACKED, contents, 0), place(tmp_path, Shape("qcow2", "scsi", size=8 * MIB), number=1),
              place(tmp_path, RAW, number=2), place(tmp_path, Shape("raw", "cdrom", size=2 * MIB), number=3)]
    flash = tmp_path / "flash"
    flash.write_bytes(bytes(256 * KIB))
    qemu = boot([*(word for image in images for word in image.arguments()), "-device", "virtio-scsi-pci",
                 "-device", "scsi-cd,id=empty", "-drive", f"if=pflash,format=raw,file={flash}"])
    with qemu.monitor() as monitor:
        found = guest_disks(monitor)
    assert [(disk.device, disk.size, disk.read_only, bool(disk.base), disk.node, disk.path) for disk in found] == [
        ("/machine/peripheral/disk0/virtio-backend", SIZE, False, True, "libvirt-0-format", str(images[0].path)),
        ("/machine/peripheral/disk2/virtio-backend", SIZE, False, False, "libvirt-2-storage", str(images[2].path)),
        ("disk1", 8 * MIB, False, False, "libvirt-1-format", str(images[1].path)),
        ("disk3", 2 * MIB, True, False, "libvirt-3-storage", str(images[3].path))]


def test_a_replica_that_was_written_to_lies_on_nothing(boot: Boot, tmp_path: Path, contents: Path) -> None:
    image = place(tmp_path, BACKED, contents)
    qemu = boot(image.arguments())
    with followed(qemu) as primary:
        with_base = primary.disks[0].base
        assert is_blank(str(image.path)) and replicas(primary.monitor)[0].base == with_base
        primary.write("write -P 1 39M 512")
        assert not is_blank(str(image.path)) and replicas(primary.monitor)[0].base == ""
        assert guest_disks(primary.monitor)[0].base == with_base
    assert not is_blank(str(contents))


@pytest.mark.parametrize(("arguments", "match"), [
    (["-blockdev", "null-co,node-name=n,size=1048576", "-device", "virtio-blk-pci,drive=n"], "use local disks"),
    (["-drive", "if=none,id=n,format=qcow2,readonly=on,file=IMAGE", "-device", "virtio-blk-pci,drive=n"],
     "use a raw image")])
def test_what_cannot_be_replicated_is_refused_with_what_to_do(arguments: list[str], match: str, boot: Boot,
                                                              tmp_path: Path) -> None:
    image = place(tmp_path, QCOW2)
    qemu = boot([word.replace("IMAGE", str(image.path)) for word in arguments])
    with qemu.monitor() as monitor, pytest.raises(Unsupported, match=match):
        guest_disks(monitor)


# The first copy


def test_a_disk_on_the_replicas_base_tells_only_what_differs(boot: Boot, tmp_path: Path, contents: Path) -> None:
    with followed(boot(place(tmp_path, BACKED, contents).arguments())) as primary:
        primary.write("write -P 5 8M 64k")
        primary.write("write -P 6 20M 64k")
        assert sorted(spans(primary.follow(0))) == [(WRITE, 8 * MIB, 64 * KIB), (WRITE, 20 * MIB, 64 * KIB)]


@pytest.mark.parametrize("shape", [RAW, QCOW2, BACKED], ids=["raw", "qcow2", "backed"])
def test_a_whole_copy_tells_no_zeros(shape: Shape, boot: Boot, tmp_path: Path, contents: Path) -> None:
    with followed(boot(place(tmp_path, shape, contents).arguments())) as primary:
        told = primary.follow()
        replica, expected = bytearray(b"\xff" * SIZE), contents.read_bytes()
        for write in told:
            replica[write.offset:write.offset + write.length] = write.contents or bytes(write.length)
        assert replica == expected
        # Each fourth of the 40 MiB is a hole.
        assert 30 * MIB <= told_bytes(told, WRITE) <= 31 * MIB
        done, total, followed_now = primary.mirror.progress()
        assert done == total >= 30 * MIB and followed_now


def test_a_first_copy_under_way_is_not_all_there_is(boot: Boot, tmp_path: Path, contents: Path) -> None:
    with followed(boot(place(tmp_path, QCOW2, contents).arguments()), speed=8 * MIB) as primary:
        primary.mirror.start(())
        wait_for("contents are told", lambda: primary.serve() or told_bytes(primary.log, WRITE))
        done, total, followed_now = primary.mirror.progress()
        assert done < total and not followed_now


# Following


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_each_change_is_told(shape: Shape, boot: Boot, tmp_path: Path, contents: Path) -> None:
    with followed(boot(place(tmp_path, shape, base_of(shape, contents)).arguments())) as primary:
        primary.follow(*([0] if primary.disks[0].base else []))
        primary.write("write -P 7 4096 3M")
        told = primary.told()
        assert told_bytes(told, WRITE) == 3 * MIB and max(write.length for write in told) == MIB
        assert {bytes(write.contents) for write in told} == {b"\x07" * MIB}
        primary.write("write -z 8M 128k")
        primary.write("write -P 0 9M 128k")
        primary.write("write -P 8 512 512")
        assert spans(primary.told()) == [(ZERO, 8 * MIB, 128 * KIB), (ZERO, 9 * MIB, 128 * KIB), (WRITE, 512, 512)]


def test_a_discard_is_told_or_changes_nothing(boot: Boot, tmp_path: Path) -> None:
    """QEMU 10 ignores what the guest discards while a mirror is there: then both sides keep their contents."""
    image = place(tmp_path, RAW)
    with followed(boot(image.arguments())) as primary:
        primary.write("write -P 7 0 4M")
        primary.follow()
        primary.write("discard 1M 1M")
        told = primary.told()
        quit_cleanly(primary.qemu)
    kept = image.path.read_bytes()[MIB:2 * MIB] == b"\x07" * MIB
    assert spans(told) == ([] if kept else [(DISCARD, MIB, MIB)])


def test_a_write_is_answered_only_when_it_is_confirmed(boot: Boot, tmp_path: Path) -> None:
    with followed(boot(place(tmp_path, QCOW2).arguments())) as primary:
        primary.follow()
        primary.begin("write -P 7 0 64k")
        wait_for("it is told", lambda: primary.mirror.receive())
        time.sleep(0.2)
        assert not primary.ended()
        primary.mirror.confirm()
        wait_for("it is answered", primary.ended)


def test_a_mirror_that_is_not_read_holds_the_writer_up(boot: Boot, tmp_path: Path) -> None:
    with followed(boot(place(tmp_path, QCOW2).arguments())) as primary:
        primary.follow()
        assert not readable(primary.mirror, 0)
        primary.begin("write -P 7 0 32M")
        assert readable(primary.mirror)
        time.sleep(0.2)
        assert not primary.ended()
        wait_for("it is answered", lambda: primary.serve() or primary.ended(), pause_s=0.0003)
        assert told_bytes(primary.told(), WRITE) == 32 * MIB


def test_a_command_does_not_wait_for_what_only_its_sender_can_take(boot: Boot, tmp_path: Path) -> None:
    with followed(boot(place(tmp_path, QCOW2).arguments())) as primary:
        primary.follow()
        primary.begin("aio_write -P 7 0 8M")
        assert readable(primary.mirror)
        # Both wait for the write's end, and so for us.
        primary.monitor.command("stop")
        primary.monitor.command("cont")
        assert primary.mirror.progress()[2]
        assert readable(primary.mirror, 0)
        primary.serve()
        assert told_bytes(primary.told(), WRITE) == 8 * MIB, "what was taken within the commands is lost"


def test_checkpoints_leave_the_mirrors_as_they_are(boot: Boot, tmp_path: Path) -> None:
    with followed(boot(place(tmp_path, QCOW2).arguments())) as primary:
        primary.follow()
        for number in range(5):
            primary.write(f"aio_write -P 7 {number}M 1M")
            primary.monitor.command("xen-save-devices-state", filename=str(tmp_path / "state"), live=False)
            primary.serve()
            assert told_bytes(primary.told(), WRITE) == MIB
        assert primary.mirror.progress()[2] and primary.qemu.is_running()
        assert not [message for message in primary.monitor.receive() if ended_mirror(message)]


# The end of a mirror


@pytest.mark.parametrize("shape", [QCOW2, Shape("qcow2", "iothread", size=SIZE)], ids=["main-thread", "iothread"])
def test_a_closed_mirror_frees_the_guest_and_leaves_nothing(shape: Shape, boot: Boot, tmp_path: Path) -> None:
    image = place(tmp_path, shape)
    with followed(boot(image.arguments())) as primary:
        primary.follow()
        primary.begin("write -P 7 0 4M")
        wait_for("it is told", lambda: primary.mirror.receive())
        primary.mirror.close()
        primary.mirror.close()
        wait_for("it is answered", primary.ended)
        primary.mirror.remove()
        assert not primary.jobs() and not primary.nodes()
        assert any(ended_mirror(message) for message in primary.monitor.receive())
        primary.begin("write -P 8 4M 4M")
        wait_for("the guest writes on", primary.ended)
        assert primary.qemu.is_running()
        quit_cleanly(primary.qemu)
    assert read(image, tmp_path)[:8 * MIB] == b"\x07" * 4 * MIB + b"\x08" * 4 * MIB


def test_a_mirror_that_is_followed_is_ended_and_not_hung_up_on(boot: Boot, tmp_path: Path) -> None:
    """QEMU would use memory that it has freed, if writes were under way."""
    with followed(boot(place(tmp_path, QCOW2).arguments())) as primary:
        primary.follow()
        for number in range(8):
            primary.begin(f"aio_write -P 7 {number}M 1M")
        wait_for("some are told", lambda: primary.mirror.receive())
        primary.mirror.close()
        assert not primary.jobs(), "it ended before the connection did"
        said = [*filter(None, map(ended_mirror, primary.monitor.receive()))]
        assert said == ["the mirror of a disk ended: somebody completed it"]
        primary.mirror.remove()
        assert not primary.nodes()


def test_the_first_copy_makes_no_write_of_the_guest_wait(boot: Boot, tmp_path: Path) -> None:
    with followed(boot(place(tmp_path, RAW).arguments()), speed=MIB) as primary:
        primary.mirror.start(())
        primary.serve()
        primary.begin("write -P 7 0 1M")
        wait_for("it is done, though nobody listens", primary.ended)
        assert not primary.mirror.progress()[2]
        primary.mirror.close()
        primary.mirror.remove()
        assert not primary.jobs() and not primary.nodes()


def test_a_guest_that_writes_all_the_time_is_followed_after_one_pass_over_its_disk(boot: Boot, tmp_path: Path) -> None:
    with followed(boot(place(tmp_path, RAW).arguments()), speed=64 * MIB) as primary:
        primary.mirror.start(())
        numbers = itertools.count()
        primary.begin("write -P 7 0 1M")

        def is_followed() -> bool:
            primary.serve()
            if primary.ended():
                primary.begin(f"write -P 7 {next(numbers) % 8}M 1M")
            return primary.mirror.progress()[2]

        wait_for("the mirrors follow", is_followed, pause_s=0.001)


@pytest.mark.parametrize("shape", [QCOW2, Shape("qcow2", "iothread", size=SIZE)], ids=["main-thread", "iothread"])
def test_an_engine_may_die_while_it_ends_its_mirrors(shape: Shape, boot: Boot, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    with followed(boot(place(tmp_path, shape).arguments())) as primary:
        primary.follow()
        for number in range(8):
            primary.begin(f"aio_write -P 7 {number}M 1M")
        wait_for("some are told", lambda: primary.mirror.receive())
        # It dies when it has asked, with all writes unanswered.
        monkeypatch.setattr(AttendedMonitor, "have_come", lambda *_: False)
        primary.mirror.close()
        goes_on_alone(primary, commands=8)


def test_an_engine_may_die_just_after_writes_began_to_wait_for_it(boot: Boot, tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    with followed(boot(place(tmp_path, RAW).arguments()), speed=64 * MIB) as primary:
        primary.mirror.start(())
        writes = 0
        asked: list[str] = []
        ask = primary.monitor.command
        monkeypatch.setattr(primary.monitor, "command", lambda name, **words: asked.append(name) or ask(name, **words))

        def is_changed() -> bool:
            nonlocal writes
            primary.serve()
            primary.begin(f"aio_write -P 7 {writes % 8}M 1M")
            writes += 1
            following = primary.mirror.progress()[2]
            assert not following, "what this look saw was before the change"
            return "block-job-change" in asked

        wait_for("all is copied once", is_changed, pause_s=0.005)
        # It dies: the mirrors are not followed yet, so nothing is ended.
        primary.mirror.close()
        goes_on_alone(primary, commands=writes)


def test_an_idle_mirror_is_removed_as_well(boot: Boot, tmp_path: Path) -> None:
    with followed(boot(place(tmp_path, QCOW2).arguments())) as primary:
        primary.follow()
        assert primary.jobs() and primary.nodes()
        primary.mirror.close()
        primary.mirror.remove()
        primary.mirror.remove()
        assert not primary.jobs() and not primary.nodes()


def test_nobody_waits_for_a_qemu_that_has_ended_though_it_had_something_to_say(boot: Boot, tmp_path: Path) -> None:
    with followed(boot(place(tmp_path, QCOW2).arguments())) as primary:
        primary.follow()
        primary.qemu.operator.command("stop")
        assert primary.monitor.have_come(lambda message: message.get("event") == "STOP", 1, 10.0)
        primary.qemu.kill()
        assert not primary.monitor.have_come(lambda message: False, 1, 3600.0)


def test_a_cancelled_mirror_is_told_of(boot: Boot, tmp_path: Path) -> None:
    with followed(boot(place(tmp_path, QCOW2).arguments())) as primary:
        primary.follow()
        primary.qemu.operator.command("block-job-cancel", device=primary.jobs()[0], force=True)
        said = wait_for("QEMU says so", lambda: [*filter(None, map(ended_mirror, primary.monitor.receive()))])
        assert said == ["somebody cancelled the mirror of a disk"]


def test_the_end_of_qemu_ends_the_mirror(boot: Boot, tmp_path: Path) -> None:
    with followed(boot(place(tmp_path, QCOW2).arguments())) as primary:
        primary.follow()
        primary.qemu.kill()
        with pytest.raises(MirrorLost, match="disk /machine/peripheral/disk0/virtio-backend ended"):
            wait_for("it is noticed", primary.serve, 5.0)
        with pytest.raises(MirrorLost):
            primary.mirror.receive()


def test_what_a_dead_engine_left_is_replaced_and_its_end_is_not_ours(boot: Boot, tmp_path: Path,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    with followed(boot(place(tmp_path, QCOW2).arguments())) as primary:
        with monkeypatch.context() as dead:
            dead.setattr(host_disks, "_MIRROR", "ftvm-disk-0-")
            primary.follow()
            # It dies, and has no time to end anything.
            primary.mirror._following = False
            primary.mirror.close()
        left = primary.jobs()
        again = Primary(primary.qemu, primary.monitor)
        with closing(again.mirror):
            assert again.disks == primary.disks, "the mirror before the image is not the image"
            again.follow()
            assert len(again.jobs()) == len(again.nodes()) == 1 and again.jobs() != left
            messages = again.monitor.receive()
            assert any(message.get("event") == "BLOCK_JOB_CANCELLED" for message in messages)
            assert not any(map(ended_mirror, messages))
            again.write("write -P 7 0 1M")
            assert told_bytes(again.told(), WRITE) == MIB


def test_a_disk_with_a_job_of_somebody_else_is_refused_and_left_alone(boot: Boot, tmp_path: Path) -> None:
    images = [place(tmp_path, RAW, number=0), place(tmp_path, QCOW2, number=1)]
    with followed(boot([word for image in images for word in image.arguments()])) as primary:
        operator = primary.qemu.operator
        operator.command("blockdev-add", driver="null-co", node_name="elsewhere", size=SIZE)
        operator.command("blockdev-mirror", job_id="theirs", device=primary.disks[1].node, target="elsewhere",
                         sync="none")
        with pytest.raises(InTheWay, match=r"disk1/virtio-backend cannot be mirrored: .* end that first"):
            primary.mirror.start(())
        primary.mirror.close()
        primary.mirror.remove()
        assert primary.jobs() == ["theirs"] and primary.nodes() == ["elsewhere"]


def test_only_the_guests_own_qemu_is_let_in(boot: Boot, tmp_path: Path) -> None:
    with followed(boot(place(tmp_path, QCOW2).arguments())) as primary:
        path = str(primary.qemu.folder / "disks.sock")
        assert os.stat(path).st_mode & 0o777 == 0o600
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.settimeout(5)
            stranger.connect(path)
            assert primary.mirror.receive() == []
            assert stranger.recv(100) == b""
        primary.follow()
        assert not os.path.exists(path), "nobody else has a reason to come"


# The standby


class Standby:
    """A standby whose disks are the replica."""

    def __init__(self, qemu: Qemu, monitor: AttendedMonitor) -> None:
        self.qemu = qemu
        self.monitor = monitor
        self.known = replicas(monitor)
        self.disks = StandbyDisks(monitor, self.known, str(qemu.folder / "replica.sock"))

    def exports(self) -> list[Any]:
        return self.qemu.operator.command("query-block-exports")


@contextmanager
def writable(qemu: Qemu) -> Iterator[Standby]:
    with qemu.monitor() as monitor:
        standby = Standby(qemu, monitor)
        with closing(standby.disks):
            yield standby


def random_commands(seed: int) -> Iterator[str]:
    """qemu-io commands all over the disk; many overlap, and many are under way together."""
    rng = random.Random(seed)
    for number in range(300):
        length = rng.choice((512, 4 * KIB, 12 * KIB, 64 * KIB, 200 * KIB, 3 * MIB))
        offset = rng.randrange((4 * MIB if number % 3 else SIZE) // SECTOR) * SECTOR
        length = min(length, SIZE - offset)
        yield rng.choice((f"aio_write -P {number % 255 + 1} {offset} {length}",) * 4 + (
            f"write -z -u {offset} {length}", f"write -z {offset} {length}"))


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_replica_of_a_written_disk_is_identical(shape: Shape, seed: int, boot: Boot, tmp_path: Path,
                                                    contents: Path) -> None:
    ours = place(tmp_path / "p", shape, contents)
    theirs = place(tmp_path / "b", shape, base_of(shape, contents))
    with followed(boot(ours.arguments())) as primary, \
            writable(boot(theirs.arguments(), standby=True)) as standby:
        assert (standby.known[0].base == primary.disks[0].base) and bool(primary.disks[0].base) == (
            shape.form == "backed")
        primary.mirror.start([0] if primary.disks[0].base else [])
        # The first copy is under way.
        for command in random_commands(seed):
            primary.write(command)
            standby.disks.submit(primary.told())
            standby.disks.advance()
        primary.write("aio_flush")
        wait_for("the mirror follows", lambda: primary.serve() or primary.mirror.progress()[2], pause_s=0.001)
        primary.serve()
        standby.disks.submit(primary.told())
        standby.disks.settle(20.0)
        assert standby.exports() == [] and standby.disks.backlog == 0
        for qemu in (primary.qemu, standby.qemu):
            quit_cleanly(qemu)
    assert same(ours.path, theirs.path)
    assert not same(ours.path, contents), "nothing was written"


def test_a_guests_disk_is_replicated_while_it_works(launch: Launch, image_folder: Path) -> None:
    shape = Shape("backed", "iothread", size=64 * MIB)
    contents = image_folder / "contents"
    fill(contents, "a", 32 * MIB)
    ours, theirs = place(image_folder / "p", shape, contents), place(image_folder / "b", shape, contents)
    guest = launch("p", work="ledger:vda", extra=ours.arguments())
    guest.await_boot()
    with followed(guest) as primary, \
            writable(launch("b", extra=theirs.arguments(), standby=True)) as standby:
        primary.mirror.start([0])

        def forward() -> None:
            primary.serve()
            standby.disks.submit(primary.told())
            standby.disks.advance()

        wait_for("the mirror follows", lambda: forward() or primary.mirror.progress()[2], pause_s=0.001)
        checks = guest.log().count("sound ledger")
        wait_for("the guest checks its disk", lambda: forward() or guest.log().count("sound ledger") > checks + 3,
                 30.0, 0.001)
        primary.monitor.command("stop")
        forward()
        standby.disks.settle(20.0)
        for qemu in (guest, standby.qemu):
            quit_cleanly(qemu)
    assert "CORRUPT" not in guest.log()
    assert same(ours.path, theirs.path)


def test_read_only_disks_are_told_whole_and_written_in_their_files(boot: Boot, tmp_path: Path) -> None:
    shape = Shape("raw", "cdrom", size=3 * MIB + 2 * KIB)
    contents = tmp_path / "contents"
    fill(contents, "a", shape.size, hole_each=2)
    ours, theirs = place(tmp_path / "p", shape, contents), place(tmp_path / "b", shape)
    with followed(boot(ours.arguments())) as primary, \
            writable(boot(theirs.arguments(), standby=True)) as standby:
        theirs.path.write_bytes(b"\xff" * shape.size)
        assert primary.follow() == [] and primary.mirror.progress() == (0, 0, True)
        told = list(read_only_contents(primary.disks))
        assert spans(told) == [(WRITE, 0, MIB), (ZERO, MIB, MIB), (WRITE, 2 * MIB, MIB), (ZERO, 3 * MIB, 2 * KIB)]
        standby.disks.submit(told)
        standby.disks.settle(5.0)
    assert theirs.path.read_bytes() == contents.read_bytes()


@pytest.fixture
def small_place(tmp_path: Path, needs_guests: None) -> Iterator[Path]:
    """A file system of 8 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "small", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_replica_fails_with_what_to_do_and_can_be_closed(boot: Boot, small_place: Path) -> None:
    image = place(small_place, RAW)
    with writable(boot(image.arguments(), standby=True)) as standby:
        standby.disks.submit([DiskWrite(0, WRITE, number * MIB, MIB, b"x" * MIB) for number in range(20)])
        with pytest.raises(ReplicaFailed, match=f"No space left on device .{image.path}.: make room there"):
            standby.disks.settle(10.0)
        standby.disks.close()
        assert standby.exports() == []


def test_settling_has_an_end(boot: Boot, tmp_path: Path) -> None:
    qemu = boot(["-object", "throttle-group,id=slow,x-bps-write=65536",
                 "-blockdev", f"file,node-name=file,filename={place(tmp_path, RAW).path}",
                 "-blockdev", "throttle,node-name=slow,throttle-group=slow,file=file",
                 "-device", "virtio-blk-pci,drive=slow"], standby=True)
    with qemu.monitor() as monitor, closing(StandbyDisks(
            monitor, [Disk("slow", SIZE, False, node="slow")], str(qemu.folder / "replica.sock"))) as disks:
        disks.submit([DiskWrite(0, WRITE, number * MIB, MIB, b"x" * MIB) for number in range(4)])
        with pytest.raises(ReplicaFailed, match=r"bytes were not written within 0.2 s"):
            disks.settle(0.2)


def test_the_end_of_the_standby_is_a_failed_replica(boot: Boot, tmp_path: Path) -> None:
    with writable(boot(place(tmp_path, QCOW2).arguments(), standby=True)) as standby:
        standby.qemu.kill()
        with pytest.raises(ReplicaFailed, match="QEMU ended the writing of disk"):
            wait_for("it is noticed", standby.disks.advance, 5.0)


def test_a_write_larger_than_qemu_takes_is_split(boot: Boot, tmp_path: Path) -> None:
    image = place(tmp_path, Shape("raw", size=6 << 30))
    with writable(boot(image.arguments(), standby=True)) as standby:
        standby.disks.submit([DiskWrite(0, WRITE, MIB, 40 * MIB, b"x" * 40 * MIB), DiskWrite(0, ZERO, 0, 6 << 30),
                              DiskWrite(0, WRITE, 5 << 30, 3, b"abc")])
        standby.disks.settle(20.0)
        quit_cleanly(standby.qemu)
    with image.path.open("rb") as file:
        assert file.read(64 * MIB) == bytes(64 * MIB)
        file.seek(5 << 30)
        assert file.read(4) == b"abc\0"


def test_what_a_dead_engine_exported_is_exported_anew(boot: Boot, tmp_path: Path) -> None:
    with writable(boot(place(tmp_path, QCOW2).arguments(), standby=True)) as standby:
        standby.disks.submit([DiskWrite(0, WRITE, 0, MIB, b"x" * MIB)])
        standby.disks.advance()
        again = StandbyDisks(standby.monitor, standby.known, str(standby.qemu.folder / "replica.sock"))
        again.submit([DiskWrite(0, WRITE, 0, MIB, b"y" * MIB)])
        again.settle(5.0)
        assert standby.exports() == []
