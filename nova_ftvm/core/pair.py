"""The pair's rules: which moves exist, and which of them change who may speak.

PURE. The arbiter (failover/arbiter.py) applies a move by one compare-and-set on (generation, state);
nobody else changes a pair's state.

Invariant: within one generation at most one side's output reaches the network. So each move that
hands the voice over, or takes the peer's veto away, starts a new generation, and a side whose
generation is over holds its output for ever:

    PROTECTED: the primary speaks, each word only after the backup's acknowledgement
    PROMOTING, then DEGRADED on the new host: the old backup speaks alone
    DEGRADED on the old host: the primary speaks alone
"""

import dataclasses
import enum

from nova_ftvm.exception import IllegalMove
from nova_ftvm.types import Generation, PairState


class PairEvent(enum.StrEnum):
    """What can happen to a pair. Values complete the sentence 'a pair that is X cannot ...'."""

    PLACED = "start to synchronise"
    SYNCED = "become protected"
    LOSE_BACKUP = "go on without its backup"
    PROMOTE = "be promoted"
    PROMOTED = "report a finished promotion"
    REPAIR = "get a new backup"
    DISARM = "be disarmed"
    ENABLE = "be enabled"
    FAIL = "fail"


@dataclasses.dataclass(frozen=True, slots=True)
class Move:
    """Result of an event: the new state and the generation that goes with it."""

    state: PairState
    generation: Generation


_S = PairState
_E = PairEvent

#: (state, event) -> (new state, does a new generation start?). An absent key is illegal.
MOVES: dict[tuple[PairState, PairEvent], tuple[PairState, bool]] = {
    (_S.PENDING, _E.PLACED): (_S.SYNCING, False),
    (_S.PENDING, _E.DISARM): (_S.DISABLED, True),
    (_S.PENDING, _E.FAIL): (_S.ERROR, True),
    (_S.SYNCING, _E.SYNCED): (_S.PROTECTED, False),
    (_S.SYNCING, _E.LOSE_BACKUP): (_S.DEGRADED, True),
    (_S.SYNCING, _E.DISARM): (_S.DISABLED, True),
    (_S.SYNCING, _E.FAIL): (_S.ERROR, True),
    (_S.PROTECTED, _E.LOSE_BACKUP): (_S.DEGRADED, True),
    (_S.PROTECTED, _E.PROMOTE): (_S.PROMOTING, True),
    (_S.PROTECTED, _E.DISARM): (_S.DISABLED, True),
    (_S.PROMOTING, _E.PROMOTED): (_S.DEGRADED, False),
    (_S.PROMOTING, _E.FAIL): (_S.ERROR, True),
    (_S.DEGRADED, _E.REPAIR): (_S.PENDING, True),
    (_S.DEGRADED, _E.DISARM): (_S.DISABLED, True),
    (_S.DISABLED, _E.ENABLE): (_S.PENDING, True),
    (_S.ERROR, _E.REPAIR): (_S.PENDING, True),
    (_S.ERROR, _E.DISARM): (_S.DISABLED, True),
}


def move(state: PairState, generation: Generation, event: PairEvent) -> Move:
    """Returns where `event` leads from `state`; raises IllegalMove when it leads nowhere."""
    try:
        new, fresh = MOVES[state, event]
    except KeyError:
        raise IllegalMove(state, event) from None
    return Move(new, Generation(generation + 1) if fresh else generation)
