"""Nova follows a promotion: the guest runs on the backup's host already, the server's record has to come after it.

Called from the pair's worker only. The row's `step` names the step that is being done; it is written before the work
and changed after it, and each step can be repeated whole. So a manager may die anywhere, and another goes on.

    bindings    the ports' bindings on the backup's host become the active ones (from the grant on: frames need them)
    role        the backup server is marked as promoted: its host must not destroy the domain with it
    allocation  its reservation in Placement is freed, as the server itself needs the room
    evacuate    the source is fenced and told to be down, and Nova is asked to move the server; unless its own live
                migration is about to, which is how the owner asks for a switchover
    settle      until the server is ACTIVE on the backup's host
    tidy        the old bindings, what the server still reserves on its old host, and the backup server go

A step that fails is tried again with back-off, for ever: the guest runs meanwhile, and ft:reason says what is wrong.
"""

from collections.abc import Callable

from oslo_log import log

from nova_ftvm.db.records import Pair
from nova_ftvm.db.store import Store
from nova_ftvm.exception import FtvmError
from nova_ftvm.failover.agents import AgentFailed, Agents, Unreachable, said
from nova_ftvm.failover.arbiter import CATCH_UP, CLEANUP, NOTHING, Arbiter
from nova_ftvm.failover.cloud import PROMOTED, ROLE_KEY, Cloud, CloudRefused, CloudUnavailable, Server
from nova_ftvm.failover.settings import Clock, Settings
from nova_ftvm.types import PairState

LOG = log.getLogger(__name__)

_MIGRATING = "migrating"
_DELETING = ("deleting", "soft-deleting")
_REBUILDING = ("rebuilding", "rebuild_block_device_mapping", "rebuild_spawning")


class StepFailed(FtvmError):
    """A step of the catch-up must be tried again, from the step that `back_to` names."""

    def __init__(self, back_to: str, reason: str) -> None:
        super().__init__(reason)
        self.back_to = back_to


class ServerGone(FtvmError):
    """The server was deleted while Nova was to follow its guest."""


def settled(server: Server, host: str) -> bool:
    """Has Nova followed? The old host with SHUTOFF and no task shows for a moment in between."""
    return server.host == host and server.task_state is None and server.vm_state == "active"


def resumed(pair: Pair) -> bool:
    """Does the guest run with its memory? Otherwise Nova boots it from the backup's disks: see Arbiter.start_anew."""
    return "running_at" in pair.timeline


