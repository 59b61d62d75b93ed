"""The manager's threads: the reconcile loop and the pairs' workers. Built by cmd/manager.py."""

import time

from oslo_log import log

from nova_ftvm.exception import FtvmError
from nova_ftvm.failover.loops import Loop, Queue
from nova_ftvm.failover.manager import Manager
from nova_ftvm.failover.settings import Settings
from nova_ftvm.types import PairId

LOG = log.getLogger(__name__)

#: Notifications of one server that come in a burst are looked at once.
_BURST_S = 0.2
#: How soon a thread notices that it is to stop.
_IDLE_S = 0.5
#: Guests that wait for the arbiter's answer come before all slow work; but that goes on, however many there are.
_GIVE_WAY_S = 1.0


class Service:
    """Runs a Manager until it is stopped."""

    def __init__(self, manager: Manager, queue: Queue[PairId], settings: Settings, workers: int) -> None:
        self._manager = manager
        self._queue = queue
        self._settings = settings
        self._named: Queue[str] = Queue()
        self._next_pass = 0.0
        self._loops = [Loop("reconcile", self._reconcile),
                       *(Loop(f"worker-{number}", self._work) for number in range(workers))]

    def start(self) -> None:
        for loop in self._loops:
            loop.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Ends the threads. Work that does not end in time is left: its row says what is still to be done."""
        for loop in self._loops:
            loop.stop()
        deadline = time.monotonic() + timeout_s
        for loop in self._loops:
            loop.join(max(0.0, deadline - time.monotonic()))

    def wake(self, server_id: str) -> None:
        """A notification named this server."""
        self._named.put(server_id, _BURST_S)

    def _reconcile(self) -> None:
        try:
            if time.monotonic() >= self._next_pass:
                self._next_pass = time.monotonic() + self._settings.reconcile_interval_s
                self._manager.arbiter.precedence.give_way(_GIVE_WAY_S)
                self._manager.reconciler.all()
            # Together: each look reads what all hosts have reported.
            named = self._named.take_all(min(_IDLE_S, max(0.0, self._next_pass - time.monotonic())))
            for server_id in named:
                self._named.done(server_id)
            if named:
                self._manager.arbiter.precedence.give_way(_GIVE_WAY_S)
                self._manager.reconciler.some(named)
        except FtvmError as error:
            LOG.warning("Reconciling is put off: %s", error)

    def _work(self) -> None:
        pair_id = self._queue.take(_IDLE_S)
        if pair_id is None:
            return
        self._manager.arbiter.precedence.give_way(_GIVE_WAY_S)
        again: float | None = self._settings.retry_s
        try:
            again = self._manager.follow(pair_id)
        except FtvmError as error:
            LOG.warning("Pair %s is put off: %s", pair_id, error)
        finally:
            self._queue.done(pair_id)
            if again is not None:
                self._queue.put(pair_id, again)
