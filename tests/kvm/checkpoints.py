"""One guest under protection by the product's own parts, and the copy of it that a backup would have; no engines.

Callers: the tests and benchmarks under KVM. A checkpoint here is what PrimaryEngine makes of it: the save's command,
protection while the disks come to rest, the capture when the device state begins, the gate opened, the guest started.
"""

import contextlib
import dataclasses
import os
import select
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import numpy as np

from nova_ftvm.core import dirty, stream
from nova_ftvm.engine.capture import Conversation, GuestEvent
from nova_ftvm.engine.clockforward import ClockForward, NotForwarded
from nova_ftvm.engine.promote import promote
from nova_ftvm.host import qmp
from nova_ftvm.host.gate import Gate
from nova_ftvm.host.kvmclock import QemuHeap
from nova_ftvm.host.memory import GuestMemory, RangedMemory, TrackedMemory, ram_blocks
from nova_ftvm.host.precedence import Precedence
from nova_ftvm.types import PAGE, RamBlock
from tests.host.machine import Qemu, read_all

_ANSWER_S = 10.0


@dataclasses.dataclass(frozen=True, slots=True)
class Taken:
    """What one checkpoint was: QEMU's pause; from the state's beginning to the gate's opening; the pages."""

    pause_ms: float
    capture_ms: float
    pages: int
    state: bytes


class Checkpoints:
    """memory: how what was written is found; None: the guest is stopped, saved and started, and nobody looks at it."""

    def __init__(self, qemu: Qemu, memory: type[TrackedMemory] | None = RangedMemory, *, forward: bool = False) -> None:
        """forward: kvmclock is set forward in the pauses."""
        self._qemu = qemu
        self.kvmclock = NotForwarded()
        with ExitStack() as stack:
            self._monitor = stack.enter_context(qemu.monitor())
            self.blocks = ram_blocks(self._monitor)
            pidfd = qmp.pidfd_of(self._monitor)
            stack.callback(os.close, pidfd)
            self._gate = stack.enter_context(contextlib.closing(Gate(str(qemu.folder / "state.fifo"))))
            self._talk = Conversation(self._monitor, self._gate, lambda message: "")
            if forward:
                self.kvmclock = ClockForward(QemuHeap(qemu.pid, self.blocks), self._talk, self._gate)
            self._precedence = Precedence(qemu.pid)
            stack.callback(self._precedence.leave)
            self.memory = None
            if memory is not None:
                self.memory = stack.enter_context(contextlib.closing(memory(qemu.pid, pidfd, self.blocks)))
                self._first_copy()
            self._stack = stack.pop_all()

    def take(self) -> Taken:
        """One checkpoint."""
        if self.memory is not None:
            self.memory.begin_capture()
        self._talk.prepare()
        self._precedence.take()
        self.kvmclock.begin()
        self._talk.begin()
        self._await_stop()
        select.select([self._gate], [], [], _ANSWER_S)
        began = time.monotonic()
        captured = [] if self.memory is None else list(self.memory.capture())
        capture_ms = (time.monotonic() - began) * 1000
        self.kvmclock.forward()
        self._gate.widen()
        self._await(GuestEvent.RESUMED)
        self._precedence.leave()
        self.kvmclock.running(saved=True)
        self.kvmclock.search()
        for pages in captured:
            self._keep(pages)
        if self.memory is not None:
            self.memory.end_capture()
        talk = self._talk.current
        return Taken(talk.pause_ms, capture_ms, sum(pages.count for pages in captured), bytes(talk.state))

    def run(self, seconds: float, epoch_s: float, between: Callable[[], None] = lambda: None) -> list[Taken]:
        """A checkpoint each epoch_s, from its beginning to the next one's; before each, `between`."""
        start = following = time.monotonic()
        taken = []
        while following < start + seconds:
            between()
            following = max(following + epoch_s, time.monotonic())
            time.sleep(max(0.0, following - time.monotonic()))
            taken.append(self.take())
        return taken

    def missed(self) -> dict[str, list[int]]:
        """Pages, by block, in which the copy is not what the guest's memory is now. The guest is stopped for it."""
        self._qemu.operator.command("stop")
        try:
            assert self.memory is not None
            self.memory.begin_capture()
            for pages in self.memory.capture():
                self._keep(pages)
            now = read_all(self._qemu.pid, self.blocks)
        finally:
            self._qemu.operator.command("cont")
            self._monitor.receive()
        differing = {block.name: np.flatnonzero((now[block.name].reshape(-1, PAGE) != copy).any(axis=1)).tolist()
                     for block, copy in zip(self.blocks, self.copy, strict=True)}
        return {name: numbers for name, numbers in differing.items() if numbers}

    def close(self) -> None:
        self._stack.close()

    def _first_copy(self) -> None:
        assert self.memory is not None
        self.copy = [np.zeros((block.pages, PAGE), np.uint8) for block in self.blocks]
        for block, runs in self.memory.take_existing():
            for part in dirty.split(runs, 4096):
                self._keep(self.memory.read(block, part))

    def _await_stop(self) -> None:
        """QEMU's processors stand; the disks of a guest may not be at rest yet."""
        self._await(GuestEvent.STOPPED)
        if self.memory is not None:
            self.memory.protect()

    def _await(self, wanted: GuestEvent) -> None:
        while True:
            assert select.select([self._monitor, self._gate], [], [], _ANSWER_S)[0], f"QEMU does not say {wanted}"
            if wanted is GuestEvent.RESUMED:
                self._talk.read_state()
            events = list(self._talk.events())
            assert GuestEvent.SAVE_FAILED not in events, self._talk.current.failure
            if wanted in events:
                return

    def _keep(self, pages: dirty.Pages) -> None:
        numbers = dirty.expand(pages.runs)
        new = pages.contents.reshape(-1, PAGE)
        copy = self.copy[pages.block]
        changed = (copy[numbers] != new).any(axis=1)
        copy[numbers] = new
        assert self.memory is not None
        self.memory.on_sent(pages.block, dirty.compress(numbers[changed]))


def load(standby: Qemu, blocks: Sequence[RamBlock], copy: Sequence[np.ndarray], state: bytes) -> None:
    """The standby becomes the guest of this checkpoint, and runs."""
    with standby.monitor() as monitor:
        own = ram_blocks(monitor)
        assert [(block.name, block.size) for block in own] == [(block.name, block.size) for block in blocks]
        memory = GuestMemory(standby.pid, own)
        memory.clear()
        for number, contents in enumerate(copy):
            used = dirty.compress(np.flatnonzero(contents.any(axis=1)))
            for runs in dirty.split(used, 1024):
                memory.write(dirty.Pages(number, runs, np.ascontiguousarray(contents[dirty.expand(runs)]).reshape(-1)))
        memory.close()
        name = monitor.command("qom-get", path="/machine", property="type").removesuffix("-machine")
        promote(monitor, stream.incoming(name, own, state), str(standby.folder / "incoming.sock"))
