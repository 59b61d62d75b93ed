"""The engines' ports, faked: a QEMU that says what the test wants, RAM in a dict, a peer on a real socket."""

import collections
import os
import select
import socket
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np

from nova_ftvm.core import dirty, wire
from nova_ftvm.core.disk import DiskWrite
from nova_ftvm.core.packets import Packets
from nova_ftvm.exception import GuestGone, MirrorLost, OutputLost, ReplicaFailed
from nova_ftvm.types import PAGE, Disk, Epoch, Generation, RamBlock
from tests.unit.frames import BLOCKS, GENERATION, LIMIT


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    theirs.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return ours, theirs


class Bell:
    """A descriptor that can be waited for."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK)

    def fileno(self) -> int:
        return self._fd

    def ring(self) -> None:
        os.eventfd_write(self._fd, 1)

    def hush(self) -> None:
        if self.rings():
            os.eventfd_read(self._fd)

    def rings(self) -> bool:
        return bool(select.select([self._fd], [], [], 0)[0])


class FakeQemu(Bell):
    """ports.Monitor. `sent`: names of the commands that came whole, ids of those that were prepared."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[str] = []
        self.answers: dict[str, list[Any]] = collections.defaultdict(list)
        self._messages: list[dict[str, Any]] = []
        self._prepared = ""
        self.gone = False

    def say(self, *messages: dict[str, Any]) -> None:
        self._messages += messages
        self.ring()

    def event(self, name: str, milliseconds: float = 0) -> None:
        self.say({"event": name, "timestamp": {"seconds": 1, "microseconds": int(milliseconds * 1000)}})

    def answer(self, ident: str, error: str = "") -> None:
        self.say({"id": ident, "error": {"desc": error}} if error else {"id": ident, "return": {}})

    def prepare(self, command: str, ident: str, **arguments: Any) -> None:
        if self.gone:
            raise GuestGone("QEMU closed its monitor")
        self._prepared = ident

    def complete(self) -> None:
        if self.gone:
            raise GuestGone("QEMU closed its monitor")
        assert self._prepared, "nothing is prepared"
        self.sent.append(self._prepared)

    def command(self, command: str, **arguments: Any) -> Any:
        self.sent.append(command)
        answers = self.answers[command]
        return answers.pop(0) if len(answers) > 1 else answers[0] if answers else {}

    def receive(self) -> list[dict[str, Any]]:
        if self.gone:
            raise GuestGone("QEMU closed its monitor")
        self.hush()
        messages, self._messages = self._messages, []
        return messages


class FakeGate:
    """ports.Gate on a real pipe."""

    path = "gate"

    def __init__(self) -> None:
        self._out, self._in = os.pipe2(os.O_NONBLOCK)
        self.wide = False
        self.drained = b""

    def fileno(self) -> int:
        return self._out

    def narrow(self) -> None:
        self.wide = False

    def widen(self) -> None:
        self.wide = True

    def drain(self) -> bytes:
        try:
            part = os.read(self._out, 1 << 16)
        except BlockingIOError:
            return b""
        self.drained += part
        return part

    def fill(self, state: bytes) -> None:
        os.write(self._in, state)


class FakeBuffer(Bell):
    """ports.NetBuffer; rings when the guest sends something. `sent` is told what is done here."""

    def __init__(self, sent: list[str]) -> None:
        super().__init__()
        self._sent = sent
        self.installed = self.is_filling = False
        self.lost = ""
        #: What came for the guest, and what the last cut covers.
        self.came: list[Packets] = []
        self.sent_last: list[Packets] = []

    def install(self) -> None:
        self.installed = True
        self._sent.append("install")

    def remove(self) -> None:
        self.installed = False
        self._sent.append("remove")

    def lose(self, why: str) -> None:
        self.lost = why
        self.ring()

    def hear(self) -> bool:
        heard = self.rings()
        self.hush()
        if self.lost:
            raise OutputLost(self.lost)
        return heard

    def cut(self) -> bool:
        heard = self.hear()
        self.came.clear()
        self._sent.append("cut")
        return heard

    def covered(self) -> list[Packets]:
        return self.sent_last

    def overheard(self) -> list[Packets]:
        came, self.came = self.came, []
        return came

    def release(self) -> None:
        self._sent.append("release")

    def close(self) -> None: ...


