"""A standby on this host: made for a backup server, adopted by Nova when promoted, or discarded.

The standby's domain and files bear the uuid of the protected server, which lives on another host: its Instance is read
here and never saved. Until the adoption a claim (claims.py) says that they are the backup's. The rule of every
clean-up: what bears no claim of that very backup is not touched, and whether a guest was promoted is asked, never
guessed.
"""

# Nova registers its objects when its services start, which may be after this import.
from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from nova import context as nova_context
from nova import exception, objects
from nova.compute import task_states
from nova.network import model as network_model
from nova.objects import migrate_data
from nova.virt import hardware
from nova.virt.libvirt import driver as libvirt_driver
from nova.virt.libvirt import guest as libvirt_guest
from oslo_log import log

from nova_ftvm.cloud import claims, files, remains, servers
from nova_ftvm.cloud.claims import Claim
from nova_ftvm.cloud.partners import PartnerAway, Partners
from nova_ftvm.cloud.refusal import Refused
from nova_ftvm.cloud.settings import CONF
from nova_ftvm.core import domain
from nova_ftvm.core.kind import Abilities, misfit
from nova_ftvm.exception import FtvmError, InTheWay, Unsupported
from nova_ftvm.rpc.manager import StandbyPlan
from nova_ftvm.types import Generation, InstanceId, PairId

LOG = log.getLogger(__name__)

#: libvirt's VIR_DOMAIN_START_PAUSED, VIR_DOMAIN_METADATA_ELEMENT and VIR_DOMAIN_AFFECT_LIVE.
_START_PAUSED = 1
_METADATA_ELEMENT = 2
_AFFECT_LIVE = 1


