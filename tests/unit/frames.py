"""Frames and pages that several tests send."""

from collections.abc import Sequence

import numpy as np

from nova_ftvm.core import dirty, wire
from nova_ftvm.core.disk import DiskOp, DiskWrite
from nova_ftvm.types import PAGE, Buffer, Disk, Epoch, Generation, RamBlock

GENERATION = Generation(7)
LIMIT = 1 << 20
BLOCKS = [RamBlock("pc.ram", 64 * PAGE, 0x10000), RamBlock("vga.vram", 4 * PAGE - 100, 0x90000)]

DISKS = [Disk("/machine/a", 1 << 20, False), Disk("/machine/b", 1 << 16, False), Disk("/machine/cd", 1 << 16, True)]


def write(disk: int, offset: int, contents: bytes) -> DiskWrite:
    return DiskWrite(disk, DiskOp.WRITE, offset, len(contents), contents)


def disk_frames(kind: wire.Kind, epoch: int, writes: list[DiskWrite], limit: int = LIMIT) -> list[bytes]:
    fit = wire.fitting(writes, limit)
    return [join(frame) for frame in wire.encode_disk(kind, GENERATION, Epoch(epoch), fit, limit)]


def pages(numbers: list[int], value: int = 1, block: int = 0) -> dirty.Pages:
    """Pages that are full of `value`."""
    return dirty.Pages(block, dirty.compress(np.array(numbers, np.int64)),
                       np.full(len(numbers) * PAGE, value, np.uint8))


def join(buffers: list[Buffer]) -> bytes:
    return b"".join(bytes(buffer) for buffer in buffers)


def page_frames(kind: wire.Kind, epoch: int, some: dirty.Pages, limit: int = LIMIT) -> list[bytes]:
    return [join(frame) for _, frame in wire.encode_pages(kind, GENERATION, Epoch(epoch), some, limit)]


def epoch_frames(epoch: int, some: list[dirty.Pages], state: bytes = b"state", limit: int = LIMIT,
                 writes: Sequence[DiskWrite] = ()) -> list[bytes]:
    """All frames of one epoch, as the primary sends them."""
    sent = disk_frames(wire.Kind.DISK, epoch, list(writes), limit)
    sent += [frame for piece in some for frame in page_frames(wire.Kind.PAGES, epoch, piece, limit)]
    sent.append(join(wire.encode(wire.Kind.DEVICE, GENERATION, Epoch(epoch), (state,))))
    sent.append(join(wire.encode_commit(GENERATION, Epoch(epoch), len(sent), sum(piece.count for piece in some),
                                        len(writes))))
    return sent


def decode(*received: bytes) -> list[wire.Frame]:
    decoder = wire.Decoder(GENERATION, LIMIT)
    return [frame for part in received for frame in decoder.feed(part)]
