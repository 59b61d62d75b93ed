"""What a failover left on this host while its nova-compute lived: the old guest, its interfaces and its files go.

Nova destroys such remains when nova-compute starts, which is soon enough for a host that died. One that was only cut
off, stood still, or lost a guest's QEMU goes on without a start; until its remains are gone it can hold no backup of
the server, and Nova does not lift its forced_down. Called by the driver at each periodic look at the host's resources.

Touches only servers that the failover manager knows, that have no task, and of which no standby is here.
"""

# Nova registers its objects when its services start, which may be after this import.
from __future__ import annotations

from collections.abc import Iterator

from nova import context as nova_context
from nova import exception, objects
from nova.objects import fields
from nova.virt.libvirt import driver as libvirt_driver
from oslo_log import log

from nova_ftvm.cloud import claims, servers

LOG = log.getLogger(__name__)

#: Of a migration record: the server is there, and its source has not been cleaned up. And what Nova sets afterwards.
_DONE, _COMPLETED = "done", "completed"


def destroy(driver: libvirt_driver.LibvirtDriver, host: str) -> None:
    """One pass over the evacuations from `host`. What fails is left for the next one. A server that is here again has
    left nothing, but its record must go all the same: the next start of nova-compute would destroy it by that."""
    context = nova_context.get_admin_context()
    for move, instance in _left(context, host):
        try:
            if instance.host != host:
                LOG.info("Removing what is left here of the server, which runs on %s", instance.host,
                         instance=instance)
                # Not our own method: that disarms, and this server's pair is none of this host's any more.
                libvirt_driver.LibvirtDriver.destroy(driver, context, instance, instance.get_network_info(), {}, True)
            move.status = _COMPLETED
            move.save()
        except Exception:  # libvirt, privsep, Neutron: whatever it was, Nova's look at its resources must go on.
            LOG.exception("The remains of the server stay for now", instance=instance)


def _left(context: nova_context.RequestContext, host: str) -> Iterator[tuple[objects.Migration, objects.Instance]]:
    moves = objects.MigrationList.get_by_filters(
        context, {"source_compute": host, "status": [_DONE], "migration_type": fields.MigrationType.EVACUATION})
    for move in moves:
        try:
            instance = objects.Instance.get_by_uuid(
                context, move.instance_uuid, expected_attrs=["metadata", "system_metadata", "info_cache", "flavor"])
        except exception.InstanceNotFound:
            continue  # deleted; the start of nova-compute sees to it
        is_settled = instance.task_state is None and instance.host is not None
        if is_settled and servers.known_to_manager(instance) and claims.of(instance.uuid, host) is None:
            yield move, instance
