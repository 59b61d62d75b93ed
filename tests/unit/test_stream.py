"""core/stream.py: golden bytes of the migration stream."""

import pytest

from nova_ftvm.core import stream
from nova_ftvm.exception import ProtocolError
from nova_ftvm.types import RamBlock

HEADER = b"QEVM\0\0\0\x03"
BLOCKS = [RamBlock("pc.ram", 0x8000000), RamBlock("0000:00:02.0/vga.vram", 0x1000000)]

GOLDEN = (
    b"QEVM" b"\x00\x00\x00\x03"                                   # magic, version
    b"\x07" b"\x00\x00\x00\x0f" b"pc-i440fx-10.0x"                # configuration: the machine's name
    b"\x01" b"\x00\x00\x00\x02" b"\x03ram"                        # section start, id 2, name
    b"\x00\x00\x00\x00" b"\x00\x00\x00\x04"                       # instance 0, version 4
    b"\x00\x00\x00\x00\x09\x00\x00\x04"                           # sum of sizes | MEM_SIZE
    b"\x06pc.ram" b"\x00\x00\x00\x00\x08\x00\x00\x00"
    b"\x150000:00:02.0/vga.vram" b"\x00\x00\x00\x00\x01\x00\x00\x00"
    b"\x00\x00\x00\x00\x00\x00\x00\x10"                           # EOS
    b"\x7e" b"\x00\x00\x00\x02"                                   # footer of section 2
    b"\x03" b"\x00\x00\x00\x02"                                   # section end, id 2
    b"\x00\x00\x00\x00\x00\x00\x00\x10"                           # EOS
    b"\x7e" b"\x00\x00\x00\x02"
    b"the devices\x00"                                            # the device state without its header
    b"\x06" b"\x00\x00\x00\x00")                                  # an empty description


def test_the_stream_is_what_qemu_reads_byte_by_byte() -> None:
    assert stream.incoming("pc-i440fx-10.0x", BLOCKS, HEADER + b"the devices\x00") == GOLDEN


@pytest.mark.parametrize("state", [b"", b"QEVM", b"QEVM\0\0\0\x02rest", b"garbage and more"])
def test_what_is_no_device_state_is_refused(state: bytes) -> None:
    with pytest.raises(ProtocolError, match="not QEMU's stream version 3"):
        stream.incoming("pc", BLOCKS, state)
