"""Ways to break the rules, each by one small change of the real code. With any of them the search must fail.

A mutation that the search does not notice means that it does not look where it should.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from nova_ftvm.core import pair
from nova_ftvm.core.epoch import Act, EpochLoop, Phase
from nova_ftvm.core.lease import Lease, Verdict, Watch
from nova_ftvm.core.pair import PairEvent
from nova_ftvm.core.replica import Acknowledge, Replica
from nova_ftvm.engine.agent import Agent
from nova_ftvm.failover import arbiter
from nova_ftvm.rpc import common
from nova_ftvm.types import Generation, Grant, PairState
from tests.model import properties, stage
from tests.model.world import Bounds

SMALL = Bounds(epochs=2, pairings=0, faults=1, losses=0, ends=0)


@dataclasses.dataclass(frozen=True)
class Mutation:
    #: Names the change, as a claim of the test.
    name: str
    apply: Callable[[], AbstractContextManager[Any]]
    #: What the search must find broken: one of these.
    breaks: tuple[str, ...]
    bounds: Bounds = SMALL

    def __str__(self) -> str:
        return self.name


def promote_without_asking() -> AbstractContextManager[Any]:
    def suspect(self: Lease, evidence: str, now: float) -> Verdict | None:
        if self.watch is not Watch.WATCHING:
            return None
        self.watch = Watch.PROMOTING
        return Verdict.PROMOTE

    return patch.object(Lease, "_suspect", suspect)


def promote_when_refused() -> AbstractContextManager[Any]:
    def on_grant(self: Lease, grant: Grant, now: float) -> Verdict | None:
        self.watch = Watch.PROMOTING
        return Verdict.PROMOTE

    return patch.object(Lease, "on_grant", on_grant)


def promote_without_an_epoch() -> AbstractContextManager[Any]:
    real = Lease.tick

    def tick(self: Lease, now: float) -> Verdict | None:
        if self.watch is Watch.SYNCING:
            self.watch = Watch.WATCHING
        return real(self, now)

    real_lost = Lease.on_peer_lost

    def on_peer_lost(self: Lease, now: float) -> Verdict | None:
        if self.watch is Watch.SYNCING:
            self.watch = Watch.WATCHING
        return real_lost(self, now)

    real_judge = arbiter.judge_promotion

    def judge(row: Any, generation: int, host: str) -> Any:
        if row.state is PairState.SYNCING and generation == row.generation and host == row.backup_host:
            return PairEvent.PROMOTE
        return real_judge(row, generation, host)

    moves = {**pair.MOVES, (PairState.SYNCING, PairEvent.PROMOTE): (PairState.PROMOTING, True)}
    return _all(patch.object(Lease, "tick", tick), patch.object(Lease, "on_peer_lost", on_peer_lost),
                patch.object(arbiter, "judge_promotion", judge), patch.object(pair, "MOVES", moves))


def release_before_the_acknowledgement() -> AbstractContextManager[Any]:
    real = EpochLoop.on_resumed

    def on_resumed(self: EpochLoop, *facts: Any) -> Any:
        acts = real(self, *facts)
        return (*acts, Act.RELEASE) if Act.COMMIT in acts else acts

    return patch.object(EpochLoop, "on_resumed", on_resumed)


def take_any_acknowledgement() -> AbstractContextManager[Any]:
    """The acknowledgement of an older epoch releases the newer one."""
    real = Replica.on_frame

    def on_frame(self: Replica, frame: Any) -> Any:
        return tuple(action for action in real(self, frame) for _ in range(2 if isinstance(action, Acknowledge) else 1))

    def on_ack(self: EpochLoop, epoch: int) -> Any:
        if self.phase is not Phase.UNACKNOWLEDGED:
            return ()
        self.phase = Phase.RUNNING
        return (Act.RELEASE, Act.REPORT_PROTECTED) if epoch == 1 else (Act.RELEASE,)

    return _all(patch.object(Replica, "on_frame", on_frame), patch.object(EpochLoop, "on_ack", on_ack))


def acknowledge_before_it_is_whole() -> AbstractContextManager[Any]:
    real = Replica.on_frame

    def on_frame(self: Replica, frame: Any) -> Any:
        actions = real(self, frame)
        early = (Acknowledge(frame.epoch),) if not actions else ()
        return (*early, *(action for action in actions if not isinstance(action, Acknowledge)))

    return patch.object(Replica, "on_frame", on_frame)


def release_when_refused() -> AbstractContextManager[Any]:
    real = EpochLoop.on_grant
    return patch.object(EpochLoop, "on_grant", lambda self, grant: real(self, dataclasses.replace(grant, granted=True)))


def release_when_nobody_acknowledges() -> AbstractContextManager[Any]:
    real = EpochLoop.tick

    def tick(self: EpochLoop, now: float) -> Any:
        waited = self.phase is Phase.UNACKNOWLEDGED
        acts = real(self, now)
        return (*acts, Act.UNBUFFER) if waited and self.phase is Phase.HOLDING else acts

    return patch.object(EpochLoop, "tick", tick)


def let_go_when_refused() -> AbstractContextManager[Any]:
    """The agent of an engine that died lets the guest's output go instead of destroying it."""
    return patch.object(Agent, "_destroy", lambda self, watched, reason: self._let_go(watched))


