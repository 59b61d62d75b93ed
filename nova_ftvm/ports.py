"""What the engine needs of the world. host/ implements these; tests give fakes; cmd/ joins them."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from nova_ftvm.core.dirty import Pages
from nova_ftvm.core.disk import DiskWrite
from nova_ftvm.core.kvmclock import Reason
from nova_ftvm.core.packets import Packets
from nova_ftvm.types import Disk, RamBlock

Message = dict[str, Any]


class Pollable(Protocol):
    def fileno(self) -> int: ...


class Monitor(Pollable, Protocol):
    """A QMP connection. Every method raises GuestGone when QEMU ended."""

    def command(self, command: str, **arguments: Any) -> Any: ...

    def prepare(self, command: str, ident: str, **arguments: Any) -> None:
        """Sends all of a command but its end. Whatever else is sent before `complete` takes it back."""

    def complete(self) -> None:
        """Sends the end of the prepared command, or all of it if it was taken back."""

    def receive(self) -> list[Message]: ...


class Gate(Pollable, Protocol):
    """The FIFO for the device state."""

    path: str

    def narrow(self) -> None: ...

    def widen(self) -> None: ...

    def drain(self) -> bytes: ...


class NetBuffer(Pollable, Protocol):
    """The guest's output. Readable when it has sent something.

    Each method but `close` raises OutputLost when it is not under our control any more.
    """

    def install(self) -> None:
        """From now on nothing leaves but by `release`."""

    def hear(self) -> bool:
        """Has the guest sent something since the last call?"""

    @property
    def is_filling(self) -> bool:
        """Is so much held that a checkpoint should come?"""

    def cut(self) -> bool:
        """What was sent until now, the guest at a stop, is the present checkpoint's. Was some of it not heard by then?
        """

    def covered(self) -> Iterable[Packets]:
        """What the last cut covers, where it is not much."""

    def overheard(self) -> Iterable[Packets]:
        """What came for the guest, which has it, since the last cut or call, where it is not much."""

    def release(self) -> None:
        """Lets go what the last cut covers."""

    def remove(self) -> None:
        """Lets all go, and the guest speak for itself from now on."""

    def close(self) -> None:
        """Idempotent."""


class Processors(Protocol):
    """The guest's."""

    def asleep(self) -> bool:
        """All of them? Raises GuestGone."""


class Life(Protocol):
    """QEMU's process, as the kernel sees it."""

    def is_ending(self) -> bool:
        """Will no code of it run any more? Told at once, however long the kernel needs to give its memory back, and
        never of a QEMU that is only stopped. False is certain when a file of QEMU's was found closed before."""


class Note(Protocol):
    """What an agent goes by that finds the guest and no engine: the guest is held, and by whom."""

    def leave(self) -> None:
        """BEFORE any output can be held."""

    def remove(self) -> None:
        """AFTER a planned end: nothing is held any more. Idempotent."""


class WritableMemory(Protocol):
    """The standby's RAM."""

    blocks: list[RamBlock]

    def write(self, pages: Pages) -> None: ...

    def clear(self) -> None: ...


class Memory(Protocol):
    """The primary's RAM."""

    blocks: list[RamBlock]

    def take_existing(self) -> list[tuple[int, np.ndarray]]: ...

    def read(self, block: int, runs: np.ndarray) -> Pages: ...

    def take_written(self) -> list[tuple[int, np.ndarray]]: ...

    #: Is `protect` of use?
    protects_at_stop: bool

    def begin_capture(self) -> None: ...

    def protect(self) -> None:
        """The guest's processors stand, its disks are not at rest yet: does some of `capture`'s work."""

    def capture(self) -> Iterator[Pages]: ...

    def on_sent(self, block: int, runs: np.ndarray) -> None:
        """These pages of the last capture went to the backup; its others are what the backup has of them already."""

    def end_capture(self) -> None:
        """AFTER `on_sent` told of all."""

    def tend(self, now: float) -> None:
        """Upkeep between two checkpoints, of a few milliseconds at most."""


class ClockPlaces(Protocol):
    """Where in QEMU's heap kvmclock's number may be. Each method but `begin` raises GuestGone, or OSError."""

    #: Found so far in this pass.
    places: list[int]

    def begin(self) -> Reason | None:
        """A pass over all of it. Why there can be none."""

    def look(self, number: int) -> bool:
        """Looks through a part, within 1 ms. Is there more to look through?"""

    def read(self, place: int) -> int: ...

    def write(self, place: int, number: int) -> None:
        """Eight aligned bytes: all of them or none."""


class Mirror(Pollable, Protocol):
    """The primary's disks: QEMU tells each write here before the guest learns that it is done.

    Readable when there is something to `receive`. A mirror that is not read makes the guest's writes wait.
    """

    disks: Sequence[Disk]

    def start(self, shallow: Collection[int]) -> None:
        """Begins: first what the disks hold already, then whatever is written. Returns at once.

        shallow: numbers of the disks whose replica lies on the same base, so that only what differs is told.
        """

    def progress(self) -> tuple[int, int, bool]:
        """(bytes told, bytes to tell in all, is all told and each write followed); asks QEMU."""

    def receive(self) -> list[DiskWrite]:
        """What came since the last call, in order, some MiB at most. Raises MirrorLost when QEMU ended a mirror."""

    def confirm(self) -> None:
        """Lets QEMU go on with what `receive` gave: only AFTER it is in the log."""

    def close(self) -> None:
        """Lets QEMU, and the guest, go on without us at once. Idempotent."""

    def remove(self) -> None:
        """After `close`: takes away what is left in QEMU, within a bounded time."""


class ReplicaDisks(Pollable, Protocol):
    """The standby's disks. Writes are done in order, in the background; each method raises ReplicaFailed when one
    could not be done: the replica is of no use any more."""

    disks: Sequence[Disk]

    @property
    def backlog(self) -> int:
        """Bytes handed in and not yet written."""

    def submit(self, writes: Sequence[DiskWrite]) -> None:
        """Hands writes in; returns at once."""

    def advance(self) -> None:
        """Moves on with what can be done now: when readable, and after `submit`."""

    def settle(self, timeout_s: float) -> None:
        """Returns when all is written; and nobody writes any more: the guest may have its disks."""

    def close(self) -> None:
        """Writes no more. Idempotent."""


class Watchdog(Protocol):
    """Kills this process unless it is armed again, or disarmed, in time."""

    def arm(self, slack_s: float = 0.0) -> None: ...

    def disarm(self) -> None: ...


class Precedence(Protocol):
    """Who works in a pause goes before whatever else runs on the host. Never fails."""

    def take(self) -> None:
        """BEFORE each checkpoint."""

    def leave_qemu(self) -> None:
        """As soon as the guest runs again: what is left to do is ours. Idempotent."""

    def leave(self) -> None:
        """As soon as the epoch has left. Idempotent."""


class Replay(Protocol):
    """The standby's interfaces, once the guest runs here."""

    def replay(self, heard: Mapping[bytes, bytes], said: Mapping[bytes, bytes],
               reminders: Mapping[bytes, bytes]) -> None:
        """Packets to the guest, and from it, once more, and reminders to its clients: by the interface's address,
        framed as QEMU does. Never raises, and takes a bounded time."""


class Control(Pollable, Protocol):
    """The agent's orders, and reports to it. Reports are lost while no agent is connected; states are told again."""

    def orders(self) -> Sequence[Message]: ...

    def report(self, event: str, **facts: Any) -> None: ...


