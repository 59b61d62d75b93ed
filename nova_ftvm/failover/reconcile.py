"""Compares Nova's servers with the pairs, and carries out judge.py's verdicts.

Called in a loop by the manager: all servers every [manager]reconcile_interval_s, single ones when a notification
names them. Notifications are lossy, so nothing depends on them. Each server's failure is its own.
"""

from collections.abc import Callable, Container, Iterable

from oslo_log import log
from oslo_utils import uuidutils

from nova_ftvm.core import request
from nova_ftvm.core.domain import needs, obstacle
from nova_ftvm.core.kind import Needs
from nova_ftvm.db.records import Host, Pair
from nova_ftvm.db.store import Store
from nova_ftvm.exception import LostRace, Unsupported
from nova_ftvm.failover import hosts as reports
from nova_ftvm.failover import refusals, shown
from nova_ftvm.failover.agents import AgentFailed, Agents, said
from nova_ftvm.failover.arbiter import CATCH_UP, Arbiter
from nova_ftvm.failover.catchup import CatchUp
from nova_ftvm.failover.cloud import BACKUP_PREFIX, PRIMARY_KEY, Cloud, CloudRefused, CloudUnavailable, Server
from nova_ftvm.failover.judge import Act, Verdict, View, judge
from nova_ftvm.failover.pairing import Pairing, misfits
from nova_ftvm.failover.settings import Clock, Settings
from nova_ftvm.types import Generation, InstanceId, PairId, PairState

LOG = log.getLogger(__name__)

_NOTHING_ASKED = request.Request(False)