class FakeProcessors:
    """ports.Processors."""

    is_asleep = False

    def asleep(self) -> bool:
        return self.is_asleep


class FakeLife:
    """ports.Life."""

    ending = False

    def is_ending(self) -> bool:
        return self.ending


class FakePrecedence:
    """ports.Precedence. `sent` is told what is done here."""

    def __init__(self, sent: list[str]) -> None:
        self._sent = sent
        self.taken = self.qemu_has_it = False

    def take(self) -> None:
        self.taken = self.qemu_has_it = True
        self._sent.append("precedence")

    def leave_qemu(self) -> None:
        self.qemu_has_it = False

    def leave(self) -> None:
        self.taken = self.qemu_has_it = False


class FakeNote:
    """ports.Note. `text`: what it says; None: there is none."""

    def __init__(self, sent: list[str]) -> None:
        self._sent = sent
        self.text: str | None = None

    def leave(self) -> None:
        self.text = "held"
        self._sent.append("note")

    def remove(self) -> None:
        self.text = None


class FakeMemory:
    """ports.Memory and ports.WritableMemory."""

    def __init__(self, blocks: list[RamBlock] = BLOCKS) -> None:
        self.blocks = blocks
        self.pages: dict[tuple[int, int], int] = {}
        self.written: set[tuple[int, int]] = set()
        self.writes = 0
        #: What was done to it in pauses, and which pages went to the backup.
        self.steps: list[str] = []
        self.sent: list[tuple[int, list[int]]] = []
        self.tended: list[float] = []
        self.ended = 0

    def put(self, block: int, number: int, value: int) -> None:
        """The guest fills a page with a byte."""
        self.pages[block, number] = value
        self.written.add((block, number))

    def take_existing(self) -> list[tuple[int, np.ndarray]]:
        self.written = set()
        return self._runs(set(self.pages))

    def take_written(self) -> list[tuple[int, np.ndarray]]:
        taken, self.written = self.written, set()
        return self._runs(taken)

    def read(self, block: int, runs: np.ndarray) -> dirty.Pages:
        numbers = dirty.expand(runs).tolist()
        return dirty.Pages(block, runs, np.repeat(np.array([self.pages[block, n] for n in numbers], np.uint8), PAGE))

    protects_at_stop = False

    def begin_capture(self) -> None: ...

    def protect(self) -> None:
        self.steps.append("protect")

    def on_sent(self, block: int, runs: np.ndarray) -> None:
        self.sent.append((block, dirty.expand(runs).tolist()))

    def end_capture(self) -> None:
        self.ended += 1

    def tend(self, now: float) -> None:
        self.tended.append(now)

    def capture(self) -> Iterator[dirty.Pages]:
        self.steps.append("capture")
        for block, runs in self.take_written():
            yield self.read(block, runs)

    def write(self, pages: dirty.Pages) -> None:
        self.writes += 1
        for i, number in enumerate(dirty.expand(pages.runs).tolist()):
            self.pages[pages.block, number] = int(pages.contents[i * PAGE])

    def clear(self) -> None:
        self.pages.clear()

    def _runs(self, numbers: set[tuple[int, int]]) -> list[tuple[int, np.ndarray]]:
        return [(block, dirty.compress(np.array(sorted(n for b, n in numbers if b == block), np.int64)))
                for block in sorted({b for b, _ in numbers})]


