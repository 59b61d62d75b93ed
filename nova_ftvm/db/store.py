"""Reads and writes pairs and hosts. Thread-safe: each call is one transaction of its own.

It decides nothing: which move is right is core.pair's, who may ask for it is failover.arbiter's.
What it promises is the compare-and-set: `change` writes all of its columns, or raises LostRace and writes none.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ParamSpec, TypedDict, TypeVar, Unpack

import sqlalchemy as sa
from oslo_db import api as db_api
from oslo_db import exception as db_exception

from nova_ftvm.core.kind import Abilities
from nova_ftvm.core.losttime import Figures
from nova_ftvm.db.records import Engine, Host, Pair, Refusal
from nova_ftvm.db.schema import HostRow, PairRow
from nova_ftvm.exception import FtvmError, LostRace, PairNotFound
from nova_ftvm.types import Generation, InstanceId, PairId, PairState

_PAIR_FIELDS = tuple(field.name for field in dataclasses.fields(Pair))

Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")


class DatabaseAway(FtvmError):
    """No answer. What was to be written may have been written: whoever cares reads the row again."""


def _again(transaction: Callable[Arguments, Answer]) -> Callable[Arguments, Answer]:
    """A transaction that the database broke off is tried again, for a second or two; then DatabaseAway is raised.

    Safe for a compare-and-set too: when the first try had come through, the second one loses, and the caller reads
    the row again.
    """
    stubborn = db_api.wrap_db_retry(max_retries=5, retry_interval=0.05, max_retry_interval=0.5,
                                    retry_on_deadlock=True, retry_on_disconnect=True)(transaction)

    @functools.wraps(transaction)
    def bounded(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Answer:
        try:
            return stubborn(*args, **kwargs)
        except (db_exception.DBConnectionError, db_exception.DBDeadlock) as error:
            raise DatabaseAway(f"the database does not answer: {type(error).__name__}") from error
    return bounded


class PairChanges(TypedDict, total=False):
    """Columns of a pair that may be written."""

    state: PairState
    generation: Generation
    reason: str
    step: str
    backup_id: str | None
    backup_host: str | None
    primary_host: str
    active_host: str
    active_since: Generation
    token: str
    timeline: Mapping[str, float]
    progress: float
    attempts: int
    retry_at: float
    refused: Mapping[str, Refusal]


class Store:
    """Pairs and hosts on one SQLAlchemy engine (db.connect)."""

    def __init__(self, engine: sa.Engine, clock: Callable[[], float] = time.time) -> None:
        self._engine = engine
        self._clock = clock

    # -- pairs

    def pairs(self, ids: Iterable[str] | None = None) -> list[Pair]:
        return self._select() if ids is None else self._select(PairRow.id.in_(list(ids)))

    def pairs_in(self, *states: PairState) -> list[Pair]:
        return self._select(PairRow.state.in_([state.value for state in states]))

    def unsettled(self, ids: Iterable[str], host: str) -> list[Pair]:
        """Of these pairs, those that are SYNCING, and those whose voice another host has."""
        return self._select(PairRow.id.in_(list(ids)),
                            sa.or_(PairRow.state == PairState.SYNCING.value, PairRow.active_host != host))

    def pair(self, pair_id: PairId) -> Pair:
        for pair in self._select(PairRow.id == pair_id):
            return pair
        raise PairNotFound(f"there is no pair {pair_id}")

    def pair_of(self, instance_id: InstanceId) -> Pair | None:
        return next(iter(self._select(PairRow.instance_id == instance_id)), None)

    def pair_of_backup(self, backup_id: str) -> Pair | None:
        return next(iter(self._select(PairRow.backup_id == backup_id)), None)

    @_again
    def add(self, pair: Pair) -> Pair:
        """Raises LostRace when the instance has a pair already."""
        now = self._clock()
        added = dataclasses.replace(pair, created_at=now, updated_at=now, moved_at=now)
        columns = _columns({name: getattr(added, name) for name in _PAIR_FIELDS})
        try:
            with self._engine.begin() as connection:
                connection.execute(sa.insert(PairRow).values(**columns, worker=None, worker_until=0.0))
        except db_exception.DBDuplicateEntry:
            raise LostRace(f"server {pair.instance_id} has a pair already") from None
        return added

    @_again
    def change(self, pair: Pair, **changes: Unpack[PairChanges]) -> Pair:
        """The compare-and-set: writes `changes` if the pair still has the generation and the state of `pair`.

        Returns the pair with the changes; raises LostRace. updated_at always changes, so that MariaDB counts the
        row as affected whatever its client's found_rows says.
        """
        now = self._clock()
        moved = now if changes.get("state", pair.state) is not pair.state else pair.moved_at
        query = sa.update(PairRow).where(*_same(pair)).values(
            **_columns(dict(changes)), moved_at=moved, updated_at=now)
        with self._engine.begin() as connection:
            written = connection.execute(query).rowcount
        if written != 1:
            raise LostRace(f"pair {pair.id} is not {pair.state} in generation {pair.generation} any more")
        return dataclasses.replace(pair, **changes, moved_at=moved, updated_at=now)

    @_again
    def forget(self, pair: Pair) -> None:
        """Removes the row, by compare-and-set as well."""
        with self._engine.begin() as connection:
            if connection.execute(sa.delete(PairRow).where(*_same(pair))).rowcount != 1:
                raise LostRace(f"pair {pair.id} has moved on")

    @_again
    def claim(self, pair_id: PairId, worker: str, for_s: float) -> bool:
        """Takes, or renews, the right to do the pair's slow work; False while another manager has it."""
        now = self._clock()
        free = sa.or_(PairRow.worker.is_(None), PairRow.worker == worker, PairRow.worker_until < now)
        query = sa.update(PairRow).where(PairRow.id == pair_id, free).values(worker=worker, worker_until=now + for_s)
        with self._engine.begin() as connection:
            return connection.execute(query).rowcount == 1

    @_again
    def release(self, pair_id: PairId, worker: str) -> None:
        query = sa.update(PairRow).where(PairRow.id == pair_id, PairRow.worker == worker)
        with self._engine.begin() as connection:
            connection.execute(query.values(worker=None, worker_until=0.0))

    # -- hosts

    @_again
    def hosts(self) -> dict[str, Host]:
        with self._engine.connect() as connection:
            rows = connection.execute(sa.select(HostRow.__table__)).mappings().all()
        return {row["host"]: _host(row) for row in rows}

    @_again
    def host(self, name: str) -> Host | None:
        with self._engine.connect() as connection:
            row = connection.execute(sa.select(HostRow.__table__).where(HostRow.name == name)).mappings().first()
        return None if row is None else _host(row)

    def report(self, host: Host) -> None:
        """What its agent says; leaves forced_down_by_us alone."""
        said = {"capable": host.capable, "reason": host.reason, "data_address": host.data_address,
                "reported_at": host.reported_at, "engines": [_said(engine) for engine in host.engines],
                "incarnation": host.incarnation, "since": host.since,
                "abilities": None if host.abilities is None else host.abilities.told()}
        self._put_host(host.name, said)

    def mark_forced_down(self, host: str, forced: bool) -> None:
        self._put_host(host, {"forced_down_by_us": forced, "forced_at": self._clock()})

    @_again
    def _put_host(self, name: str, columns: dict[str, Any]) -> None:
        update = sa.update(HostRow).where(HostRow.name == name).values(**columns)
        with self._engine.begin() as connection:
            if connection.execute(update).rowcount:
                return
        fresh: dict[str, Any] = {"capable": False, "reason": "its agent has not reported", "data_address": "",
                                 "reported_at": 0.0, "engines": [], "incarnation": "", "since": 0.0, "abilities": None,
                                 "forced_down_by_us": False, "forced_at": 0.0}
        try:
            with self._engine.begin() as connection:
                connection.execute(sa.insert(HostRow).values(name=name, **{**fresh, **columns}))
        except db_exception.DBDuplicateEntry:
            with self._engine.begin() as connection:
                connection.execute(update)

    # -- within

    @_again
    def _select(self, *where: sa.ColumnElement[bool]) -> list[Pair]:
        query = sa.select(PairRow.__table__).where(*where).order_by(PairRow.created_at)
        with self._engine.connect() as connection:
            return [_pair(row) for row in connection.execute(query).mappings()]


