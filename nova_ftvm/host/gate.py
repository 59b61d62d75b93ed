"""The FIFO for QEMU's device state: as long as nobody drains it, the guest stays paused.

QEMU cannot finish xen-save-devices-state, so cannot start the guest, before the last byte fits into the pipe.
A pipe of one page is the gate; once RAM is copied it is widened, so that the rest passes in one go.
It must be a named FIFO: QEMU opens the target with O_TRUNC, which fails on a pipe passed by add-fd.

A FIFO without a reader has a trap: to open it for writing waits for one, for ever. An engine that dies between its
command and QEMU's open would leave QEMU, and the guest, waiting there. So each gate has a keeper, a forked process
that does nothing until the engine is gone: then it lets QEMU in, throws away what it writes, and takes the path away,
so that whoever opens it later gets an ordinary file (doc/source/contributor/decisions/gate-keeper.rst). Once QEMU is
let in it also gets back what else the engine changed of it for the pause.
"""

import contextlib
import fcntl
import os
import select
from collections.abc import Callable
from typing import NoReturn

F_SETPIPE_SZ = 1031
_NARROW = 4096
_WIDE = 1 << 20
_CHUNK = 1 << 20
#: The keeper goes when QEMU has said nothing for so long; a save that still goes on then fails, and the guest runs.
_QUIET_MS = 200
_MOST_FDS = 1 << 20


class Gate:
    """When this process dies, its keeper lets QEMU go on."""

    def __init__(self, path: str, owner: tuple[int, int] | None = None,
                 give_back: Callable[[], None] = lambda: None) -> None:
        """owner: user and group of QEMU. give_back: what the keeper does as soon as QEMU is let in."""
        if os.path.lexists(path):
            os.unlink(path)
        os.mkfifo(path, 0o600)
        if owner is not None:
            os.chown(path, *owner)
        self.path = path
        # Both ends are ours, so it never shows end-of-file.
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        engine_lives, self._lives = os.pipe()
        self._keeper = os.fork()
        if self._keeper == 0:
            _keep(path, os.fstat(self._fd).st_ino, engine_lives, give_back)
        os.close(engine_lives)
        self.narrow()

    def fileno(self) -> int:
        return self._fd

    def narrow(self) -> None:
        """Before each checkpoint, the FIFO empty: QEMU waits here until it is widened, once RAM is copied."""
        fcntl.fcntl(self._fd, F_SETPIPE_SZ, _NARROW)

    def widen(self) -> None:
        """The rest passes in one go."""
        fcntl.fcntl(self._fd, F_SETPIPE_SZ, _WIDE)

    def drain(self) -> bytes:
        """What is in the gate now; b'' when nothing is."""
        parts: list[bytes] = []
        while True:
            try:
                part = os.read(self._fd, _CHUNK)
            except BlockingIOError:
                return b"".join(parts)
            parts.append(part)
            if len(part) < _CHUNK:
                return b"".join(parts)

    def close(self) -> None:
        """The keeper does it, as if this process had died; until it is done QEMU has a reader here too."""
        os.close(self._lives)
        os.waitpid(self._keeper, 0)
        os.close(self._fd)


def _keep(path: str, inode: int, engine_lives: int, give_back: Callable[[], None]) -> NoReturn:
    """The keeper's whole life, in a process of its own that holds nothing else of the engine's."""
    try:
        os.closerange(0, engine_lives)
        os.closerange(engine_lives + 1, _MOST_FDS)
        os.read(engine_lives, 1)
        entrance = _let_in(path, inode)
        give_back()
        if entrance is not None:
            waiting = select.poll()
            waiting.register(entrance, select.POLLIN)
            while waiting.poll(_QUIET_MS) and os.read(entrance, _CHUNK):
                pass
    finally:
        os._exit(0)


def _let_in(path: str, inode: int) -> int | None:
    """A reader, unless the path is somebody else's by now."""
    with contextlib.suppress(FileNotFoundError):
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        if os.fstat(reader).st_ino == inode:
            os.unlink(path)
            return reader
    return None
