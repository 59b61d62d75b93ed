"""Output commit by QEMU's own netfilters: the engine stands in the way of what the guest sends.

    guest -> virtio queue -> [out] ...  ... [in] -> tap
                               |         ^
                               v         |
                        the engine: held until its epoch is committed (core/output.py)

Both are filter-redirectors, each with one end of a socket pair as its character device: `out` gives each packet to
the engine as soon as it is sent, `in` takes back what may go. No command, and no parsing, for either: what waits is
seen by a read, what is committed goes by a write.

An engine that dies takes what it held with it. From then on QEMU throws away what the guest sends, as nobody reads
it, until the filters are removed: with the arbiter's grant, or disarmed. TCP sends it again.
Source: QEMU, net/filter-mirror.c. Why not its filter-buffer: doc/source/contributor/decisions/output-redirected.rst.
"""

import fcntl
import logging
import select
import socket
import struct
import termios
import time

from nova_ftvm.core.outbox import Outbox
from nova_ftvm.core.output import HeldOutput
from nova_ftvm.exception import OutputLost, QemuError, Unsupported
from nova_ftvm.host import qmp

LOG = logging.getLogger(__name__)

_IN, _OUT = "ftvm-in", "ftvm-out"
#: What is held of each interface at most, beside what the kernel holds. A checkpoint is due long before (`is_filling`).
_LIMIT_BYTES = 64 << 20
#: What QEMU may write while the engine does something else. When that is full QEMU waits, and the guest with it, until
#: the engine reads on or the watchdog ends it.
_KERNEL_BYTES = 16 << 20
_CHUNK = 1 << 18
#: Taken at once at most: more than the kernel holds, so all that a guest that stands still has sent.
_MOST_CHUNKS = 4 * _KERNEL_BYTES // _CHUNK
_SO_SNDBUFFORCE = 32
#: For QEMU to take what may go, before the filters are removed.
_TAKEN_S = 1.0
_TAKEN_STEP_S = 0.2e-3


def interfaces(monitor: qmp.Monitor) -> list[str]:
    """Ids of the netdevs behind the guest's network devices, whatever their model."""
    found = []
    for child in monitor.command("qom-list", path="/machine/peripheral"):
        if not child["type"].startswith("child<"):
            continue
        path = f"/machine/peripheral/{child['name']}"
        if any(p["name"] == "netdev" for p in monitor.command("qom-list", path=path)):
            netdev = monitor.command("qom-get", path=path, property="netdev")
            if netdev:
                found.append(netdev)
    return found


