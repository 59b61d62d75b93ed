"""What the backup knows of the guest: frames in, whole epochs out. PURE.

Invariant: nothing of an epoch is written, to RAM or disk, before its COMMIT arrived and fits what was staged; and once
the first epoch is committed, only whole epochs are ever written. An epoch is acknowledged when it is here, and applied
after that: nothing but the end of this process can come between (doc/source/contributor/decisions/
acknowledged-when-held.rst). What is copied before the first epoch (PRELOAD, DISK_PRELOAD) is written at once: without a
committed epoch there is nothing that a promotion could use.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nova_ftvm.core import delta, dirty, wire
from nova_ftvm.core.disk import DiskWrite
from nova_ftvm.exception import ProtocolError
from nova_ftvm.types import PAGE, Buffer, Disk, Epoch, RamBlock


@dataclasses.dataclass(frozen=True, slots=True)
class Write:
    """Put these pages in now."""

    pages: tuple[dirty.Pages, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class WriteDisks:
    """Hand these to the disks now, in this order. They may be done later, but before the guest runs here."""

    writes: tuple[DiskWrite, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Acknowledge:
    """Tell the primary: the epoch is here, whole and checked."""

    epoch: Epoch


@dataclasses.dataclass(frozen=True, slots=True)
class Apply:
    """Put in what `Replica.apply` gives: AFTER the acknowledgement, which the primary's clients wait for, and BEFORE
    anything else is done, a promotion above all."""


Action = Write | WriteDisks | Acknowledge | Apply


class _StateChanges(NamedTuple):
    """Of the device state: its length, and pages of it."""

    length: int
    delta: delta.Delta


class _SentBefore:
    """What changes are against."""

    def __init__(self) -> None:
        self.memory = delta.Memory()
        #: The device state's pages, each as it was sent last; longer than the state if that was longer once.
        self._state = np.zeros((0, PAGE), np.uint8)

    def state(self, staged: Sequence[Buffer | _StateChanges]) -> bytes:
        """The device state: its pieces, or what it was with the changes in it."""
        changes = [each for each in staged if isinstance(each, _StateChanges)]
        if not changes:
            return b"".join(each for each in staged if not isinstance(each, _StateChanges))
        length = changes[-1].length
        missing = -(-length // PAGE) - len(self._state)
        if missing > 0:
            self._state = np.concatenate((self._state, np.zeros((missing, PAGE), np.uint8)))
        for each in changes:
            pages = self.memory.grow(each.delta)
            self._state[dirty.expand(pages.runs)] = pages.contents.reshape(-1, PAGE)
        return self._state.reshape(-1)[:length].tobytes()


class Replica:
    """One generation's replica. `device_state` belongs to `committed`, once that is applied."""

    def __init__(self, blocks: Sequence[RamBlock], disks: Sequence[Disk] = ()) -> None:
        self._blocks = blocks
        self._disks = disks
        self.committed = Epoch(0)
        self.device_state = b""
        self._sent_before = _SentBefore()
        self._forget()

    def on_frame(self, frame: wire.Frame) -> tuple[Action, ...]:
        """Raises ProtocolError, with nothing changed, for a frame that cannot come now."""
        if frame.kind in (wire.Kind.PRELOAD, wire.Kind.DISK_PRELOAD):
            return self._preload(frame)
        if frame.epoch != self.committed + 1:
            raise ProtocolError(f"{frame.kind.name} of epoch {frame.epoch} after epoch {self.committed}")
        if frame.kind is wire.Kind.PAGES:
            self._staged.append(wire.decode_pages(frame, self._blocks))
        elif frame.kind is wire.Kind.CHANGES:
            self._staged.append(wire.decode_changes(frame, self._blocks))
        elif frame.kind is wire.Kind.DEVICE_CHANGES:
            self._staged_state.append(_StateChanges(*wire.decode_device_changes(frame, self._blocks)))
        elif frame.kind is wire.Kind.DISK:
            self._staged_writes += wire.decode_disk(frame, self._disks)
            self._disk_frames += 1
        elif frame.kind is wire.Kind.DEVICE:
            self._staged_state.append(frame.payload)
        elif frame.kind is wire.Kind.COMMIT:
            return self._commit(frame)
        else:
            raise ProtocolError(f"{frame.kind.name} is not part of an epoch")
        return ()

    def _preload(self, frame: wire.Frame) -> tuple[Action, ...]:
        if self.committed or self._staged or self._staged_state or self._disk_frames:
            raise ProtocolError(f"{frame.kind.name} after the first epoch began")
        if frame.kind is wire.Kind.DISK_PRELOAD:
            return (WriteDisks(wire.decode_disk(frame, self._disks)),)
        return (Write((wire.decode_pages(frame, self._blocks),)),)

    def apply(self) -> list[dirty.Pages]:
        """The committed epoch's pages; from now on `device_state` is its as well."""
        memory, pages = self._sent_before.memory, []
        for staged in self._staged:
            if isinstance(staged, dirty.Pages):
                memory.forget(staged)
                pages.append(staged)
            else:
                pages.append(memory.grow(staged))
        self.device_state = self._sent_before.state(self._staged_state)
        self._forget()
        return pages

    def _commit(self, frame: wire.Frame) -> tuple[Action, ...]:
        expected = wire.decode_commit(frame)
        staged = (len(self._staged) + len(self._staged_state) + self._disk_frames,
                  sum(pages.count for pages in self._staged), len(self._staged_writes))
        if staged != expected:
            raise ProtocolError(f"epoch {frame.epoch} has {expected} frames, pages and disk writes, {staged} arrived")
        if not self._staged_state:
            raise ProtocolError(f"epoch {frame.epoch} has no device state")
        self.committed = frame.epoch
        disks = (WriteDisks(tuple(self._staged_writes)),) if self._staged_writes else ()
        return (*disks, Acknowledge(frame.epoch), Apply())

    def _forget(self) -> None:
        self._staged: list[dirty.Pages | delta.Delta] = []
        self._staged_state: list[Buffer | _StateChanges] = []
        self._staged_writes: list[DiskWrite] = []
        self._disk_frames = 0
