"""The clients of the guest's register: several connections that read, write and compare-and-set without pause.

Run inside the client namespace, as `python -m ftvm_lab.register ADDRESS --history FILE`. Writes the history of all
operations to FILE while it runs. It ends when standard input closes: then every key is read once more, and the
report is printed as JSON. It judges nothing but the form of the answers.

A connection has at most one request under way. Without an answer its outcome is unknown, and the connection goes on
as another process: what the old one asked for may still come true.
"""

import argparse
import asyncio
import itertools
import json
import random
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ftvm_lab.history import NOTHING, Kind, Operation, Recorder

PORT = 7002
REOPEN_S = 0.1
FLUSH_S = 0.1
#: The keys in use at one time, and the requests after which another takes a key's place: the histories of
#: single keys stay short, so that they can be judged.
KEYS_AT_ONCE = 3
REQUESTS_PER_KEY = 300
#: At the end, so many keys are read again at most.
KEYS_READ_AGAIN = 1500
SHOWN_WRONG = 20
WEIGHTS = {Kind.READ: 4, Kind.WRITE: 3, Kind.CAS: 3}


@dataclass(frozen=True, slots=True)
class Pace:
    """Times of the clients, in seconds."""

    think_s: float = 0.005
    connect_s: float = 3.0
    #: A connection that is silent for so long is given up: its request's outcome is unknown.
    silence_s: float = 15.0
    #: At the end, the time for reading the keys again, and then for the last answers.
    read_again_s: float = 20.0
    grace_s: float = 15.0


@dataclass(frozen=True, slots=True)
class Report:
    """`boots`: the words of the guest's boots that answered; more than one if it was started again."""

    reconnects: int
    boots: list[str]
    wrong: list[str]
    keys: int


class Plan:
    """What is asked next. Values are numbers of requests: none is written twice."""

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)
        self._numbers = itertools.count(1)
        self._names = (f"k{number}" for number in itertools.count(1))
        self._left: dict[str, int] = {}
        #: All keys that were ever in use, and the value that was last heard of each.
        self._latest: dict[str, str] = {}
        self._read_again: Iterator[str] | None = None
        for _ in range(KEYS_AT_ONCE):
            self._begin_key()

    def _begin_key(self) -> None:
        name = next(self._names)
        self._left[name] = REQUESTS_PER_KEY
        self._latest[name] = NOTHING

    @property
    def keys(self) -> int:
        return len(self._latest)

    def end(self) -> None:
        """From now on the keys are read again, each once."""
        keys = list(self._latest)
        self._read_again = iter(self._draw.sample(keys, min(len(keys), KEYS_READ_AGAIN)))

    def end_at_once(self) -> None:
        """From now on nothing is asked."""
        self._read_again = iter(())

    def next(self, process: int, connection: int) -> Operation | None:
        """None when there is nothing left to ask."""
        if self._read_again is not None:
            key = next(self._read_again, None)
            return None if key is None else self._operation(Kind.READ, key, process, connection)
        key = self._draw.choice(list(self._left))
        (kind,) = self._draw.choices(list(WEIGHTS), list(WEIGHTS.values()))
        self._left[key] -= 1
        if not self._left[key]:
            del self._left[key]
            self._begin_key()
        return self._operation(kind, key, process, connection)

    def _operation(self, kind: Kind, key: str, process: int, connection: int) -> Operation:
        number = next(self._numbers)
        return Operation(
            number,
            process,
            connection,
            kind,
            key,
            time.monotonic(),
            value=None if kind is Kind.READ else str(number),
            expected=self._latest[key] if kind is Kind.CAS else None,
        )

    def learn(self, operation: Operation, seen: str | None) -> None:
        value = operation.value if seen is None else seen
        assert value is not None
        self._latest[operation.key] = value


class WrongAnswer(ConnectionError):
    """An answer that no register gives: to another request, or of another form."""


@dataclass(slots=True)
class Work:
    """What all connections share."""

    plan: Plan
    recorder: Recorder
    processes: Iterator[int] = field(default_factory=itertools.count)
    reconnects: int = 0
    #: In the order in which they were met.
    boots: dict[str, None] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    @property
    def report(self) -> Report:
        return Report(self.reconnects, list(self.boots), self.wrong[:SHOWN_WRONG], self.plan.keys)


