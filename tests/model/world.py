"""What a world is: two hosts, the row of their pair, and what is on its way between them. Values only.

A guest is told by what has left it: `said` is the last epoch whose output the network has seen, `covered` the last one
whose output waits for its commit. One that is not `held` says all at once.
"""

import dataclasses
from typing import Any, NamedTuple

from nova_ftvm.failover.arbiter import ENGINES
from nova_ftvm.types import PairState
from tests.model.agents import Question, Report, Watched
from tests.model.rules import Row, Snapshot

A, B = HOSTS = ("A", "B")
OTHER = {A: B, B: A}


class Bounds(NamedTuple):
    """How much may happen. The first is for each generation, the others for a whole story."""

    epochs: int = 2
    #: Pairs that are made after the first: by a repair, or switched on again.
    pairings: int = 1
    #: Engines, agents, QEMUs and hosts that die, links that are cut, saves and promotions that fail.
    faults: int = 2
    #: Answers that are lost, with the question judged before, later or never; questions that wait while a new pair is
    #: begun; orders of the manager that are carried out later or never.
    losses: int = 1
    #: Disarms, shutdowns of the guest, switchovers.
    ends: int = 1


class Guest(NamedTuple):
    standby: bool = False
    held: bool = False
    covered: int = 0
    said: int = 0
    #: The generation in the note that its engine left, host/note.py; 0: there is none.
    noted: int = 0

    @property
    def speaks(self) -> bool:
        return not (self.standby or self.held)


class Primary(NamedTuple):
    """A primary's engine. done: it has ended, and waits until an agent has seen its last report."""

    generation: int
    loop: Snapshot
    linked: bool = True
    done: bool = False
    last: Report | None = None


class Backup(NamedTuple):
    generation: int
    lease: Snapshot
    replica: Snapshot
    linked: bool = False
    #: It has the grant, and the guest does not run yet.
    promoting: bool = False
    done: bool = False
    last: Report | None = None


class Host(NamedTuple):
    up: bool = True
    guest: Guest | None = None
    primary: Primary | None = None
    backup: Backup | None = None
    agent: bool = True
    watched: tuple[Watched, ...] = ()
    #: What the agent keeps in mind beside them.
    memory: tuple[Any, ...] = ()


class Link(NamedTuple):
    """The synchronisation connection. What is on its way may arrive after a cut, or not."""

    generation: int
    up: bool = True
    forth: tuple[tuple[str, int], ...] = ()
    back: tuple[int, ...] = ()


class Seen(NamedTuple):
    """What an onlooker who knows all has seen since the last first copy was over."""

    generation: int = 0
    #: The last epoch that the backup's engine has got whole.
    whole: int = 0
    #: The last epoch whose output was released, by whomever.
    said: int = 0
    #: Where the pair was promoted, and the epoch.
    promoted: str = ""
    promoted_epoch: int = 0
    #: Somebody was told that no backup can be promoted any more, and nobody has switched it on since.
    disarmed: bool = False
    #: The guest shut itself down.
    off: bool = False


class World(NamedTuple):
    row: Row
    a: Host
    b: Host
    link: Link | None
    #: Of the manager, which waits for them no longer: (what, host, generation). They may still be carried out.
    orders: tuple[tuple[str, str, int], ...]
    #: Questions that nobody waits for any more; the manager may still judge them.
    stray: tuple[Question, ...]
    seen: Seen
    left: Bounds

    def host(self, name: str) -> Host:
        return self.a if name == A else self.b


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    label: str
    fair: bool
    world: World
    #: What an onlooker saw: ("released", host, generation, epoch), ("opened", host), ("destroyed", host) and
    #: ("promoted", host, generation, epoch, epoch of the device state).
    events: tuple[Any, ...]


def first_world(bounds: Bounds) -> World:
    """A guest on host A, its standby on host B, and the manager about to start the engines."""
    row = Row(PairState.SYNCING, 1, A, 1, A, B, ENGINES)
    return World(row, Host(guest=Guest()), Host(guest=Guest(standby=True)), None, (), (), Seen(), bounds)
