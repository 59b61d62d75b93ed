"""The clients of a database guest: several connections that insert rows without pause.

Run inside the client namespace, as `python -m ftvm_lab.rows COMMAND ADDRESS`; prints its report as JSON:

prepare   makes the table; its index goes to the server's second disk, if there is one
insert    inserts until standard input closes; the report is a Work
read      what is in the table; the report is a Contents
"""

import argparse
import asyncio
import itertools
import json
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Protocol

import psycopg

from ftvm_lab.ledger import Ledger, Transaction

PORT = 5432
REOPEN_S = 0.1
CONNECT_S = 10
SIZES = (1, 2, 3)

TABLE = "create table if not exists rows (id bigint not null, payload text not null)"
INDEX = "create index if not exists rows_id on rows (id)"
SECOND_DISK = "/srv/second/tables"
SPACE = "second"
#: Long enough that a row's place on the disk matters, and computed from the id.
PAYLOAD = "repeat(md5(id::text), 8)"
INSERT = f"insert into rows select id, {PAYLOAD} from generate_series(%s::bigint, %s::bigint) id"
DAMAGED = f"select count(*) from rows where payload is distinct from {PAYLOAD}"


@dataclass(frozen=True, slots=True)
class Pace:
    """Times of the clients, in seconds."""

    think_s: float = 0.005
    #: A connection that is silent for so long is given up, and counted.
    silence_s: float = 60.0
    #: At the end, the time that outstanding answers are waited for.
    grace_s: float = 30.0


@dataclass(slots=True)
class Work:
    """What the connections did. A transaction that they gave up is in doubt."""

    ledger: Ledger = field(default_factory=Ledger)
    reconnects: int = 0
    longest_wait_s: float = 0.0
    last_error: str = ""


@dataclass(frozen=True, slots=True)
class Contents:
    """Every row's id, and how many rows have another payload than they must have."""

    ids: list[int]
    damaged: int


class Database(Protocol):
    """One connection. Both may raise OSError or TimeoutError: the connection is of no use then."""

    async def insert(self, transaction: Transaction) -> None:
        """Returns once the server has confirmed the commit."""

    async def close(self) -> None: ...


Opener = Callable[[], Awaitable[Database]]


class Postgres:
    def __init__(self, connection: psycopg.AsyncConnection) -> None:
        self._connection = connection

    @classmethod
    async def open(cls, address: str) -> "Postgres":
        try:
            return cls(await psycopg.AsyncConnection.connect(_conninfo(address), autocommit=True))
        except psycopg.Error as error:
            raise ConnectionError(str(error)) from error

    async def insert(self, transaction: Transaction) -> None:
        try:
            await self._connection.execute(INSERT, (transaction.first, transaction.ids[-1]))
        except psycopg.Error as error:
            raise ConnectionError(str(error)) from error

    async def close(self) -> None:
        await self._connection.close()


def _conninfo(address: str) -> str:
    return f"host={address} port={PORT} user=postgres dbname=postgres connect_timeout={CONNECT_S}"


async def insert_until(stop: asyncio.Event, open_one: Opener, first_id: int, connections: int, pace: Pace) -> Work:
    """Keeps all connections busy until `stop`; then gives them the grace for their last answers."""
    work = Work()
    plan = transactions(first_id)
    tasks = [asyncio.create_task(_keep_busy(stop, open_one, plan, pace, work)) for _ in range(connections)]
    await stop.wait()
    finished, unfinished = await asyncio.wait(tasks, timeout=pace.grace_s)
    for task in unfinished:
        task.cancel()
    await asyncio.gather(*unfinished, return_exceptions=True)
    for task in finished:
        task.result()
    return work


def transactions(first_id: int) -> Iterator[Transaction]:
    """One behind the other, without end."""
    for size in itertools.cycle(SIZES):
        yield Transaction(first_id, size)
        first_id += size


async def _keep_busy(
    stop: asyncio.Event, open_one: Opener, plan: Iterator[Transaction], pace: Pace, work: Work
) -> None:
    while not stop.is_set():
        try:
            database = await open_one()
            try:
                while not stop.is_set():
                    await _insert(database, next(plan), pace, work)
                    await asyncio.sleep(pace.think_s)
            finally:
                await database.close()
        except (OSError, TimeoutError) as error:
            work.reconnects += 1
            work.last_error = repr(error)
            await asyncio.sleep(REOPEN_S)


async def _insert(database: Database, transaction: Transaction, pace: Pace, work: Work) -> None:
    """In doubt is all that is not confirmed, however this ends."""
    start = time.monotonic()
    outcome = work.ledger.in_doubt
    try:
        async with asyncio.timeout(pace.silence_s):
            await database.insert(transaction)
        outcome = work.ledger.confirmed
    finally:
        outcome.append(transaction)
        work.longest_wait_s = max(work.longest_wait_s, time.monotonic() - start)


def prepare(address: str) -> None:
    with psycopg.connect(_conninfo(address), autocommit=True) as connection:
        connection.execute(TABLE)
        connection.execute(INDEX + (f" tablespace {SPACE}" if _has_space(connection) else ""))


def _has_space(connection: psycopg.Connection) -> bool:
    if connection.execute("select 1 from pg_tablespace where spcname = %s", [SPACE]).fetchone() is None:
        if connection.execute("select pg_stat_file(%s, true)", [SECOND_DISK]).fetchone() == (None,):
            return False
        connection.execute(f"create tablespace {SPACE} location '{SECOND_DISK}'")
    return True


def read(address: str) -> Contents:
    """From the table itself: what its index says is the index's check."""
    with psycopg.connect(_conninfo(address)) as connection:
        for way in ("indexscan", "indexonlyscan", "bitmapscan"):
            connection.execute(f"set enable_{way} = off")
        ids = [int(row[0]) for row in connection.execute("select id from rows")]
        found = connection.execute(DAMAGED).fetchone()
        assert found is not None
        return Contents(ids, int(found[0]))


async def _insert_until_input_closes(arguments: argparse.Namespace) -> Work:
    stop = asyncio.Event()
    work = asyncio.create_task(
        insert_until(
            stop, lambda: Postgres.open(arguments.address), arguments.first_id, arguments.connections, Pace()
        )
    )
    await asyncio.to_thread(sys.stdin.read)
    stop.set()
    return await work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("prepare", "insert", "read"))
    parser.add_argument("address")
    parser.add_argument("--first-id", type=int, default=1)
    parser.add_argument("--connections", type=int, default=6)
    arguments = parser.parse_args()
    if arguments.command == "prepare":
        prepare(arguments.address)
    elif arguments.command == "insert":
        print(json.dumps(asdict(asyncio.run(_insert_until_input_closes(arguments)))))
    else:
        print(json.dumps(asdict(read(arguments.address))))


if __name__ == "__main__":
    main()
