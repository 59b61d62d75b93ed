"""What each of Nova's operations means for a protected server, and for a backup's.

A protected guest that stops, moves or changes its devices must first be disarmed: else its backup takes the end for a
failure, and the server runs twice. So must one whose disks libvirt is to copy: QEMU takes one such job a disk, and ours
is there. Three answers are possible:

    disarmed      the operation goes on
    no answer     it is refused wherever it would leave or start a guest that another host may be running too, or break
                  off half-way; it goes on where the owner wants the guest gone
    a failover    it is refused: the guest is about to live elsewhere, and Nova with it. Only a deletion goes on
    is under way

Servers that never asked for protection, that the manager never took up, and that are not armed, pass without any call.
Called by driver.py; how a refusal reaches the user is refusal.py's.
"""

# Nova registers its objects when its services start, which may be after this import.
from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

from nova import context as nova_context
from nova import exception, objects
from nova.compute import task_states, vm_states
from nova.virt.libvirt import driver as libvirt_driver
from oslo_log import log

from nova_ftvm.cloud import refusal, servers
from nova_ftvm.cloud.partners import PartnerAway, Partners
from nova_ftvm.cloud.refusal import Refused
from nova_ftvm.core import request
from nova_ftvm.types import InstanceId, PairState

LOG = log.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Planned:
    """An operation that ends protection on purpose."""

    #: Completes 'the server is ...'; the manager shows it as the reason.
    reason: str
    #: Without the manager's word that no backup can be promoted any more: refuse the operation?
    needs_word: bool
    #: While a failover is under way: refuse it, although it needs no word? It would be undone by the failover.
    yields: bool = False


#: Method of the driver -> what it does to protection. destroy() and resume_state_on_host_boot() have rules of their own
#: in the driver. Not here:
#:   unpause, resume, unrescue, finish_migration: the pair was disarmed on the way in;
#:   swap_volume, extend_volume, volume_snapshot_create and _delete: only a server with volumes has them, and with the
#:   first volume the pair was disarmed;
#:   quiesce, unquiesce, get_diagnostics, block_stats: they ask and copy nothing.
OPERATIONS: dict[str, Planned] = {
    # The owner wants it off. Its engine tells the backup, and the manager sees STOPPED in Nova when it is back.
    "power_off": Planned("stopped", needs_word=False, yields=True),
    # Where the last stop could not disarm, or the host died, the backup may be running.
    "power_on": Planned("started", needs_word=True),
    # QEMU may end, and starts again without buffers.
    "reboot": Planned("rebooted", needs_word=True),
    "pause": Planned("paused", needs_word=True),
    "suspend": Planned("suspended", needs_word=True),
    # power_off() of the same task had the word; refused here, the guest would be off and in ERROR.
    "rescue": Planned("rescued", needs_word=False),
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

#: What the method is a part of, if the server's task says so; otherwise its row in OPERATIONS holds.
PARTS: dict[tuple[str, str], Planned] = {
    # What Nova starts in the guest's place must not run beside a promoted backup.
    ("power_off", task_states.RESCUING): Planned("rescued", needs_word=True),
    ("power_off", task_states.REBUILDING): Planned("rebuilt", needs_word=True),
    # As a stop. Refused, Nova would leave an empty image.
    ("power_off", task_states.SHELVING): Planned("shelved", needs_word=False, yields=True),
    ("snapshot", task_states.SHELVING): Planned("shelved", needs_word=False),
    ("power_off", task_states.SOFT_DELETING): Planned("deleted", needs_word=False),
    # migrate_disk_and_power_off() had the word.
    ("power_off", task_states.RESIZE_MIGRATING): Planned("resized or migrated", needs_word=False),
}


def planned(name: str, instance: objects.Instance) -> Planned:
    return PARTS.get((name, instance.task_state), OPERATIONS[name])


def guarded(name: str) -> Callable[..., Any]:
    """LibvirtDriver's method of that name, behind the check of its row in OPERATIONS or PARTS."""
    original = getattr(libvirt_driver.LibvirtDriver, name)
    signature = inspect.signature(original)

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        instance = signature.bind(self, *args, **kwargs).arguments["instance"]
        try:
            before(name, instance, self.ft_host, self.partners, self._is_armed)
        except Refused as refused:
            raise refusal.as_nova_shows_it(refused, name, instance, self.virtapi.reportclient) from refused
        return getattr(libvirt_driver.LibvirtDriver, name)(self, *args, **kwargs)

    return method


def before_reboot(instance: objects.Instance, host: str, partners: Partners, is_armed: Callable[[str], bool]) -> None:
    """Called from get_info(), which Nova asks just before it reboots. What reboot() itself raises, Nova takes for a
    success if the guest runs: nobody would learn that it was refused."""
    if instance.task_state in (task_states.REBOOT_PENDING, task_states.REBOOT_PENDING_HARD):
        before("reboot", instance, host, partners, is_armed)


def before_interface(instance: objects.Instance, host: str, partners: Partners,
                     is_armed: Callable[[str], bool]) -> None:
    """Called from network_binding_host_id(), the first that Nova asks when it attaches an interface. Of what
    attach_interface() itself raises, Nova shows nothing but that it failed."""
    if instance.vm_state != vm_states.BUILDING:
        try:
            before("attach_interface", instance, host, partners, is_armed)
        except Refused as refused:
            raise exception.InterfaceAttachFailed(refused.sentence) from refused


def before(name: str, instance: objects.Instance, host: str, partners: Partners,
           is_armed: Callable[[str], bool] = lambda uuid: False) -> None:
    """Makes way for the operation, or raises Refused. is_armed: has the server's domain here our monitor?"""
    primary = servers.primary_of(instance)
    if primary is not None:
        raise Refused(f"{name} is not for {instance.uuid}: it holds the place of the backup of server {primary}. "
                      "Work on that server; the failover manager looks after this one")
    disarm(planned(name, instance), instance, host, partners, is_armed)


def disarm(planned: Planned, instance: objects.Instance, host: str, partners: Partners,
           is_armed: Callable[[str], bool] = lambda uuid: False) -> None:
    """Ends the server's protection if it lives on `host`; raises Refused when that must be confirmed and is not."""
    if (instance.host or host) != host:
        return
    # Its owner may have taken away every property that tells; the domain still does.
    known = servers.known_to_manager(instance) or is_armed(instance.uuid)
    if not known and not servers.asks(instance):
        return
    try:
        reason = f"the server is {planned.reason}"
        if partners.disarm(InstanceId(instance.uuid), reason):
            _show_ended(instance, reason)
            return
        refused = planned.needs_word or planned.yields
        why = "a failover of the server is under way"
    except PartnerAway as error:
        refused = planned.needs_word and known
        why = str(error)
    if refused:
        raise Refused(f"the server cannot be {planned.reason} before its protection has ended: {why}. "
                      "Nothing was changed; try again")
    LOG.warning("Going on although protection could not be ended: %s", why, instance=instance)


def _show_ended(instance: objects.Instance, reason: str) -> None:
    """Nova's API lets nobody write a property while a task is under way, nor afterwards if the server is rescued,
    resized or shelved then. Nova saves it with the rest of the record."""
    shown = instance.metadata.get(request.STATE_KEY)
    if instance.task_state is None or shown in (None, PairState.DISABLED.value):
        return
    newest = objects.Instance.get_by_uuid(nova_context.get_admin_context(), instance.uuid, expected_attrs=["metadata"])
    instance.metadata = {**newest.metadata, request.STATE_KEY: PairState.DISABLED.value, request.REASON_KEY: reason}
