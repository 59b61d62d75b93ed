"""What the agents report, and what follows from it for engines that are over."""

import dataclasses
import re
from typing import Any

from oslo_log import log

from nova_ftvm.core.kind import Abilities
from nova_ftvm.core.losttime import Figures
from nova_ftvm.db.records import Engine, Host, Pair
from nova_ftvm.db.store import Store
from nova_ftvm.exception import LostRace
from nova_ftvm.failover.arbiter import ALONE
from nova_ftvm.failover.settings import Clock, Settings
from nova_ftvm.types import PairState, Role

LOG = log.getLogger(__name__)

#: An engine that was told to stop may show in a report or two after that.
_LINGER_S = 5.0


def is_over(pair: Pair, host: str, engine: Engine) -> bool:
    """Must this engine's guest be destroyed? A primary whose voice went to another host. No doubt leads here:
    only a grant changes active_host."""
    return (engine.role == Role.PRIMARY and host != pair.active_host and engine.generation < pair.active_since)


def lingers(pair: Pair, host: str, engine: Engine, now: float) -> bool:
    """Should this engine have ended, its guest unharmed? Its generation is over, and its stop was not heard."""
    if engine.generation >= pair.generation or now - pair.moved_at < _LINGER_S or is_over(pair, host, engine):
        return False
    if engine.role == Role.BACKUP:
        return host != pair.active_host
    return pair.state in ALONE and host == pair.active_host


def lists(host: Host | None, pair: Pair, role: Role | None = None) -> bool:
    """Does the host run an engine of the pair, in whatever generation?"""
    return host is not None and any(
        engine.pair_id == pair.id and role in (None, engine.role) for engine in host.engines)


def present(host: Host | None, pair: Pair) -> bool:
    """Does the host run an engine of the pair's generation?"""
    return host is not None and any(
        engine.pair_id == pair.id and engine.generation == pair.generation for engine in host.engines)


class Hosts:
    """Takes the agents' reports."""

    def __init__(self, store: Store, clock: Clock, settings: Settings) -> None:
        self._store = store
        self._clock = clock
        self._settings = settings

    def report(self, name: str, report: dict[str, Any]) -> list[str]:
        """Keeps the report; returns the pairs whose engine on this host must be fenced."""
        engines = tuple(Engine(pair_id=engine["pair_id"], role=engine["role"], generation=engine["generation"],
                               state=engine.get("state", ""), figures=Figures.parse(engine.get("figures")))
                        for engine in report.get("engines", ()))
        now = self._clock.now()
        said = Host(name=name, capable=bool(report["capable"]), reason=report.get("reason", ""),
                    data_address=report.get("data_address", ""), incarnation=str(report.get("incarnation", "")),
                    reported_at=now, engines=engines, abilities=Abilities.read(report.get("abilities")))
        before = self._store.host(name)
        same = before is not None and before.alive(now, self._settings.agent_down_s) and _word(before) == _word(said)
        self._store.report(dataclasses.replace(said, since=before.since if before is not None and same else now))
        # Only a primary can be over, or tell of a first copy; and of most there is nothing to say.
        primaries = [engine for engine in engines if engine.role == Role.PRIMARY]
        if not primaries:
            return []
        unsettled = self._store.unsettled([engine.pair_id for engine in primaries], name)
        pairs: dict[str, Pair] = {pair.id: pair for pair in unsettled}
        for engine in primaries:
            if engine.pair_id in pairs and _is_first_copy(pairs[engine.pair_id], name, engine):
                self._progress(pairs[engine.pair_id], engine.state)
        stale = [engine.pair_id for engine in primaries
                 if (pair := pairs.get(engine.pair_id)) is not None and is_over(pair, name, engine)]
        for pair_id in stale:
            LOG.warning("Pair %s generation %d: the old primary on %s is over and is fenced", pair_id,
                        pairs[pair_id].generation, name)
        return stale

    def _progress(self, pair: Pair, said: str) -> None:
        """How far the first copy is; written only when it moved, so that updated_at tells a copy that hangs. It may go
        backwards: the guest goes on writing."""
        reached = percent(said)
        if reached == pair.progress:
            return
        try:
            self._store.change(pair, progress=reached)
        except LostRace:
            LOG.debug("Pair %s: progress came late", pair.id)


def _word(host: Host) -> tuple[object, ...]:
    """What the agent says of itself and its host, apart from its engines."""
    return host.capable, host.reason, host.data_address, host.incarnation, host.abilities


def _is_first_copy(pair: Pair, host: str, engine: Engine) -> bool:
    return (pair.state is PairState.SYNCING and engine.role == Role.PRIMARY and host == pair.primary_host
            and engine.generation == pair.generation and engine.state.startswith("syncing"))


def percent(said: str) -> float:
    """'40', '40%', '40.5 %' or 'syncing 40.25 %' as a number of percent; 0 when there is none in it."""
    found = re.search(r"\d+(\.\d+)?", said)
    return min(100.0, float(found.group())) if found else 0.0
