"""Writes and reads the blocks of a guest's disks from outside the cloud. The guest's half is guest_root/blocks."""

import hashlib
import sys
from dataclasses import dataclass

from ftvm_lab.command import LabError, run
from ftvm_lab.traffic import IN_CLIENT

PORT = 7001
TIMEOUT_S = 180
_ASK = (
    "import socket, sys\n"
    "connection = socket.create_connection((sys.argv[1], int(sys.argv[2])), 10)\n"
    "connection.settimeout(None)\n"
    "connection.sendall((sys.argv[3] + '\\n').encode())\n"
    "print(connection.makefile().read(), end='')\n"
)


@dataclass(frozen=True, slots=True)
class Extent:
    """A part of a disk; in KiB."""

    disk: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Blocks:
    """The disks of the guest at that address."""

    address: str

    def fill(self, extent: Extent, word: str) -> None:
        """Writes lines of the word; the disk has them when it returns."""
        if word.split() != [word]:
            raise ValueError(f"not one word: {word!r}")
        self._ask(f"fill {extent.disk} {extent.offset} {extent.size} {word}")

    def sum(self, extent: Extent) -> str:
        """The SHA-256 of what the disk holds, not the guest's memory."""
        return self._ask(f"sum {extent.disk} {extent.offset} {extent.size}").split()[0]

    def _ask(self, request: str) -> str:
        argv = [*IN_CLIENT, sys.executable, "-c", _ASK, self.address, str(PORT), request]
        answer = run(argv, timeout_s=TIMEOUT_S)
        if not answer.endswith("done\n"):
            raise LabError(f"the guest at {self.address} did not do it: {request}")
        return answer


def sum_of(word: str, size: int) -> str:
    """The SHA-256 of an extent of so many KiB that was filled with the word."""
    line = f"{word}\n".encode()
    return hashlib.sha256((line * (size * 1024 // len(line) + 1))[: size * 1024]).hexdigest()
