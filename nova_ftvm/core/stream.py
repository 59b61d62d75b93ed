"""The migration stream that turns a standby into the guest. PURE.

RAM is in the standby already, so the stream names the blocks and carries no page:

    magic, version | configuration: the machine's name | section "ram": block list, end
    | device state, its header cut off | an empty description of the devices, which QEMU warns about when it is missing

Source: QEMU, docs/devel/migration/main.rst and migration/ram.c (stream version 3, "ram" version 4).
"""

import struct
from collections.abc import Sequence

from nova_ftvm.exception import ProtocolError
from nova_ftvm.types import RamBlock

#: Arguments of announce-self, for the guest that the stream made: at once, then 20 ms apart and slower, so that
#: switches learn its new port.
ANNOUNCE = {"initial": 10, "max": 100, "rounds": 10, "step": 20}

_MAGIC_AND_VERSION = struct.pack(">4sI", b"QEVM", 3)
_SECTION_START, _SECTION_END, _CONFIGURATION, _FOOTER = 1, 3, 7, 0x7E
_RAM_SECTION = 2
_EMPTY_DESCRIPTION = struct.pack(">BI", 6, 0)
_RAM_VERSION = 4
_FLAG_MEM_SIZE, _FLAG_EOS = 0x04, 0x10


def incoming(machine: str, blocks: Sequence[RamBlock], device_state: bytes) -> bytes:
    """The whole stream for `migrate-incoming`. `machine` is the versioned type, e.g. pc-i440fx-10.0."""
    if not device_state.startswith(_MAGIC_AND_VERSION):
        raise ProtocolError("the device state is not QEMU's stream version 3")
    name = machine.encode()
    footer = struct.pack(">BI", _FOOTER, _RAM_SECTION)
    end = struct.pack(">Q", _FLAG_EOS)
    sizes = b"".join(bytes([len(b.name)]) + b.name.encode() + struct.pack(">Q", b.size) for b in blocks)
    return b"".join((
        _MAGIC_AND_VERSION,
        struct.pack(">BI", _CONFIGURATION, len(name)), name,
        struct.pack(">BIB", _SECTION_START, _RAM_SECTION, 3), b"ram", struct.pack(">II", 0, _RAM_VERSION),
        struct.pack(">Q", sum(b.size for b in blocks) | _FLAG_MEM_SIZE), sizes, end, footer,
        struct.pack(">BI", _SECTION_END, _RAM_SECTION), end, footer,
        device_state[len(_MAGIC_AND_VERSION):], _EMPTY_DESCRIPTION))
