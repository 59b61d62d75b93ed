"""Turns the standby into the running guest. RAM is in place; the devices come as a migration stream.

Only with the arbiter's grant. Called by the backup's engine; the steps are those of an incoming migration whose
source is this process. [26-36 ms from the primary's death to the guest running, with a warm standby]
"""

import os
import socket
import time
from collections.abc import Callable

from nova_ftvm import ports
from nova_ftvm.core.stream import ANNOUNCE
from nova_ftvm.engine.faults import Fault, trip
from nova_ftvm.exception import FtvmError

LOAD_TIMEOUT_S = 10.0
_POLL_S = 0.001


class PromotionFailed(FtvmError):
    """The standby did not take the stream. The guest does not run here."""


def promote(monitor: ports.Monitor, stream: bytes, socket_path: str,
            clock: Callable[[], float] = time.monotonic) -> None:
    """Returns when the guest runs. Raises PromotionFailed or GuestGone.

    libvirt may be away meanwhile: it follows QEMU's RESUME event, as it does after each checkpoint.
    """
    trip(Fault.BEFORE_LOAD)
    if os.path.lexists(socket_path):
        os.unlink(socket_path)
    monitor.command("migrate-incoming", uri=f"unix:{socket_path}")
    _send(stream, socket_path)
    deadline = clock() + LOAD_TIMEOUT_S
    while monitor.command("query-status")["status"] == "inmigrate":
        migration = monitor.command("query-migrate")
        if migration.get("status") == "failed":
            raise PromotionFailed(f"QEMU refused the last checkpoint: {migration.get('error-desc', 'see its log')}")
        if clock() > deadline:
            raise PromotionFailed(f"QEMU did not load the last checkpoint within {LOAD_TIMEOUT_S:g} s")
        time.sleep(_POLL_S)
    trip(Fault.LOADED)
    monitor.command("cont")
    monitor.command("announce-self", **ANNOUNCE)


def _send(stream: bytes, socket_path: str) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(LOAD_TIMEOUT_S)
        try:
            connection.connect(socket_path)
            connection.sendall(stream)
            connection.shutdown(socket.SHUT_WR)
        except OSError as error:
            raise PromotionFailed(f"QEMU took no stream: {error}") from error
