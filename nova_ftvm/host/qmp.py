"""The second QMP monitor of a guest: blocking commands for set-up, raw lines for the checkpoint.

Owns the socket and the framing of JSON lines. Knows nothing of checkpoints. Every wait has a deadline.
Why not qemu.qmp here: doc/source/contributor/decisions/qmp-in-the-pause.rst.
"""

import json
import os
import select
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

from nova_ftvm.exception import GuestGone, QemuError

Message = dict[str, Any]

#: What a descriptor is sent with: QMP takes no notice of it.
_BLANK = b" "
#: What ends every command, and what ends it so that QEMU refuses it: no command has such a member.
_END = b"}\n"
_TAKEN_BACK = b',"taken-back":true}\n'
_CHUNK = 1 << 16
_UCRED = struct.Struct("3i")


def encode(command: str, arguments: Message | None = None, ident: str | None = None) -> bytes:
    """One command as a line of the wire."""
    message: Message = {"execute": command}
    if arguments:
        message["arguments"] = arguments
    if ident is not None:
        message["id"] = ident
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


class Monitor:
    """A connection to a monitor's UNIX socket. QEMU serves one client at a time."""

    def __init__(self, path: str, timeout_s: float = 5.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout_s = timeout_s
        self._clock = clock
        self._rest = b""
        self._waiting: list[Message] = []
        #: The command that was prepared last; is all of it but its end with QEMU?
        self._line, self._ident = b"", ""
        self._prepared = False
        #: Ids of commands that were taken back, and not refused yet.
        self._taken_back: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(timeout_s)
            self._socket.connect(path)
            self.pid = _UCRED.unpack(self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))[0]
            self._socket.setblocking(False)
            if "QMP" not in self._next(self._deadline()):
                raise GuestGone(f"{path} is not a QMP monitor")
            self.command("qmp_capabilities")
        except OSError as error:
            self._socket.close()
            raise GuestGone(f"no monitor at {path}: {error}") from error
        except GuestGone:
            self._socket.close()
            raise

    def fileno(self) -> int:
        return self._socket.fileno()

    def command(self, command: str, **arguments: Any) -> Any:
        """Sends one command and waits for its answer; events that come first are kept for `receive`."""
        self.send(encode(command, {key.replace("_", "-"): value for key, value in arguments.items()}, "command"))
        deadline = self._deadline()
        skipped: list[Message] = []
        try:
            while True:
                message = self._next(deadline)
                if message.get("id") != "command":
                    skipped.append(message)
                elif "error" in message:
                    raise QemuError(command, message["error"]["desc"])
                else:
                    return message["return"]
        finally:
            self._waiting = skipped + self._waiting

    def give(self, name: str, descriptor: socket.socket) -> None:
        """QEMU gets a copy of the descriptor, which a later command calls by this name."""
        try:
            socket.send_fds(self._socket, [_BLANK], [descriptor.fileno()])
        except OSError as error:
            raise GuestGone(f"QEMU closed its monitor: {error}") from error
        self.command("getfd", fdname=name)

    def prepare(self, command: str, ident: str, **arguments: Any) -> None:
        """Sends all of a command but its end. Whatever else is sent before `complete` takes it back.

        QEMU reads a monitor byte by byte, some microseconds each: a command that must not be late is sent before
        (doc/source/contributor/decisions/prepared-save.rst).
        """
        self._line, self._ident = encode(command, arguments, ident), ident
        self.send(self._line.removesuffix(_END))
        self._prepared = True

    def complete(self) -> None:
        """Sends the end of the prepared command, or all of it if it was taken back."""
        self._write(_END if self._prepared else self._line)
        self._prepared = False

    def send(self, lines: bytes) -> None:
        """Sends whole lines; they are short, so that the socket's buffer always takes them."""
        if self._prepared:
            self._taken_back.append(self._ident)
            self._prepared = False
            lines = _TAKEN_BACK + lines
        self._write(lines)

    def receive(self) -> list[Message]:
        """All messages that are there now, in order; does not wait."""
        self._fill()
        messages, self._waiting = self._waiting, []
        return messages

    def close(self) -> None:
        self._socket.close()

    def _write(self, lines: bytes) -> None:
        deadline = self._deadline()
        view = memoryview(lines)
        while view:
            try:
                view = view[self._socket.send(view):]
            except BlockingIOError:
                self._wait(select.POLLOUT, deadline)
            except OSError as error:
                raise GuestGone(f"QEMU closed its monitor: {error}") from error

    def _next(self, deadline: float) -> Message:
        while not self._waiting:
            self._wait(select.POLLIN, deadline)
            self._fill()
        return self._waiting.pop(0)

    def _fill(self) -> None:
        while True:
            try:
                chunk = self._socket.recv(_CHUNK)
            except BlockingIOError:
                return
            except OSError as error:
                if self._waiting:
                    return
                raise GuestGone(f"QEMU closed its monitor: {error}") from error
            if not chunk:
                # What it said before is heard first: a SHUTDOWN makes a planned end of this.
                if self._waiting:
                    return
                raise GuestGone("QEMU closed its monitor")
            *lines, self._rest = (self._rest + chunk).split(b"\n")
            self._waiting += filter(self._is_wanted, (json.loads(line) for line in lines if line.strip()))
            if len(chunk) < _CHUNK:
                return

    def _is_wanted(self, message: Message) -> bool:
        """Not so the refusal of a command that was taken back. QEMU answers in order: the first answer is that."""
        if message.get("id") in self._taken_back:
            self._taken_back.remove(message["id"])
            return False
        return True

    def _wait(self, events: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(self._socket, events)
        if not poll.poll(max(0.0, deadline - self._clock()) * 1000):
            raise GuestGone(f"QEMU's monitor gave no answer within {self._timeout_s:g} s")

    def _deadline(self) -> float:
        return self._clock() + self._timeout_s


def pidfd_of(monitor: Monitor) -> int:
    """A descriptor that becomes readable when QEMU ends."""
    try:
        return os.pidfd_open(monitor.pid)
    except ProcessLookupError as error:
        raise GuestGone(f"QEMU {monitor.pid} ended") from error
