"""A backup's place: made (a server of the service project), filled (the standby, the engines), removed.

Called by the manager: `place`, `start_engines` and `remove_backup` from the pair's worker, one at a time for a pair;
`plan` from the RPC method of the driver that spawns the backup. Each can be repeated after a crash at any point.
"""

from collections.abc import Container, Mapping, Sequence

from oslo_log import log

from nova_ftvm.core import request
from nova_ftvm.core.domain import needs as needs_of
from nova_ftvm.core.kind import NOTHING_NEEDED, Needs, misfit
from nova_ftvm.db.records import Host, Pair
from nova_ftvm.db.store import Store
from nova_ftvm.exception import FtvmError, LostRace, Unsupported
from nova_ftvm.failover import line, refusals, shown
from nova_ftvm.failover.agents import AgentFailed, Agents, lasting, said
from nova_ftvm.failover.arbiter import NOTHING, Arbiter
from nova_ftvm.failover.cloud import GENERATION_KEY, PRIMARY_KEY, Cloud, CloudRefused, Server
from nova_ftvm.failover.settings import Clock, Settings
from nova_ftvm.rpc.manager import StandbyPlan
from nova_ftvm.types import Generation, InstanceId, PairState

LOG = log.getLogger(__name__)

#: Nothing else holds a pair up for long: a lost agent is asked for so long, and then left to its next report.
_STOP_S = 3.0
#: A worker does not wait longer than this for Nova to delete a backup server.
_DELETION_S = 30.0
#: A host that has been silent for more than this part of [manager]agent_down_s may be dead.
_FRESH = 3


class NotPlanned(FtvmError):
    """This backup server has no use (any more): the driver must not boot it."""


class PlaceLost(FtvmError):
    """The backup cannot be made now, for a reason that the server's owner or the operator can read."""

    def __init__(self, reason: str, refused_by: str = "") -> None:
        """refused_by: the host that will say the same again as long as nothing changes."""
        super().__init__(reason)
        self.refused_by = refused_by


class InLine(FtvmError):
    """Other pairs synchronise first."""


def candidates(hosts: Mapping[str, Host], primary_host: str, now: float, limit_s: float,
               refused: Container[str] = (), needs: Needs = NOTHING_NEEDED) -> list[str]:
    """Hosts that can hold a backup of a server on `primary_host`. Nova chooses none that is forced down."""
    return sorted(name for name, host in hosts.items()
                  if name != primary_host and name not in refused and host.capable and host.alive(now, limit_s)
                  and not host.forced_down_by_us and not misfit(needs, host.abilities))


