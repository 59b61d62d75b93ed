"""The failover manager: rpc.manager.ManagerApi, and the pairs' slow work.

The RPC methods answer from the arbiter at once; whatever takes time they leave to `follow`, which does what the
pair's state and step call for. `follow` can be repeated at any time, by any manager: the row says what is left, and
the row's claim keeps two managers from doing it side by side.
"""

import dataclasses
import threading
from typing import Any

from oslo_log import log

from nova_ftvm.db.records import Pair
from nova_ftvm.db.store import Store
from nova_ftvm.exception import FtvmError, LostRace, PairNotFound
from nova_ftvm.failover import shown
from nova_ftvm.failover.agents import Agents
from nova_ftvm.failover.arbiter import CATCH_UP, CLEANUP, ENGINES, Announce, Arbiter, was_granted
from nova_ftvm.failover.catchup import CatchUp, StepFailed, resumed
from nova_ftvm.failover.cloud import Cloud, CloudRefused, CloudUnavailable
from nova_ftvm.failover.hosts import Hosts
from nova_ftvm.failover.loops import Queue
from nova_ftvm.failover.pairing import InLine, Pairing, PlaceLost
from nova_ftvm.failover.reconcile import Reconciler
from nova_ftvm.failover.settings import Clock, Settings
from nova_ftvm.rpc.manager import Adoption, StandbyPlan
from nova_ftvm.types import Generation, Grant, InstanceId, PairId, PairState

LOG = log.getLogger(__name__)

#: A claim outlives the longest wait of a step by so much.
_CLAIM_SLACK_S = 30.0
#: From so many failures in a row on, the server's ft:reason says what is wrong with its catch-up.
_TELL_AFTER = 3
#: The answer to disarm() waits for Neutron no longer than this after the engine's end.
_UNBIND_S = 1.0
#: After somebody else's move came in between.
_LOOK_AGAIN_S = 0.1


