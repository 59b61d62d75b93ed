"""Both engines in this process, on two real QEMUs, with a look at both sides' whole RAM and disks at some checkpoints.

When it is right to look. The replica of epoch N must be what the primary's RAM and disks were when epoch N's device
state was complete. So the gate is kept narrow at such a checkpoint and drained a page at a time; when all but the end
of the state is read, the primary is looked at. The guest stands still then: its processors since the STOP event, its
disks since QEMU drained and flushed them, QEMU's main thread because it is in the write to the gate. What the drain of
the disks, or the saving of a device, wrote after our scan would show as a difference. The standby is looked at
when the primary may release epoch N: what is still to be applied of it, and written to disks, is waited for, and
N+1 cannot begin before the look is over, as it is the same thread.
"""

import itertools
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from nova_ftvm.cmd.engine import machine_type
from nova_ftvm.core import dirty, wire
from nova_ftvm.core.epoch import Acts, EpochLoop, Pace, Phase
from nova_ftvm.core.lease import Lease
from nova_ftvm.core.policy import Policy
from nova_ftvm.engine import link as links
from nova_ftvm.engine import primary as engine_module
from nova_ftvm.engine.backup import BackupEngine
from nova_ftvm.engine.capture import Conversation
from nova_ftvm.engine.primary import PrimaryEngine
from nova_ftvm.engine.stats import EpochLog
from nova_ftvm.host import netfilter, qmp
from nova_ftvm.host.disks import (
    AttendedMonitor,
    DiskMirror,
    StandbyDisks,
    ended_mirror,
    guest_disks,
    read_only_contents,
    replicas,
)
from nova_ftvm.host.gate import Gate
from nova_ftvm.host.lifesigns import ProcessLife
from nova_ftvm.host.memory import GuestMemory, RangedMemory, TrackedMemory, ram_blocks
from nova_ftvm.host.netbuf import OutputBuffer
from nova_ftvm.host.precedence import NoPrecedence
from nova_ftvm.host.processors import Processors
from nova_ftvm.types import PAGE, Disk, Generation
from tests.host.images import SECTOR
from tests.host.machine import Qemu, read_all, wait_for

TOKEN = "token"
LIMIT = 4 << 20
LOG_LIMIT = 16 << 20
MAX_REQUEST = 1 << 20
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

    def arm(self, slack_s: float = 0.0) -> None: ...

    def disarm(self) -> None: ...


class NoNote:
    def leave(self) -> None: ...

    def remove(self) -> None: ...


class NoReplay:
    def replay(self, heard: Mapping[bytes, bytes], said: Mapping[bytes, bytes],
               reminders: Mapping[bytes, bytes]) -> None: ...


class ObservedMemory(TrackedMemory):
    """The primary's memory; for mutations, is told when the guest's processors stand and its disks do not yet."""

    def at_stop(self) -> None: ...


class LosesAPage(ObservedMemory):
    """Mutation: the last page of each checkpoint is lost."""

    def capture(self) -> Iterator[dirty.Pages]:
        captured = list(super().capture())
        if captured:
            last = captured[-1]
            runs = dirty.compress(dirty.expand(last.runs)[:-1])
            captured[-1] = dirty.Pages(last.block, runs, last.contents[:-PAGE])
        return iter(captured)


class LooksAtTheStop(ObservedMemory):
    """Mutation: what is written after the STOP event comes an epoch late."""

    _noted: list[tuple[int, np.ndarray]] | None = None

    def at_stop(self) -> None:
        self._noted = super().take_written()

    def take_written(self) -> list[tuple[int, np.ndarray]]:
        noted, self._noted = self._noted, None
        return super().take_written() if noted is None else noted


class CopiesAtTheStop(ObservedMemory):
    """Mutation: a page is copied where it is found written, while a disk may still transfer to it."""

    _early: list[dirty.Pages]

    def at_stop(self) -> None:
        self._early = list(super().capture())

    def capture(self) -> Iterator[dirty.Pages]:
        return itertools.chain(self._early, super().capture())