def request(operation: Operation) -> bytes:
    words = (operation.number, operation.kind, operation.key, operation.expected, operation.value)
    return " ".join(str(word) for word in words if word is not None).encode() + b"\n"


def answer(operation: Operation, line: bytes) -> tuple[str, str | None]:
    """The boot's word, and what was seen if the answer says so; WrongAnswer if it is none to this request."""
    match line.decode(errors="replace").split():
        case [number, boot, "ok"] if number == str(operation.number) and operation.kind is not Kind.READ:
            return boot, None
        case [number, boot, "ok", seen] if number == str(operation.number) and operation.kind is Kind.READ:
            return boot, seen
        case [number, boot, "no", seen] if number == str(operation.number) and operation.kind is Kind.CAS:
            return boot, seen
    raise WrongAnswer(f"{request(operation)!r} was answered {line!r}")


async def keep_busy(connection: int, address: tuple[str, int], pace: Pace, work: Work) -> None:
    """Asks until the plan is at its end; opens the connection again, and counts that, if it breaks."""
    while True:
        process = next(work.processes)
        try:
            async with asyncio.timeout(pace.connect_s):
                reader, writer = await asyncio.open_connection(*address)
        except (OSError, TimeoutError):
            await asyncio.sleep(REOPEN_S)
            continue
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            while (operation := work.plan.next(process, connection)) is not None:
                await _perform(operation, reader, writer, pace, work)
                await asyncio.sleep(pace.think_s)
            return
        except (OSError, EOFError, TimeoutError) as error:
            work.reconnects += 1
            if isinstance(error, WrongAnswer):
                work.wrong.append(str(error))
            await asyncio.sleep(REOPEN_S)
        finally:
            # What was not sent yet must not be sent later than need be: it belongs to a process that is over.
            writer.transport.abort()


async def _perform(
    operation: Operation, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pace: Pace, work: Work
) -> None:
    """However it ends without an answer, the outcome is unknown."""
    work.recorder.invoke(operation)
    why = "the clients ended"
    try:
        writer.write(request(operation))
        async with asyncio.timeout(pace.silence_s):
            line = await reader.readline()
        now = time.monotonic()
        if not line.endswith(b"\n"):
            raise EOFError("the guest closed the connection")
        boot, seen = answer(operation, line)
        why = ""
    except (OSError, EOFError, TimeoutError) as error:
        why = repr(error)
        raise
    finally:
        if why:
            work.recorder.unknown(operation.number, time.monotonic(), why)
    work.recorder.ok(operation.number, now, seen)
    work.boots.setdefault(boot)
    work.plan.learn(operation, seen)


async def run_clients(
    address: tuple[str, int], connections: int, pace: Pace, work: Work, stop: asyncio.Event
) -> Report:
    """Keeps all connections busy until `stop`, reads the keys again, and waits for the last answers; all bounded."""
    flushing = asyncio.create_task(_flush(work.recorder))
    tasks = [asyncio.create_task(keep_busy(number, address, pace, work)) for number in range(connections)]
    await stop.wait()
    work.plan.end()
    finished, unfinished = await asyncio.wait(tasks, timeout=pace.read_again_s)
    if unfinished:
        work.plan.end_at_once()
        finished, unfinished = await asyncio.wait(tasks, timeout=pace.grace_s)
    for task in (*unfinished, flushing):
        task.cancel()
    await asyncio.gather(*unfinished, flushing, return_exceptions=True)
    work.recorder.flush()
    for task in finished:
        task.result()
    return work.report


async def _flush(recorder: Recorder) -> None:
    while True:
        await asyncio.sleep(FLUSH_S)
        recorder.flush()


async def _main(arguments: argparse.Namespace) -> Report:
    stop = asyncio.Event()
    with arguments.history.open("w") as output:
        work = Work(Plan(arguments.seed), Recorder(output))
        clients = asyncio.create_task(run_clients((arguments.address, PORT), arguments.connections, Pace(), work, stop))
        await asyncio.to_thread(sys.stdin.read)
        stop.set()
        return await clients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address")
    parser.add_argument("--history", type=Path, required=True)
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    print(json.dumps(asdict(asyncio.run(_main(parser.parse_args())))))


if __name__ == "__main__":
    main()