def let_go_without_asking() -> AbstractContextManager[Any]:
    return patch.object(Agent, "_go_on_alone", lambda self, watched, reason: self._let_go(watched))


def take_over_engines_as_unprotected() -> AbstractContextManager[Any]:
    def adopt_engines(self: Agent, engines: list[Any]) -> None:
        for engine in engines:
            self._watch(engine)

    return patch.object(Agent, "adopt_engines", adopt_engines)


def grant_both() -> AbstractContextManager[Any]:
    """The primary is let go on alone whatever has become of the pair."""
    return patch.object(arbiter, "judge_degrade", lambda row, generation, host: Grant(True, row.generation))


def grant_the_backup_always() -> AbstractContextManager[Any]:
    real = arbiter.judge_promotion

    def judge(row: Any, generation: int, host: str) -> Any:
        answer = real(row, generation, host)
        return answer if isinstance(answer, PairEvent) else Grant(True, row.generation)

    return patch.object(arbiter, "judge_promotion", judge)


def ignore_the_generation() -> AbstractContextManager[Any]:
    """A question of an older generation is taken for one of the newer."""
    def deaf(real: Callable[..., Any]) -> Callable[..., Any]:
        return lambda row, generation, host: real(row, row.generation, host)

    return _all(*(patch.object(arbiter, name, deaf(getattr(arbiter, name)))
                  for name in ("judge_promotion", "judge_degrade", "judge_sync")))


def ignore_since_when_the_voice_is_there() -> AbstractContextManager[Any]:
    return patch.object(arbiter, "has_voice", lambda row, generation, host: generation <= row.generation)


def forget_the_new_generation() -> AbstractContextManager[Any]:
    moves = {key: (state, False) for key, (state, _) in pair.MOVES.items()}
    return patch.object(pair, "MOVES", moves)


def disarm_leaves_the_pair_protected() -> AbstractContextManager[Any]:
    moves = {**pair.MOVES, (PairState.PROTECTED, PairEvent.DISARM): (PairState.PROTECTED, False)}
    return patch.object(pair, "MOVES", moves)


def write_without_comparing() -> AbstractContextManager[Any]:
    """A grant by a row that was read before somebody else's move: two managers, and no compare-and-set."""
    real = arbiter.Arbiter.request_degrade

    def request_degrade(self: Any, pair_id: Any, generation: int, host: str, reason: str) -> Grant:
        answer = real(self, pair_id, generation, host, reason)
        row = self._store.row
        if not answer.granted and row.primary_host == host and row.active_since == generation + 1:
            return Grant(True, Generation(generation + 1))
        return answer

    return patch.object(arbiter.Arbiter, "request_degrade", request_degrade)


