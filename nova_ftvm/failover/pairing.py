"""A backup's place: made (a server of the service project), filled (the standby, the engines), removed.

Called by the manager: `place`, `start_engines` and `remove_backup` from the pair's worker, one at a time for a pair;
`plan` from the RPC method of the driver that spawns the backup. Each can be repeated after a crash at any point.
"""

from collections.abc import Mapping

from oslo_log import log

from nova_ftvm.db.records import Host, Pair
from nova_ftvm.db.store import Store
from nova_ftvm.exception import FtvmError, LostRace
from nova_ftvm.failover import shown
from nova_ftvm.failover.agents import AgentFailed, Agents, said
from nova_ftvm.failover.arbiter import NOTHING, Arbiter
from nova_ftvm.failover.cloud import GENERATION_KEY, PRIMARY_KEY, Cloud, CloudRefused, Server
from nova_ftvm.failover.settings import Clock, Settings
from nova_ftvm.rpc.manager import StandbyPlan
from nova_ftvm.types import InstanceId, PairState

LOG = log.getLogger(__name__)

#: Nothing else holds a pair up for long: a lost agent is asked for so long, and then left to its next report.
_STOP_S = 3.0


class NotPlanned(FtvmError):
    """This backup server has no use (any more): the driver must not boot it."""


class PlaceLost(FtvmError):
    """The backup cannot be made now, for a reason that the server's owner or the operator can read."""


def candidates(hosts: Mapping[str, Host], primary_host: str, now: float, limit_s: float) -> list[str]:
    """Hosts that can hold a backup of a server on `primary_host`."""
    return sorted(name for name, host in hosts.items()
                  if name != primary_host and host.capable and host.alive(now, limit_s))


