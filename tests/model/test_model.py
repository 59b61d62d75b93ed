"""Only one side speaks, whatever is lost, late or dead: every story within the bounds is told, and none ends badly.

`python -m tests.model --help` searches further; doc/source/contributor/model.rst says what is proven, and how to read
a counterexample.
"""

import time
from collections.abc import Callable, Iterator

import pytest

from tests.model import agents, properties, rules
from tests.model.mutations import MUTATIONS, Mutation
from tests.model.search import Found, Search
from tests.model.steps import Model
from tests.model.world import Bounds, Step, World, first_world

#: Each takes in what the others leave out; all of it at once is for a longer night than the tests have.
PROVEN = {
    "two epochs": Bounds(epochs=2, pairings=0, faults=1, losses=0, ends=0),
    "two faults": Bounds(epochs=1, pairings=0, faults=2, losses=0, ends=0),
    "a fault and a loss": Bounds(epochs=1, pairings=0, faults=1, losses=1, ends=0),
    "a second pair and a loss": Bounds(epochs=1, pairings=1, faults=0, losses=1, ends=0),
    "a second pair, a fault and a planned end": Bounds(epochs=1, pairings=1, faults=1, losses=0, ends=1),
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    rules.silence()
    with agents.threads_aside():
        yield


def search(bounds: Bounds) -> Found:
    return Search(first_world(bounds), Model(bounds).steps, properties.wrong).run(properties.GOALS)


@pytest.mark.parametrize("bounds", PROVEN.values(), ids=PROVEN.keys())
def test_only_one_side_speaks_whatever_breaks(bounds: Bounds, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    found = search(bounds)
    with capsys.disabled():
        print(f"\n{bounds}: {found}, {time.monotonic() - began:.0f} s")
    assert found.wrong is None, str(found.wrong)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_the_search_notices_that(mutation: Mutation, capsys: pytest.CaptureFixture[str]) -> None:
    with mutation.apply():
        found = search(mutation.bounds)
    assert found.wrong is not None, f"{mutation} goes unnoticed in {found}"
    with capsys.disabled():
        print(f"\nwhen {mutation}: {found.wrong.claim} ({len(found.wrong.story)} steps, {found.states:,} states)")
    assert found.wrong.claim.startswith(mutation.breaks), str(found.wrong)
    assert found.wrong.story


# What cannot be promised


def search_for(event: str, where: Callable[[World], bool], bounds: Bounds) -> Found:
    """The first world in which that happens, or in which something is wrong."""
    def told(before: World, step: Step) -> str | None:
        happens = where(before) and any(each[0] == event for each in step.events)
        return event if happens else properties.wrong(before, step)

    return Search(first_world(bounds), Model(bounds).steps, told).run()


def test_a_guest_is_promoted_if_nobody_lived_to_tell_that_it_shut_itself_down() -> None:
    """Its backup cannot know. The guest runs on from its last epoch there, and shuts itself down again."""
    found = search_for("promoted", lambda before: before.seen.off,
                       Bounds(epochs=1, pairings=0, faults=1, losses=0, ends=1))
    assert found.wrong is not None and found.wrong.claim == "promoted"
    assert not any("disarm" in line for line in found.wrong.story)


def test_what_the_backup_acknowledged_may_leave_after_the_grant_and_nothing_else() -> None:
    """The packets of an epoch that is in the promoted guest: the network has them late, as it may."""
    found = search_for("released", lambda before: bool(before.seen.promoted),
                       Bounds(epochs=2, pairings=0, faults=0, losses=0, ends=0))
    assert found.wrong is not None and found.wrong.claim == "released"


def test_a_story_is_a_shortest_one_and_can_be_told() -> None:
    """The search itself: a counter that may add one or two, and must not be five."""
    class Sum:
        def __init__(self, world: int, label: str) -> None:
            self.world, self.label, self.fair = world, label, True

    found = Search(0, lambda world: [Sum(world + 1, "one"), Sum(world + 2, "two")] if world < 9 else [],
                   lambda world, step: "five" if step.world == 5 else None).run()
    assert found.wrong is not None and sorted(found.wrong.story) == ["one", "two", "two"]


def test_a_world_without_a_fair_way_to_a_good_one_is_found() -> None:
    class Move:
        def __init__(self, world: str, fair: bool) -> None:
            self.world, self.label, self.fair = world, f"to {world}", fair

    moves = {"start": [Move("good", True), Move("trap", False)], "trap": [Move("good", False)], "good": []}
    found = Search("start", lambda world: moves[world], lambda world, step: None).run(
        {"stuck": lambda world: world == "good"})
    assert found.wrong is not None and (found.wrong.claim, found.wrong.story) == ("stuck", ("to trap",))
