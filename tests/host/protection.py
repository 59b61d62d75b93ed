"""A protected guest: both engines as processes, the test in the place of both agents."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.host.machine import Engine, Qemu


class Protection:
    """The engines of one guest; PROTECTED once it is made."""

    def __init__(self, primary: Qemu, standby: Qemu, *, primary_fault: str = "", backup_fault: str = "",
                 **settings: Any) -> None:
        self.primary_qemu = primary
        self.standby_qemu = standby
        self._engines: list[Engine] = []
        try:
            self.backup = self._start("backup", standby, fault=backup_fault, **settings)
            self.port: int = self.backup.hear("listening")["port"]
            self.primary = self._start("primary", primary, port=self.port, fault=primary_fault, **settings)
            self.primary.hear("protected")
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """Whatever state they are in: the engines go, the primary's guest may speak."""
        for engine in self._engines:
            engine.kill()
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