class FakeMirror(Bell):
    """ports.Mirror. `write` is the guest's; `answered` counts what QEMU was let go on with."""

    def __init__(self, disks: Sequence[Disk] = ()) -> None:
        super().__init__()
        self.disks = disks
        self.shallow: Collection[int] | None = None
        self.is_followed = True
        self._waiting: list[DiskWrite] = []
        self._unconfirmed = 0
        self.answered = 0
        self.lost = ""
        self.closed = False

    def write(self, *writes: DiskWrite) -> None:
        self._waiting += writes
        self.ring()

    def lose(self, why: str) -> None:
        self.lost = why
        self.ring()

    def start(self, shallow: Collection[int]) -> None:
        self.shallow = shallow

    def progress(self) -> tuple[int, int, bool]:
        return (100, 100, True) if self.is_followed else (40, 100, False)

    def receive(self) -> list[DiskWrite]:
        if self.lost:
            raise MirrorLost(self.lost)
        self.hush()
        taken, self._waiting = self._waiting, []
        self._unconfirmed = len(taken)
        return taken

    def confirm(self) -> None:
        self.answered += self._unconfirmed
        self._unconfirmed = 0

    def close(self) -> None:
        """As a real one: its descriptor is gone, and using it after that is an error."""
        if not self.closed:
            os.close(self._fd)
        self._fd, self.closed = -1, True

    def remove(self) -> None: ...


class FakeReplicaDisks(Bell):
    """ports.ReplicaDisks: writes are done when the test lets them."""

    def __init__(self, disks: Sequence[Disk] = ()) -> None:
        super().__init__()
        self.disks = disks
        self.submitted: list[DiskWrite] = []
        self.done: list[DiskWrite] = []
        self.stuck = False
        self.failure = ""
        self.closed = False

    @property
    def backlog(self) -> int:
        return sum(write.length for write in self.submitted)

    def submit(self, writes: Sequence[DiskWrite]) -> None:
        self.submitted += writes

    def advance(self) -> None:
        self.hush()
        if self.failure:
            raise ReplicaFailed(self.failure)
        if not self.stuck:
            self.done += self.submitted
            self.submitted = []

    def settle(self, timeout_s: float) -> None:
        self.stuck = False
        self.advance()

    def close(self) -> None:
        self.closed = True


class FakeControl(Bell):
    """ports.Control, the agent's side in the test's hands."""

    def __init__(self) -> None:
        super().__init__()
        self._orders: list[dict[str, Any]] = []
        self.reports: list[dict[str, Any]] = []

    def give(self, what: str, **facts: Any) -> None:
        self._orders.append({"do": what, **facts})
        self.ring()

    def grant(self, granted: bool, generation: int = GENERATION + 1, reason: str = "so it is") -> None:
        self.give("grant", granted=granted, generation=generation, reason=reason)

    def orders(self) -> list[dict[str, Any]]:
        self.hush()
        given, self._orders = self._orders, []
        return given

    def report(self, event: str, **facts: Any) -> None:
        self.reports.append({"event": event, **facts})

    @property
    def told(self) -> list[str]:
        return [report["event"] for report in self.reports if report["event"] != "syncing"]


class FakeWatchdog:
    armed = False

    def arm(self, slack_s: float = 0.0) -> None:
        self.armed = True

    def disarm(self) -> None:
        self.armed = False


class Clock:
    """Stands still until it is set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Peer:
    """The other end of a connection, frame by frame."""

    def __init__(self, connection: socket.socket, generation: Generation = GENERATION) -> None:
        self.connection = connection
        self.generation = generation
        connection.settimeout(2.0)
        self._decoder = wire.Decoder(generation, LIMIT)
        self.frames: list[wire.Frame] = []

    def send(self, kind: wire.Kind, epoch: int = 0, *payload: bytes) -> None:
        self.raw(b"".join(bytes(b) for b in wire.encode(kind, self.generation, Epoch(epoch), payload)))

    def raw(self, data: bytes) -> None:
        self.connection.sendall(data)

    def read(self, beats: bool = False) -> list[wire.Frame]:
        """All frames that are there, but for beats."""
        self.connection.setblocking(False)
        try:
            while received := self.connection.recv(1 << 20):
                self.frames += self._decoder.feed(received)
        except (BlockingIOError, ConnectionError):
            pass
        frames, self.frames = self.frames, []
        return [frame for frame in frames if beats or frame.kind is not wire.Kind.BEAT]

    def kinds(self) -> list[str]:
        return [frame.kind.name for frame in self.read()]

    def close(self) -> None:
        self.connection.close()
