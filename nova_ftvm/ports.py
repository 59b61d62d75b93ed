"""What the engine needs of the world. host/ implements these; tests give fakes; cmd/ joins them."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from nova_ftvm.core.dirty import Pages
from nova_ftvm.types import RamBlock

Message = dict[str, Any]


class Pollable(Protocol):
    def fileno(self) -> int: ...


class Monitor(Pollable, Protocol):
    """A QMP connection. Every method raises GuestGone when QEMU ended."""

    def command(self, command: str, **arguments: Any) -> Any: ...

    def send(self, lines: bytes) -> None: ...

    def receive(self) -> list[Message]: ...


class Gate(Pollable, Protocol):
    """The FIFO for the device state."""

    path: str

    def narrow(self) -> None: ...

    def widen(self) -> None: ...

    def drain(self) -> bytes: ...


class NetBuffer(Protocol):
    """The guest's output. `barrier` and `release` are QMP lines, their answers carry those words as id."""

    barrier: bytes
    release: bytes

    def install(self) -> None: ...

    def remove(self) -> None: ...


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

    def begin_capture(self) -> None: ...

    def capture(self) -> Iterator[Pages]: ...


class Watchdog(Protocol):
    """Kills this process unless it is disarmed in time."""

    def arm(self) -> None: ...

    def disarm(self) -> None: ...


class Domain(Protocol):
    """The standby, as libvirt knows it."""

    def resume(self) -> None: ...


class Control(Pollable, Protocol):
    """The agent's orders, and reports to it. Reports are lost while no agent is connected; states are told again."""

    def orders(self) -> Sequence[Message]: ...

    def report(self, event: str, **facts: Any) -> None: ...


