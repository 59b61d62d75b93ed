"""Output commit by QEMU's own netfilters: the engine stands in the way of what the guest sends.

    guest -> virtio queue -> [out] ...  ... [in] -> tap
                               |         ^
                               v         |
                        the engine: held until its epoch is committed (core/packets.py)
                               ^
                               |
    guest <- virtio queue <- [tee] <- tap

`out` and `in` are filter-redirectors, each with one end of a socket pair as its character device: `out` gives each
packet to the engine as soon as it is sent, `in` takes back what may go. No command, and no parsing, for either: what
waits is seen by a read, what is committed goes by a write. `tee`, a filter-mirror, tells what comes for the guest,
which gets it at once.

An engine that dies takes what it held with it. From then on QEMU throws away what the guest sends, as nobody reads
it, until the filters are removed: with the arbiter's grant, or disarmed. TCP sends it again.
Source: QEMU, net/filter-mirror.c. Why not its filter-buffer: doc/source/contributor/decisions/output-redirected.rst.
What the tee is for: doc/source/contributor/decisions/packets-under-way.rst.
"""

import logging
import select
import socket
import time
from collections.abc import Iterator, Mapping

from nova_ftvm.core.outbox import Outbox
from nova_ftvm.core.packets import HeldPackets, Packets
from nova_ftvm.exception import OutputLost, QemuError, Unsupported
from nova_ftvm.host import netfilter, qmp

LOG = logging.getLogger(__name__)

#: What is held of each interface at most, beside what the kernel holds. A checkpoint is due long before (`is_filling`).
_LIMIT_BYTES = 64 << 20
#: What QEMU may write while the engine does something else. When that is full QEMU waits, and the guest with it, until
#: the engine reads on or the watchdog ends it.
_KERNEL_BYTES = 16 << 20
#: Nobody wakes up for the tee: it is read with the output, and with every beat.
_TEE_KERNEL_BYTES = 64 << 20
_CHUNK = 1 << 18
#: Taken at once at most: more than the kernel holds, so all that a guest that stands still has sent.
_MOST_CHUNKS = 4 * _TEE_KERNEL_BYTES // _CHUNK
#: Of an epoch, an interface and a direction: who sends more at once is not the one that waits for a reply.
_UNDER_WAY_BYTES = 128 << 10
#: For QEMU to take what may go, before the filters are removed.
_TAKEN_S = 1.0
_TAKEN_STEP_S = 0.2e-3


class OutputBuffer:
    """ports.NetBuffer of one guest."""

    def __init__(self, monitor: qmp.Monitor, interfaces: Mapping[str, bytes]) -> None:
        """interfaces: netfilter.interfaces()."""
        self._monitor = monitor
        self._interfaces = interfaces
        self._valves: list[_Valve] = []
        self._epoll = select.epoll()

    def fileno(self) -> int:
        return self._epoll.fileno()

    def install(self) -> None:
        """From now on nothing leaves but by `release`. Leftovers of an engine that died are removed first."""
        netfilter.remove(self._monitor, self._interfaces)
        for netdev, mac in self._interfaces.items():
            valve = _Valve(netdev, mac, self._epoll)
            self._valves.append(valve)
            try:
                valve.install(self._monitor)
            except QemuError as error:
                netfilter.remove(self._monitor, self._interfaces)
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

    def cut(self) -> bool:
        """What the guest has sent until now the present checkpoint covers. The guest stands still. Had some of it not
        been heard? Raises OutputLost."""
        heard = self.hear()
        for valve in self._valves:
            valve.cut()
        return heard

    def covered(self) -> Iterator[Packets]:
        """What the last cut covers, where it is not much."""
        for valve in self._valves:
            if 0 < len(valve.held.covered) <= _UNDER_WAY_BYTES:
                yield Packets(valve.mac, bytes(valve.held.covered))

    def overheard(self) -> Iterator[Packets]:
        """What has come for the guest since the last cut, or call, as long as it is not much. It has it already."""
        for valve in self._valves:
            if packets := valve.overhear():
                yield Packets(valve.mac, packets)

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
        netfilter.remove(self._monitor, self._interfaces)
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
    """The filters of one interface, and what is between them."""

    def __init__(self, netdev: str, mac: bytes, epoll: select.epoll) -> None:
        self.mac = mac
        self._netdev = netdev
        self._epoll = epoll
        self._out, self._qemu_out = netfilter.pair(_KERNEL_BYTES)
        self._in, self._qemu_in = netfilter.pair(_KERNEL_BYTES)
        self._tee, self._qemu_tee = netfilter.pair(_TEE_KERNEL_BYTES)
        self._leaving = Outbox()
        self.held = HeldPackets(_LIMIT_BYTES)
        self._dropped = 0
        self._overheard = HeldPackets(_UNDER_WAY_BYTES)
        #: Bytes that were passed on since the last cut.
        self._told = 0
        epoll.register(self._out, select.EPOLLIN)
        epoll.register(self._in, 0)

    def install(self, monitor: qmp.Monitor) -> None:
        for kind, end, type, queue, way in (
                (netfilter.IN, self._qemu_in, "filter-redirector", "rx", "indev"),
                (netfilter.OUT, self._qemu_out, "filter-redirector", "rx", "outdev"),
                (netfilter.TEE, self._qemu_tee, "filter-mirror", "tx", "outdev")):
            netfilter.add(monitor, kind, self._netdev, end, type=type, queue=queue, way=way)

    def bypass(self, monitor: qmp.Monitor) -> None:
        """From now on the guest's packets go past us."""
        netfilter.bypass(monitor, netfilter.OUT, self._netdev)

    def read(self) -> bool:
        """Takes what there is, and passes on what had no room. Did anything come?"""
        self._flush()
        heard = False
        for received in _received(self._out):
            if not received:
                raise OutputLost(f"QEMU closed the filter of {self._netdev}")
            self.held.add(received)
            heard = True
        if self.held.dropped > self._dropped:
            LOG.warning("%d packets of %s are dropped, as too much is held", self.held.dropped - self._dropped,
                        self._netdev)
            self._dropped = self.held.dropped
        return heard

    def overhear(self) -> bytes:
        """What came for the guest and was not passed on yet."""
        for received in _received(self._tee):
            self._overheard.add(received)
        self._overheard.cut()
        packets = self._overheard.release()
        self._told += len(packets)
        return packets if self._told <= _UNDER_WAY_BYTES else b""

    def cut(self) -> None:
        self.held.cut()
        self.overhear()
        self._told = 0

    def release(self) -> None:
        self._leaving.add(self.held.release())
        self._flush()

    def is_taken(self) -> bool:
        """Has QEMU read all that may go?"""
        self._flush()
        return not self._leaving and netfilter.is_taken(self._in)

    def close(self) -> None:
        for end in (self._out, self._in, self._tee, self._qemu_out, self._qemu_in, self._qemu_tee):
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


def _received(end: socket.socket) -> Iterator[bytes]:
    """What is there now, in pieces; the last one is empty when QEMU closed its end."""
    for _ in range(_MOST_CHUNKS):
        try:
            received = end.recv(_CHUNK)
        except BlockingIOError:
            return
        yield received
        if not received:
            return
