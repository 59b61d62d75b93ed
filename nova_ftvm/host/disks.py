"""The guest's disks in QEMU: which there are, the primary's mirrors, the standby's replicas. No policy.

On the primary a mirror job tells each write to an NBD server in this process (DiskMirror) before the guest learns that
it is done. On the standby QEMU's own NBD server lets this process write the guest's disks (StandbyDisks), as in a
migration with non-shared storage. Why so: doc/source/contributor/decisions/own-nbd.rst.
"""

import contextlib
import hashlib
import logging
import math
import os
import select
import struct
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from nova_ftvm import ports
from nova_ftvm.core.disk import DiskOp, DiskWrite
from nova_ftvm.exception import GuestGone, InTheWay, MirrorLost, QemuError, ReplicaFailed, Unsupported
from nova_ftvm.host import qmp
from nova_ftvm.host.nbd import NbdClient, NbdServer
from nova_ftvm.types import Disk

LOG = logging.getLogger(__name__)

#: Jobs and nodes of all engines, this one's, and exports. What a dead engine left is not this one's.
_MIRRORS = "ftvm-disk-"
_MIRROR = f"{_MIRRORS}{os.getpid()}-"
#: The id of what asks for their end.
_END = "end"
_REPLICA = "ftvm-replica-"

_PIECE_BYTES = 1 << 20

#: What a fingerprint reads of a file: both ends, and blocks spread evenly.
_END_BYTES = 1 << 20
_SAMPLE_BYTES, _SAMPLES = 1 << 16, 256

_QCOW2 = struct.Struct(">4sIQIIQIIQ")
_QCOW2_MAGIC = b"QFI\xfb"

#: Since then a mirror's copy mode can be changed.
_CHANGES_MODE = (8, 2)
#: For mirrors to end in order: for the writes that are under way, on whatever disk.
_END_S = 0.5
_REMOVE_S = 2.0
_POLL_S = 0.002


# Which there are


def guest_disks(monitor: qmp.Monitor) -> list[Disk]:
    """The guest's disks, sorted by device. Drives without a medium are left out.

    Raises Unsupported for a disk that cannot be replicated.
    """
    return sorted((_disk(drive) for drive in monitor.command("query-block")
                   if drive.get("qdev") and "inserted" in drive and not _is_flash(monitor, drive["qdev"])),
                  key=lambda disk: disk.device)


def replicas(monitor: qmp.Monitor) -> list[Disk]:
    """The standby's disks. One that was written to counts as lying on nothing: its base is not all that it shows."""
    return [disk if is_blank(disk.path) else Disk(disk.device, disk.size, disk.read_only, "", disk.node, disk.path)
            for disk in guest_disks(monitor)]


def is_blank(path: str) -> bool:
    """Is it a qcow2 image that nothing was written to, so that all it shows is its base's?"""
    with open(path, "rb") as image:
        head = image.read(_QCOW2.size)
        if len(head) < _QCOW2.size or not head.startswith(_QCOW2_MAGIC):
            return False
        entries, table = _QCOW2.unpack(head)[-2:]
        image.seek(table)
        # Whatever is allocated hangs from the first level table.
        return not image.read(8 * entries).strip(b"\0")


def fingerprint(path: str) -> str:
    """Tells a base image by its name, its size and samples of its contents: some tens of MiB are read at most.

    Nova names a base by its image's id, and makes it from the image alike on every host. What differs from host to host
    (a file system made there) differs in its first MiB.
    """
    with open(path, "rb") as image:
        size = image.seek(0, os.SEEK_END)
        seen = hashlib.sha256(f"{os.path.basename(path)} {size}".encode())
        for offset in _samples(size):
            contents = os.pread(image.fileno(), _SAMPLE_BYTES, offset)
            # Holes and zeros read alike; this is only faster.
            seen.update(b"0" if contents == bytes(len(contents)) else b"1" + contents)
    return seen.hexdigest()


