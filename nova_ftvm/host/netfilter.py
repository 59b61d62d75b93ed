"""QEMU's filters on the guest's network interfaces: added, found and removed by name, each with a socket of ours.

`rx` is the way of what the guest sends, `tx` of what it gets (QEMU names them from the netdev's side).
"""

import fcntl
import socket
import struct
import termios
from collections.abc import Iterable

from nova_ftvm.host import qmp

#: Of an interface, in the order in which they are removed: first what takes packets, then what they are for.
OUT, IN, TEE, HEARD, SAID = _KINDS = ("ftvm-out", "ftvm-in", "ftvm-tee", "ftvm-heard", "ftvm-said")

_SO_SNDBUFFORCE = 32


def interfaces(monitor: qmp.Monitor) -> dict[str, bytes]:
    """Ids of the netdevs behind the guest's network devices, whatever their model, and the devices' addresses."""
    found = {}
    for child in monitor.command("qom-list", path="/machine/peripheral"):
        if not child["type"].startswith("child<"):
            continue
        path = f"/machine/peripheral/{child['name']}"
        if any(p["name"] == "netdev" for p in monitor.command("qom-list", path=path)):
            netdev = monitor.command("qom-get", path=path, property="netdev")
            if netdev:
                mac = monitor.command("qom-get", path=path, property="mac")
                found[netdev] = bytes.fromhex(mac.replace(":", ""))
    return found


def pair(room_bytes: int) -> tuple[socket.socket, socket.socket]:
    """Our end, which does not block, and QEMU's. So much fits in between."""
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, room_bytes)
    ours.setblocking(False)
    return ours, theirs


def is_taken(end: socket.socket) -> bool:
    """Has QEMU read all that was written there?"""
    return struct.unpack("i", fcntl.ioctl(end, termios.TIOCOUTQ, b"\0" * 4))[0] == 0


def add(monitor: qmp.Monitor, kind: str, netdev: str, end: socket.socket, *, type: str, queue: str, way: str) -> None:
    """Of several filters the one added last sees the guest's packets first. `end` is QEMU's from then on.

    type: filter-redirector or filter-mirror. way: indev, what comes from us, or outdev, what goes to us.
    Raises QemuError for an interface that takes no filter.
    """
    name = f"{kind}-{netdev}"
    monitor.give(name, end)
    end.close()
    monitor.command("chardev-add", id=name, backend={
        "type": "socket", "data": {"addr": {"type": "fd", "data": {"str": name}}, "server": False}})
    monitor.command("object-add", qom_type=type, id=name, netdev=netdev, queue=queue, **{way: name})


def bypass(monitor: qmp.Monitor, kind: str, netdev: str) -> None:
    """From now on packets go past that filter; its end of the socket stays."""
    monitor.command("object-del", id=f"{kind}-{netdev}")


def drop(monitor: qmp.Monitor, kind: str, netdev: str) -> None:
    """What `add` made."""
    bypass(monitor, kind, netdev)
    monitor.command("chardev-remove", id=f"{kind}-{netdev}")


def remove(monitor: qmp.Monitor, netdevs: Iterable[str]) -> None:
    """Takes all filters away, whoever made them. From then on the guest is heard."""
    filters = {child["name"] for child in monitor.command("qom-list", path="/objects")}
    devices = {device["label"] for device in monitor.command("query-chardev")}
    for name in (f"{kind}-{netdev}" for kind in _KINDS for netdev in netdevs):
        if name in filters:
            monitor.command("object-del", id=name)
        if name in devices:
            monitor.command("chardev-remove", id=name)
