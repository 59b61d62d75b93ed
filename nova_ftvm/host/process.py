"""The agent's hold on one engine process: start it, or find one that outlived the last agent; talk to it; end it.

Owns the control socket's client side and one reader thread an engine. Decides nothing: reports go to a callback.
"""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from nova_ftvm.exception import FtvmError
from nova_ftvm.host.note import Note

LOG = logging.getLogger(__name__)

Report = dict[str, Any]

_CONNECT_PAUSE_S = 0.02
_KILL_WAIT_S = 5.0
#: An engine that accepts but does not say who it is hangs.
_GREETING_S = 5.0


class EngineLost(FtvmError):
    """The engine's process did not start, or ended."""


class EngineProcess:
    """One engine. `on_report(engine, report)` is called in the reader thread; {"event": "gone"} is the last one."""

    def __init__(self, control_path: str, timeout_s: float) -> None:
        """Connects to an engine that listens at `control_path`, or will do so within the time."""
        self._socket = _connect(control_path, timeout_s)
        # SO_PEERCRED names the process that called listen(): the engine.
        credentials = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        self.pid = int.from_bytes(credentials[:4], sys.byteorder)
        self._gone = threading.Event()
        self._lines = self._socket.makefile("r", encoding="utf-8")
        self._socket.settimeout(max(timeout_s, _GREETING_S))
        try:
            identity = json.loads(self._lines.readline() or "{}")
        except TimeoutError as error:
            # Nothing that it holds is lost: its guest runs on, and its backup has asked for the pair long since.
            os.kill(self.pid, signal.SIGKILL)
            raise EngineLost(f"the engine at {control_path} hung, it was killed") from error
        except (OSError, ValueError):
            identity = {}
        self._socket.settimeout(None)
        if identity.get("event") != "hello":
            raise EngineLost(f"no engine answers at {control_path}")
        self.role: str = identity["role"]
        self.pair_id: str = identity["pair_id"]
        self.generation: int = identity["generation"]
        self.instance_id: str = identity["instance_id"]

    def listen(self, on_report: Callable[["EngineProcess", Report], None]) -> None:
        """Starts the reader thread."""
        threading.Thread(target=self._read, args=(on_report,), name=f"engine-{self.pair_id}", daemon=True).start()

    def order(self, what: str, **facts: Any) -> None:
        """Tells the engine; one that is gone hears nothing, and its end is reported anyway."""
        try:
            self._socket.sendall(json.dumps({"do": what, **facts}).encode() + b"\n")
        except OSError:
            LOG.debug("engine of pair %s hears no more", self.pair_id)

    def wait(self, timeout_s: float) -> bool:
        """True once the engine has ended."""
        return self._gone.wait(timeout_s)

    def kill(self) -> None:
        """Ends the process, whatever it does. Its guest runs on by itself."""
        try:
            os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self._gone.wait(_KILL_WAIT_S)

    def _read(self, on_report: Callable[["EngineProcess", Report], None]) -> None:
        try:
            for line in self._lines:
                on_report(self, json.loads(line))
        except OSError as error:
            LOG.debug("engine of pair %s: %s", self.pair_id, error)
        self._gone.set()
        self._socket.close()
        on_report(self, {"event": "gone"})


class LostEngine:
    """What stands for a primary's engine that died while no agent was there: all that it says is that it is gone."""

    def __init__(self, note: Note) -> None:
        self.role = "primary"
        self.pair_id = note.pair_id
        self.generation = note.generation
        self.instance_id = note.instance_id

    def listen(self, on_report: Callable[["LostEngine", Report], None]) -> None:
        # As from a reader's thread: the agent may take its time, until the manager answers.
        threading.Thread(target=on_report, args=(self, {"event": "gone"}), name=f"engine-{self.pair_id}",
                         daemon=True).start()

    def order(self, what: str, **facts: Any) -> None:
        """It hears nothing."""

    def wait(self, timeout_s: float) -> bool:
        return True

    def kill(self) -> None:
        """It is dead."""


def start(order: dict[str, Any], log_path: str, control_path: str, timeout_s: float) -> EngineProcess:
    """Starts an engine in a session of its own, so that it outlives this agent. Raises EngineLost."""
    if os.path.lexists(control_path):
        os.unlink(control_path)
    with open(log_path, "ab") as log:
        process = subprocess.Popen([sys.executable, "-m", "nova_ftvm.cmd.engine"], stdin=subprocess.PIPE, stdout=log,
                                   stderr=log, start_new_session=True)
    assert process.stdin is not None
    process.stdin.write(json.dumps(order).encode() + b"\n")
    process.stdin.close()
    # A child's end must be collected, or it stays as a zombie and its socket's end is all that tells.
    threading.Thread(target=process.wait, name=f"reaper-{process.pid}", daemon=True).start()
    try:
        return EngineProcess(control_path, timeout_s)
    except EngineLost:
        process.kill()
        raise


def _connect(path: str, timeout_s: float) -> socket.socket:
    deadline = time.monotonic() + timeout_s
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(path)
            return connection
        except OSError as error:
            connection.close()
            if time.monotonic() > deadline:
                raise EngineLost(f"no engine listens at {path}: {error}") from error
            time.sleep(_CONNECT_PAUSE_S)