class ObservedRanged(RangedMemory):
    """A guest under KVM has this; here it is for one that has disks and a network as well."""

    at_stop = ObservedMemory.at_stop


class LooksOnce(ObservedRanged):
    """Mutation: what a disk writes after the look at the stop is not looked for."""

    _looked = False

    def protect(self) -> None:
        super().protect()
        self._looked = bool(self._protected)

    def _look(self, spots: list[Any]) -> list[tuple[int, np.ndarray]]:
        looked, self._looked = self._looked, False
        return [] if looked else super()._look(spots)


class StopLoop(EpochLoop):
    """Tells of each stop."""

    at_stop: Callable[[], None]

    def on_stopped(self) -> Acts:
        self.at_stop()
        return super().on_stopped()


class TellingBackup(BackupEngine):
    """Tells which epoch was applied last: it is acknowledged before."""

    applied = 0

    def _take(self, frame: wire.Frame) -> None:
        super()._take(frame)
        self.applied = self._replica.committed


class HeldGate(Gate):
    """Holds the guest at the first and each `every`th checkpoint until `look` is done: at the end of the state."""

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
        self._held = self._checkpoints == 1 or self._checkpoints % self._every == 0

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


class ComparingBuffer(OutputBuffer):
    """Compares before the output of a held epoch is released."""

    compare: Callable[[], None]

    def release(self) -> None:
        self.compare()
        super().release()


Observed = type[ObservedMemory] | type[ObservedRanged]


