"""compute_driver = ftvm.FTVMLibvirtDriver: Nova's libvirt driver, for hosts whose servers can be fault tolerant.

Owns only the places where a protected server or a backup differs; what happens there is in the modules beside it.
Every other server passes through LibvirtDriver unchanged, without a call to anybody.
"""

# Nova registers its objects when its services start, which may be after this import.
from __future__ import annotations

from typing import Any

from nova import exception, objects
from nova.compute import power_state, task_states, vm_states
from nova.virt import driver as virt_driver
from nova.virt import event as virt_event
from nova.virt import hardware
from nova.virt.libvirt import driver as libvirt_driver
from oslo_log import log

from nova_ftvm.cloud import arming, claims, operations, remains, servers, switchover
from nova_ftvm.cloud.events import EventFilter
from nova_ftvm.cloud.operations import Planned, guarded
from nova_ftvm.cloud.partners import PartnerAway, Partners
from nova_ftvm.cloud.refusal import Refused
from nova_ftvm.cloud.settings import CONF
from nova_ftvm.cloud.standby import Standbys
from nova_ftvm.core import domain
from nova_ftvm.exception import Unsupported
from nova_ftvm.types import InstanceId

LOG = log.getLogger(__name__)

#: libvirt's VIR_DOMAIN_PAUSED, and its reason VIR_DOMAIN_PAUSED_UNKNOWN.
_PAUSED, _PAUSED_UNKNOWN = 3, 0

#: Tasks in which Nova itself pauses the guest, and looks whether it is.
_PAUSING = (task_states.PAUSING, task_states.MIGRATING)


