"""Packets that were under way when the primary died, said once more beside the promoted guest (core/packets.py).
And reminders to its clients, in its name (core/reminders.py).

A kindness: whatever goes wrong here, the guest runs, and TCP sends again what is missing.
"""

import logging
import time
from collections.abc import Mapping

from nova_ftvm.exception import GuestGone, QemuError
from nova_ftvm.host import netfilter, qmp

LOG = logging.getLogger(__name__)

_ROOM_BYTES = 4 << 20
#: For QEMU to take them, of each interface and direction.
_TAKEN_S = 0.2
_TAKEN_STEP_S = 0.2e-3


class Replay:
    """ports.Replay of one standby. Made before its promotion: to look for its interfaces takes time."""

    def __init__(self, monitor: qmp.Monitor) -> None:
        self._monitor = monitor
        self._netdevs = {mac: netdev for netdev, mac in netfilter.interfaces(monitor).items()}

    def replay(self, heard: Mapping[bytes, bytes], said: Mapping[bytes, bytes],
               reminders: Mapping[bytes, bytes]) -> None:
        """heard: to the guest, said and reminders: from it; by interface, as QEMU frames packets."""
        LOG.info("said once more: %d bytes to the guest, %d from it, beside %d of reminders", _size(heard),
                 _size(said), _size(reminders))
        # The guest answers what it hears while the others go; those are one way, as each has its price in commands.
        sent = {mac: reminders.get(mac, b"") + said.get(mac, b"") for mac in {**reminders, **said}}
        try:
            for packets, kind, queue in ((heard, netfilter.HEARD, "tx"), (sent, netfilter.SAID, "rx")):
                for mac, framed in packets.items():
                    if mac in self._netdevs:
                        self._say(kind, queue, self._netdevs[mac], framed)
        except (GuestGone, QemuError, OSError) as error:
            LOG.warning("not all packets that were under way are said again: %s", error)

    def _say(self, kind: str, queue: str, netdev: str, framed: bytes) -> None:
        ours, theirs = netfilter.pair(_ROOM_BYTES)
        with ours:
            netfilter.add(self._monitor, kind, netdev, theirs, type="filter-redirector", queue=queue, way="indev")
            try:
                ours.sendall(framed)
                deadline = time.monotonic() + _TAKEN_S
                while not netfilter.is_taken(ours) and time.monotonic() < deadline:
                    time.sleep(_TAKEN_STEP_S)
            finally:
                netfilter.drop(self._monitor, kind, netdev)


def _size(packets: Mapping[bytes, bytes]) -> int:
    return sum(map(len, packets.values()))
