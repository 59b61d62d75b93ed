"""Both engines in this process, on two real QEMUs, with a look at both sides' whole RAM at chosen checkpoints.

When it is right to look. The replica of epoch N must be what the primary's RAM was when epoch N's device state was
complete. So the gate is kept narrow at such a checkpoint and drained a page at a time; when all but the end of the
state is read, the primary is looked at. The guest stands still then: its processors since the STOP event, its disks
since QEMU drained them, QEMU's main thread because it is in the write to the gate. What the drain of the disks, or the
saving of a device, wrote after our last scan would show as a difference. The standby is looked at when the primary
may release epoch N: N is applied then, and N+1 cannot begin before the look is over, as it is the same thread.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nova_ftvm.cmd.engine import machine_type
from nova_ftvm.core import dirty, wire
from nova_ftvm.core.epoch import EpochLoop, Pace, Phase
from nova_ftvm.core.lease import Lease
from nova_ftvm.engine import link as links
from nova_ftvm.engine.backup import BackupEngine
from nova_ftvm.engine.capture import Conversation
from nova_ftvm.engine.primary import PrimaryEngine
from nova_ftvm.engine.stats import EpochLog
from nova_ftvm.host import qmp
from nova_ftvm.host.gate import Gate
from nova_ftvm.host.memory import GuestMemory, TrackedMemory, ram_blocks
from nova_ftvm.host.netbuf import OutputBuffers, interfaces
from nova_ftvm.types import PAGE, Generation
from tests.host.machine import Qemu, read_all

TOKEN = "token"
LIMIT = 4 << 20
GENERATION = Generation(1)


class Orders:
    """ports.Control with the test in the agent's place."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK)
        self._orders: list[dict[str, Any]] = []
        self.reports: list[dict[str, Any]] = []

    def fileno(self) -> int:
        return self._fd

    def give(self, what: str, **facts: Any) -> None:
        self._orders.append({"do": what, **facts})
        os.eventfd_write(self._fd, 1)

    def orders(self) -> list[dict[str, Any]]:
        os.eventfd_read(self._fd)
        given, self._orders = self._orders, []
        return given

    def report(self, event: str, **facts: Any) -> None:
        self.reports.append({"event": event, **facts})

    def close(self) -> None:
        os.close(self._fd)


class NoWatchdog:
    """A look takes longer than any hold should."""

    def arm(self) -> None: ...

    def disarm(self) -> None: ...


class NoDomain:
    def resume(self) -> None:
        raise AssertionError("nobody granted a promotion")


class CountingMemory(TrackedMemory):
    """The primary's memory; knows how many pages the captures after the drain of the disks brought."""

    second = False
    late_pages = 0

    def begin_capture(self) -> None:
        self.second = False
        super().begin_capture()

    def capture(self) -> Iterator[dirty.Pages]:
        captured = list(super().capture())
        if self.second:
            self.late_pages += sum(pages.count for pages in captured)
        self.second = True
        return iter(captured)


class LosesAPage(CountingMemory):
    """Mutation: the last page of each checkpoint's first capture is lost."""

    def capture(self) -> Iterator[dirty.Pages]:
        first = not self.second
        captured = list(super().capture())
        if first and captured:
            last = captured[-1]
            runs = dirty.compress(dirty.expand(last.runs)[:-1])
            captured[-1] = dirty.Pages(last.block, runs, last.contents[:-PAGE])
        return iter(captured)


class LooksOnce(CountingMemory):
    """Mutation: no second scan, so what QEMU's disks complete after the STOP event comes an epoch late."""

    def capture(self) -> Iterator[dirty.Pages]:
        return super().capture() if not self.second else iter(())


class HeldGate(Gate):
    """Holds the guest at each `every`th checkpoint until `look` is done, at the end of the device state."""

    def __init__(self, path: str, every: int, look: Callable[[], None]) -> None:
        self._every = every
        self._look = look
        self._checkpoints = self._expected = self._total = 0
        self._held = False
        super().__init__(path)

    def narrow(self) -> None:
        super().narrow()
        self._expected, self._total = self._total, 0
        self._checkpoints += 1
        self._held = self._checkpoints % self._every == 0

    def widen(self) -> None:
        if not self._held:
            super().widen()

    def drain(self) -> bytes:
        if not self._held:
            part = super().drain()
        else:
            try:
                part = os.read(self.fileno(), PAGE)
            except BlockingIOError:
                part = b""
        self._total += len(part)
        if self._held and self._total >= self._expected - 2 * PAGE:
            self._held = False
            self._look()
            super().widen()
        return part


