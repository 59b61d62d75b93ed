"""The real rules, made a function of values: a snapshot and an event in, a snapshot and the answer out.

What runs here is nova_ftvm's own code: core.epoch.EpochLoop, core.lease.Lease, core.replica.Replica, and
failover.manager.Manager with its Arbiter on a row in memory. Nothing is told again. Equal snapshots are one object, and
an event that was seen before on a snapshot is not run again.

Time. A rule's times are forgotten, and a timer may run out as soon as it is armed: SOON is after all of them.
"""

import copy
import dataclasses
import enum
import logging
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from nova_ftvm.core import wire
from nova_ftvm.core.epoch import EpochLoop, Pace
from nova_ftvm.core.lease import Lease
from nova_ftvm.core.policy import Policy
from nova_ftvm.core.replica import Replica
from nova_ftvm.db.records import Engine, Pair
from nova_ftvm.exception import FtvmError, LostRace
from nova_ftvm.failover import hosts as reports
from nova_ftvm.failover.manager import Manager
from nova_ftvm.failover.settings import Settings
from nova_ftvm.types import Epoch, Generation, Grant, InstanceId, PairId, PairState

PAIR, SERVER = PairId("pair"), InstanceId("server")
NOW, SOON = 0.0, 1000.0
_PACE = Pace(policy=Policy.FIXED, epoch_s=1.0, ack_limit_s=1.0, beat_s=1.0, live_passes=1, live_rest_pages=0)


class Snapshot:
    """A rule at rest. Compared by identity: there is one for each state. `rule` is for reading only."""

    __slots__ = ("rule",)

    def __init__(self, rule: Any) -> None:
        self.rule = rule


class Row(NamedTuple):
    """What of the pair's row decides anything."""

    state: PairState
    generation: int
    active_host: str
    active_since: int
    primary_host: str
    backup_host: str | None
    step: str


class Answered(NamedTuple):
    """What a manager's method did and said."""

    row: Row
    answer: Any
    #: (host, generation) of the engines that it wants to be stopped.
    stops: tuple[tuple[str, int], ...]


def plain(value: Any) -> Any:
    """What of a rule's attribute makes a difference."""
    if isinstance(value, float):
        return NOW
    if _is_record(value):
        return dataclasses.replace(value, **{name: plain(each) for name, each in _fields(value)})
    if isinstance(value, enum.Enum) or dataclasses.is_dataclass(value):
        return value
    if isinstance(value, str):
        return "why" if value else ""
    return value


def _is_record(value: Any) -> bool:
    """A part of a rule's state with fields of its own, which change."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type) and type(value).__hash__ is None


def _fields(record: Any) -> list[tuple[str, Any]]:
    return [(field.name, getattr(record, field.name)) for field in dataclasses.fields(record)]


def _key(value: Any) -> Any:
    # A replica's staged frames come in one order only, so their number tells which they are.
    return len(value) if isinstance(value, list) else tuple(_fields(value)) if _is_record(value) else value


def _copy(rule: Any) -> Any:
    twin = object.__new__(type(rule))
    twin.__dict__ = {name: copy.copy(value) if isinstance(value, list) or _is_record(value) else value
                     for name, value in vars(rule).items()}
    return twin


class Rules:
    """One search's rules: a mutation that is in force when they are first run stays in what is remembered."""

    def __init__(self) -> None:
        self._known: dict[Any, Snapshot] = {}
        self._done: dict[Any, Any] = {}
        #: The one that all begin with. What it keeps of pages that were sent is never used here, and so stays one.
        self._replica = Replica(())
        self._store = _RowStore()
        self._stops = _Stops()
        self._manager = Manager(self._store, _Cloud(), self._stops, _Clock(), Settings(), _Queue())  # type: ignore

    # The engines' rules

    def loop(self) -> Snapshot:
        return self._keep(EpochLoop(_PACE, NOW))

    def lease(self, generation: int) -> Snapshot:
        return self._keep(Lease(Generation(generation), 1.0, NOW))

    def replica(self) -> Snapshot:
        return self._keep(_copy(self._replica))

    def happen(self, snapshot: Snapshot, event: str, *facts: Any) -> tuple[Snapshot, Any]:
        """Calls the rule's method `event`; an error of ours is the answer."""
        key = (snapshot, event, facts)
        if key not in self._done:
            rule = _copy(snapshot.rule)
            try:
                answer = getattr(rule, event)(*facts)
            except FtvmError as error:
                answer = error
            self._done[key] = self._keep(rule), answer
        return self._done[key]

    def _keep(self, rule: Any) -> Snapshot:
        for name, value in vars(rule).items():
            setattr(rule, name, plain(value))
        return self.keep(rule, (type(rule), *((name, _key(value)) for name, value in vars(rule).items())))

    def keep(self, rule: Any, key: Any) -> Snapshot:
        return self._known.setdefault(key, Snapshot(rule))

    # The arbiter and the manager

    def manager(self, row: Row, method: str, *facts: Any) -> Answered:
        """A question by RPC, as rpc.manager.ManagerApi names it."""
        return self._on_row(row, method, facts, lambda: getattr(self._manager, method)(
            *({} if fact == () else fact for fact in facts)))

    def decide(self, row: Row, method: str, *facts: Any) -> Answered:
        """A decision of the manager's own, by the arbiter; LostRace is an answer."""
        return self._on_row(row, method, facts, lambda: getattr(self._manager.arbiter, method)(
            self._store.row, *facts))

    def lingers(self, row: Row, host: str, role: str, generation: int) -> bool:
        key = ("lingers", row, host, role, generation)
        if key not in self._done:
            self._done[key] = reports.lingers(pair_of(row), host, Engine(PAIR, role, generation, ""), SOON)
        return bool(self._done[key])

    def stale(self, row: Row, host: str, engines: tuple[tuple[str, int], ...]) -> tuple[str, ...]:
        """The answer to an agent's report (failover/hosts.py, `report`): pairs whose engines are over."""
        key = ("stale", row, host, engines)
        if key not in self._done:
            self._done[key] = tuple({PAIR for role, generation in engines if reports.is_over(
                pair_of(row), host, Engine(PAIR, role, generation, ""))})
        return tuple(self._done[key])

    def _on_row(self, row: Row, method: str, facts: tuple[Any, ...], call: Callable[[], Any]) -> Answered:
        key = (row, method, facts)
        if key not in self._done:
            self._store.row = pair_of(row)
            self._stops.seen = []
            try:
                answer = call()
            except LostRace as error:
                answer = error
            self._done[key] = Answered(row_of(self._store.row), answer, tuple(self._stops.seen))
        return self._done[key]


