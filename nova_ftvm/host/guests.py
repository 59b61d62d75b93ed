"""The guests of this host, by server UUID: runtime folders, domains, monitors. agent.Guests' implementation."""

import contextlib
import os
import pwd
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from nova_ftvm.core.stream import ANNOUNCE
from nova_ftvm.exception import GuestGone, QemuError, Unsupported
from nova_ftvm.host import netfilter, note, qmp
from nova_ftvm.host.disks import remove_mirrors
from nova_ftvm.host.libvirt import Host

MONITOR = "monitor.sock"

Result = TypeVar("Result")


def owner(user: str) -> tuple[int, int]:
    """(uid, gid) of the user that QEMU runs as."""
    try:
        entry = pwd.getpwnam(user)
    except KeyError as error:
        raise Unsupported(f"there is no user {user}: set [agent]qemu_user to libvirt's qemu.conf's") from error
    return entry.pw_uid, entry.pw_gid


class Guests:
    """Runtime folders lie below `runtime_dir`, one a server, and belong to QEMU's user: QEMU makes sockets there."""

    def __init__(self, runtime_dir: str, qemu_owner: tuple[int, int], libvirt_uri: str) -> None:
        self._runtime_dir = runtime_dir
        self._owner = qemu_owner
        self._uri = libvirt_uri

    def folder(self, instance_id: str) -> str:
        return os.path.join(self._runtime_dir, instance_id)

    def make_folder(self, instance_id: str) -> str:
        folder = self.folder(instance_id)
        os.makedirs(folder, mode=0o750, exist_ok=True)
        os.chown(folder, *self._owner)
        return folder

    def sweep(self, keep_s: float) -> None:
        """Removes the folders of servers that are gone, once nothing in them has changed for so long."""
        for entry in os.scandir(self._runtime_dir):
            with os.scandir(entry.path) as files:
                newest = max(place.stat(follow_symlinks=False).st_mtime for place in (entry, *files))
            if time.time() - newest > keep_s and not _is_served(os.path.join(entry.path, MONITOR)):
                shutil.rmtree(entry.path, ignore_errors=True)

    def live_xml(self, instance_id: str) -> str:
        return self._libvirt(lambda host: host.live_xml(instance_id))

    def disk_size(self, instance_id: str, target: str) -> int:
        return self._libvirt(lambda host: host.disk_size(instance_id, target))

    def has_monitor(self, instance_id: str, domain_xml: str) -> bool:
        """Was the domain started with our monitor?"""
        path = os.path.join(self.folder(instance_id), MONITOR)
        return path in domain_xml and os.path.exists(path)

    def destroy(self, instance_id: str) -> bool:
        destroyed = self._libvirt(lambda host: host.destroy(instance_id))
        note.remove(self.folder(instance_id))
        return destroyed

    def is_standby(self, instance_id: str) -> bool:
        """Does a QEMU wait here for its stream? False when none runs, or when it was ever promoted."""
        return self._status(instance_id) == "inmigrate"

    def finish_promotion(self, instance_id: str) -> bool:
        """Does the guest run here that a backup's engine was promoting when it ended? One that has its checkpoint and
        was not resumed yet is resumed: an engine loads it by the arbiter's grant only, and it has never run, so nobody
        else has paused it. False: there is no guest, or it never got its checkpoint. Raises GuestGone or QemuError
        when it is not resumed."""
        status = self._status(instance_id)
        if status not in ("paused", "running"):
            return False
        with self._monitor(instance_id) as monitor:
            if status == "paused":
                monitor.command("cont")
            monitor.command("announce-self", **ANNOUNCE)
        return True

    def let_go(self, instance_id: str) -> None:
        """Lets the guest be heard whose engine is dead, and lets go of its disks: the mirror of one that nobody writes
        to would never notice. Only with the arbiter's grant, or disarmed."""
        with self._monitor(instance_id) as monitor:
            netfilter.remove(monitor, netfilter.interfaces(monitor))
            remove_mirrors(monitor)
        note.remove(self.folder(instance_id))

    def _status(self, instance_id: str) -> str:
        """QEMU's word for what the guest does; '' when nobody answers."""
        try:
            with self._monitor(instance_id) as monitor:
                return str(monitor.command("query-status")["status"])
        except (GuestGone, QemuError):
            return ""

    @contextlib.contextmanager
    def _monitor(self, instance_id: str) -> Iterator[qmp.Monitor]:
        monitor = qmp.Monitor(os.path.join(self.folder(instance_id), MONITOR))
        try:
            yield monitor
        finally:
            monitor.close()

    def _libvirt(self, call: Callable[[Host], Result]) -> Result:
        """A connection for each call: libvirtd may be restarted at any time."""
        host = Host(self._uri)
        try:
            return call(host)
        finally:
            host.close()


def _is_served(path: str) -> bool:
    """Does a QEMU listen there?"""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
    return True
