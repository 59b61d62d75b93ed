"""A protected guest: both engines as processes, the test in the place of both agents, a link that can be spoilt."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.host.machine import Engine, Qemu

_CHUNK = 1 << 14


class Line:
    """What the synchronisation connection goes through: it can stall, and be slow. Holds little itself."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _CHUNK)
        self.port: int = self._listener.getsockname()[1]
        self._open = threading.Event()
        self._open.set()
        #: Bytes a second towards the backup; 0 for no limit.
        self.rate = 0
        self._ends: list[socket.socket] = []

    def lead_to(self, port: int) -> None:
        """One connection to the port goes through here."""
        threading.Thread(target=self._serve, args=(port,), daemon=True).start()

    def stall(self) -> None:
        self._open.clear()

    def go_on(self) -> None:
        self._open.set()

    def close(self) -> None:
        self._open.set()
        self._listener.close()
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _serve(self, port: int) -> None:
        with contextlib.suppress(OSError):
            primary, _ = self._listener.accept()
            backup = socket.create_connection(("127.0.0.1", port))
            self._ends = [primary, backup]
            for end in self._ends:
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._pump, args=(backup, primary, False), daemon=True).start()
            self._pump(primary, backup, True)

    def _pump(self, source: socket.socket, target: socket.socket, limited: bool) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(_CHUNK):
                self._open.wait()
                if limited and self.rate:
                    time.sleep(len(piece) / self.rate)
                target.sendall(piece)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class Protection:
    """The engines of one guest; PROTECTED once it is made, or as far as `until` says; '' for no waiting."""

    def __init__(self, primary: Qemu, standby: Qemu, *, primary_fault: str = "", backup_fault: str = "",
                 line: Line | None = None, until: str = "protected", **settings: Any) -> None:
        self.primary_qemu = primary
        self.standby_qemu = standby
        self._engines: list[Engine] = []
        try:
            self.backup = self._start("backup", standby, fault=backup_fault, **settings)
            self.port: int = self.backup.hear("listening")["port"]
            if line:
                line.lead_to(self.port)
            self.primary = self._start("primary", primary, port=line.port if line else self.port, fault=primary_fault,
                                       **settings)
            if until:
                self.primary.hear(until)
        except BaseException:
            self.end()
            raise

    def end_engines(self) -> None:
        for engine in self._engines:
            engine.kill()

    def end(self) -> None:
        """Whatever state they are in: the engines go, the primary's guest may speak."""
        self.end_engines()
        self.standby_qemu.kill()
        if self.primary_qemu.process.poll() is None:
            self.primary_qemu.unbuffer()

    def _start(self, role: str, qemu: Qemu, **settings: Any) -> Engine:
        self._engines.append(Engine(role, qemu.folder, **settings))
        return self._engines[-1]


@contextmanager
def protected(primary: Qemu, standby: Qemu, **settings: Any) -> Iterator[Protection]:
    protection = Protection(primary, standby, **settings)
    try:
        yield protection
    finally:
        protection.end()
