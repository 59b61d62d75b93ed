"""What the store hands out. Times are wall-clock seconds (managers on several machines share the tables)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from nova_ftvm.core.kind import Abilities
from nova_ftvm.core.losttime import Figures
from nova_ftvm.types import Generation, InstanceId, PairId, PairState


@dataclasses.dataclass(frozen=True, slots=True)
class Refusal:
    """A host's word that it cannot work with a server as things are, or that a backup was just lost there."""

    at: float
    reason: str
    #: The host's own word: the same will happen again. Otherwise it is only a reason to prefer another host.
    lasting: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """One protected server: who may speak for it, and what is still to be done for it."""

    id: PairId
    instance_id: InstanceId
    project_id: str
    #: Where the server ran when the pair was made; the new host once Nova followed a promotion.
    primary_host: str
    generation: Generation
    state: PairState
    #: The only side that may ever speak without asking. Changes by a grant, and by nothing else.
    active_host: str
    #: The generation that handed the voice to active_host. A request of an older one comes from a guest that is over.
    active_since: Generation
    #: Shared secret of the synchronisation connection. Never shown.
    token: str = dataclasses.field(repr=False)
    backup_id: str | None = None
    backup_host: str | None = None
    reason: str = ""
    #: What the manager must still do in this state; '' is nothing. Written before the work, changed after it.
    step: str = ""
    #: detected_at, granted_at, running_at, nova_done_at of the last failover.
    timeline: Mapping[str, float] = dataclasses.field(default_factory=dict)
    #: Percent of the first copy, as finely as the engine tells it: a large disk moves slowly.
    progress: float = 0.0
    #: Failures in a row, and when the next try is due.
    attempts: int = 0
    retry_at: float = 0.0
    #: By host. Which of them still count, failover.refusals says.
    refused: Mapping[str, Refusal] = dataclasses.field(default_factory=dict)
    #: When the state last changed.
    moved_at: float = 0.0
    created_at: float = 0.0
    updated_at: float = 0.0

    def public(self) -> dict[str, Any]:
        """All that may be shown: everything but the token."""
        shown = dataclasses.asdict(self)
        del shown["token"]
        return shown | {"state": self.state.value, "timeline": dict(self.timeline)}


@dataclasses.dataclass(frozen=True, slots=True)
class Engine:
    """One running engine, as its host's agent lists it."""

    pair_id: str
    role: str
    generation: int
    state: str
    #: Of a primary that has had checkpoints; an older agent tells none.
    figures: Figures | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Host:
    """A compute host, as its agent last reported it."""

    name: str
    capable: bool = False
    reason: str = ""
    data_address: str = ""
    reported_at: float = 0.0
    engines: tuple[Engine, ...] = ()
    #: Which start of the agent this is, if it tells.
    incarnation: str = ""
    #: Since when it has reported without a gap, and the same of itself.
    since: float = 0.0
    #: What its KVM can; None when its agent is too old to tell.
    abilities: Abilities | None = None
    #: We told Nova that it is down; we must take that back once it is not.
    forced_down_by_us: bool = False
    forced_at: float = 0.0

    def alive(self, now: float, limit_s: float) -> bool:
        return now - self.reported_at <= limit_s
