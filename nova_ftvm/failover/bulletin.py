"""Hands notifications to the broker in a thread of its own, so that whoever posts one never waits.

A broker that is away holds up that thread only. What is posted meanwhile is kept, up to a bound; then the oldest goes,
as the newest tells more. Lossy like all notifications: the rows and ft:state are the truth. Built by cmd/manager.py.
"""

import collections
import threading
from collections.abc import Callable
from typing import Any

from oslo_log import log

from nova_ftvm.failover.loops import Loop

LOG = log.getLogger(__name__)

#: Priority, event type, payload.
Notice = tuple[str, str, dict[str, Any]]

_IDLE_S = 0.5


class Bulletin:
    """A bounded queue before a sender that may block and may raise."""

    def __init__(self, send: Callable[[str, str, dict[str, Any]], None], room: int = 1000) -> None:
        self._send = send
        self._waiting: collections.deque[Notice] = collections.deque()
        self._room = room
        self._changed = threading.Condition()
        self._loop = Loop("notifications", self._send_next)

    def start(self) -> None:
        self._loop.start()

    def post(self, priority: str, event_type: str, payload: dict[str, Any]) -> None:
        with self._changed:
            if len(self._waiting) >= self._room:
                LOG.warning("The notification %s is dropped: the broker takes none", self._waiting.popleft()[1])
            self._waiting.append((priority, event_type, payload))
            self._changed.notify()

    def _send_next(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting, _IDLE_S)
            if not self._waiting:
                return
            notice = self._waiting.popleft()
        self._send(*notice)
