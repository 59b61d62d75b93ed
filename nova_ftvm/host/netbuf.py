"""Output commit by QEMU's own netfilters: two chained filter-buffers on each of the guest's interfaces.

    guest -> virtio queue -> [sign] -> [early] -> [late] -> tap
                       sign:    a line for each packet, to a FIFO: something waits
                       barrier: early flushes into late, just before the guest is stopped
                       release: late flushes into the tap, after the backup's acknowledgement

What the guest sends between the barrier and the stop waits one epoch longer: late, but safe.
Source: QEMU, docs/COLO-FT.txt and net/filter-buffer.c. A flush is a status switched off and on. The sign is a
filter-dump, which writes 16 bytes and the packet's first into the FIFO (net/dump.c): nobody polls, and what a guest
sends in bulk is not copied. An engine that dies closes the FIFO, and the dump ends by itself.

A buffer's timer would release by itself after INTERVAL_US; each flush starts it anew. It runs on the guest's
clock, so that a paused guest's output never leaves. Whoever holds for long must pause the guest before
(core/epoch.py, HOLD_LIMIT_S).
"""

from nova_ftvm.exception import QemuError, Unsupported
from nova_ftvm.host import qmp

INTERVAL_US = 4_294_000_000

_SIGN, _EARLY, _LATE = "ftvm-sign", "ftvm-early", "ftvm-late"
_BUFFER = {"qom-type": "filter-buffer", "queue": "rx", "interval": INTERVAL_US}


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


class OutputBuffers:
    """The buffers of one guest. `barrier` and `release` are commands, to be sent in a batch.

    sign: the path of a FIFO that is told of each packet.
    """

    def __init__(self, monitor: qmp.Monitor, netdevs: list[str], sign: str | None = None) -> None:
        self._monitor = monitor
        self._netdevs = netdevs
        # Of several filters the one added last sees the guest's packets first.
        self._filters = {_LATE: _BUFFER, _EARLY: _BUFFER}
        if sign is not None:
            self._filters[_SIGN] = {"qom-type": "filter-dump", "queue": "rx", "file": sign, "maxlen": 1}
        self.barrier = self._flush(_EARLY, "barrier")
        self.release = self._flush(_LATE, "release")

    def install(self) -> None:
        """From now on nothing leaves but by `release`. Leftovers of an engine that died are removed first."""
        self.remove()
        for netdev in self._netdevs:
            for name, properties in self._filters.items():
                try:
                    self._monitor.command("object-add", id=f"{name}-{netdev}", netdev=netdev, **properties)
                except QemuError as error:
                    self.remove()
                    raise Unsupported(f"the output of interface {netdev} cannot be buffered ({error.description}): "
                                      "use virtio interfaces without vhost and multiqueue") from error

    def remove(self) -> None:
        """Lets all output go, in its order, and takes the buffers away. Only with the arbiter's grant, or disarmed."""
        present = {child["name"] for child in self._monitor.command("qom-list", path="/objects")}
        for name in (_SIGN, _EARLY, _LATE):
            for netdev in self._netdevs:
                if f"{name}-{netdev}" in present:
                    self._monitor.command("object-del", id=f"{name}-{netdev}")

    def _flush(self, name: str, ident: str) -> bytes:
        return b"".join(
            qmp.encode("qom-set", {"path": f"/objects/{name}-{netdev}", "property": "status", "value": value}, ident)
            for netdev in self._netdevs for value in ("off", "on"))
