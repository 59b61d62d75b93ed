"""A planned failover: Nova live-migrates a protected server to its backup's host, and the backup takes the guest.

Nova's own steps stay: scheduler, ports, records, clean-up of the source. Only what libvirt would do in between is
replaced: nothing is copied, the primary hands the guest over, and the arbiter gives it to the backup as in every
failover.
The destination says in its answer that a standby is there; the source then keeps the pair instead of ending it.
"""

# Nova registers its objects when its services start, which may be after this import.
from __future__ import annotations

import time
from collections.abc import Callable

from nova import exception, objects
from nova.compute import power_state
from nova.virt.libvirt import guest as libvirt_guest
from oslo_log import log

from nova_ftvm.cloud import claims
from nova_ftvm.cloud.partners import PartnerAway, Partners
from nova_ftvm.types import InstanceId

LOG = log.getLogger(__name__)

#: In LibvirtLiveMigrateData.target_connect_addr, where the address of the destination's libvirtd is otherwise.
_STANDBY = "ftvm-standby"
#: The arbiter's word comes within a fraction of a second, or never.
_ARBITER_LIMIT_S = 20.0
#: Until the granted standby runs.
_RUNNING_LIMIT_S = 20.0
_POLL_S = 0.1


def is_to_standby(data: objects.LibvirtLiveMigrateData | None) -> bool:
    return data is not None and "target_connect_addr" in data and data.target_connect_addr == _STANDBY


def check(instance: objects.Instance, host: str, partners: Partners) -> bool:
    """At the destination: does the server's standby wait here? Raises MigrationPreCheckError if it is not ready."""
    if claims.of(instance.uuid, host) is None:
        return False
    try:
        answer = partners.switchover(InstanceId(instance.uuid), host)
    except PartnerAway as error:
        raise exception.MigrationPreCheckError(reason=str(error)) from error
    if not answer["ready"]:
        raise exception.MigrationPreCheckError(
            reason=f"the server's backup on {host} cannot take it now: {answer['reason']}; try again, or migrate it to "
                   "another host")
    return True


def mark(data: objects.LibvirtLiveMigrateData) -> None:
    data.target_connect_addr = _STANDBY


def without_interfaces(data: objects.LibvirtLiveMigrateData) -> objects.LibvirtLiveMigrateData:
    """The standby's interfaces are plugged, so nobody may wait for Neutron's word that they were. Without `vifs` Nova
    takes the source's from its own record."""
    known = data.obj_to_primitive()
    known["nova_object.data"].pop("vifs", None)
    return objects.LibvirtLiveMigrateData.obj_from_primitive(known)


def hand_over(instance: objects.Instance, host: str, dest: str, partners: Partners) -> bool:
    """At the source: has the arbiter given the server to `dest`? If not, the guest goes on here.

    No answer within a bound counts as no: should the backup get the guest all the same, the manager moves Nova's
    record after it, as after any failover.
    """
    instance_id = InstanceId(instance.uuid)
    deadline = time.monotonic() + _ARBITER_LIMIT_S
    try:
        before = partners.adoption(instance_id, dest)
        if not partners.hand_over(host, instance_id):
            LOG.warning("No engine protects the guest here: it is not handed over", instance=instance)
            return False
    except PartnerAway as error:
        LOG.warning("The guest is not handed over: %s", error, instance=instance)
        return False
    while time.monotonic() < deadline:
        try:
            now = partners.adoption(instance_id, dest)
            if now["adopt"]:
                return True
            if now["generation"] != before["generation"]:
                LOG.warning("The backup did not take the guest, which goes on here", instance=instance)
                return False
        except PartnerAway as error:
            LOG.warning("Waiting for the arbiter's word: %s", error, instance=instance)
        time.sleep(_POLL_S)
    LOG.warning("No word of the arbiter within %g s", _ARBITER_LIMIT_S, instance=instance)
    return False


def wait_until_it_runs(find: Callable[[], libvirt_guest.Guest | None], host: object) -> None:
    """At the destination: the grant is there, QEMU loads the devices' state. Raises MigrationError."""
    deadline = time.monotonic() + _RUNNING_LIMIT_S
    while True:
        guest = find()
        if guest is not None and guest.get_power_state(host) == power_state.RUNNING:
            return
        if guest is None or time.monotonic() >= deadline:
            raise exception.MigrationError(reason="the standby did not take the guest that was handed to it")
        time.sleep(_POLL_S)
