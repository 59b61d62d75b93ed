"""Breadth-first search over all that can happen. Knows nothing of what it searches.

A world is any hashable value. `steps(world)` gives its successors; `wrong(world, step)` says in one sentence what is
wrong with taking a step, or nothing. Breadth first, so that the story of a wrong step is a shortest one.
"""

import dataclasses
import gc
import itertools
from array import array
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, Generic, Protocol, TypeVar

World = TypeVar("World", bound=Hashable)


class Step(Protocol):
    """One thing that can happen."""

    @property
    def label(self) -> str: ...

    @property
    def fair(self) -> bool:
        """Will it happen sooner or later, if nothing breaks any more?"""

    @property
    def world(self) -> Any: ...


class Unfinished(AssertionError):
    """The search met its limit: nothing is proven."""


@dataclasses.dataclass(frozen=True)
class Wrong:
    """What is wrong, and a shortest way there."""

    claim: str
    story: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join((self.claim, *(f"{number:3}. {line}" for number, line in enumerate(self.story, 1))))


@dataclasses.dataclass(frozen=True)
class Found:
    """What was seen, and the first thing that was wrong."""

    states: int
    transitions: int
    depth: int
    wrong: Wrong | None

    def __str__(self) -> str:
        return f"{self.states:,} states, {self.transitions:,} transitions, longest shortest way {self.depth} steps"


class Search(Generic[World]):
    """`run` looks at every world that can be reached from `start`."""

    def __init__(self, start: World, steps: Callable[[World], Iterable[Step]],
                 wrong: Callable[[World, Step], str | None], limit: int = 20_000_000) -> None:
        self._start = start
        self._steps = steps
        self._wrong = wrong
        self._limit = limit
        self._number: dict[World, int] = {start: 0}
        self._worlds: list[World] = [start]
        #: Number of the world that each was first reached from.
        self._parents = array("l", [-1])
        #: Pairs (from, to) of numbers.
        self._fair = array("l")
        self._transitions = 0
        self._depth = 0

    def run(self, goals: Mapping[str, Callable[[World], bool]] | None = None) -> Found:
        """Ends at the first wrong step. goals: what is wrong with a world that has no fair way to one of a kind."""
        # Worlds are many and in no cycles: the collector would look at all of them, again and again.
        gc.disable()
        try:
            wrong = self._look()
            for claim, good in (goals or {}).items():
                wrong = wrong or self._stuck(claim, good)
        finally:
            gc.enable()
        return Found(len(self._worlds), self._transitions, self._depth, wrong)

    def _look(self) -> Wrong | None:
        done, end_of_layer = 0, 1
        while done < len(self._worlds):
            if done == end_of_layer:
                end_of_layer = len(self._worlds)
                self._depth += 1
            world = self._worlds[done]
            for step in self._steps(world):
                self._transitions += 1
                claim = self._wrong(world, step)
                if claim is not None:
                    return Wrong(claim, (*self._way_to(done), step.label))
                number = self._number.setdefault(step.world, len(self._worlds))
                if number == len(self._worlds):
                    self._worlds.append(step.world)
                    self._parents.append(done)
                if step.fair:
                    self._fair.extend((done, number))
            done += 1
            if done > self._limit:
                raise Unfinished(f"more than {self._limit:,} states")
        return None

    def _stuck(self, claim: str, good: Callable[[World], bool]) -> Wrong | None:
        """The first world without a fair way to a good one: backwards from the good ones."""
        sources: dict[int, list[int]] = {}
        for place in range(0, len(self._fair), 2):
            sources.setdefault(self._fair[place + 1], []).append(self._fair[place])
        reached = bytearray(good(world) for world in self._worlds)
        frontier = [number for number, is_good in enumerate(reached) if is_good]
        while frontier:
            for source in sources.get(frontier.pop(), ()):
                if not reached[source]:
                    reached[source] = True
                    frontier.append(source)
        number = reached.find(0)
        return None if number < 0 else Wrong(claim, self._way_to(number))

    def _way_to(self, number: int) -> tuple[str, ...]:
        """The steps' labels, told again from the start: they are not kept."""
        way = [number]
        while self._parents[way[-1]] >= 0:
            way.append(self._parents[way[-1]])
        worlds = [self._worlds[each] for each in reversed(way)]
        return tuple(next(step.label for step in self._steps(source) if step.world == target)
                     for source, target in itertools.pairwise(worlds))