class Standbys:
    """The standbys of one compute host. `driver` does what Nova does for any guest: files, interfaces, domains."""

    def __init__(self, driver: libvirt_driver.LibvirtDriver, partners: Partners, host: Callable[[], str]) -> None:
        self._driver = driver
        self._partners = partners
        self._host = host

    def make(self, context: nova_context.RequestContext, backup: objects.Instance) -> None:
        """Starts the paused standby that the backup server stands for.

        Raises BuildAbortException, with nothing left behind: another try on another host is the manager's decision.
        """
        try:
            plan = self._partners.standby_plan(backup.uuid, self._host())
        except PartnerAway as error:
            raise _abort(backup, str(error)) from error
        if plan is None:
            raise _abort(backup, "the failover manager expects no backup here; servers of its project are not booted")
        try:
            with contextlib.ExitStack() as undo:
                self._build(context, backup, plan, undo)
                grant = self._partners.standby_ready(PairId(plan["pair_id"]), Generation(plan["generation"]),
                                                     self._host())
                if not grant.granted:
                    raise InTheWay(f"the pair went on without this standby: {grant.reason}")
                undo.pop_all()
        except Exception as error:  # Glance, Neutron, privsep, libvirt: whatever it was, the manager has to know.
            LOG.exception("The standby could not be made", instance=backup)
            self._report_failure(plan, str(error) or type(error).__name__, isinstance(error, Unsupported))
            raise _abort(backup, f"the standby could not be made: {error}") from error

    def discard_of(self, backup: objects.Instance) -> None:
        """The backup server ends: its standby goes, unless it was promoted. Raises Refused when that is not known."""
        for claim in self.of_backup(backup.uuid):
            self.discard(claim)

    def of_backup(self, backup_id: str) -> list[Claim]:
        return [claim for claim in claims.held(self._host()).values() if claim.backup_id == backup_id]

    def discard(self, claim: Claim, never_ran: bool = False) -> bool:
        """Removes domain, interfaces and files of a standby that was not promoted. True: nothing is left.

        never_ran: this call's own caller knows that nobody else has seen the standby yet.
        """
        try:
            if not self._domain_gone(claim) or not (never_ran or self._files_forsaken(claim)):
                LOG.info("The standby of %s was promoted here: domain and files stay", claim.instance_id)
                return False
        except PartnerAway as error:
            raise Refused(f"the standby of server {claim.instance_id} stays until it is certain that it was not "
                          f"promoted: {error}") from error
        self._unplug(claim)
        claims.remove_files(claim)
        return True

    def promoted_here(self, instance: objects.Instance) -> bool:
        """Nova evacuates the server to this host: is its promoted standby here, or what an adoption that broke off made
        of it? Raises Refused when nobody can tell."""
        is_nothing_here = claims.of(instance.uuid, self._host()) is None and self.guest(instance.uuid) is None
        if is_nothing_here and not servers.known_to_manager(instance):
            return False
        try:
            return self._partners.may_adopt(InstanceId(instance.uuid), self._host())
        except PartnerAway as error:
            raise Refused(f"nobody can tell whether a standby of the server was promoted here: {error}") from error

    def adopt(self, instance: objects.Instance) -> bool:
        """Nova evacuates the server: makes the promoted guest its own. False: it has ended since, and Nova boots from
        its disks."""
        if self.guest(instance.uuid) is not None:
            _walk_task_states(instance)
        return self.take(instance)

    def take(self, instance: objects.Instance) -> bool:
        """The promoted guest, its disks and all are Nova's from now on. False: there is no guest."""
        guest = self.guest(instance.uuid)
        if guest is not None:
            self._make_persistent(guest)
            LOG.info("Adopted the promoted guest", instance=instance)
        claims.drop(instance.uuid)
        return guest is not None

    def make_way(self, instance: objects.Instance) -> None:
        """Nova boots the server here anew: a standby that was not promoted is in the way."""
        claim = claims.of(instance.uuid, self._host())
        if claim is not None and not self.discard(claim):
            raise Refused("the server's guest runs here, but the arbiter gave the server to another host")

    def sweep(self, servers_here: Sequence[str]) -> None:
        """Removes what backups left that were deleted while nova-compute was away."""
        claims.remove_leftovers(self._host())
        for claim in claims.held(self._host()).values():
            if claim.backup_id not in servers_here:
                try:
                    self.discard(claim)
                except (exception.NovaException, FtvmError) as error:
                    # Nova's own start must not hang on it.
                    LOG.warning("Left for the next start: %s", error)

    def guest(self, instance_id: str) -> libvirt_guest.Guest | None:
        try:
            return self._driver._host.get_guest(objects.Instance(uuid=instance_id))
        except exception.InstanceNotFound:
            return None

    def _build(self, context: nova_context.RequestContext, backup: objects.Instance, plan: StandbyPlan,
               undo: contextlib.ExitStack) -> None:
        instance_id = InstanceId(plan["instance_id"])
        prepared = self._partners.prepare_domain(self._host(), instance_id)
        if not prepared["capable"]:
            raise Unsupported(prepared["reason"])
        if why := misfit(domain.needs(plan["domain_xml"]), Abilities.read(prepared.get("abilities"))):
            raise Unsupported(f"this host cannot take the guest over: {why}")
        self._make_room(instance_id)
        primary = objects.Instance.get_by_uuid(
            nova_context.get_admin_context(), instance_id,
            expected_attrs=["metadata", "system_metadata", "info_cache", "flavor", "device_metadata"])
        vifs = _bound_here(primary, plan["bindings"], self._host())
        claim = Claim(instance_id, backup.uuid, PairId(plan["pair_id"]), self._host(), vifs.json())
        claims.stake(claim)
        undo.callback(self._undo, claim)
        files.make(self._driver, context, primary, vifs)
        files.fit(primary, domain.disks(plan["domain_xml"]), plan["disks"])
        self._driver.plug_vifs(primary, vifs)
        xml = domain.standby(
            plan["domain_xml"], prepared["monitor"],
            domain.StandbyMark(PairId(plan["pair_id"]), Generation(plan["generation"]), backup.uuid),
            {vif["address"].lower(): self._interface(primary, vif) for vif in vifs},
            graphics_listen=CONF.spice.server_listen if CONF.spice.enabled else CONF.vnc.server_listen,
            cpuset=_shared_processors())
        self._driver._host.get_connection().createXML(xml, _START_PAUSED)

    def _undo(self, claim: Claim) -> None:
        self.discard(claim, never_ran=self.guest(claim.instance_id) is None)

    def _make_room(self, instance_id: InstanceId) -> None:
        """Files and domain of that server must not be here; only what an earlier standby left is taken away."""
        files.refuse_shared_storage()
        remains.destroy(self._driver, self._host())
        claim = claims.of(instance_id, self._host())
        if claim is not None and not self.discard(claim):
            raise InTheWay(f"an earlier standby of server {instance_id} was promoted on this host")
        if self.guest(instance_id) is not None:
            raise InTheWay(f"a guest of server {instance_id} is on this host already")

    def _interface(self, primary: objects.Instance, vif: network_model.VIF) -> str:
        return self._driver.vif_driver.get_config(primary, vif, primary.image_meta, primary.flavor,
                                                  CONF.libvirt.virt_type).to_xml()

    def _domain_gone(self, claim: Claim) -> bool:
        """Discards the claim's domain. False: a domain is there that must stay."""
        guest = self.guest(claim.instance_id)
        if guest is None:
            return True
        mark = domain.standby_mark(guest.get_xml_desc())
        if mark is None or mark.backup_id != claim.backup_id:
            return False
        self._partners.discard_standby(self._host(), claim.instance_id)
        return self.guest(claim.instance_id) is None

    def _files_forsaken(self, claim: Claim) -> bool:
        """No domain is here. Had it been promoted and ended since, the files would be the newest of the server."""
        return not self._partners.may_adopt(claim.instance_id, self._host())

    def _unplug(self, claim: Claim) -> None:
        context = nova_context.get_admin_context(read_deleted="yes")
        try:
            primary = objects.Instance.get_by_uuid(context, claim.instance_id)
        except exception.InstanceNotFound:
            LOG.warning("The interfaces of the standby of %s stay plugged: the server's record is gone",
                        claim.instance_id)
            return
        self._driver._unplug_vifs(primary, network_model.NetworkInfo.hydrate(claim.vifs), ignore_errors=True)

    def _make_persistent(self, guest: libvirt_guest.Guest) -> None:
        """A transient domain is gone when it stops. Defined with its own devices, the guest finds them unchanged."""
        xml = guest.get_xml_desc(dump_inactive=True, dump_sensitive=True)
        self._driver._host.write_instance_config(domain.ordinary(xml))
        if domain.standby_mark(guest.get_xml_desc()) is not None:
            guest._domain.setMetadata(_METADATA_ELEMENT, None, None, domain.FTVM_NS, _AFFECT_LIVE)

    def _report_failure(self, plan: StandbyPlan, failure: str, lasting: bool) -> None:
        try:
            self._partners.standby_ready(PairId(plan["pair_id"]), Generation(plan["generation"]), self._host(), failure,
                                         lasting)
        except PartnerAway as error:
            LOG.warning("The failed standby could not be reported; the manager finds the backup in ERROR: %s", error)


