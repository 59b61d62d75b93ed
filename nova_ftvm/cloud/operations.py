"""What each of Nova's operations means for a protected server, and for a backup's.

A protected guest that stops, moves or changes its devices must first be disarmed: else its backup takes the end for a
failure, and the server runs twice. So must one whose disks libvirt is to copy: QEMU takes one such job a disk, and ours
is there. If the manager cannot confirm that, the operation is refused wherever it would leave or start a guest that
another host may be running too, or break off half-way; it goes on where the owner wants the guest gone.

Servers that never asked for protection, and that the manager never took up, pass without any call.
"""

# Nova registers its objects when its services start, which may be after this import.
from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

from nova import objects
from nova.virt.libvirt import driver as libvirt_driver
from oslo_log import log

from nova_ftvm.cloud import servers
from nova_ftvm.cloud.partners import PartnerAway, Partners
from nova_ftvm.cloud.refusal import Refused
from nova_ftvm.types import InstanceId

LOG = log.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Planned:
    """An operation that ends protection on purpose."""

    #: Completes 'the server is ...'; the manager shows it as the reason.
    reason: str
    #: Without the manager's word that no backup can be promoted any more: refuse the operation?
    needs_word: bool


#: Method of the driver -> what it does to protection. destroy() and resume_state_on_host_boot() have rules of their own
#: in the driver. Not here:
#:   unpause, resume, unrescue, finish_migration: the pair was disarmed on the way in;
#:   swap_volume, extend_volume, volume_snapshot_create and _delete: only a server with volumes has them, and with the
#:   first volume the pair was disarmed;
#:   quiesce, unquiesce, get_diagnostics, block_stats: they ask and copy nothing.
OPERATIONS: dict[str, Planned] = {
    # The owner wants it off. The manager sees STOPPED in Nova when it is back.
    "power_off": Planned("stopped", needs_word=False),
    # Where the last stop could not disarm, or the host died, the backup may be running.
    "power_on": Planned("started", needs_word=True),
    # QEMU may end, and starts again without buffers.
    "reboot": Planned("rebooted", needs_word=True),
    "pause": Planned("paused", needs_word=True),
    "suspend": Planned("suspended", needs_word=True),
    "rescue": Planned("rescued", needs_word=True),
    # libvirt mirrors the disk beside our own mirror, which QEMU refuses, and Nova then leaves a domain that its host
    # forgets. The guest runs on, but Nova shows a task until the image is uploaded; the pair is made anew after that.
    "snapshot": Planned("copied to an image", needs_word=True),
    # Refused here, while Nova can still call the migration off; said once more when it begins.
    "check_can_live_migrate_source": Planned("live-migrated", needs_word=True),
    "live_migration": Planned("live-migrated", needs_word=False),
    "migrate_disk_and_power_off": Planned("resized or migrated", needs_word=True),
    # A new interface has no buffer; a volume is not replicated.
    "attach_volume": Planned("given a volume", needs_word=True),
    "detach_volume": Planned("rid of a volume", needs_word=True),
    "attach_interface": Planned("given an interface", needs_word=True),
    "detach_interface": Planned("rid of an interface", needs_word=True),
}


def guarded(name: str) -> Callable[..., Any]:
    """LibvirtDriver's method of that name, behind the check of its row in OPERATIONS."""
    original = getattr(libvirt_driver.LibvirtDriver, name)
    signature = inspect.signature(original)

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        instance = signature.bind(self, *args, **kwargs).arguments["instance"]
        before(name, instance, self.ft_host, self.partners)
        return original(self, *args, **kwargs)

    return method


def before(name: str, instance: objects.Instance, host: str, partners: Partners) -> None:
    """Makes way for the operation, or raises Refused."""
    primary = servers.primary_of(instance)
    if primary is not None:
        raise Refused(f"{name} is not for {instance.uuid}: it holds the place of the backup of server {primary}. "
                      "Work on that server; the failover manager looks after this one")
    disarm(OPERATIONS[name], instance, host, partners)


def disarm(planned: Planned, instance: objects.Instance, host: str, partners: Partners) -> None:
    """Ends the server's protection if it lives on `host`; raises Refused when that must be confirmed and is not."""
    known = servers.known_to_manager(instance)
    if (instance.host or host) != host or not (known or servers.asks(instance)):
        return
    try:
        if partners.disarm(InstanceId(instance.uuid), f"the server is {planned.reason}"):
            return
        why = "the failover manager would not end its protection now"
    except PartnerAway as error:
        why = str(error)
    if planned.needs_word and known:
        raise Refused(f"the server cannot be {planned.reason} before its protection has ended: {why}. "
                      "Nothing was changed; try again")
    LOG.warning("Going on although protection could not be ended: %s", why, instance=instance)
