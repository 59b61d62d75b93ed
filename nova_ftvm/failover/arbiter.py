"""Who may speak. The only writer of a pair's state: core.pair's moves, each one compare-and-set.

Called by the manager's RPC methods and by its own work; holds no lock and keeps nothing in memory, so any number
of managers may run one each. Nothing slow happens here: a backup waits for the answer while the guest stands still.

An answer can be lost on the wire. So the side that has won gets the same grant again when it asks again, and
only that side: `active_host` and `active_since` say whose voice it is, and since which generation.
A doubt (an unknown pair, another generation, another host) is never a grant.
"""

import math
import secrets
from collections.abc import Callable
from typing import Unpack

from oslo_log import log

from nova_ftvm.core import pair as rules
from nova_ftvm.core.pair import PairEvent
from nova_ftvm.db.records import Pair, Refusal
from nova_ftvm.db.store import PairChanges, Store
from nova_ftvm.exception import LostRace, PairNotFound
from nova_ftvm.failover.loops import Precedence
from nova_ftvm.failover.settings import Clock, Settings
from nova_ftvm.types import Generation, Grant, InstanceId, PairId, PairState

LOG = log.getLogger(__name__)

#: Work that is recorded in a pair's `step`. The catch-up's own steps are in catchup.py.
NOTHING, ENGINES, CLEANUP = "", "engines", "cleanup"
CATCH_UP = ("bindings", "role", "allocation", "evacuate", "settle", "tidy")

#: States without a backup that could be promoted: the active host's guest speaks alone.
ALONE = frozenset({PairState.PENDING, PairState.DEGRADED, PairState.DISABLED, PairState.ERROR})
#: A lost race is looked at again; each loss means that somebody else's move came through.
_TRIES = 10
#: Whoever asked has given up waiting then, and asks again if it still needs to. A grant to a side that has ended since
#: would take the voice from one that lives.
_STALE_S = 3.0

Judge = Callable[[Pair], Grant | PairEvent]
#: Told of each move after it is written: the pair before (None: there was none) and after. Must not wait or raise.
Announce = Callable[[Pair | None, Pair], None]


def judge_promotion(pair: Pair, generation: int, host: str) -> Grant | PairEvent:
    """May the backup on `host` speak? PROMOTE: yes, if the compare-and-set comes through."""
    if pair.state is PairState.PROTECTED and generation == pair.generation and host == pair.backup_host:
        return PairEvent.PROMOTE
    if (pair.state in (PairState.PROMOTING, PairState.DEGRADED) and pair.active_host == host
            and pair.active_since == pair.generation == generation + 1):
        return Grant(True, pair.generation, "granted before")
    return Grant(False, pair.generation, _refusal(pair, generation, host))


def judge_degrade(pair: Pair, generation: int, host: str) -> Grant | PairEvent:
    """May the primary on `host` speak without its backup's acknowledgement?"""
    if (pair.state in (PairState.SYNCING, PairState.PROTECTED) and generation == pair.generation
            and host == pair.primary_host == pair.active_host):
        return PairEvent.LOSE_BACKUP
    if pair.state in ALONE and has_voice(pair, generation, host):
        return Grant(True, pair.generation, f"no backup can be promoted: the pair is {pair.state}")
    return _refused_primary(pair, generation, host)


def judge_sync(pair: Pair, generation: int, host: str) -> Grant | PairEvent:
    """The primary says that its backup holds a whole epoch."""
    if generation == pair.generation and host == pair.primary_host:
        if pair.state is PairState.SYNCING:
            return PairEvent.SYNCED
        if pair.state is PairState.PROTECTED:
            return Grant(True, pair.generation, "protected already")
    return _refused_primary(pair, generation, host)


def judge_placed(pair: Pair, generation: int, host: str) -> Grant | PairEvent:
    """The driver says that the standby domain is there."""
    if generation == pair.generation and host == pair.backup_host:
        if pair.state is PairState.PENDING:
            return PairEvent.PLACED
        if pair.state in (PairState.SYNCING, PairState.PROTECTED):
            return Grant(True, pair.generation, "known already")
    return Grant(False, pair.generation, _refusal(pair, generation, host))


def judge_promoted(pair: Pair, generation: int, host: str) -> Grant | PairEvent:
    """The backup says that the guest runs. It may name the generation that it asked with, or the one it was given."""
    if was_granted(pair, generation, host):
        if pair.state is PairState.PROMOTING:
            return PairEvent.PROMOTED
        if pair.state is PairState.DEGRADED:
            return Grant(True, pair.generation, "known already")
    if pair.primary_host == pair.active_host == host and pair.active_since in (generation, generation + 1):
        # The answer was lost, and Nova has followed since: the guest on this host is the primary.
        return Grant(True, pair.generation, "known already")
    return Grant(False, pair.generation, _refusal(pair, generation, host))