class OutputBuffer:
    """ports.NetBuffer of one guest."""

    def __init__(self, monitor: qmp.Monitor, netdevs: list[str]) -> None:
        self._monitor = monitor
        self._netdevs = netdevs
        self._valves: list[_Valve] = []
        self._epoll = select.epoll()

    def fileno(self) -> int:
        return self._epoll.fileno()

    def install(self) -> None:
        """From now on nothing leaves but by `release`. Leftovers of an engine that died are removed first."""
        remove_filters(self._monitor, self._netdevs)
        for netdev in self._netdevs:
            valve = _Valve(netdev, self._epoll)
            self._valves.append(valve)
            try:
                valve.install(self._monitor)
            except QemuError as error:
                remove_filters(self._monitor, self._netdevs)
                raise Unsupported(f"the output of interface {netdev} cannot be buffered ({error.description}): "
                                  "use virtio interfaces without vhost and multiqueue") from error

    def hear(self) -> bool:
        """Has the guest sent something since the last call, or cut? Raises OutputLost."""
        # Each of them is read, whatever the others had.
        return True in [self._read(valve) for valve in list(self._valves)]

    @property
    def is_filling(self) -> bool:
        """Much is held: time for a checkpoint, while there is room."""
        return any(valve.held.size > _LIMIT_BYTES // 2 for valve in self._valves)

    def cut(self) -> None:
        """What the guest has sent until now the present checkpoint covers. The guest stands still. Raises OutputLost.
        """
        self.hear()
        for valve in self._valves:
            valve.held.cut()

    def release(self) -> None:
        """Lets go what the last cut covers: only AFTER its epoch is committed. Raises OutputLost."""
        for valve in self._valves:
            valve.release()

    def remove(self) -> None:
        """Lets all output go and takes the filters away. Only with the arbiter's grant, or disarmed.

        What the guest sends in that moment may overtake what it sent just before.
        """
        try:
            self._let_go()
            for valve in self._valves:
                valve.bypass(self._monitor)
            self._let_go()
        except OutputLost as lost:
            LOG.warning("what was held of the guest's output is lost: %s", lost)
        remove_filters(self._monitor, self._netdevs)
        self.close()

    def close(self) -> None:
        """What is held is lost; as long as the filters are there so is what the guest sends. Idempotent."""
        for valve in self._valves:
            valve.close()
        self._valves.clear()

    def _read(self, valve: "_Valve") -> bool:
        try:
            return valve.read()
        except OutputLost:
            # It would be readable for ever.
            self._valves.remove(valve)
            valve.close()
            raise

    def _let_go(self) -> None:
        self.cut()
        self.release()
        deadline = time.monotonic() + _TAKEN_S
        while not all(valve.is_taken() for valve in self._valves):
            if time.monotonic() > deadline:
                raise OutputLost(f"QEMU did not take it within {_TAKEN_S:g} s")
            time.sleep(_TAKEN_STEP_S)


class _Valve:
    """The two filters of one interface, and what is between them."""

    def __init__(self, netdev: str, epoll: select.epoll) -> None:
        self._names = {kind: f"{kind}-{netdev}" for kind in (_IN, _OUT)}
        self._netdev = netdev
        self._epoll = epoll
        self._out, self._qemu_out = _pair()
        self._in, self._qemu_in = _pair()
        self._leaving = Outbox()
        self.held = HeldOutput(_LIMIT_BYTES)
        self._dropped = 0
        epoll.register(self._out, select.EPOLLIN)
        epoll.register(self._in, 0)

    def install(self, monitor: qmp.Monitor) -> None:
        # Of several filters the one added last sees the guest's packets first.
        for kind, end, way in ((_IN, self._qemu_in, "indev"), (_OUT, self._qemu_out, "outdev")):
            name = self._names[kind]
            monitor.give(name, end)
            end.close()
            monitor.command("chardev-add", id=name, backend={
                "type": "socket", "data": {"addr": {"type": "fd", "data": {"str": name}}, "server": False}})
            monitor.command("object-add", qom_type="filter-redirector", id=name, netdev=self._netdev, queue="rx",
                            **{way: name})

    def bypass(self, monitor: qmp.Monitor) -> None:
        """From now on the guest's packets go past us."""
        monitor.command("object-del", id=self._names[_OUT])

    def read(self) -> bool:
        """Takes what there is, and passes on what had no room. Did anything come?"""
        self._flush()
        heard = False
        for _ in range(_MOST_CHUNKS):
            try:
                received = self._out.recv(_CHUNK)
            except BlockingIOError:
                break
            if not received:
                raise OutputLost(f"QEMU closed the filter of {self._netdev}")
            self.held.add(received)
            heard = True
        if self.held.dropped > self._dropped:
            LOG.warning("%d packets of %s are dropped, as too much is held", self.held.dropped - self._dropped,
                        self._netdev)
            self._dropped = self.held.dropped
        return heard

    def release(self) -> None:
        self._leaving.add(self.held.release())
        self._flush()

    def is_taken(self) -> bool:
        """Has QEMU read all that may go?"""
        self._flush()
        unread = struct.unpack("i", fcntl.ioctl(self._in, termios.TIOCOUTQ, b"\0" * 4))[0]
        return not self._leaving and unread == 0

    def close(self) -> None:
        for end in (self._out, self._in, self._qemu_out, self._qemu_in):
            end.close()

    def _flush(self) -> None:
        if not self._leaving:
            return
        try:
            while self._leaving:
                self._leaving.sent(self._in.sendmsg(self._leaving.batch()))
        except BlockingIOError:
            pass
        except OSError as error:
            raise OutputLost(f"QEMU closed the filter of {self._netdev}: {error}") from error
        # For room in the socket only while something waits for it.
        self._epoll.modify(self._in, select.EPOLLOUT if self._leaving else 0)


def remove_filters(monitor: qmp.Monitor, netdevs: list[str]) -> None:
    """Takes the filters away, whoever made them. From then on the guest is heard."""
    filters = {child["name"] for child in monitor.command("qom-list", path="/objects")}
    devices = {device["label"] for device in monitor.command("query-chardev")}
    # First what the engine got: what it gave has nowhere to go then.
    for name in (f"{kind}-{netdev}" for kind in (_OUT, _IN) for netdev in netdevs):
        if name in filters:
            monitor.command("object-del", id=name)
        if name in devices:
            monitor.command("chardev-remove", id=name)


def _pair() -> tuple[socket.socket, socket.socket]:
    """Ours and QEMU's end. Much fits in between."""
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _KERNEL_BYTES)
    ours.setblocking(False)
    return ours, theirs
