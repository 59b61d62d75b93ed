"""Threads that do not die, and a queue in which a key waits only once. The only `except Exception` of the manager."""

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from oslo_log import log

LOG = log.getLogger(__name__)

Key = TypeVar("Key", bound=Hashable)

#: After a failure that nobody expected.
_BACK_OFF_S = 2.0


class Loop:
    """Calls `body` in a thread of its own until it is stopped. body returns within about a second, or is woken."""

    def __init__(self, name: str, body: Callable[[], None]) -> None:
        self._name = name
        self._body = body
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._body()
            except Exception:
                LOG.exception("The loop %s failed and goes on", self._name)
                self._stopping.wait(_BACK_OFF_S)


class Precedence:
    """Urgent work goes first: entered by whoever does some, waited for by whoever can wait."""

    def __init__(self) -> None:
        self._urgent = 0
        self._changed = threading.Condition()

    def __enter__(self) -> None:
        with self._changed:
            self._urgent += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._urgent -= 1
            self._changed.notify_all()

    def give_way(self, limit_s: float) -> None:
        """Returns when nothing is urgent, and after limit_s at the latest."""
        with self._changed:
            self._changed.wait_for(lambda: not self._urgent, limit_s)


class Queue(Generic[Key]):
    """Keys and when they are due. A key is with one taker at a time; asked for meanwhile, it comes again afterwards."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._heap: list[tuple[float, int, Key]] = []
        self._due: dict[Key, float] = {}
        self._taken: set[Key] = set()
        self._order = itertools.count()
        self._changed = threading.Condition()

    def put(self, key: Key, delay_s: float = 0.0) -> None:
        """An earlier due time wins over a later one."""
        due = self._clock() + delay_s
        with self._changed:
            if key in self._due and self._due[key] <= due:
                return
            self._due[key] = due
            heapq.heappush(self._heap, (due, next(self._order), key))
            self._changed.notify_all()

    def take(self, wait_s: float) -> Key | None:
        """The next due key, or None after wait_s. Whoever takes it calls done()."""
        deadline = time.monotonic() + wait_s
        with self._changed:
            while True:
                key, next_due_s = self._next()
                if key is not None:
                    self._taken.add(key)
                    del self._due[key]
                    return key
                left = deadline - time.monotonic()
                if left <= 0:
                    return None
                self._changed.wait(min(left, next_due_s))

    def take_all(self, wait_s: float) -> list[Key]:
        """All due keys, after waiting for the first one as take does. Whoever takes them calls done() for each."""
        keys = []
        key = self.take(wait_s)
        while key is not None:
            keys.append(key)
            key = self.take(0.0)
        return keys

    def done(self, key: Key) -> None:
        with self._changed:
            self._taken.discard(key)
            self._changed.notify_all()

    def _next(self) -> tuple[Key | None, float]:
        """A due key that nobody has; or how long until there may be one."""
        now = self._clock()
        held = []
        found = None
        next_due_s = 1.0
        while self._heap:
            due, order, key = self._heap[0]
            if due > now:
                next_due_s = min(next_due_s, max(due - now, 0.001))
                break
            heapq.heappop(self._heap)
            if self._due.get(key) != due:
                continue  # replaced by an earlier entry
            if key in self._taken:
                held.append((due, order, key))
                continue
            found = key
            break
        for entry in held:
            heapq.heappush(self._heap, entry)
        return found, next_due_s