def _samples(size: int) -> list[int]:
    """Offsets of the blocks that are looked at."""
    step = max(_SAMPLE_BYTES, size // _SAMPLES)
    wanted = {*range(0, min(size, _END_BYTES), _SAMPLE_BYTES), *range(0, size, step),
              *range(max(0, size - _END_BYTES), size, _SAMPLE_BYTES)}
    return sorted(wanted)


def _disk(drive: dict[str, Any]) -> Disk:
    device, medium = drive["qdev"], drive["inserted"]
    image, path = medium["image"], medium["file"]
    if not path.startswith("/"):
        raise Unsupported(f"disk {device} is no plain file or device of this host ({path}): use local disks")
    if medium["ro"] and (medium["drv"] not in ("raw", "file") or "backing-image" in image):
        raise Unsupported(f"disk {device} is read-only and of format {medium['drv']}: use a raw image")
    return Disk(device, image["virtual-size"], medium["ro"], _base(image), medium["node-name"], path)


def _base(image: dict[str, Any]) -> str:
    backing = image.get("backing-image")
    # A longer chain than Nova makes is not compared, but copied whole.
    if backing is None or "backing-image" in backing or not backing["filename"].startswith("/"):
        return ""
    return fingerprint(backing["filename"])


def _is_flash(monitor: qmp.Monitor, device: str) -> bool:
    """Firmware: its contents are a RAM block."""
    return device.startswith("/") and "pflash" in monitor.command("qom-get", path=device, property="type")


# The primary


class AttendedMonitor(qmp.Monitor):
    """A monitor during whose commands something else is served.

    QEMU's main thread often waits for the guest's disk requests (a stop, a device's reset, any change of a chain of
    images), and so for whoever takes the mirrors' writes. That must not be waiting for QEMU's main thread.
    """

    _beside: tuple[ports.Pollable, Callable[[], None]] | None = None

    def attend(self, door: ports.Pollable, serve: Callable[[], None]) -> None:
        """From now on `serve` is called when `door` is readable while an answer is waited for."""
        self._beside = (door, serve)

    def ignore(self) -> None:
        self._beside = None

    def have_come(self, wanted: Callable[[qmp.Message], bool], number: int, timeout_s: float) -> bool:
        """Waits for so many messages of a kind. They, and all others, are kept for `receive`."""
        deadline = self._clock() + timeout_s
        while sum(map(wanted, self._waiting)) < number:
            if not self._comes(deadline):
                return False
            known = len(self._waiting), self._rest
            self._fill()
            if known == (len(self._waiting), self._rest):
                return False  # QEMU has closed it, which is told once all else is received.
        return True

    def _wait(self, events: int, deadline: float) -> None:
        self._serve_until(events, deadline)
        super()._wait(events, deadline)

    def _comes(self, deadline: float) -> bool:
        """Does QEMU say something before that?"""
        self._serve_until(select.POLLIN, deadline)
        return bool(select.select([self], [], [], max(0.0, deadline - self._clock()))[0])

    def _serve_until(self, events: int, deadline: float) -> None:
        """Until QEMU is ready for that, or the time is over, or nothing is to be served."""
        while self._beside is not None:
            door, serve = self._beside
            poll = select.poll()
            poll.register(self, events)
            poll.register(door, select.POLLIN)
            left = deadline - self._clock()
            ready = [fd for fd, _ in poll.poll(max(0.0, left) * 1000)]
            if not ready or self.fileno() in ready or left <= 0:
                return
            serve()


class DiskMirror:
    """ports.Mirror of one guest."""

    def __init__(self, monitor: AttendedMonitor, disks: Sequence[Disk], socket_path: str, owner: tuple[int, int],
                 speed_bytes_s: int, max_request: int) -> None:
        """owner: (uid, gid) of QEMU. speed_bytes_s: of what the disks hold already; 0 for no limit.
        max_request: bytes that one write has at most."""
        self.disks = disks
        self._monitor = monitor
        self._socket_path = socket_path
        self._speed = speed_bytes_s
        self._server = NbdServer(socket_path, owner, monitor.pid, disks, max_request)
        self._mirrored = [number for number, disk in enumerate(disks) if not disk.read_only]
        #: Jobs that make the guest's writes wait for us.
        self._blocking: set[str] = set()
        #: Bytes that a job had to copy when it began.
        self._whole: dict[str, int] = {}
        #: Is each write followed?
        self._following = False

    def fileno(self) -> int:
        return self._server.fileno()

    def start(self, shallow: Collection[int]) -> None:
        """As ports.Mirror says. Raises InTheWay for a disk that QEMU does not mirror; `remove` also then."""
        remove_mirrors(self._monitor)
        self._monitor.attend(self._server, self._attend)
        version = self._monitor.command("query-version")["qemu"]
        if (version["major"], version["minor"]) < _CHANGES_MODE:
            self._blocking = {f"{_MIRROR}{number}" for number in self._mirrored}
        try:
            # Within blockdev-add QEMU waits for our greeting.
            for number in self._mirrored:
                self._monitor.command("blockdev-add", **self._target(number))
            for number in self._mirrored:
                self._monitor.command("blockdev-mirror", **self._job(number, number in shallow))
        except QemuError as error:
            raise InTheWay(f"disk {self.disks[number].device} cannot be mirrored: {error.description}. "
                           "If it has a block job of somebody else, end that first") from error
        self._server.close_door()

    def progress(self) -> tuple[int, int, bool]:
        jobs = [job for job in self._monitor.command("query-block-jobs") if job["device"].startswith(_MIRROR)]
        for job in jobs:
            self._block_when_copied(job)
        # QEMU tells "actively-synced" since 8.2; before, a job with our copy mode that is ready is just that.
        following = sum(job["ready"] and job.get("actively-synced", True) for job in jobs)
        self._following = following == len(self._mirrored)
        return sum(job["offset"] for job in jobs), sum(job["len"] for job in jobs), self._following

    def receive(self) -> list[DiskWrite]:
        return self._server.receive()

    def confirm(self) -> None:
        self._server.confirm()

    def close(self) -> None:
        if self._following:
            self._following = False
            with contextlib.suppress(GuestGone):
                self._end_in_order()
        self._monitor.ignore()
        self._server.close()

    def remove(self) -> None:
        remove_mirrors(self._monitor, _MIRROR)

    def _block_when_copied(self, job: dict[str, Any]) -> None:
        """From now on the guest's writes wait for us, which also makes an end of the copy for a guest that writes much.

        Not before: when a mirror fails, QEMU frees what a write that waits is still to use (doc/source/contributor/
        decisions/mirrors-end-in-order.rst), and a first copy may fail because of the backup.
        """
        name = job["device"]
        if name in self._blocking:
            return
        if job["len"]:
            self._whole.setdefault(name, job["len"])
        if job["ready"] or job["offset"] >= self._whole.get(name, math.inf):
            self._blocking.add(name)
            with contextlib.suppress(QemuError):  # It ended just now, and is told as lost.
                self._monitor.command("block-job-change", id=name, type="mirror", copy_mode="write-blocking")

    def _end_in_order(self) -> None:
        """A mirror that is asked to end when it is complete waits for all writes first; until then we answer them."""
        self._attend()
        for number in self._mirrored:
            self._monitor.send(qmp.encode("block-job-cancel", {"device": f"{_MIRROR}{number}"}, _END))

        def is_over(message: qmp.Message) -> bool:
            return bool(ended_mirror(message)) or (message.get("id") == _END and "error" in message)

        if not self._monitor.have_come(is_over, len(self._mirrored), _END_S):
            LOG.warning("QEMU did not end the mirrors within %g s: they are cut off", _END_S)

    def _attend(self) -> None:
        try:
            self._server.attend()
        except MirrorLost:
            # Whoever receives next is told.
            self._monitor.ignore()

    def _target(self, number: int) -> dict[str, Any]:
        # Zeros that the guest writes, or that are no hole in its image, are told as such.
        return {"driver": "nbd", "node-name": f"{_MIRROR}{number}", "export": str(number), "discard": "unmap",
                "detect-zeroes": "unmap", "server": {"type": "unix", "path": self._socket_path}}

    def _job(self, number: int, shallow: bool) -> dict[str, Any]:
        name = f"{_MIRROR}{number}"
        return {"job-id": name, "device": self.disks[number].node, "target": name,
                "sync": "top" if shallow else "full", "speed": self._speed,
                "copy-mode": "write-blocking" if name in self._blocking else "background",
                "on-source-error": "report", "on-target-error": "report"}


def ended_mirror(message: qmp.Message) -> str:
    """Why a mirror of this process is over, when the QMP message says that one is; '' otherwise.

    A job that somebody cancelled leaves its connection open: nothing else tells that no write comes any more.
    """
    job = message.get("data", {}).get("device", "") if message.get("event", "").startswith("BLOCK_JOB_") else ""
    if not job.startswith(_MIRROR):
        return ""
    if message["event"] == "BLOCK_JOB_CANCELLED":
        return "somebody cancelled the mirror of a disk"
    if message["event"] == "BLOCK_JOB_COMPLETED":
        return f"the mirror of a disk ended: {message['data'].get('error', 'somebody completed it')}"
    if message["event"] == "BLOCK_JOB_ERROR":
        return f"the mirror of a disk failed to {message['data']['operation']}"
    return ""


def read_only_contents(disks: Sequence[Disk]) -> Iterator[DiskWrite]:
    """What the read-only disks hold: they are told once, whole."""
    for number, disk in enumerate(disks):
        if not disk.read_only:
            continue
        with open(disk.path, "rb") as image:
            offset = 0
            while contents := image.read(_PIECE_BYTES):
                if contents == bytes(len(contents)):
                    yield DiskWrite(number, DiskOp.ZERO, offset, len(contents))
                else:
                    yield DiskWrite(number, DiskOp.WRITE, offset, len(contents), contents)
                offset += len(contents)


def remove_mirrors(monitor: qmp.Monitor, prefix: str = _MIRRORS) -> None:
    """Ends the jobs of that name, by default every engine's, dead or alive, and takes their targets away; raises
    QemuError for what is still there after all."""
    deadline = time.monotonic() + _REMOVE_S
    for job in _jobs(monitor, prefix):
        with contextlib.suppress(QemuError):  # It ended just now.
            monitor.command("job-cancel", id=job)
    while _jobs(monitor, prefix) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    for node in monitor.command("query-named-block-nodes", flat=True):
        if node["node-name"].startswith(prefix):
            monitor.command("blockdev-del", node_name=node["node-name"])


def _jobs(monitor: qmp.Monitor, prefix: str) -> list[str]:
    return [job["id"] for job in monitor.command("query-jobs") if job["id"].startswith(prefix)]


# The standby


class StandbyDisks:
    """ports.ReplicaDisks in a QEMU that waits for its stream.

    The disks are written through QEMU's own block nodes, those that the guest will use: when `settle` is over, the
    guest sees what was written, whatever QEMU or the host cache. Read-only disks are written in their files, which only
    the guest could read, and it does not run.
    """

    def __init__(self, monitor: qmp.Monitor, disks: Sequence[Disk], socket_path: str) -> None:
        """socket_path: where QEMU may make a socket. Raises ReplicaFailed or QemuError."""
        self.disks = disks
        self._monitor = monitor
        self._clients: dict[int, NbdClient] = {}
        self._epoll = select.epoll()
        self._waiting: dict[int, int] = {}
        self._stop_exports()
        try:
            monitor.command("nbd-server-start", addr={"type": "unix", "data": {"path": socket_path}})
            for number, disk in enumerate(disks):
                if not disk.read_only:
                    self._open(number, disk, socket_path)
        except BaseException:
            self.close()
            raise

    def _open(self, number: int, disk: Disk, socket_path: str) -> None:
        self._monitor.command("block-export-add", type="nbd", id=f"{_REPLICA}{number}", node_name=disk.node,
                              name=str(number), writable=True)
        client = self._clients[number] = NbdClient(socket_path, number, disk)
        self._epoll.register(client, select.EPOLLIN)

    def fileno(self) -> int:
        return self._epoll.fileno()

    @property
    def backlog(self) -> int:
        return sum(client.backlog for client in self._clients.values())

    def submit(self, writes: Sequence[DiskWrite]) -> None:
        for write in writes:
            if self.disks[write.disk].read_only:
                self._write_file(write)
            else:
                self._clients[write.disk].submit(write)

    def advance(self) -> None:
        for client in self._clients.values():
            client.advance()
            self._watch(client)

    def settle(self, timeout_s: float) -> None:
        """Raises ReplicaFailed also when that takes too long."""
        deadline = time.monotonic() + timeout_s
        self.advance()
        while self.backlog:
            if not self._epoll.poll(max(0.0, deadline - time.monotonic())):
                raise ReplicaFailed(f"{self.backlog} bytes were not written within {timeout_s:g} s: the disks are slow")
            self.advance()
        self._hang_up()
        self._stop_exports()
        if any(export["id"].startswith(_REPLICA) for export in self._monitor.command("query-block-exports")):
            raise ReplicaFailed("QEMU still exports the disks")

    def close(self) -> None:
        self._hang_up()
        with contextlib.suppress(GuestGone):
            self._stop_exports()

    def _hang_up(self) -> None:
        self._epoll.close()
        for client in self._clients.values():
            client.close()
        self._clients.clear()

    def _stop_exports(self) -> None:
        """Ends all exports, a dead engine's too; returns when they are gone."""
        with contextlib.suppress(QemuError):  # There is no server.
            self._monitor.command("nbd-server-stop")

    def _watch(self, client: NbdClient) -> None:
        """Wakes up for room in a socket only while something waits for it."""
        wanted = select.EPOLLIN | select.EPOLLOUT if client.wants_room else select.EPOLLIN
        if self._waiting.get(client.fileno(), select.EPOLLIN) != wanted:
            self._waiting[client.fileno()] = wanted
            self._epoll.modify(client, wanted)

    def _write_file(self, write: DiskWrite) -> None:
        disk = self.disks[write.disk]
        contents = write.contents if write.op is DiskOp.WRITE else bytes(write.length)
        if write.offset + len(contents) > disk.size:
            raise ReplicaFailed(f"disk {disk.device} is smaller here than on the primary")
        try:
            with open(disk.path, "r+b") as image:
                image.seek(write.offset)
                image.write(contents)
        except OSError as error:
            raise ReplicaFailed(f"disk {disk.device} could not be written: {error.strerror} ({disk.path}): "
                                "make room there") from error
