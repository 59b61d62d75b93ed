"""What the backup knows of the guest: frames in, whole epochs out. PURE.

Invariant: nothing of an epoch is written before its COMMIT arrived and fits what was staged; and once the first epoch
is committed, only whole epochs are ever written. Pages copied before the first epoch (PRELOAD) are written at once:
without a committed epoch there is nothing that a promotion could use.
"""

import dataclasses
from collections.abc import Sequence

from nova_ftvm.core import dirty, wire
from nova_ftvm.exception import ProtocolError
from nova_ftvm.types import Epoch, RamBlock


@dataclasses.dataclass(frozen=True, slots=True)
class Write:
    """Put these pages in now."""

    pages: tuple[dirty.Pages, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Acknowledge:
    """Tell the primary, only AFTER the Write before it is done."""

    epoch: Epoch


Action = Write | Acknowledge


class Replica:
    """One generation's replica. `device_state` belongs to `committed`, always."""

    def __init__(self, blocks: Sequence[RamBlock]) -> None:
        self._blocks = blocks
        self.committed = Epoch(0)
        self.device_state = b""
        self._forget()

    def on_frame(self, frame: wire.Frame) -> tuple[Action, ...]:
        """Raises ProtocolError, with nothing changed, for a frame that cannot come now."""
        if frame.kind is wire.Kind.PRELOAD:
            return self._preload(frame)
        if frame.epoch != self.committed + 1:
            raise ProtocolError(f"{frame.kind.name} of epoch {frame.epoch} after epoch {self.committed}")
        if frame.kind is wire.Kind.PAGES:
            self._staged.append(wire.decode_pages(frame, self._blocks))
        elif frame.kind is wire.Kind.DEVICE:
            self._staged_state.append(frame.payload)
        elif frame.kind is wire.Kind.COMMIT:
            return self._commit(frame)
        else:
            raise ProtocolError(f"{frame.kind.name} is not part of an epoch")
        return ()

    def _preload(self, frame: wire.Frame) -> tuple[Action, ...]:
        if self.committed or self._staged or self._staged_state:
            raise ProtocolError("PRELOAD after the first epoch began")
        return (Write((wire.decode_pages(frame, self._blocks),)),)

    def _commit(self, frame: wire.Frame) -> tuple[Action, ...]:
        expected = wire.decode_commit(frame)
        staged = (len(self._staged) + len(self._staged_state), sum(pages.count for pages in self._staged))
        if staged != expected:
            raise ProtocolError(f"epoch {frame.epoch} has {expected} frames and pages, {staged} arrived")
        if not self._staged_state:
            raise ProtocolError(f"epoch {frame.epoch} has no device state")
        write = Write(tuple(self._staged))
        self.device_state = b"".join(self._staged_state)
        self.committed = frame.epoch
        self._forget()
        return (write, Acknowledge(frame.epoch))

    def _forget(self) -> None:
        self._staged: list[dirty.Pages] = []
        self._staged_state: list[wire.Buffer] = []