class FTVMLibvirtDriver(libvirt_driver.LibvirtDriver):
    """LibvirtDriver, plus: arm, stand by, adopt, disarm."""

    def __init__(self, virtapi: Any, read_only: bool = False) -> None:
        self.ft_host: str = CONF.host
        self.partners = Partners()
        self.standbys = Standbys(self, self.partners, lambda: self.ft_host)
        self._events = EventFilter(self._is_armed, lambda: self.ft_host)
        #: Until the compute manager has destroyed what was evacuated from this host while it was down.
        self._returning = True
        super().__init__(virtapi, read_only)
        self.vif_driver = arming.InterfaceDriver(self._host, self._is_armed)

    def init_host(self, host: str) -> None:
        self.ft_host = host
        super().init_host(host)

    def process_instances_at_startup(self, context: Any, instances: Any) -> Any:
        self._returning = False
        self.standbys.sweep([instance.uuid for instance in instances])
        return super().process_instances_at_startup(context, instances)

    # Starting

    def spawn(self, context: Any, instance: objects.Instance, *args: Any, **kwargs: Any) -> None:
        if servers.is_backup(instance):
            self.standbys.make(context, instance)
            return
        if instance.vm_state in (vm_states.SHELVED, vm_states.SHELVED_OFFLOADED):
            # Where the shelving could not disarm, the backup may be running.
            operations.disarm(Planned("unshelved", needs_word=True), instance, self.ft_host, self.partners)
        super().spawn(context, instance, *args, **kwargs)

    def _get_guest_xml(self, context: Any, instance: objects.Instance, network_info: Any, disk_info: Any,
                       image_meta: Any, rescue: Any = None, block_device_info: Any = None, **kwargs: Any) -> str:
        xml = super()._get_guest_xml(context, instance, network_info, disk_info, image_meta, rescue=rescue,
                                     block_device_info=block_device_info, **kwargs)
        if rescue:
            return xml
        volumes = len(virt_driver.block_device_info_get_mapping(block_device_info))
        return arming.armed(xml, instance, network_info, volumes, self.ft_host, self.partners)

    def _build_device_metadata(self, context: Any, instance: objects.Instance) -> Any:
        if claims.of(instance.uuid, self.ft_host):
            # A standby's config drive is made before its domain: the primary's own description holds.
            return instance.device_metadata
        return super()._build_device_metadata(context, instance)

    def resume_state_on_host_boot(self, context: Any, instance: objects.Instance, *args: Any, **kwargs: Any) -> None:
        if servers.is_backup(instance):
            LOG.info("A backup's guest is not resumed: the manager makes a new standby", instance=instance)
            return
        guest = self.standbys.guest(instance.uuid)
        if guest is None or guest.get_power_state(self._host) in (power_state.SHUTDOWN, power_state.CRASHED):
            # This host was down: the backup may be running.
            operations.disarm(Planned("started after its host's restart", needs_word=True), instance, self.ft_host,
                              self.partners)
        super().resume_state_on_host_boot(context, instance, *args, **kwargs)

    # Moves to this host

    def check_can_live_migrate_destination(self, context: Any, instance: objects.Instance, *args: Any,
                                           **kwargs: Any) -> Any:
        is_standby_here = switchover.check(instance, self.ft_host, self.partners)
        data = super().check_can_live_migrate_destination(context, instance, *args, **kwargs)
        if is_standby_here:
            switchover.mark(data)
        return data

    def pre_live_migration(self, context: Any, instance: objects.Instance, block_device_info: Any, network_info: Any,
                           disk_info: Any, migrate_data: Any) -> Any:
        if switchover.is_to_standby(migrate_data):
            return switchover.without_interfaces(migrate_data)
        arming.expect(instance, self.ft_host, self.partners)
        return super().pre_live_migration(context, instance, block_device_info, network_info, disk_info, migrate_data)

    def post_live_migration_at_destination(self, context: Any, instance: objects.Instance, *args: Any,
                                           **kwargs: Any) -> None:
        if claims.of(instance.uuid, self.ft_host):
            switchover.wait_until_it_runs(lambda: self.standbys.guest(instance.uuid), self._host)
            self.standbys.take(instance)
        super().post_live_migration_at_destination(context, instance, *args, **kwargs)

    def rollback_live_migration_at_destination(self, context: Any, instance: objects.Instance, *args: Any,
                                               **kwargs: Any) -> None:
        if not claims.of(instance.uuid, self.ft_host):
            super().rollback_live_migration_at_destination(context, instance, *args, **kwargs)

    # Moves from this host

    def check_can_live_migrate_source(self, context: Any, instance: objects.Instance, dest_check_data: Any,
                                      *args: Any, **kwargs: Any) -> Any:
        if not switchover.is_to_standby(dest_check_data):
            operations.before("check_can_live_migrate_source", instance, self.ft_host, self.partners)
        return super().check_can_live_migrate_source(context, instance, dest_check_data, *args, **kwargs)

    def live_migration(self, context: Any, instance: objects.Instance, dest: str, post_method: Any,
                       recover_method: Any, block_migration: bool = False, migrate_data: Any = None) -> None:
        if not switchover.is_to_standby(migrate_data):
            operations.before("live_migration", instance, self.ft_host, self.partners)
            super().live_migration(context, instance, dest, post_method, recover_method, block_migration, migrate_data)
        elif switchover.hand_over(instance, self.ft_host, dest, self.partners):
            # The arbiter has spoken: what still runs here is over, and unheard. It goes as libvirt's migration would
            # take it away.
            self._destroy(instance)
            self._undefine_domain(instance)
            post_method(context, instance, dest, block_migration, migrate_data)
        else:
            recover_method(context, instance, dest, migrate_data)

    # Evacuation to this host

    def instance_exists(self, instance: objects.Instance) -> bool:
        if claims.of(instance.uuid, self.ft_host):
            return False
        if not super().instance_exists(instance):
            return False
        # An adoption that was interrupted after the claim was dropped can be repeated.
        return instance.host == self.ft_host or not self._may_adopt(instance)

    def instance_on_disk(self, instance: objects.Instance) -> bool:
        return claims.of(instance.uuid, self.ft_host) is None and super().instance_on_disk(instance)

    def rebuild(self, context: Any, instance: objects.Instance, *args: Any, evacuate: bool = False,
                **kwargs: Any) -> None:
        if evacuate and servers.is_backup(instance):
            raise Refused("a backup server is not evacuated: the failover manager makes a new one")
        if evacuate and self.standbys.promoted_here(instance):
            if self.standbys.adopt(instance):
                return
        elif evacuate:
            # Somebody else than the manager moves it: from now on no backup may be promoted any more.
            operations.disarm(Planned("evacuated", needs_word=True), instance, instance.host, self.partners)
            self.standbys.make_way(instance)
        super().rebuild(context, instance, *args, evacuate=evacuate, **kwargs)

    def _may_adopt(self, instance: objects.Instance) -> bool:
        try:
            return self.partners.may_adopt(InstanceId(instance.uuid), self.ft_host)
        except PartnerAway as error:
            LOG.warning("Taking the guest for one that must not be touched: %s", error, instance=instance)
            return False

    # Ending

    def destroy(self, context: Any, instance: objects.Instance, network_info: Any, *args: Any, **kwargs: Any) -> None:
        if self._is_backups_end(instance):
            self.standbys.discard_of(instance)
            return
        # What init_host() destroys are the remains of servers that were evacuated while this host was away: the pair of
        # a server that runs elsewhere now must not be disarmed by them.
        if self._returning and self._is_back(instance):
            LOG.warning("The server was evacuated from here and is here again: it is not destroyed", instance=instance)
            return
        if not self._returning:
            operations.disarm(Planned("deleted or recreated", needs_word=False), instance, self.ft_host, self.partners)
        super().destroy(context, instance, network_info, *args, **kwargs)

    def _is_back(self, instance: objects.Instance) -> bool:
        """Nova destroys by its record of an evacuation, and does not look where the server is now."""
        return (instance.host == self.ft_host and instance.vm_state != vm_states.DELETED
                and instance.task_state != task_states.DELETING and servers.known_to_manager(instance))

    def cleanup(self, context: Any, instance: objects.Instance, *args: Any, **kwargs: Any) -> None:
        if self._is_backups_end(instance):
            self.standbys.discard_of(instance)
            return
        super().cleanup(context, instance, *args, **kwargs)

    def _is_backups_end(self, instance: objects.Instance) -> bool:
        """A deleted server has lost its metadata; its claim still tells."""
        return servers.is_backup(instance) or (
            servers.in_service_project(instance.project_id) and bool(self.standbys.of_backup(instance.uuid)))

    power_off = guarded("power_off")
    power_on = guarded("power_on")
    reboot = guarded("reboot")
    pause = guarded("pause")
    suspend = guarded("suspend")
    rescue = guarded("rescue")
    snapshot = guarded("snapshot")
    migrate_disk_and_power_off = guarded("migrate_disk_and_power_off")
    attach_volume = guarded("attach_volume")
    detach_volume = guarded("detach_volume")
    attach_interface = guarded("attach_interface")
    detach_interface = guarded("detach_interface")

    def network_binding_host_id(self, context: Any, instance: objects.Instance) -> Any:
        operations.before_interface(instance, self.ft_host, self.partners, self._is_armed)
        return super().network_binding_host_id(context, instance)

    # What Nova sees

    def get_available_resource(self, nodename: str) -> dict[str, Any]:
        if not self._returning:
            remains.destroy(self, self.ft_host)
        return super().get_available_resource(nodename)

    def get_info(self, instance: objects.Instance, use_cache: bool = True) -> hardware.InstanceInfo:
        operations.before_reboot(instance, self.ft_host, self.partners, self._is_armed)
        if not servers.is_backup(instance):
            return self._between_checkpoints(instance, super().get_info(instance, use_cache))
        if any(self.standbys.guest(claim.instance_id) for claim in self.standbys.of_backup(instance.uuid)):
            # The standby is there, paused as it should be: for Nova, the backup is up.
            return hardware.InstanceInfo(state=power_state.RUNNING)
        raise exception.InstanceNotFound(instance_id=instance.uuid)

    def _between_checkpoints(self, instance: objects.Instance, info: hardware.InstanceInfo) -> hardware.InstanceInfo:
        """A checkpoint's pause is none of the server's: whoever looks in its few milliseconds sees a running guest."""
        if (info.state == power_state.PAUSED and instance.vm_state == vm_states.ACTIVE
                and instance.task_state not in _PAUSING and self._is_armed(instance.uuid)
                and self._stands_still_for_us(instance.uuid)):
            return hardware.InstanceInfo(state=power_state.RUNNING, internal_id=info.internal_id)
        return info

    def _stands_still_for_us(self, instance_id: str) -> bool:
        """libvirt knows no reason of a checkpoint's stop, but of its own, and of QEMU's at a full disk."""
        guest = self.standbys.guest(instance_id)
        if guest is None:
            return False
        state, reason = guest._domain.state()
        # It may run again since the first look.
        return state != _PAUSED or reason == _PAUSED_UNKNOWN

    def list_instance_uuids(self) -> list[str]:
        """A standby is listed as its backup server: it is no guest of this host under its own uuid."""
        held = claims.held(self.ft_host)
        return [held[uuid].backup_id if uuid in held else uuid for uuid in super().list_instance_uuids()]

    def emit_event(self, event: virt_event.InstanceEvent) -> None:
        if self._events.passes(event):
            super().emit_event(event)

    def _is_armed(self, instance_id: str) -> bool:
        guest = self.standbys.guest(instance_id)
        try:
            return guest is not None and domain.monitor_path(guest.get_xml_desc()) is not None
        except Unsupported:
            return False
