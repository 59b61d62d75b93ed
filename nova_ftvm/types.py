"""The words that cross rooms: ids, states and the small frozen records.

Owns names only. Nothing here decides, and nothing here does I/O.
"""

import dataclasses
import enum
from typing import NewType

#: UUID of a pair (one protected server and its backup).
PairId = NewType("PairId", str)
#: UUID of the server that the user sees.
InstanceId = NewType("InstanceId", str)
#: Grows by one each time the arbiter changes who may speak. A message of an older generation is refused.
Generation = NewType("Generation", int)
#: Number of a checkpoint within a generation; the first is 1.
Epoch = NewType("Epoch", int)

Buffer = bytes | bytearray | memoryview

#: Bytes of a guest page: the unit of dirty tracking.
PAGE = 4096


class PairState(enum.StrEnum):
    """Where a pair stands. `value` is what the server's `ft:state` shows."""

    #: Asked for; the backup's place is being made.
    PENDING = "pending"
    #: The standby exists; the first copy of RAM is under way. Nothing can be promoted yet.
    SYNCING = "syncing"
    #: The backup holds a whole committed epoch. Either side may ask the arbiter for the pair.
    PROTECTED = "protected"
    #: The guest runs alone, by the arbiter's grant.
    DEGRADED = "degraded"
    #: The backup has the arbiter's grant; the old primary may not speak any more.
    PROMOTING = "promoting"
    #: Not protected, on purpose: refused, switched off or disarmed. See the reason.
    DISABLED = "unprotected"
    #: Needs a hand. See the reason.
    ERROR = "error"


class Role(enum.StrEnum):
    """A side of a pair."""

    PRIMARY = "primary"
    BACKUP = "backup"


@dataclasses.dataclass(frozen=True, slots=True)
class RamBlock:
    """One of QEMU's RAM blocks, as x-query-ramblock lists it (QEMU 8.0 or newer)."""

    name: str
    #: Bytes in use, a multiple of no particular size; the tracker rounds up to whole pages.
    size: int
    #: Host virtual address in the QEMU process that was asked.
    address: int = 0

    @property
    def pages(self) -> int:
        return -(-self.size // PAGE)


@dataclasses.dataclass(frozen=True, slots=True)
class Disk:
    """One of the guest's disks. Its place in the table that both sides agreed on is its number on the wire."""

    #: QEMU's path of the device, e.g. /machine/peripheral/virtio-disk0/virtio-backend: the same on both sides.
    device: str
    #: Bytes that the guest sees.
    size: int
    read_only: bool
    #: What the image lies on, told by its contents: replicas on the same base need only what differs from it.
    #: Empty for an image that lies on nothing.
    base: str = ""
    #: The block node and the image file in the QEMU that was asked.
    node: str = ""
    path: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Grant:
    """The arbiter's answer. Refusal carries the reason and the generation in force."""

    granted: bool
    generation: Generation
    reason: str = ""
