"""The agent's connection to one engine: a UNIX socket beside the guest's monitor, JSON lines both ways.

The engine listens, so that it outlives its agent: a restarted agent connects again and is told where things stand.
One agent at a time; the newest wins.
"""

import json
import os
import select
import socket
import time
from typing import Any

_CHUNK = 1 << 16
_MOST_LINE_BYTES = 1 << 16


class ControlServer:
    """The engine's side. `fileno` is an epoll of the listener and the agent, so that one descriptor is waited for."""

    def __init__(self, path: str, identity: dict[str, Any]) -> None:
        """`identity` is told to every agent that connects, with the last state reported."""
        if os.path.lexists(path):
            os.unlink(path)
        self._path = path
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        os.chmod(path, 0o600)
        self._listener.listen(1)
        self._listener.setblocking(False)
        self._epoll = select.epoll()
        self._epoll.register(self._listener, select.EPOLLIN)
        self._agent: socket.socket | None = None
        self._rest = b""
        self._identity = identity
        self._last: dict[str, Any] = {}

    def fileno(self) -> int:
        return self._epoll.fileno()

    def orders(self) -> list[dict[str, Any]]:
        """What the agent asked for since the last call."""
        self._accept()
        return self._read()

    def report(self, event: str, **facts: Any) -> None:
        """Tells the agent, if there is one. The last report is told again to the next agent."""
        self._last = {"event": event, **facts}
        self._send(self._last)

    def tell(self, event: str, **facts: Any) -> None:
        """As `report`, of something that is no state: it is not told again."""
        self._send({"event": event, **facts})

    def farewell(self, timeout_s: float) -> None:
        """Waits until an agent has seen the last report: a promotion must not be forgotten with a restarted agent."""
        deadline = time.monotonic() + timeout_s
        while (left := deadline - time.monotonic()) > 0:
            self._epoll.poll(left)
            if any(order["do"] == "seen" for order in self.orders()):
                return

    def close(self) -> None:
        self._epoll.close()
        self._listener.close()
        if self._agent:
            self._agent.close()
        if os.path.lexists(self._path):
            os.unlink(self._path)

    def _accept(self) -> None:
        try:
            agent, _ = self._listener.accept()
        except BlockingIOError:
            return
        self._hang_up()
        agent.setblocking(False)
        self._agent = agent
        self._epoll.register(agent, select.EPOLLIN)
        self._send({"event": "hello", **self._identity})
        if self._last:
            self._send(self._last)

    def _read(self) -> list[dict[str, Any]]:
        if self._agent is None:
            return []
        try:
            received = self._agent.recv(_CHUNK)
        except BlockingIOError:
            return []
        except OSError:
            received = b""
        if not received or len(self._rest) > _MOST_LINE_BYTES:
            self._hang_up()
            return []
        *lines, self._rest = (self._rest + received).split(b"\n")
        return [json.loads(line) for line in lines]

    def _send(self, message: dict[str, Any]) -> None:
        if self._agent is None:
            return
        try:
            self._agent.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            # An agent that does not read is as good as none; it will come again.
            self._hang_up()

    def _hang_up(self) -> None:
        if self._agent is not None:
            self._epoll.unregister(self._agent)
            self._agent.close()
            self._agent = None
            self._rest = b""