class Manager:
    """Builds the parts; its methods are ManagerApi's (without the RPC context)."""

    def __init__(self, store: Store, cloud: Cloud, agents: Agents, clock: Clock, settings: Settings,
                 queue: Queue[PairId], announce: Announce = lambda before, after: None) -> None:
        self._store = store
        self._cloud = cloud
        self._clock = clock
        self._settings = settings
        self._queue = queue
        self._hosts = Hosts(store, clock, settings)
        self.arbiter = Arbiter(store, clock, settings, announce)
        self._pairing = Pairing(store, self.arbiter, cloud, agents, clock, settings)
        self._catch_up = CatchUp(store, self.arbiter, cloud, agents, clock, settings, keep=self._claim)
        self.reconciler = Reconciler(store, self.arbiter, cloud, agents, self._pairing, self._catch_up, clock,
                                     settings, follow=self._queue.put)

    # -- ManagerApi

    def agent_report(self, host: str, report: dict[str, Any]) -> dict[str, Any]:
        return {"stale": self._hosts.report(host, report)}

    def request_promotion(self, pair_id: str, generation: int, host: str, evidence: str) -> dict[str, Any]:
        return self._answer(pair_id, self.arbiter.request_promotion(PairId(pair_id), generation, host, evidence))

    def request_degrade(self, pair_id: str, generation: int, host: str, reason: str) -> dict[str, Any]:
        return self._answer(pair_id, self.arbiter.request_degrade(PairId(pair_id), generation, host, reason))

    def report_protection(self, pair_id: str, generation: int, host: str, state: str, detail: str) -> dict[str, Any]:
        if state == "protected":
            return self._answer(pair_id, self.arbiter.synced(PairId(pair_id), generation, host))
        return self._answer(pair_id, self._failed(PairId(pair_id), generation, host, detail, state == "refused"))

    def report_promoted(self, pair_id: str, generation: int, host: str, timeline: dict[str, float],
                        failure: str) -> dict[str, Any]:
        if failure:
            return self._answer(pair_id, self._promotion_failed(PairId(pair_id), generation, host, failure))
        return self._answer(pair_id, self.arbiter.promoted(PairId(pair_id), generation, host, timeline))

    def standby_plan(self, backup_id: str, host: str) -> StandbyPlan | None:
        return self._pairing.plan(backup_id, host)

    def standby_ready(self, pair_id: str, generation: int, host: str, failure: str,
                      lasting: bool = False) -> dict[str, Any]:
        if failure:
            return self._answer(pair_id, self._failed(PairId(pair_id), generation, host, failure, lasting))
        return self._answer(pair_id, self.arbiter.placed(PairId(pair_id), generation, host))

    def disarm(self, instance_id: str, reason: str) -> dict[str, Any]:
        pair = self._store.pair_of(InstanceId(instance_id))
        if pair is None:
            return {"disarmed": True}
        try:
            moved = self.arbiter.disarm(pair, f"disarmed: {reason}")
        except LostRace as error:
            LOG.warning("Pair %s is not disarmed for '%s': %s", pair.id, reason, error)
            return {"disarmed": False, "reason": str(error)}
        except PairNotFound:
            return {"disarmed": True}
        if moved.state is PairState.DISABLED and moved.step == CLEANUP:
            # The caller goes on to stop or destroy the domain, and to give away its ports: the primary's engine must
            # not be at it then, and nothing of the backup at them.
            unbinding = threading.Thread(target=self._unbind, args=(moved,), name=f"unbind-{moved.id}", daemon=True)
            unbinding.start()
            self._pairing.stop_engine(moved, moved.active_host)
            unbinding.join(_UNBIND_S)
            self._queue.put(moved.id)
        return {"disarmed": True}

    def _unbind(self, pair: Pair) -> None:
        try:
            self._pairing.remove_bindings(pair)
        except (CloudRefused, CloudUnavailable) as error:
            LOG.warning("Pair %s: bindings on %s are left to the cleanup: %s", pair.id, pair.backup_host, error)

    def switchover(self, instance_id: str, host: str) -> dict[str, Any]:
        pair = self._store.pair_of(InstanceId(instance_id))
        if pair is None or pair.state is not PairState.PROTECTED or pair.backup_host != host:
            state = "not protected" if pair is None else f"{pair.state}, its backup on {pair.backup_host or 'no host'}"
            return {"ready": False, "reason": f"the server is {state}"}
        self._pairing.remove_bindings(pair)
        return {"ready": True, "reason": ""}

    def adoption(self, instance_id: str, host: str) -> Adoption:
        pair = self._store.pair_of(InstanceId(instance_id))
        if pair is None:
            return Adoption(adopt=False, pair_id=None, generation=0)
        # From the grant on: what is there then is the guest itself, and must not be cleaned away.
        promoted = pair.state in (PairState.PROMOTING, PairState.DEGRADED) and pair.step in CATCH_UP
        adopt = promoted and pair.active_host == host
        return Adoption(adopt=adopt, pair_id=pair.id, generation=pair.generation)

    # -- the reports that are no request

    def _answer(self, pair_id: str, grant: Grant) -> dict[str, Any]:
        if grant.granted:
            self._queue.put(PairId(pair_id))
        return dataclasses.asdict(grant)

    def _of_side(self, pair_id: PairId, generation: int, host: str) -> tuple[Pair | None, Grant]:
        """The pair, if `generation` is in force and the caller is one of its sides; and the answer either way."""
        try:
            pair = self._store.pair(pair_id)
        except PairNotFound as error:
            return None, Grant(False, Generation(0), str(error))
        if pair.generation != generation or host not in (pair.primary_host, pair.backup_host):
            return None, Grant(False, pair.generation, f"the pair is {pair.state} in generation {pair.generation}")
        return pair, Grant(True, pair.generation)

    def _failed(self, pair_id: PairId, generation: int, host: str, failure: str, lasting: bool) -> Grant:
        pair, grant = self._of_side(pair_id, generation, host)
        if pair is not None and pair.state in (PairState.PENDING, PairState.SYNCING, PairState.PROTECTED):
            try:
                self.arbiter.give_up(pair, f"protection failed on {host}: {failure}", failed=True,
                                     refused_by=host if lasting else "")
            except LostRace as error:
                return Grant(False, pair.generation, str(error))
        return grant

    def _promotion_failed(self, pair_id: PairId, generation: int, host: str, failure: str) -> Grant:
        try:
            pair = self._store.pair(pair_id)
            granted = was_granted(pair, generation, host)
            if pair.state is PairState.PROMOTING and granted:
                pair = self.arbiter.start_anew(pair, failure)
        except (LostRace, PairNotFound) as error:
            return Grant(False, Generation(0), str(error))
        return Grant(granted and pair.state is PairState.DEGRADED, pair.generation, f"the pair is {pair.state}")

    # -- the slow work

    def follow(self, pair_id: PairId) -> float | None:
        """Does what the pair's row calls for. Returns seconds until it should be looked at again; None: no need."""
        if not self._store.claim(pair_id, self._settings.name, self._claim_s):
            return self._settings.retry_s
        try:
            return self._advance(self._store.pair(pair_id))
        except (LostRace, PairNotFound) as error:
            LOG.debug("Pair %s: looked at again: %s", pair_id, error)
            return _LOOK_AGAIN_S if isinstance(error, LostRace) else None
        finally:
            self._store.release(pair_id, self._settings.name)

    @property
    def _claim_s(self) -> float:
        return self._settings.step_timeout_s + _CLAIM_SLACK_S

    def _claim(self, pair: Pair) -> None:
        if not self._store.claim(pair.id, self._settings.name, self._claim_s):
            raise LostRace(f"another manager works on pair {pair.id}")

    def _advance(self, pair: Pair) -> float | None:
        try:
            self._show(self._work(pair))
        except PlaceLost as error:
            return self._put_off(pair, error)
        except InLine as error:
            return self._wait_in_line(pair, str(error))
        except StepFailed as error:
            return self._retry(pair, str(error), error.back_to)
        except (CloudRefused, CloudUnavailable) as error:
            return self._retry(pair, str(error), None)
        return None

    def _work(self, pair: Pair) -> Pair:
        match pair.state, pair.step:
            case PairState.PENDING, _:
                return self._pairing.place(pair)
            case PairState.SYNCING, step if step == ENGINES:
                return self._pairing.start_engines(pair)
            case PairState.PROMOTING, _:
                self._catch_up.bind_early(pair)
                return pair
            case PairState.DEGRADED, step if step in CATCH_UP:
                return self._catch_up.run(pair)
            case _, step if step == CLEANUP:
                self._show(pair)
                return self._pairing.remove_backup(pair)
        return pair

    def _show(self, pair: Pair) -> None:
        server = None if pair.state is PairState.PROMOTING else self._cloud.server(pair.instance_id)
        if server is not None:
            shown.show_pair(self._cloud, server, pair)

    def _wait_in_line(self, pair: Pair, reason: str) -> float | None:
        """It is looked at again soon: what it waits for may end at another manager."""
        if pair.reason != reason:
            self._show(self._store.change(pair, reason=reason))
        return self._settings.retry_s

    def _put_off(self, pair: Pair, error: PlaceLost) -> float | None:
        """The backup cannot be made: the pair is given up, and reconcile tries again later."""
        self.arbiter.give_up(pair, str(error), failed=True, refused_by=error.refused_by)
        return 0.0

    def _retry(self, pair: Pair, reason: str, back_to: str | None) -> float | None:
        """The same again after a while. The owner is told when it goes on for long."""
        pair = self._store.pair(pair.id)
        attempts = pair.attempts + 1
        delay_s = self._settings.back_off(attempts)
        LOG.warning("Pair %s generation %d, %s %s: tried again in %.1f s: %s", pair.id, pair.generation, pair.state,
                    pair.step, delay_s, reason)
        pair = self._store.change(pair, attempts=attempts, step=back_to or pair.step,
                                  retry_at=self._clock.now() + delay_s)
        if attempts >= _TELL_AFTER and pair.step in CATCH_UP:
            told = (f"the guest runs on {pair.active_host}, but Nova does not follow: {reason}" if resumed(pair) else
                    f"the server does not start anew on {pair.active_host}: {reason}")
            pair = self._store.change(pair, reason=told)
            try:
                self._show(pair)
            except FtvmError as error:
                LOG.debug("Pair %s: %s", pair.id, error)
        return delay_s