def _same(pair: Pair) -> tuple[sa.ColumnElement[bool], ...]:
    return (PairRow.id == pair.id, PairRow.generation == pair.generation, PairRow.state == pair.state.value)


def _columns(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields as the columns hold them."""
    written = dict(fields)
    if "state" in written:
        written["state"] = written["state"].value
    if "timeline" in written:
        written["timeline"] = dict(written["timeline"])
    if "refused" in written:
        written["refused"] = {host: dataclasses.asdict(refusal) for host, refusal in written["refused"].items()}
    return written


def _pair(row: Any) -> Pair:
    fields = {name: row[name] for name in _PAIR_FIELDS}
    refused = {host: Refusal(**said) for host, said in (fields["refused"] or {}).items()}
    return Pair(**{**fields, "state": PairState(fields["state"]), "timeline": dict(fields["timeline"] or {}),
                   "refused": refused})


def _said(engine: Engine) -> dict[str, Any]:
    """A manager of an older release can read the row as long as there are no figures."""
    columns = dataclasses.asdict(engine)
    if engine.figures is None:
        del columns["figures"]
    return columns


def _engine(said: Mapping[str, Any]) -> Engine:
    """What a manager of another release wrote beside it is left out."""
    return Engine(said["pair_id"], said["role"], said["generation"], said["state"], Figures.parse(said.get("figures")))


def _host(row: Any) -> Host:
    return Host(name=row["host"], capable=bool(row["capable"]), reason=row["reason"],
                data_address=row["data_address"], reported_at=row["reported_at"],
                engines=tuple(map(_engine, row["engines"] or ())),
                incarnation=row["incarnation"] or "", since=row["since"] or 0.0,
                abilities=Abilities.read(row["abilities"]),
                forced_down_by_us=bool(row["forced_down_by_us"]), forced_at=row["forced_at"])