class ComparingConversation(Conversation):
    """Compares before the output of a held epoch is released."""

    compare: Callable[[], None]

    def release(self) -> None:
        self.compare()
        super().release()


class Comparison:
    """The two engines. `run` gives what differed: (block, page numbers) a look."""

    def __init__(self, primary: Qemu, standby: Qemu, folder: Path, memory: type[CountingMemory] = CountingMemory, *,
                 looks: int = 5, every: int = 6) -> None:
        self._primary = primary
        self._standby = standby
        self._folder = folder
        self._memory_type = memory
        self._every = every
        self._looks = looks
        self._seen: dict[str, np.ndarray] | None = None
        self._blocks: list[Any] = []
        self.compared = 0
        self.differences: list[tuple[str, list[int]]] = []
        self.late_pages = 0
        self.phase: Phase | None = None
        self.promoted: bool | None = None

    def run(self) -> list[tuple[str, list[int]]]:
        """Protects, compares `looks` times (or until a difference shows), and ends the protection."""
        self._backup_orders, self._orders = Orders(), Orders()
        with self._standby.monitor() as theirs, self._primary.monitor() as ours:
            listener = links.listen("127.0.0.1")
            self._backup_blocks = ram_blocks(theirs)
            memory = GuestMemory(theirs.pid, self._backup_blocks)
            memory.clear()
            backup = BackupEngine(
                generation=GENERATION, token=TOKEN, memory=memory, monitor=theirs, domain=NoDomain(),
                expected=wire.Hello("pair", machine_type(theirs), tuple(self._backup_blocks), ""), listener=listener,
                control=self._backup_orders, pidfd=qmp.pidfd_of(theirs), beat_s=0.5,
                lease=Lease(GENERATION, 60.0, time.monotonic()), frame_limit=LIMIT,
                stream_path=str(self._folder / "incoming.sock"))

            def serve() -> None:
                self.promoted = backup.run()

            thread = threading.Thread(target=serve)
            thread.start()
            try:
                self._run_primary(ours, listener.getsockname()[1])
            finally:
                self._backup_orders.give("stop", reason="the test ends")
                thread.join(20.0)
                listener.close()
                memory.close()
        assert not thread.is_alive(), "the backup's engine did not end"
        return self.differences

    def _run_primary(self, monitor: qmp.Monitor, port: int) -> None:
        self._blocks = ram_blocks(monitor)
        hello = wire.Hello("pair", machine_type(monitor), tuple(self._blocks), "")
        link = links.dial("127.0.0.1", port, GENERATION, hello, TOKEN, LIMIT)
        pidfd = qmp.pidfd_of(monitor)
        memory = self._memory_type(monitor.pid, pidfd, self._blocks)
        gate = HeldGate(str(self._folder / "state.fifo"), self._every, self._look)
        buffers = OutputBuffers(monitor, interfaces(monitor))
        save = qmp.encode("xen-save-devices-state", {"filename": gate.path, "live": False}, "save")
        talk = ComparingConversation(monitor, gate, buffers, save)
        talk.compare = self._compare
        try:
            self.phase = PrimaryEngine(
                generation=GENERATION, memory=memory, talk=talk, monitor=monitor, gate=gate, buffers=buffers, link=link,
                loop=EpochLoop(Pace(0.02, 20.0, 0.5, 4, 2048), time.monotonic()), control=self._orders, pidfd=pidfd,
                watchdog=NoWatchdog(), stats=EpochLog(str(self._folder / "epochs.jsonl")), frame_limit=LIMIT).run()
        finally:
            gate.close()
            memory.close()
            link.close()
            os.close(pidfd)
        self.late_pages = memory.late_pages

    def _look(self) -> None:
        self._seen = read_all(self._primary.pid, self._blocks)

    def _compare(self) -> None:
        if self._seen is None:
            return
        replica = read_all(self._standby.pid, self._backup_blocks)
        assert replica.keys() == self._seen.keys()
        for name, contents in self._seen.items():
            pages = np.flatnonzero((contents.reshape(-1, PAGE) != replica[name].reshape(-1, PAGE)).any(axis=1))
            if len(pages):
                self.differences.append((name, pages.tolist()))
        self._seen = None
        self.compared += 1
        if self.compared >= self._looks or self.differences:
            self._orders.give("stop", reason="enough seen")