def ask_only_once() -> AbstractContextManager[Any]:
    """Nobody asks again for a guest whose engine died."""
    def go_on_alone(self: Agent, watched: Any, reason: str) -> None:
        try:
            grant = self._manager.request_degrade(*self._voice(watched), reason)
        except common.Failed:
            return
        if grant.granted:
            self._let_go(watched)

    return patch.object(Agent, "_go_on_alone", go_on_alone)


def overlook_the_notes() -> AbstractContextManager[Any]:
    """An agent that starts looks for living engines only."""
    return patch.object(stage, "lost", lambda host: ())


def take_the_promoted_for_failed() -> AbstractContextManager[Any]:
    """A guest whose engine died right after it had resumed it is destroyed as a standby that is of no use."""
    def lose_backup(self: Agent, watched: Any, reason: str) -> None:
        self._guests.destroy(watched.engine.instance_id)

    return patch.object(Agent, "_lose_backup", lose_backup)


@contextmanager
def _all(*patches: AbstractContextManager[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for each in patches:
            stack.enter_context(each)
        yield


ONE_VOICE, WHOLE, COVERED, PLANNED, HARMLESS, PROGRESS = (
    properties.ONE_VOICE, properties.WHOLE, properties.COVERED, properties.PLANNED, properties.HARMLESS,
    properties.PROGRESS)
TWICE = SMALL._replace(epochs=1, faults=2)
AGAIN = Bounds(epochs=1, pairings=1, faults=0, losses=1, ends=0)

MUTATIONS = (
    Mutation("the backup promotes without asking", promote_without_asking, (ONE_VOICE,)),
    Mutation("the backup promotes when it is refused", promote_when_refused, (ONE_VOICE,)),
    Mutation("the backup promotes without an epoch", promote_without_an_epoch, (ONE_VOICE, WHOLE)),
    Mutation("the primary releases before the acknowledgement", release_before_the_acknowledgement, (COVERED,)),
    Mutation("the primary takes any acknowledgement", take_any_acknowledgement, (COVERED,)),
    Mutation("the backup acknowledges before the epoch is whole", acknowledge_before_it_is_whole, (COVERED, WHOLE)),
    Mutation("the primary releases when it is refused", release_when_refused, (ONE_VOICE,)),
    Mutation("the primary releases when nobody acknowledges", release_when_nobody_acknowledges, (COVERED,)),
    Mutation("the agent lets go when it is refused", let_go_when_refused, (ONE_VOICE,)),
    Mutation("the agent lets go without asking", let_go_without_asking, (COVERED, ONE_VOICE)),
    Mutation("the agent forgets who was protected", take_over_engines_as_unprotected, (COVERED, ONE_VOICE),
             SMALL._replace(faults=2)),
    Mutation("both sides are granted", grant_both, (ONE_VOICE, COVERED)),
    Mutation("the backup is always granted", grant_the_backup_always, (ONE_VOICE, PLANNED)),
    Mutation("the generation of a question is ignored", ignore_the_generation,
             (ONE_VOICE, COVERED, HARMLESS), AGAIN),
    Mutation("it is ignored since when the voice is there", ignore_since_when_the_voice_is_there, (ONE_VOICE,)),
    Mutation("no new generation begins", forget_the_new_generation,
             (ONE_VOICE,)),
    Mutation("a disarm leaves the pair as it was", disarm_leaves_the_pair_protected, (PLANNED, COVERED, ONE_VOICE),
             SMALL._replace(epochs=1, faults=0, ends=1)),
    Mutation("the row is written without comparing", write_without_comparing, (ONE_VOICE,)),
    Mutation("the agent asks only once", ask_only_once, (PROGRESS,), SMALL._replace(epochs=1, losses=1)),
    Mutation("the notes of lost engines are overlooked", overlook_the_notes, (PROGRESS,), TWICE),
    Mutation("a promoted guest is taken for a failed one", take_the_promoted_for_failed, (HARMLESS,), TWICE),
)