def misfits(hosts: Mapping[str, Host], primary_host: str, now: float, limit_s: float,
            refused: Container[str], needs: Needs) -> str:
    """Why none of the hosts that could hold a backup otherwise can take over such a guest; '' when one can."""
    if candidates(hosts, primary_host, now, limit_s, refused, needs):
        return ""
    unfit = {name: misfit(needs, hosts[name].abilities)
             for name in candidates(hosts, primary_host, now, limit_s, refused)}
    return "; ".join(f"{name} cannot hold the backup: {why}" for name, why in unfit.items())


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
        hosts = self._places(pair)
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

    def _places(self, pair: Pair) -> list[str]:
        """The hosts that Nova may choose from. If there is a choice, none where a backup was just lost, or that may
        have died with it; and, at the first try, none where other pairs have to be waited for."""
        hosts, now, limit_s = self._store.hosts(), self._clock.now(), self._settings.agent_down_s
        refused = refusals.standing(pair, hosts, now, self._settings).keys()
        avoided = refused | refusals.avoided(pair, now)
        needs = self._needs(pair)
        places = (candidates(hosts, pair.primary_host, now, limit_s / _FRESH, avoided, needs)
                  or candidates(hosts, pair.primary_host, now, limit_s / _FRESH, refused, needs)
                  or candidates(hosts, pair.primary_host, now, limit_s, refused, needs))
        if not places and (why := misfits(hosts, pair.primary_host, now, limit_s, refused, needs)):
            raise PlaceLost(why)
        load = line.load(self._store.pairs_in(PairState.PENDING, PairState.SYNCING))
        roomy = [host for host in places if load[host] < self._settings.sync_limit_per_host]
        return roomy if roomy and pair.attempts == 0 else places

    def _needs(self, pair: Pair) -> Needs:
        """What the guest's domain asks of a host. Unknown is nothing: `plan` asks again, and so does the driver."""
        try:
            return needs_of(self._agents.describe_domain(pair.primary_host, pair.instance_id)["domain_xml"])
        except (*AgentFailed, Unsupported) as error:
            LOG.warning("Pair %s generation %d: the agent of %s does not describe the guest, and any host may be "
                        "chosen: %s", pair.id, pair.generation, pair.primary_host, said(error))
            return NOTHING_NEEDED

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
        """SYNCING: the backup's engine listens, then the primary's connects. Raises PlaceLost, InLine."""
        assert pair.backup_host is not None
        first = line.ahead(pair, self._store.pairs_in(PairState.SYNCING), self._settings.sync_limit_per_host)
        if first:
            others = "1 other is" if first == 1 else f"{first} others are"
            raise InLine(f"the first copy waits in line: {others} first on {pair.primary_host} or {pair.backup_host}")
        asked = pair.backup_host
        try:
            listening = self._agents.start_backup(asked, pair.id, pair.generation, pair.instance_id, pair.token)
            asked = pair.primary_host
            self._agents.start_primary(asked, pair.id, pair.generation, pair.instance_id, listening["address"],
                                       listening["port"], pair.token, self._policy(pair))
        except AgentFailed as error:
            raise PlaceLost(f"the engine on {asked} did not start: {said(error)}",
                            asked if lasting(error) else "") from error
        try:
            return self._store.change(pair, step=NOTHING, reason="")
        except LostRace:
            # The first copy was faster than the agent's answer.
            return self._store.pair(pair.id)

    def _policy(self, pair: Pair) -> str:
        server = self._cloud.server(pair.instance_id)
        return "" if server is None else request.read(server.metadata, server.extra_specs).policy

    # -- removing

    def remove_backup(self, pair: Pair) -> Pair:
        """Step 'cleanup': ends the engines, deletes the backup server and its bindings, and waits for it.

        One that does not go in time, or that is on a silent host, is left to the reconciler's sweep: Nova deletes it
        once it takes the host for dead, or when the host is back.
        """
        if pair.backup_host is not None and pair.backup_host != pair.active_host:
            self.stop_engine(pair, pair.backup_host)
        if pair.state is PairState.DISABLED:
            self.stop_engine(pair, pair.active_host)
        backups = self._cloud.backups_of(pair.instance_id)
        for backup in backups:
            self._cloud.delete_server(backup.id)
        self.remove_bindings(pair)
        self._await_deletion(pair, self._on_living_hosts(backups))
        return self._store.change(pair, step=NOTHING, backup_id=None, backup_host=None)

    def _await_deletion(self, pair: Pair, backups: Sequence[Server]) -> None:
        """A new backup finds its place more easily when the old one is gone. It may find one all the same."""
        deadline = self._clock.now() + _DELETION_S
        while any(self._cloud.server(backup.id) is not None for backup in backups):
            if self._clock.now() > deadline:
                LOG.warning("Pair %s generation %d: Nova has not deleted its backup server within %g s and is asked "
                            "again later", pair.id, pair.generation, _DELETION_S)
                return
            self._clock.sleep(self._settings.poll_s)

    def _on_living_hosts(self, backups: Sequence[Server]) -> list[Server]:
        hosts, now = self._store.hosts(), self._clock.now()
        return [backup for backup in backups if backup.host is None or backup.host not in hosts
                or hosts[backup.host].alive(now, self._settings.agent_down_s)]

    def stop_engine(self, pair: Pair, host: str, generation: Generation | None = None) -> None:
        """Best effort: an agent that does not answer is told again when it reports the engine.

        generation: no newer engine is meant; without it, none that is newer than the pair as it is given.
        """
        try:
            self._agents.stop_engine(host, pair.id, generation or pair.generation, pair.reason, timeout_s=_STOP_S)
        except AgentFailed as error:
            LOG.warning("Pair %s generation %d: the engine on %s was not told to stop: %s", pair.id,
                        pair.generation, host, said(error))

    def remove_bindings(self, pair: Pair) -> None:
        """Those on the backup's host that are not active. Only as long as the ports are the server's: of others Neutron
        neither tells the bindings nor changes them."""
        server = self._cloud.server(pair.instance_id)
        if pair.backup_host is None or server is None or server.host == pair.backup_host:
            return
        for port in self._cloud.ports(pair.instance_id):
            for binding in self._cloud.bindings(port.id):
                if binding.host == pair.backup_host and not binding.active:
                    self._cloud.unbind(port.id, binding.host)