class Comparison:
    """The two engines. `run` gives what differed at a look: (RAM block, page numbers) or (disk, sector numbers).

    memory, mirror, replica, engine: kinds of what the engines work with, for mutations.
    """

    def __init__(self, primary: Qemu, standby: Qemu, folder: Path, memory: Observed = ObservedMemory, *,
                 mirror: type[DiskMirror] = DiskMirror, replica: type[StandbyDisks] = StandbyDisks,
                 engine: type[PrimaryEngine] = PrimaryEngine, looks: int = 5, every: int = 6) -> None:
        self._primary = primary
        self._standby = standby
        self._folder = folder
        self._memory_type = memory
        self._mirror_type = mirror
        self._replica_type = replica
        self._engine_type = engine
        self._every = every
        self._looks = looks
        self._seen: dict[str, np.ndarray] | None = None
        self._seen_disks: list[np.ndarray] = []
        self._blocks: list[Any] = []
        self._disks: list[Disk] = []
        self.compared = 0
        self.differences: list[tuple[str, list[int]]] = []
        self.phase: Phase | None = None
        self.promoted: bool | None = None

    def run(self) -> list[tuple[str, list[int]]]:
        """Protects, compares `looks` times (or until a difference shows), and ends the protection."""
        self._backup_orders, self._orders = Orders(), Orders()
        with self._standby.monitor() as theirs, self._primary.monitor() as ours:
            listener = links.listen("127.0.0.1")
            self._backup_blocks = ram_blocks(theirs)
            self._backup_disks = replicas(theirs)
            memory = GuestMemory(theirs.pid, self._backup_blocks)
            memory.clear()
            pidfd = qmp.pidfd_of(theirs)
            life = ProcessLife(theirs.pid, pidfd)
            self._replica = self._replica_type(theirs, self._backup_disks, self._export_path)
            backup = self._backup = TellingBackup(
                generation=GENERATION, token=TOKEN, memory=memory, monitor=theirs, replay=NoReplay(),
                expected=wire.Hello("pair", machine_type(theirs), tuple(self._backup_blocks),
                                    disks=tuple(self._backup_disks)),
                listener=listener, disks=self._replica, backlog_limit=LOG_LIMIT, control=self._backup_orders,
                pidfd=pidfd, life=life, beat_s=0.5, lease=Lease(GENERATION, 60.0, time.monotonic()),
                frame_limit=LIMIT, stream_path=str(self._folder / "incoming.sock"))

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
                life.close()
                os.close(pidfd)
        assert not thread.is_alive(), "the backup's engine did not end"
        return self.differences

    @property
    def _export_path(self) -> str:
        return str(self._folder / "replica.sock")

    def _run_primary(self, monitor: AttendedMonitor, port: int) -> None:
        self._blocks, self._disks = ram_blocks(monitor), guest_disks(monitor)
        hello = wire.Hello("pair", machine_type(monitor), tuple(self._blocks), disks=tuple(self._disks))
        link, self.shallow = links.dial("127.0.0.1", port, GENERATION, hello, TOKEN, LIMIT)
        pidfd = qmp.pidfd_of(monitor)
        life = ProcessLife(monitor.pid, pidfd)
        memory = self._memory_type(monitor.pid, pidfd, self._blocks)
        mirror = self._mirror_type(monitor, self._disks, str(self._folder / "disks.sock"), (0, 0), 0, MAX_REQUEST)
        gate = HeldGate(str(self._folder / "state.fifo"), self._every, self._look)
        buffers = ComparingBuffer(monitor, netfilter.interfaces(monitor))
        buffers.compare = self._compare
        processors = Processors(monitor)
        loop = self._loop = StopLoop(Pace(Policy.FIXED, 0.02, 20.0, 0.5, 4, 2048), time.monotonic())
        loop.at_stop = memory.at_stop
        # The engine wakes up for QEMU's word of the stop only where somebody wants to know.
        unheard_s = engine_module._UNHEARD_S if self._memory_type.at_stop is ObservedMemory.at_stop else 0.0
        try:
            with patch.object(engine_module, "_UNHEARD_S", unheard_s):
                self.phase = self._engine_type(
                    generation=GENERATION, memory=memory, talk=Conversation(monitor, gate, ended_mirror),
                    monitor=monitor, gate=gate, buffers=buffers, link=link, loop=loop, control=self._orders,
                    mirror=mirror, fixed=read_only_contents(self._disks), shallow=self.shallow, log_limit=LOG_LIMIT,
                    pidfd=pidfd, life=life, watchdog=NoWatchdog(), note=NoNote(), processors=processors,
                    precedence=NoPrecedence(), stats=EpochLog(str(self._folder / "epochs.jsonl")),
                    frame_limit=LIMIT).run()
        finally:
            gate.close()
            buffers.close()
            processors.close()
            memory.close()
            mirror.close()
            mirror.remove()
            link.close()
            life.close()
            os.close(pidfd)

    def _look(self) -> None:
        self._seen = read_all(self._primary.pid, self._blocks)
        # A host's cache may hold what is on no disk yet; QEMU's own caches are flushed at a stop.
        self._seen_disks = [self._contents(disk.path) for disk in self._disks]

    def _compare(self) -> None:
        if self._seen is None:
            return
        wait_for("the epoch is applied", lambda: self._backup.applied >= self._loop.epoch)
        replica = read_all(self._standby.pid, self._backup_blocks)
        assert replica.keys() == self._seen.keys()
        for name, contents in self._seen.items():
            self._tell_difference(name, contents, replica[name], PAGE)
        wait_for("the replica has written all", lambda: not self._replica.backlog)
        for number, (disk, contents) in enumerate(zip(self._backup_disks, self._seen_disks, strict=True)):
            source = disk.path if disk.read_only else f"nbd+unix:///{number}?socket={self._export_path}"
            self._tell_difference(disk.device, contents, self._contents(source), SECTOR)
        self._seen = None
        self.compared += 1
        if self.compared >= self._looks or self.differences:
            self._orders.give("stop", reason="enough seen")

    def _tell_difference(self, name: str, ours: np.ndarray, theirs: np.ndarray, unit: int) -> None:
        assert ours.shape == theirs.shape, name
        differing = np.flatnonzero((ours.reshape(-1, unit) != theirs.reshape(-1, unit)).any(axis=1))
        if len(differing):
            self.differences.append((name, differing.tolist()))

    def _contents(self, source: str) -> np.ndarray:
        """What a guest would read of an image, or of an export."""
        raw = self._folder / "look"
        subprocess.run(["qemu-img", "convert", "-U", "-T", "none" if source.startswith("/") else "writeback",
                        "-O", "raw", source, raw], check=True)
        return np.fromfile(raw, np.uint8)