def has_voice(pair: Pair, generation: int, host: str) -> bool:
    """Has the voice been with `host` from `generation` until now?"""
    return pair.active_host == host and pair.active_since <= generation <= pair.generation


def was_granted(pair: Pair, generation: int, host: str) -> bool:
    """Is the generation in force the one that the backup on `host` was promoted with?"""
    return (pair.active_host == host and pair.active_since == pair.generation
            and generation in (pair.generation - 1, pair.generation))


def _refused_primary(pair: Pair, generation: int, host: str) -> Grant:
    """A newer generation in the answer has the guest destroyed. The guest that has the voice must not be: its engine is
    over, as the pair was disarmed, or as a newer engine looks after it; so the answer names the engine's own."""
    if has_voice(pair, generation, host):
        return Grant(False, Generation(generation),
                     f"generation {generation} is over: the pair is {pair.state}. {pair.reason}".rstrip())
    return Grant(False, pair.generation, _refusal(pair, generation, host))


def _refusal(pair: Pair, generation: int, host: str) -> str:
    return (f"the pair is {pair.state} in generation {pair.generation}, {pair.active_host} speaks"
            f" (asked by {host} for generation {generation})")


class Arbiter:
    """Applies moves. Every method reads the row, judges, writes by compare-and-set, and looks again if it lost."""

    def __init__(self, store: Store, clock: Clock, settings: Settings,
                 announce: Announce = lambda before, after: None) -> None:
        self._store = store
        self._clock = clock
        self._settings = settings
        self._announce = announce
        #: Entered while a guest waits for an answer: many may at once, when hosts die.
        self.precedence = Precedence()

    # -- the two sides' requests

    def request_promotion(self, pair_id: PairId, generation: int, host: str, evidence: str) -> Grant:
        def voice(pair: Pair) -> PairChanges:
            return {"active_host": host, "active_since": Generation(pair.generation + 1), "step": CATCH_UP[0],
                    "timeline": {"granted_at": self._clock.now()}, "attempts": 0, "retry_at": 0.0,
                    "reason": f"failing over from {pair.primary_host} to {host}: {evidence}"}
        with self.precedence:
            return self._ask(pair_id, lambda pair: judge_promotion(pair, generation, host), voice, evidence, _STALE_S)

    def request_degrade(self, pair_id: PairId, generation: int, host: str, reason: str) -> Grant:
        def alone(pair: Pair) -> PairChanges:
            return {"step": CLEANUP, "reason": f"no backup: {reason}", **self._put_off(pair, reason)}
        with self.precedence:
            return self._ask(pair_id, lambda pair: judge_degrade(pair, generation, host), alone, reason, _STALE_S)

    # -- reports

    def synced(self, pair_id: PairId, generation: int, host: str) -> Grant:
        # Its attempts go on being counted: only a protection that lasts ends a row of failures.
        return self._ask(pair_id, lambda pair: judge_sync(pair, generation, host),
                         lambda _: {"step": NOTHING, "reason": "", "progress": 100.0},
                         "the backup holds a whole epoch")

    def placed(self, pair_id: PairId, generation: int, host: str) -> Grant:
        return self._ask(pair_id, lambda pair: judge_placed(pair, generation, host),
                         lambda _: {"step": ENGINES, "reason": "", "progress": 0.0}, f"the standby is on {host}")

    def promoted(self, pair_id: PairId, generation: int, host: str, timeline: dict[str, float]) -> Grant:
        def alone(pair: Pair) -> PairChanges:
            return {"timeline": {"running_at": self._clock.now(), **pair.timeline, **timeline},
                    "reason": f"failed over from {pair.primary_host} to {host}; no backup yet"}
        return self._ask(pair_id, lambda pair: judge_promoted(pair, generation, host), alone,
                         f"the guest runs on {host}")

    def start_anew(self, pair: Pair, why: str) -> Pair:
        """The backup has the grant, and no guest: it is booted there, from the disks that it holds. Raises LostRace.

        The voice stays where the grant put it, so this is the end of the promotion by another way; a report of a guest
        that runs after all finds it done.
        """
        return self.apply(pair, PairEvent.PROMOTED, why,
                          reason=f"failing over from {pair.primary_host} to {pair.active_host} without the guest's "
                                 f"memory ({why}): the server is started anew from its disks there")

    # -- the manager's own decisions

    def begin(self, pair: Pair | None, instance_id: InstanceId, project_id: str, host: str, pair_id: PairId) -> Pair:
        """A backup is to be made: a new pair, or the old one enabled or repaired. Raises LostRace."""
        if pair is None:
            pair = self._store.add(Pair(
                id=pair_id, instance_id=instance_id, project_id=project_id, primary_host=host,
                generation=Generation(1), state=PairState.PENDING, active_host=host, active_since=Generation(1),
                token=secrets.token_hex(32)))
            LOG.info("Pair %s generation 1 of server %s: -> %s, cause: protection was asked for", pair.id,
                     instance_id, pair.state)
            self._announce(None, pair)
            return pair
        event = PairEvent.ENABLE if pair.state is PairState.DISABLED else PairEvent.REPAIR
        fresh: PairChanges = {"primary_host": host, "token": secrets.token_hex(32), "progress": 0.0, "reason": "",
                              "step": NOTHING, "backup_id": None, "backup_host": None}
        if host != pair.active_host:
            fresh |= {"active_host": host, "active_since": Generation(pair.generation + 1)}
        return self.apply(pair, event, "protection is asked for", **fresh)

    def disarm(self, pair: Pair, reason: str) -> Pair:
        """A planned end: no backup can be promoted after the return, whatever happens meanwhile. Raises LostRace
        when that cannot be had: one was promoted, and until Nova has followed, the caller may be the old host.
        """
        for _ in range(_TRIES):
            if pair.step in CATCH_UP:
                break
            try:
                return self.forgive(pair) if pair.state is PairState.DISABLED else self.give_up(pair, reason)
            except LostRace:
                pair = self._store.pair(pair.id)
        raise LostRace(f"pair {pair.id} is {pair.state} and cannot be disarmed now: wait for the failover to end")

    def give_up(self, pair: Pair, reason: str, failed: bool = False, refused_by: str = "") -> Pair:
        """Disarms the pair as it was judged, and only then. Raises LostRace.

        failed: the next try is put off, ever longer. refused_by: the host that will refuse again, see refusals.py.
        """
        changes: PairChanges = {"step": CLEANUP, "reason": reason, "refused": {}}
        if failed:
            changes |= self._put_off(pair, reason)
        if refused_by:
            changes["refused"] = {**pair.refused, refused_by: Refusal(self._clock.now(), reason)}
        return self.apply(pair, PairEvent.DISARM, reason, **changes)

    def forgive(self, pair: Pair) -> Pair:
        """The server is worked on: whoever refused it is asked again. Raises LostRace."""
        return self._store.change(pair, refused={}) if pair.refused else pair

    def fail(self, pair: Pair, reason: str) -> Pair:
        """Nothing can be done before somebody or something comes back: the reason says what. Raises LostRace."""
        changes: PairChanges = {"step": CLEANUP, "reason": reason, **self._put_off(pair, reason)}
        return self.apply(pair, PairEvent.FAIL, reason, **changes)

    def apply(self, pair: Pair, event: PairEvent, cause: str, **changes: Unpack[PairChanges]) -> Pair:
        """One move, written or not at all. Raises IllegalMove, LostRace."""
        move = rules.move(pair.state, pair.generation, event)
        changes |= {"state": move.state, "generation": move.generation}
        moved = self._store.change(pair, **changes)
        LOG.info("Pair %s generation %d of server %s: %s -> %s, cause: %s", pair.id, moved.generation,
                 pair.instance_id, pair.state, moved.state, cause)
        self._announce(pair, moved)
        return moved

    def _put_off(self, pair: Pair, reason: str) -> PairChanges:
        """One more failure in the row; a protection that lasted has ended the row. Where the backup was is remembered,
        as the next one had better be elsewhere."""
        now = self._clock.now()
        lasted = pair.state is PairState.PROTECTED and now - pair.moved_at >= self._settings.retry_limit_s
        attempts = 1 if lasted else pair.attempts + 1
        refused = dict(pair.refused)
        if pair.backup_host is not None and not (pair.backup_host in refused and refused[pair.backup_host].lasting):
            refused[pair.backup_host] = Refusal(now, reason, lasting=False)
        return {"attempts": attempts, "retry_at": now + self._settings.back_off(attempts), "refused": refused}

    def _ask(self, pair_id: PairId, judge: Judge, changes: Callable[[Pair], PairChanges], cause: str,
             stale_s: float = math.inf) -> Grant:
        """Judges, writes, and judges again what is there when the write was lost."""
        asked_at = self._clock.now()
        for _ in range(_TRIES):
            try:
                pair = self._store.pair(pair_id)
            except PairNotFound as error:
                return Grant(False, Generation(0), str(error))
            answer = judge(pair)
            if isinstance(answer, Grant):
                if not answer.granted:
                    LOG.warning("Pair %s generation %d: refused: %s", pair.id, pair.generation, answer.reason)
                return answer
            if self._clock.now() - asked_at > stale_s:
                return Grant(False, pair.generation, "the answer took too long to find: ask again")
            try:
                return Grant(True, self.apply(pair, answer, cause, **changes(pair)).generation)
            except LostRace:
                continue
        return Grant(False, pair.generation, "the pair changes too fast: ask again")