def _abort(backup: objects.Instance, reason: str) -> exception.BuildAbortException:
    return exception.BuildAbortException(instance_uuid=backup.uuid, reason=reason)


def _bound_here(primary: objects.Instance, bindings: Sequence[dict[str, Any]], host: str) -> network_model.NetworkInfo:
    """The server's interfaces as this host's inactive bindings describe them: the way of live migration."""
    by_port = {binding["port_id"]: binding for binding in bindings}
    vifs = network_model.NetworkInfo()
    for vif in primary.get_network_info():
        binding = by_port.get(vif["id"])
        if binding is None:
            raise InTheWay(f"port {vif['id']} has no binding on this host")
        moved = migrate_data.VIFMigrateData(
            port_id=vif["id"], host=host, source_vif=vif, vif_type=binding["vif_type"],
            vnic_type=binding["vnic_type"])
        moved.vif_details = binding["vif_details"]
        moved.profile = binding["profile"] or {}
        vifs.append(moved.get_dest_vif())
    return vifs


def _shared_processors() -> str | None:
    processors = hardware.get_cpu_shared_set()
    return hardware.format_cpu_spec(processors) if processors else None


def _walk_task_states(instance: objects.Instance) -> None:
    """Takes the server through the states that the compute manager expects a rebuild to pass."""
    for state, expected in ((task_states.REBUILD_BLOCK_DEVICE_MAPPING, task_states.REBUILDING),
                            (task_states.REBUILD_SPAWNING, task_states.REBUILD_BLOCK_DEVICE_MAPPING)):
        instance.task_state = state
        instance.save(expected_task_state=[expected])
