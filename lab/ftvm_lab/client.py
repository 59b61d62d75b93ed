"""A client of the demo guest: several connections that ask without pause, and check every reply.

Run as `python -m ftvm_lab.client ADDRESS`, inside the client namespace. Lines
`mark SECONDS` on standard input give it a moment (CLOCK_MONOTONIC) to measure
from; it ends on SIGTERM or when standard input closes, and prints its report as JSON.
"""

import argparse
import asyncio
import json
import random
import signal
import socket
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field

from ftvm_lab.figures import quantile
from ftvm_lab.session import Session, Verdict

PORT = 7000
REOPEN_S = 0.1


@dataclass(frozen=True, slots=True)
class Pace:
    """Times of the client, in seconds."""

    think_s: float = 0.005
    #: A connection that is silent for so long is given up, and counted.
    silence_s: float = 30.0
    #: At the end, the time that outstanding replies are waited for.
    grace_s: float = 10.0


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request and when its reply came, on CLOCK_MONOTONIC."""

    sent_s: float
    received_s: float


@dataclass(slots=True)
class Record:
    """What one connection saw. Every request is answered, lost, or still waiting."""

    exchanges: list[Exchange] = field(default_factory=list)
    waiting_since: float | None = None
    lost: int = 0
    wrong: int = 0
    reconnects: int = 0
    longest_wait_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Report:
    """The figures of a run. `first_reply_ms`: the end of the longest silence of all
    connections together after the mark, counted from the mark; None without a mark."""

    connections: int
    requests: int
    lost: int
    wrong: int
    reconnects: int
    longest_gap_ms: float
    rtt_ms_p50: float
    rtt_ms_p99: float
    first_reply_ms: float | None


async def converse(address: tuple[str, int], pace: Pace, record: Record, stop: asyncio.Event) -> None:
    """Keeps one connection busy until `stop`; opens it again, and counts that, if it breaks."""
    while not stop.is_set():
        try:
            await _use_connection(address, pace, record, stop)
        except (OSError, EOFError, TimeoutError):
            give_up(record)
            record.reconnects += 1
            await asyncio.sleep(REOPEN_S)


async def _use_connection(address: tuple[str, int], pace: Pace, record: Record, stop: asyncio.Event) -> None:
    reader, writer = await asyncio.open_connection(*address)
    writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        await _exchange_until(reader, writer, pace, record, stop)
    finally:
        writer.close()


async def _exchange_until(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    pace: Pace,
    record: Record,
    stop: asyncio.Event,
) -> None:
    session = Session()
    while not stop.is_set():
        record.waiting_since = time.monotonic()
        writer.write(session.ask(random.getrandbits(31)))
        async with asyncio.timeout(pace.silence_s):
            await _await_reply(reader, session, record)
        now = time.monotonic()
        record.exchanges.append(Exchange(record.waiting_since, now))
        record.longest_wait_s = max(record.longest_wait_s, now - record.waiting_since)
        record.waiting_since = None
        await asyncio.sleep(pace.think_s)


async def _await_reply(reader: asyncio.StreamReader, session: Session, record: Record) -> None:
    """Returns when the outstanding request is answered, rightly or not."""
    verdict = Verdict.WRONG_REQUEST
    while verdict is Verdict.WRONG_REQUEST:
        line = await reader.readline()
        if not line.endswith(b"\n"):
            raise EOFError("the guest closed the connection")
        verdict = session.judge(line)
        record.wrong += verdict is not Verdict.RIGHT


def give_up(record: Record) -> None:
    """Counts the outstanding request as lost."""
    if record.waiting_since is not None:
        record.lost += 1
        waited_s = time.monotonic() - record.waiting_since
        record.longest_wait_s = max(record.longest_wait_s, waited_s)
        record.waiting_since = None


async def run_client(address: tuple[str, int], connections: int, pace: Pace, stop: asyncio.Event) -> list[Record]:
    """Runs all connections until `stop`, and the grace for the last replies."""
    records = [Record() for _ in range(connections)]
    tasks = [asyncio.create_task(converse(address, pace, record, stop)) for record in records]
    await stop.wait()
    answered, unanswered = await asyncio.wait(tasks, timeout=pace.grace_s)
    for task in answered:
        task.result()
    for task in unanswered:
        task.cancel()
    await asyncio.gather(*unanswered, return_exceptions=True)
    for record in records:
        give_up(record)
    return records


def summarize(records: Sequence[Record], mark_s: float | None = None) -> Report:
    waits_s = [exchange.received_s - exchange.sent_s for record in records for exchange in record.exchanges]
    return Report(
        connections=len(records),
        requests=len(waits_s) + sum(record.lost for record in records),
        lost=sum(record.lost for record in records),
        wrong=sum(record.wrong for record in records),
        reconnects=sum(record.reconnects for record in records),
        longest_gap_ms=_ms(max((record.longest_wait_s for record in records), default=0.0)),
        rtt_ms_p50=_ms(quantile(waits_s, 0.5)),
        rtt_ms_p99=_ms(quantile(waits_s, 0.99)),
        first_reply_ms=None if mark_s is None else _first_reply_ms(records, mark_s),
    )


def _first_reply_ms(records: Iterable[Record], mark_s: float) -> float | None:
    replies_s = sorted(
        exchange.received_s for record in records for exchange in record.exchanges if exchange.received_s > mark_s
    )
    silences = zip([mark_s, *replies_s], replies_s, strict=False)
    longest = max(silences, key=lambda silence: silence[1] - silence[0], default=None)
    return None if longest is None else _ms(longest[1] - mark_s)


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)


async def _serve_standard_input(stop: asyncio.Event) -> float | None:
    """Reads lines until the end of the input; the last mark."""
    mark: float | None = None
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        if line.startswith(b"mark "):
            mark = float(line.split()[1])
    stop.set()
    return mark


async def _main(arguments: argparse.Namespace) -> Report:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    marks = asyncio.create_task(_serve_standard_input(stop))
    records = await run_client((arguments.address, PORT), arguments.connections, Pace(), stop)
    mark = marks.result() if marks.done() else None
    return summarize(records, mark)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("--connections", type=int, default=8)
    print(json.dumps(asdict(asyncio.run(_main(parser.parse_args())))))


if __name__ == "__main__":
    main()