class Pairing:
    """Makes and removes backups."""

    def __init__(self, store: Store, arbiter: Arbiter, cloud: Cloud, agents: Agents, clock: Clock,
                 settings: Settings) -> None:
        self._store = store
        self._arbiter = arbiter
        self._cloud = cloud
        self._agents = agents
        self._clock = clock
        self._settings = settings

    # -- making

    def place(self, pair: Pair) -> Pair:
        """PENDING: sees to it that the backup server exists or is asked for, and that the row says so."""
        server = self._cloud.server(pair.instance_id)
        if server is None:
            return pair
        # The driver takes ft:state for the sign that a backup may exist: shown BEFORE there is one.
        shown.show_pair(self._cloud, server, pair)
        if pair.backup_id is not None:
            return pair
        return self._store.change(pair, backup_id=self._existing(pair) or self._create(pair, server))

    def _existing(self, pair: Pair) -> str | None:
        """A backup of this generation that a manager asked for before it could write it down; older ones go."""
        found = None
        for backup in self._cloud.backups_of(pair.instance_id):
            if backup.metadata.get(GENERATION_KEY) == str(pair.generation) and found is None:
                found = backup.id
            else:
                self._cloud.delete_server(backup.id)
        return found

    def _create(self, pair: Pair, server: Server) -> str:
        hosts = candidates(self._store.hosts(), pair.primary_host, self._clock.now(), self._settings.agent_down_s)
        if not hosts:
            raise PlaceLost("no other capable host is left")
        try:
            backup_id = self._cloud.create_backup(server, hosts, pair.generation)
        except CloudRefused as error:
            raise PlaceLost("Nova refused the backup server, which is made from the server's own image and flavor: "
                            f"{error.message}") from error
        LOG.info("Pair %s generation %d: backup server %s asked for on one of %s", pair.id, pair.generation,
                 backup_id, ", ".join(hosts))
        return backup_id

    # -- filling

    def plan(self, backup_id: str, host: str) -> StandbyPlan | None:
        """For the driver on `host`, which spawns `backup_id`. None: an ordinary server. Raises NotPlanned."""
        pair = self._store.pair_of_backup(backup_id) or self._unrecorded(backup_id)
        if pair is None:
            return None
        if pair.state is not PairState.PENDING or host == pair.primary_host:
            raise NotPlanned(f"pair {pair.id} is {pair.state} and needs no backup on {host}")
        bindings = [(port, self._cloud.bind(port, host)) for port in self._cloud.ports(pair.instance_id)]
        for port, binding in bindings:
            if binding.vif_type in ("", "unbound", "binding_failed"):
                raise NotPlanned(f"Neutron cannot bind port {port.id} on {host}: {binding.vif_type or 'no answer'}")
        try:
            domain = self._agents.describe_domain(pair.primary_host, pair.instance_id)
        except AgentFailed as error:
            raise NotPlanned(f"the agent of {pair.primary_host} does not describe the guest: {said(error)}") from error
        pair = self._store.change(pair, backup_host=host)
        return StandbyPlan(
            pair_id=pair.id, instance_id=pair.instance_id, generation=pair.generation,
            primary_host=pair.primary_host, domain_xml=domain["domain_xml"], disks=domain.get("disks", {}),
            bindings=[{"port_id": port.id, "vif_type": binding.vif_type, "vif_details": dict(binding.vif_details),
                       "vnic_type": binding.vnic_type, "profile": dict(binding.profile)}
                      for port, binding in bindings])

    def _unrecorded(self, backup_id: str) -> Pair | None:
        """The driver may be faster than the note of the backup's id. The project decides, then the generation."""
        backup = self._cloud.server(backup_id)
        if backup is None or backup.project_id != self._cloud.service_project() or PRIMARY_KEY not in backup.metadata:
            return None
        pair = self._store.pair_of(InstanceId(backup.metadata[PRIMARY_KEY]))
        if pair is None or backup.metadata.get(GENERATION_KEY) != str(pair.generation):
            raise NotPlanned(f"backup server {backup_id} belongs to no pair any more")
        return self._store.change(pair, backup_id=backup_id)

    def start_engines(self, pair: Pair) -> Pair:
        """SYNCING: the backup's engine listens, then the primary's connects. Raises PlaceLost."""
        assert pair.backup_host is not None
        try:
            listening = self._agents.start_backup(pair.backup_host, pair.id, pair.generation, pair.instance_id,
                                                  pair.token)
            self._agents.start_primary(pair.primary_host, pair.id, pair.generation, pair.instance_id,
                                       listening["address"], listening["port"], pair.token)
        except AgentFailed as error:
            raise PlaceLost(f"the engines did not start: {said(error)}") from error
        try:
            return self._store.change(pair, step=NOTHING)
        except LostRace:
            # The first copy was faster than the agent's answer.
            return self._store.pair(pair.id)

    # -- removing

    def remove_backup(self, pair: Pair) -> Pair:
        """Step 'cleanup': ends the engines, deletes the backup server and its bindings, and waits until it is gone."""
        if pair.backup_host is not None and pair.backup_host != pair.active_host:
            self.stop_engine(pair, pair.backup_host)
        if pair.state is PairState.DISABLED:
            self.stop_engine(pair, pair.active_host)
        backups = self._cloud.backups_of(pair.instance_id)
        for backup in backups:
            self._cloud.delete_server(backup.id)
        self._remove_bindings(pair)
        deadline = self._clock.now() + self._settings.step_timeout_s
        while any(self._cloud.server(backup.id) is not None for backup in backups):
            if self._clock.now() > deadline:
                raise PlaceLost(f"Nova does not delete the backup server {backups[0].id}: delete it by hand")
            self._clock.sleep(self._settings.poll_s)
        return self._store.change(pair, step=NOTHING, backup_id=None, backup_host=None)

    def stop_engine(self, pair: Pair, host: str) -> None:
        """Best effort: an agent that does not answer is told again when it reports the engine."""
        try:
            self._agents.stop_engine(host, pair.id, pair.generation, pair.reason, timeout_s=_STOP_S)
        except AgentFailed as error:
            LOG.warning("Pair %s generation %d: the engine on %s was not told to stop: %s", pair.id,
                        pair.generation, host, said(error))

    def _remove_bindings(self, pair: Pair) -> None:
        server = self._cloud.server(pair.instance_id)
        if pair.backup_host is None or server is None or server.host == pair.backup_host:
            return
        for port in self._cloud.ports(pair.instance_id):
            for binding in self._cloud.bindings(port.id):
                if binding.host == pair.backup_host and not binding.active:
                    self._cloud.unbind(port.id, binding.host)