def pair_of(row: Row) -> Pair:
    return Pair(id=PAIR, instance_id=SERVER, project_id="", token="", backup_id="backup", **{
        **row._asdict(), "generation": Generation(row.generation), "active_since": Generation(row.active_since)})


def row_of(pair: Pair) -> Row:
    return Row(*(getattr(pair, name) for name in Row._fields))


def grant_of(answer: Any) -> Grant:
    return Grant(answer["granted"], answer["generation"], "so it is")


def frames(generation: int, epoch: int) -> dict[str, wire.Frame]:
    """An epoch as short as it can be: a device state, and the commit that says so."""
    number, part = Epoch(epoch), Generation(generation)
    commit = wire.encode_commit(part, number, frames=1, pages=0, writes=0)
    return {"device state": wire.Frame(wire.Kind.DEVICE, part, number, b"%d" % epoch),
            "commit": wire.Frame(wire.Kind.COMMIT, part, number, commit[1])}


class _RowStore:
    """db.store.Store with one row, in memory."""

    row: Pair

    def pair(self, pair_id: PairId) -> Pair:
        return self.row

    def pair_of(self, instance_id: InstanceId) -> Pair:
        return self.row

    def pairs(self, ids: Iterable[str] | None = None) -> list[Pair]:
        return [self.row]

    def change(self, pair: Pair, **changes: Any) -> Pair:
        if (pair.state, pair.generation) != (self.row.state, self.row.generation):
            raise LostRace("the row has moved on")
        self.row = dataclasses.replace(self.row, **changes)
        return self.row


class _Stops:
    """failover.agents.Agents: notes whom it should have told to stop."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def stop_engine(self, host: str, pair_id: str, generation: int, *_: Any, **__: Any) -> bool:
        self.seen.append((host, generation))
        return True


class _Cloud:
    """failover.cloud.Cloud, of which a disarm asks only what ports there are to free."""

    def server(self, server_id: str) -> None:
        return None


class _Clock:
    def now(self) -> float:
        return NOW

    def sleep(self, seconds: float) -> None:
        raise AssertionError("nothing waits in the model")


class _Queue:
    def put(self, key: PairId, delay_s: float = 0.0) -> None:
        pass


def silence() -> None:
    """What the rules log is no news in a search that takes each road."""
    logging.getLogger("nova_ftvm").setLevel(logging.CRITICAL + 1)


__all__ = ["NOW", "PAIR", "SERVER", "SOON", "Answered", "Row", "Rules", "Snapshot", "frames",
           "grant_of", "pair_of", "plain", "row_of", "silence"]