class CatchUp:
    """Carries out the steps."""

    def __init__(self, store: Store, arbiter: Arbiter, cloud: Cloud, agents: Agents, clock: Clock, settings: Settings,
                 keep: Callable[[Pair], None] = lambda pair: None) -> None:
        """keep: called between two steps, to say that the work goes on (the worker's claim)."""
        self._store = store
        self._arbiter = arbiter
        self._cloud = cloud
        self._agents = agents
        self._clock = clock
        self._settings = settings
        self._keep = keep
        self._do: dict[str, Callable[[Pair, str], None]] = {
            "bindings": self._bindings, "role": self._role, "allocation": self._allocation,
            "evacuate": self._evacuate, "settle": self._settle, "tidy": self._tidy}
        assert tuple(self._do) == CATCH_UP

    def bind_early(self, pair: Pair) -> None:
        """PROMOTING: what can be done while the guest is being resumed."""
        self._bindings(pair, pair.active_host)

    def run(self, pair: Pair) -> Pair:
        """From the recorded step to the end. Raises StepFailed and as Cloud does; the row then names the step."""
        while pair.step in CATCH_UP:
            self._keep(pair)
            try:
                self._do[pair.step](pair, pair.active_host)
            except ServerGone:
                return self._abandon(pair)
            pair = self._finish(pair) if pair.step == CATCH_UP[-1] else self._next(pair)
        return pair

    def _next(self, pair: Pair) -> Pair:
        # That Nova took the request is no success yet: failures are counted on until the server is there.
        attempts = pair.attempts if pair.step == "evacuate" else 0
        return self._store.change(pair, step=CATCH_UP[CATCH_UP.index(pair.step) + 1], attempts=attempts)

    def _finish(self, pair: Pair) -> Pair:
        now = self._clock.now()
        how = "" if resumed(pair) else ", started anew there from its disks"
        done = self._store.change(
            pair, step=NOTHING, attempts=0, primary_host=pair.active_host, backup_id=None, backup_host=None,
            timeline={**pair.timeline, "nova_done_at": now}, retry_at=now + self._settings.settle_s,
            reason=f"failed over from {pair.primary_host} to {pair.active_host}{how}; no backup yet")
        LOG.info("Pair %s generation %d: Nova has followed the guest of server %s to %s", pair.id, pair.generation,
                 pair.instance_id, pair.active_host)
        return done

    def _abandon(self, pair: Pair) -> Pair:
        """The server was deleted: nobody but us knows of the guest that runs on the backup's host."""
        LOG.warning("Pair %s generation %d: server %s was deleted; its guest on %s is destroyed", pair.id,
                    pair.generation, pair.instance_id, pair.active_host)
        try:
            self._agents.fence(pair.active_host, pair.id, pair.generation, pair.instance_id)
        except AgentFailed as error:
            raise StepFailed(pair.step, f"the agent of {pair.active_host} does not destroy the guest") from error
        return self._arbiter.disarm(self._store.change(pair, step=CLEANUP), "the server was deleted")

    # -- the steps

    def _bindings(self, pair: Pair, host: str) -> None:
        for port in self._cloud.ports(pair.instance_id):
            active = {binding.host: binding.active for binding in self._cloud.bindings(port.id)}
            if host not in active:
                self._cloud.bind(port, host)
            if not active.get(host):
                self._cloud.activate(port.id, host)

    def _role(self, pair: Pair, host: str) -> None:
        if pair.backup_id is None:
            return
        try:
            self._cloud.set_metadata(pair.backup_id, {ROLE_KEY: PROMOTED})
        except CloudRefused as error:
            if error.status != 404:
                raise

    def _allocation(self, pair: Pair, host: str) -> None:
        if pair.backup_id is not None:
            self._cloud.delete_allocation(pair.backup_id)

    def _evacuate(self, pair: Pair, host: str) -> None:
        server = self._server(pair)
        if server.host == host or server.task_state in _REBUILDING:
            return  # asked for already; what hangs, `settle` resets
        if server.task_state == _MIGRATING and host in self._cloud.moving_to(server.id):
            return  # a switchover: Nova's own live migration brings the record here
        if not resumed(pair):
            self._discard(pair, host)
        source = server.host or pair.primary_host
        alive = self._fence(pair, source)
        self._store.mark_forced_down(source, True)
        self._cloud.force_down(source, True)
        try:
            server = self._server(pair)
            if server.task_state in _DELETING:
                # The order was given to a host that is down, and Nova's evacuation would forget it. What is ordered
                # from now on Nova does by itself.
                self._cloud.delete_server(server.id)
                raise StepFailed("evacuate", "the server is being deleted")
            if server.task_state is not None or server.vm_state != "active":
                self._cloud.reset_state(server.id)
            self._cloud.evacuate(server.id, host)
        except CloudRefused as error:
            raise StepFailed("evacuate", f"Nova refused to move the server: {error.message}") from error
        finally:
            if alive:
                self.lift(source)

    def _discard(self, pair: Pair, host: str) -> None:
        """What is left of a standby that could not be resumed; the disks stay. A guest that runs after all stays too,
        and Nova adopts it."""
        try:
            self._agents.discard_standby(host, pair.instance_id)
        except AgentFailed as error:
            raise StepFailed("evacuate", f"the agent of {host} does not answer: {said(error)}") from error

    def _fence(self, pair: Pair, source: str) -> bool:
        """Ends the old guest; says whether the source's agent lives. Silence is no proof of death, and need not be:
        the old primary's output is held for ever, and its agent learns of the new generation at its next report."""
        try:
            self._agents.fence(source, pair.id, pair.generation, pair.instance_id,
                               timeout_s=self._settings.fence_answer_s)
        except Unreachable:
            return False
        except AgentFailed as error:
            LOG.warning("Pair %s generation %d: the agent of %s could not destroy the old guest: %s", pair.id,
                        pair.generation, source, said(error))
        return True

    def lift(self, host: str) -> bool:
        """Takes back that the host is down. Nova refuses that until its nova-compute has cleaned up after itself."""
        try:
            self._cloud.force_down(host, False)
        except (CloudRefused, CloudUnavailable) as error:
            LOG.info("Host %s stays forced down; tried again later: %s", host, error)
            return False
        self._store.mark_forced_down(host, False)
        LOG.info("Host %s is not forced down any more", host)
        return True

    def _settle(self, pair: Pair, host: str) -> None:
        deadline = self._clock.now() + self._settings.step_timeout_s
        while not settled(server := self._server(pair), host):
            if server.task_state is None and (server.vm_state == "error" or server.host == host):
                self._cloud.reset_state(server.id)
                if server.host != host:
                    raise StepFailed("evacuate", f"Nova's evacuation failed: {server.fault or 'no fault given'}")
            if self._clock.now() > deadline:
                if server.task_state not in _DELETING:
                    self._cloud.reset_state(server.id)
                raise StepFailed("evacuate", f"the server is not on {host} after {self._settings.step_timeout_s:g} s")
            self._clock.sleep(self._settings.poll_s)

    def _tidy(self, pair: Pair, host: str) -> None:
        for port in self._cloud.ports(pair.instance_id):
            for binding in self._cloud.bindings(port.id):
                if binding.host == pair.primary_host and not binding.active:
                    self._cloud.unbind(port.id, binding.host)
        try:
            self._cloud.release_allocation(pair.instance_id, pair.primary_host)
        except CloudRefused as error:
            # It is Nova's in the end: it goes when the source's nova-compute starts.
            LOG.warning("Pair %s generation %d: %s stays reserved on %s: %s", pair.id, pair.generation,
                        pair.instance_id, pair.primary_host, error)
        if pair.backup_id is not None:
            self._cloud.delete_server(pair.backup_id)

    def _server(self, pair: Pair) -> Server:
        server = self._cloud.server(pair.instance_id)
        if server is None:
            raise ServerGone(f"server {pair.instance_id} is gone")
        assert pair.state is PairState.DEGRADED
        return server
