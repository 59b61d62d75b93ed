"""The pair's table: which moves exist, and which of them start a generation."""

import pytest

from nova_ftvm.core.pair import MOVES, PairEvent, move
from nova_ftvm.exception import IllegalMove
from nova_ftvm.types import Generation, PairState

ALL = [(state, event) for state in PairState for event in PairEvent]


@pytest.mark.parametrize("state, event", [key for key in ALL if key not in MOVES])
def test_a_move_that_is_not_in_the_table_is_illegal(state, event):
    with pytest.raises(IllegalMove):
        move(state, Generation(3), event)


@pytest.mark.parametrize("state, event", list(MOVES))
def test_a_generation_never_goes_back(state, event):
    assert move(state, Generation(3), event).generation in (3, 4)


def test_only_a_protected_pair_can_be_promoted():
    assert {state for state, event in MOVES if event is PairEvent.PROMOTE} == {PairState.PROTECTED}


@pytest.mark.parametrize("event", [PairEvent.PROMOTE, PairEvent.LOSE_BACKUP, PairEvent.DISARM, PairEvent.FAIL,
                                   PairEvent.REPAIR, PairEvent.ENABLE])
def test_each_move_that_takes_a_sides_right_away_starts_a_generation(event):
    assert all(fresh for (_, moved), (_, fresh) in MOVES.items() if moved is event)


def test_every_state_but_promoting_can_be_disarmed_or_is():
    able = {state for state, event in MOVES if event is PairEvent.DISARM} | {PairState.DISABLED}
    assert set(PairState) - able == {PairState.PROMOTING}


def test_every_state_leads_back_to_protected():
    reached = {PairState.PROTECTED}
    while True:
        more = {state for (state, _), (new, _) in MOVES.items() if new in reached} | reached
        if more == reached:
            break
        reached = more
    assert reached == set(PairState)
