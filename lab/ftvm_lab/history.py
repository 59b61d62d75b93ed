"""What the clients of a register did and saw: in memory, and as lines of JSON on disk.

A line is written when an operation is invoked and when it ends, so that a history is of use however its writer
ended. An operation without an answer is unknown: it may have taken effect, take effect at any later time, or never.
Times are seconds on CLOCK_MONOTONIC, one clock for all of the machine's processes. Nothing here judges.
"""

import json
import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import IO, Any

#: The value of a key that nobody has written.
NOTHING = "-"


class Kind(StrEnum):
    READ = "read"
    WRITE = "write"
    CAS = "cas"


@dataclass(frozen=True, slots=True)
class Operation:
    """One request and what came of it.

    `value`: what a write or a cas puts there; `expected`: what a cas wants to find there. `completed_s` is None if
    the outcome is unknown. `seen`: what a read, or a cas that found something else, was answered; None otherwise.
    """

    number: int
    process: int
    connection: int
    kind: Kind
    key: str
    invoked_s: float
    value: str | None = None
    expected: str | None = None
    completed_s: float | None = None
    seen: str | None = None

    @property
    def is_known(self) -> bool:
        return self.completed_s is not None

    def __str__(self) -> str:
        request = " ".join(word for word in (self.kind, self.key, self.expected, self.value) if word is not None)
        outcome = "unknown" if not self.is_known else "ok" if self.seen is None else f"saw {self.seen}"
        end = "..." if self.completed_s is None else f"{self.completed_s:.6f}"
        return f"[{self.invoked_s:.6f}, {end}] process {self.process}: {request}: {outcome}"


@dataclass(frozen=True, slots=True)
class Wait:
    """From a connection's first request that had no reply until its next reply."""

    connection: int
    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s


@dataclass(slots=True)
class History:
    """The operations by their numbers, and how long each connection waited. Grows line by line."""

    operations: dict[int, Operation] = field(default_factory=dict)
    #: In the order of their ends.
    waits: list[Wait] = field(default_factory=list)
    #: Number of an operation without an answer -> when its client gave it up; infinite while it waits.
    unknown: dict[int, float] = field(default_factory=dict)
    #: Connection -> since when it waits.
    _waiting: dict[int, float] = field(default_factory=dict)
    _connections: set[int] = field(default_factory=set)
    _last_s: float = 0.0

    def add(self, line: str) -> None:
        record = json.loads(line)
        self._last_s = record["at"]
        if "invoke" in record:
            self._invoke(record)
        elif "ok" in record:
            self._complete(record)
        else:
            self.unknown[record["unknown"]] = record["at"]

    def _invoke(self, record: dict[str, Any]) -> None:
        operation = Operation(
            record["invoke"],
            record["process"],
            record["connection"],
            Kind(record["kind"]),
            record["key"],
            record["at"],
            record.get("value"),
            record.get("expected"),
        )
        self.operations[operation.number] = operation
        self.unknown[operation.number] = math.inf
        self._connections.add(operation.connection)
        self._waiting.setdefault(operation.connection, operation.invoked_s)

    def _complete(self, record: dict[str, Any]) -> None:
        known = completed(self.operations[record["ok"]], record["at"], record.get("seen"))
        self.operations[known.number] = known
        del self.unknown[known.number]
        self.waits.append(Wait(known.connection, self._waiting.pop(known.connection), record["at"]))

    def unknown_within(self, start_s: float, end_s: float) -> list[Operation]:
        """Those without an answer whose client waited for it at some moment of this window."""
        given_up = ((self.operations[number], at_s) for number, at_s in self.unknown.items())
        return [operation for operation, at_s in given_up if operation.invoked_s < end_s and at_s > start_s]

    def longest_wait(self, start_s: float, end_s: float) -> Wait | None:
        """The longest of the waits that reach into this window; None if nobody waited.

        One that is still open lasts until the end of the window, or of the history.
        """
        now_s = max(self._last_s, end_s)
        still = (Wait(connection, at_s, now_s) for connection, at_s in self._waiting.items() if at_s < end_s)
        return _longest((*still, *self._waits_within(start_s, end_s)))

    def longest_whole_wait(self, start_s: float, end_s: float) -> Wait | None:
        """The longest of those that also ended in this window: what came after it has no part in them."""
        return _longest(wait for wait in self._waits_within(start_s, end_s) if wait.end_s <= end_s)

    def _waits_within(self, start_s: float, end_s: float) -> Iterator[Wait]:
        first = bisect_right(self.waits, start_s, key=lambda wait: wait.end_s)
        later: set[int] = set()
        for place in range(first, len(self.waits)):
            wait = self.waits[place]
            if wait.start_s < end_s:
                yield wait
            else:
                later.add(wait.connection)
                if later == self._connections:
                    return


def _longest(waits: Iterable[Wait]) -> Wait | None:
    return max(waits, key=lambda wait: wait.seconds, default=None)


def completed(operation: Operation, at_s: float | None, seen: str | None) -> Operation:
    """at_s None: nobody knows what came of it."""
    return replace(operation, completed_s=at_s, seen=seen)


class Recorder:
    """Writes the lines. Call flush() often enough for those who follow the file."""

    def __init__(self, output: IO[str]) -> None:
        self._output = output
        self.flush = output.flush

    def invoke(self, operation: Operation) -> None:
        record = {
            "invoke": operation.number,
            "at": operation.invoked_s,
            "process": operation.process,
            "connection": operation.connection,
            "kind": operation.kind,
            "key": operation.key,
            "value": operation.value,
            "expected": operation.expected,
        }
        self._write({name: value for name, value in record.items() if value is not None})

    def ok(self, number: int, at_s: float, seen: str | None) -> None:
        self._write({"ok": number, "at": at_s} | ({} if seen is None else {"seen": seen}))

    def unknown(self, number: int, at_s: float, why: str) -> None:
        self._write({"unknown": number, "at": at_s, "why": why})

    def _write(self, record: dict[str, Any]) -> None:
        self._output.write(json.dumps(record, separators=(",", ":")) + "\n")


class Follower:
    """Reads a history while it is written: each call takes the whole lines that came since the last one."""

    def __init__(self, path: Path) -> None:
        self.history = History()
        self._path = path
        self._offset = 0

    def catch_up(self) -> History:
        if not self._path.exists():
            return self.history
        with self._path.open("rb") as source:
            source.seek(self._offset)
            for line in source:
                if not line.endswith(b"\n"):
                    break
                self.history.add(line.decode())
                self._offset += len(line)
        return self.history


def load(path: Path) -> History:
    """A whole history; a last line that was cut short is left out."""
    return Follower(path).catch_up()


def save(path: Path, operations: Sequence[Operation]) -> None:
    """The operations as a client would have written them."""
    with path.open("w") as output:
        recorder = Recorder(output)
        for at_s, is_end, operation in _moments(operations):
            if is_end:
                recorder.ok(operation.number, at_s, operation.seen)
            else:
                recorder.invoke(operation)


def _moments(operations: Iterable[Operation]) -> Iterator[tuple[float, bool, Operation]]:
    moments = [(operation.invoked_s, False, operation) for operation in operations]
    moments += [(one.completed_s, True, one) for one in operations if one.completed_s is not None]
    yield from sorted(moments, key=lambda moment: (moment[0], moment[1], moment[2].number))
