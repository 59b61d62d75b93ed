"""The FIFO that QEMU writes its device state into: as long as nobody drains it, the guest stays paused.

QEMU cannot finish xen-save-devices-state, so cannot start the guest, before the last byte fits into the pipe.
A pipe of one page is the gate; once RAM is copied it is widened, so that the rest passes in one go.
It must be a named FIFO: QEMU opens the target with O_TRUNC, which fails on a pipe passed by add-fd.
"""

import fcntl
import os

F_SETPIPE_SZ = 1031
_NARROW = 4096
_WIDE = 1 << 20
_CHUNK = 1 << 20


class Gate:
    """Both ends are ours, so the FIFO never shows end-of-file. When this process dies it closes: QEMU's save fails."""

    def __init__(self, path: str, owner: tuple[int, int] | None = None) -> None:
        if os.path.lexists(path):
            os.unlink(path)
        os.mkfifo(path, 0o600)
        if owner is not None:
            os.chown(path, *owner)
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self.narrow()

    def fileno(self) -> int:
        return self._fd

    def narrow(self) -> None:
        """Before each checkpoint, the FIFO empty."""
        fcntl.fcntl(self._fd, F_SETPIPE_SZ, _NARROW)

    def widen(self) -> None:
        """Once the guest's RAM is copied."""
        fcntl.fcntl(self._fd, F_SETPIPE_SZ, _WIDE)

    def drain(self) -> bytes:
        """What is in the FIFO now; b'' when nothing is."""
        parts: list[bytes] = []
        while True:
            try:
                part = os.read(self._fd, _CHUNK)
            except BlockingIOError:
                return b"".join(parts)
            parts.append(part)

    def close(self) -> None:
        os.close(self._fd)
        if os.path.lexists(self.path):
            os.unlink(self.path)