class Reconciler:
    """One pass at a time; see Manager for the loop."""

    def __init__(self, store: Store, arbiter: Arbiter, cloud: Cloud, agents: Agents, pairing: Pairing,
                 catch_up: CatchUp, clock: Clock, settings: Settings, follow: Callable[[PairId], None]) -> None:
        """follow: hands a pair to its worker."""
        self._store = store
        self._arbiter = arbiter
        self._cloud = cloud
        self._agents = agents
        self._pairing = pairing
        self._catch_up = catch_up
        self._clock = clock
        self._settings = settings
        self._follow = follow
        #: When somebody was heard first after nobody was. Lost with this process, it only makes the next one patient.
        self._hearing_since = clock.now()

    def all(self) -> None:
        """One whole comparison. Raises CloudUnavailable when Nova does not answer."""
        # The pairs BEFORE the servers: what a pair names was there when the servers were listed.
        pairs = {pair.instance_id: pair for pair in self._store.pairs()}
        servers = {server.id: server for server in self._cloud.servers()}
        hosts = self._hear()
        for server in servers.values():
            if not self._is_ours(server):
                self._one(server, pairs.get(InstanceId(server.id)), servers, hosts)
        for pair in pairs.values():
            if pair.instance_id not in servers:
                self._unlisted(pair, servers, hosts)
        self._sweep(servers.values(), {pair.backup_id for pair in pairs.values()})
        self._stop_lingering(hosts)
        self._lift_hosts(hosts)

    def some(self, server_ids: Iterable[str]) -> None:
        """The servers that notifications named: protected ones, or backups of such."""
        hosts = self._hear()
        for server_id in server_ids:
            pair = self._store.pair_of(InstanceId(server_id)) or self._store.pair_of_backup(server_id)
            try:
                server = self._cloud.server(pair.instance_id if pair is not None else server_id)
            except CloudRefused as error:
                LOG.warning("Server %s is left to the next pass: %s", server_id, error)
                continue
            if server is None and pair is not None:
                self._unlisted(pair, {}, hosts)
            elif server is not None and not self._is_ours(server):
                self._one(server, pair, {}, hosts)

    def _hear(self) -> dict[str, Host]:
        """The hosts. When all are silent, it is the broker or this manager that was away."""
        hosts, now = self._store.hosts(), self._clock.now()
        if not any(host.alive(now, self._settings.agent_down_s) for host in hosts.values()):
            self._hearing_since = now
        return hosts

    def _is_ours(self, server: Server) -> bool:
        return server.project_id == self._cloud.service_project()

    # -- one server

    def _one(self, server: Server | None, pair: Pair | None, known: dict[str, Server], hosts: dict[str, Host]) -> None:
        asked = _NOTHING_ASKED if server is None else request.read(server.metadata, server.extra_specs)
        if pair is None and not asked.wanted and not asked.refusal and (
                server is None or request.STATE_KEY not in server.metadata):
            return
        try:
            view = View(server=server, request=asked, pair=pair, backup=self._backup(pair, known), hosts=hosts,
                        now=self._clock.now(), settings=self._settings, hearing_since=self._hearing_since)
            self._carry_out(judge(view), view)
        except LostRace as error:
            LOG.debug("Left to the next pass: %s", error)
        except (CloudRefused, CloudUnavailable) as error:
            LOG.warning("Server %s is left to the next pass: %s", server.id if server else pair and pair.instance_id,
                        error)

    def _backup(self, pair: Pair | None, known: dict[str, Server]) -> Server | None:
        if pair is None or pair.backup_id is None:
            return None
        return known.get(pair.backup_id) or self._cloud.server(pair.backup_id)

    def _unlisted(self, pair: Pair, known: dict[str, Server], hosts: dict[str, Host]) -> None:
        """A list may miss a server; only an explicit answer says that it is gone."""
        try:
            server = self._cloud.server(pair.instance_id)
        except (CloudRefused, CloudUnavailable) as error:
            LOG.warning("Server %s is left to the next pass: %s", pair.instance_id, error)
            return
        self._one(server, pair, known, hosts)

    def _carry_out(self, verdict: Verdict, view: View) -> None:
        pair, server = view.pair, view.server
        match verdict.act, pair, server:
            case Act.TRY, _, Server():
                self._try(server, pair, view)
            case Act.REFUSE, _, Server():
                if pair is not None and not view.request.wanted:
                    pair = self._arbiter.forgive(pair)
                self._refuse(server, pair, verdict.reason)
            case Act.SHOW, Pair(), Server():
                shown.show_pair(self._cloud, server, pair, verdict.reason)
            case Act.FOLLOW, Pair(), _:
                self._follow(pair.id)
            case (Act.DISARM | Act.GIVE_UP), Pair(), _:
                self._arbiter.give_up(pair, verdict.reason, failed=verdict.act is Act.GIVE_UP)
                self._follow(pair.id)
            case Act.FAIL, Pair(), _:
                self._arbiter.fail(pair, verdict.reason)
                self._follow(pair.id)
            case Act.START_ANEW, Pair(), _:
                self._arbiter.start_anew(pair, verdict.reason)
                self._follow(pair.id)
            case Act.FORGET, Pair(), _:
                self._store.forget(pair)
                LOG.info("Pair %s generation %d: forgotten with its server %s", pair.id, pair.generation,
                         pair.instance_id)

    def _refuse(self, server: Server, pair: Pair | None, reason: str) -> None:
        if pair is not None and pair.state is PairState.DISABLED and pair.reason != reason:
            self._store.change(pair, reason=reason)
        state = PairState.DISABLED if pair is None else pair.state
        shown.show(self._cloud, server, state, reason)

    def _try(self, server: Server, pair: Pair | None, view: View) -> None:
        """What costs questions: the shape, then the domain; then the pair."""
        assert server.host is not None
        instance_id = InstanceId(server.id)
        why = self._obstacle(server) or self._unfit(server.host, instance_id, view)
        if why:
            if pair is None or pair.state is PairState.DISABLED:
                self._refuse(server, pair, why)
            else:
                shown.show_pair(self._cloud, server, pair, why)
            return
        begun = self._arbiter.begin(pair, instance_id, server.project_id, server.host,
                                    PairId(uuidutils.generate_uuid()))
        self._follow(begun.id)

    def _obstacle(self, server: Server) -> str:
        return request.obstacle(request.Shape(
            extra_specs=server.extra_specs, image_properties=server.image_properties,
            has_image=bool(server.image_id), volumes=server.volumes,
            vnic_types=[port.vnic_type for port in self._cloud.ports(server.id)]))

    def _unfit(self, host: str, instance_id: InstanceId, view: View) -> str:
        """What the server's domain says against it, on this host and on those that could hold the backup."""
        try:
            domain = self._agents.describe_domain(host, instance_id)
        except AgentFailed as error:
            return f"the agent of {host} does not describe the server's domain: {said(error)}"
        if not domain["armed"]:
            return domain["reason"]
        try:
            # A disk may have come since it was armed.
            return obstacle(domain["domain_xml"]) or self._misfits(host, view, needs(domain["domain_xml"]))
        except Unsupported as error:
            return str(error)

    def _misfits(self, host: str, view: View, needed: Needs) -> str:
        refused = refusals.standing(view.pair, view.hosts, view.now, view.settings)
        return misfits(view.hosts, host, view.now, view.settings.agent_down_s, refused, needed)

    # -- what belongs to no server

    def _sweep(self, servers: Iterable[Server], known: Container[str | None]) -> None:
        """Backup servers that no pair names. The rows are read again: a young pair may have named it meanwhile.

        known: named when the pass began, which is all of them as a rule; the next pass looks at them again.
        """
        # Nova takes no second word for a deletion until it knows that the host is dead; then it needs one.
        recently = self._clock.now() - self._settings.agent_down_s
        suspects = [server for server in servers if server.id not in known
                    and self._is_ours(server) and PRIMARY_KEY in server.metadata
                    and server.name.startswith(BACKUP_PREFIX)
                    and (server.task_state != "deleting" or server.updated_at < recently)]
        if not suspects:
            return
        pairs = self._store.pairs()
        named = {pair.backup_id for pair in pairs}
        unsure = {pair.instance_id for pair in pairs if pair.state is PairState.PENDING and pair.backup_id is None}
        for server in suspects:
            if server.id in named or server.metadata[PRIMARY_KEY] in unsure:
                continue
            LOG.warning("Backup server %s belongs to no pair and is deleted", server.id)
            try:
                self._cloud.delete_server(server.id)
            except (CloudRefused, CloudUnavailable) as error:
                LOG.warning("Backup server %s is left to the next pass: %s", server.id, error)

    def _stop_lingering(self, hosts: dict[str, Host]) -> None:
        """Engines whose stop was not heard."""
        now = self._clock.now()
        listed = [(host, engine) for host in hosts.values() if host.alive(now, self._settings.agent_down_s)
                  for engine in host.engines]
        if not listed:
            return
        pairs: dict[str, Pair] = {pair.id: pair for pair in self._store.pairs()}
        for host, engine in listed:
            pair = pairs.get(engine.pair_id)
            if pair is not None and reports.lingers(pair, host.name, engine, now):
                # That one: what the agent said is old, and the pair's next engine may be there by now.
                self._pairing.stop_engine(pair, host.name, Generation(engine.generation))

    def _lift_hosts(self, hosts: dict[str, Host]) -> None:
        """Hosts that we forced down, whose agent has reported since, and from which no server is being moved."""
        back = [host.name for host in hosts.values() if host.forced_down_by_us and host.reported_at > host.forced_at]
        if not back:
            return
        busy = {pair.primary_host for pair in self._store.pairs()
                if pair.state is PairState.PROMOTING or pair.step in CATCH_UP}
        for name in back:
            if name not in busy:
                self._catch_up.lift(name)
