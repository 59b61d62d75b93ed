"""The synchronisation connection's frames. PURE: bytes in, frames out; no socket, no clock.

    0       4    5    6       8            16           24       28       32
    | magic |ver |kind| zero  | generation |   epoch    | length | crc32  | payload ...
      FTVM    5    u8   u16      u64           u64         u32      u32      length bytes      (big endian)

crc32 covers the first 28 bytes and the payload. A frame that is too long, of another version, damaged, or of
another generation raises, and the decoder gives nothing more: the connection must be closed.

    backup                                    primary
      | CHALLENGE  32 random bytes        ->     |
      |     <- HELLO  JSON: pair, machine, blocks, disks, accelerator, proof = HMAC-SHA256(token, challenge)
      | WELCOME  JSON: disks on the same base ->  |  or BYE: why it is refused
      |     <- PRELOAD, DISK_PRELOAD ...         |   copied while the guest runs; no epoch yet
      |     <- DISK ... PAGES ... DEVICE ... COMMIT  one epoch; whole at COMMIT. DISK comes while the guest runs
      | ACK (epoch)                       ->     |   only AFTER the epoch is here, whole
      |     <- HEARD, SAID  packets under way    |   no part of an epoch, SAID after its COMMIT; core/packets.py
      | BEAT                             <->     |   a sign of life; the primary's epoch: the last whose output left
      |     <- GUEST_GONE  QEMU ended by itself  |
      |     <- HAND_OVER  the guest moves        |   a planned failover; the primary holds its output
      |     <- BYE  a planned end                |
      | BYE  why it has failed            ->     |

PAGES and DEVICE may come as CHANGES and DEVICE_CHANGES: only what changed since it was sent last.

PRELOAD and PAGES:  block u16 | zero u16 | runs u32 | runs x (first page u32, pages u32) little endian | contents
DISK_PRELOAD and DISK:  writes u32 | zero u32 | writes x (disk u16, op u16, length u32, offset u64) | contents
CHANGES:            block u16 | zero u16 | runs u32 | runs | masks | words, see core/delta.py
DEVICE_CHANGES:     length u32 | CHANGES of the state as pages, of the block after the last
COMMIT:             frames u32 | pages u64 | disk writes u64
HEARD and SAID:     the interface's address, 6 bytes | packets. HEARD's epoch is the one that will cover them
BYE of a backup:    why it has failed, UTF-8
"""

import dataclasses
import enum
import hashlib
import hmac
import json
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from nova_ftvm.core import delta, dirty
from nova_ftvm.core.disk import DiskOp, DiskWrite, split
from nova_ftvm.core.packets import Packets
from nova_ftvm.exception import ProtocolError, StaleGeneration
from nova_ftvm.types import PAGE, Buffer, Disk, Epoch, Generation, RamBlock

VERSION = 5
CHALLENGE_BYTES = 32
#: Longest frame that is read from a peer that has not proved itself yet.
GREETING_LIMIT = 1 << 16

_MAGIC = b"FTVM"
_HEADER = struct.Struct(">4sBBHQQI")
_CRC = struct.Struct(">I")
_PAGES = struct.Struct(">HHI")
_DISK = struct.Struct(">II")
_WRITE = struct.Struct(">HHIQ")
_COMMIT = struct.Struct(">IQQ")
_STATE = struct.Struct(">I")
HEADER_BYTES = _HEADER.size + _CRC.size
_MOST_STATE_BYTES = 1 << 28
_MAC_BYTES = 6
#: More of a reason is not read: it goes to the arbiter and to the server's owner.
_MOST_WHY_BYTES = 1 << 10


class Kind(enum.IntEnum):
    CHALLENGE = 1
    HELLO = 2
    WELCOME = 3
    PRELOAD = 4
    PAGES = 5
    DEVICE = 6
    COMMIT = 7
    ACK = 8
    BEAT = 9
    GUEST_GONE = 10
    BYE = 11
    DISK_PRELOAD = 12
    DISK = 13
    HAND_OVER = 14
    CHANGES = 15
    DEVICE_CHANGES = 16
    HEARD = 17
    SAID = 18


@dataclasses.dataclass(frozen=True, slots=True)
class Frame:
    kind: Kind
    generation: Generation
    epoch: Epoch
    payload: Buffer = b""


@dataclasses.dataclass(frozen=True, slots=True)
class Hello:
    """What the primary says of itself."""

    pair_id: str
    machine: str
    #: Names and sizes; the index is the frames' block number.
    blocks: tuple[RamBlock, ...]
    proof: str = ""
    #: Devices, sizes and bases; the index is the writes' disk number.
    disks: tuple[Disk, ...] = ()
    #: core.kind.KVM or TCG; '' from a peer that is too old to tell.
    accelerator: str = ""


def encode(kind: Kind, generation: Generation, epoch: Epoch = Epoch(0), payload: Sequence[Buffer] = ()) -> list[Buffer]:
    """A frame as buffers to be sent in order, without copying the payload."""
    header = _HEADER.pack(_MAGIC, VERSION, kind, 0, generation, epoch, sum(len(part) for part in payload))
    crc = zlib.crc32(header)
    for part in payload:
        crc = zlib.crc32(part, crc)
    return [header + _CRC.pack(crc), *payload]


def encode_pages(kind: Kind, generation: Generation, epoch: Epoch, pages: dirty.Pages,
                 limit: int) -> Iterator[tuple[np.ndarray, list[Buffer]]]:
    """PRELOAD or PAGES frames, each no longer than `limit`, with the runs of their pages."""
    # A run costs 8 bytes beside its pages, so a frame of one-page runs is the longest.
    for part in dirty.parts(pages, (limit - HEADER_BYTES - _PAGES.size) // (PAGE + 8)):
        meta = _meta(part.block, part.runs)
        yield part.runs, encode(kind, generation, epoch, (meta, part.contents.data))


def encode_changes(generation: Generation, epoch: Epoch, pages: dirty.Pages, memory: delta.Memory,
                   limit: int) -> Iterator[tuple[np.ndarray, list[Buffer]]]:
    """CHANGES frames, likewise; none for what is as it was when it went last."""
    most_pages = min(delta.AT_ONCE, (limit - HEADER_BYTES - _PAGES.size) // (PAGE + 8 + delta.MASK_BYTES))
    for part in dirty.parts(pages, most_pages):
        shrunk = memory.shrink(part)
        if len(shrunk.runs):
            yield shrunk.runs, encode(Kind.CHANGES, generation, epoch, _changes(shrunk))


def encode_device_changes(generation: Generation, epoch: Epoch, state: Buffer, block: int, memory: delta.Memory,
                          limit: int) -> Iterator[list[Buffer]]:
    """DEVICE_CHANGES frames: one at least, each no longer than `limit`. block: the number after the last."""
    size = -(-len(state) // PAGE)
    padded = np.zeros(size * PAGE, np.uint8)
    padded[:len(state)] = np.frombuffer(state, np.uint8)
    whole = dirty.Pages(block, np.array([[0, size]], np.uint32), padded)
    most_pages = (limit - HEADER_BYTES - _STATE.size - _PAGES.size) // (PAGE + 8 + delta.MASK_BYTES)
    for part in dirty.parts(whole, most_pages):
        yield encode(Kind.DEVICE_CHANGES, generation, epoch,
                     (_STATE.pack(len(state)), *_changes(memory.shrink(part))))


def _meta(block: int, runs: np.ndarray) -> bytes:
    return _PAGES.pack(block, 0, len(runs)) + runs.astype("<u4").tobytes()


def _changes(shrunk: delta.Delta) -> tuple[Buffer, ...]:
    return _meta(shrunk.block, shrunk.runs), shrunk.masks.tobytes(), shrunk.words.astype("<u8", copy=False).tobytes()


def decode_pages(frame: Frame, blocks: Sequence[RamBlock]) -> dirty.Pages:
    """The pages of a PRELOAD or PAGES frame, checked against the table of blocks; contents are not copied."""
    block, runs, rest = _runs(frame, blocks)
    contents = np.frombuffer(rest, np.uint8)
    if dirty.count(runs) * PAGE != len(contents):
        raise ProtocolError(f"a {frame.kind.name} frame's contents do not fit its runs")
    return dirty.Pages(block, runs, contents)


def decode_changes(frame: Frame, blocks: Sequence[RamBlock]) -> delta.Delta:
    """The pages of a CHANGES frame, whole, and checked against the table of blocks."""
    return _shrunk(frame, blocks)


def decode_device_changes(frame: Frame, blocks: Sequence[RamBlock]) -> tuple[int, delta.Delta]:
    """(length of the device state, pages of it) of a DEVICE_CHANGES frame, checked as well."""
    payload = memoryview(frame.payload)
    try:
        (length,) = _STATE.unpack_from(payload)
    except struct.error as error:
        raise ProtocolError("a DEVICE_CHANGES frame is cut short") from error
    if length > _MOST_STATE_BYTES:
        raise ProtocolError(f"a device state of {length} bytes")
    state = RamBlock("of the device state", -(-length // PAGE) * PAGE)
    return length, _shrunk(dataclasses.replace(frame, payload=payload[_STATE.size:]), [*blocks, state])


def _shrunk(frame: Frame, blocks: Sequence[RamBlock]) -> delta.Delta:
    block, runs, rest = _runs(frame, blocks)
    masks = dirty.count(runs) * delta.MASK_BYTES
    if len(rest) < masks or (len(rest) - masks) % 8:
        raise ProtocolError(f"a {frame.kind.name} frame's contents do not fit its runs")
    shrunk = delta.Delta(block, runs, np.frombuffer(rest[:masks], np.uint8).reshape(-1, delta.MASK_BYTES),
                         np.frombuffer(rest[masks:], "<u8"))
    if not shrunk.is_whole:
        raise ProtocolError(f"a {frame.kind.name} frame's words do not fit its masks")
    return shrunk


def _runs(frame: Frame, blocks: Sequence[RamBlock]) -> tuple[int, np.ndarray, memoryview]:
    """(block, runs, what follows), checked against the table of blocks."""
    try:
        block, _, number = _PAGES.unpack_from(frame.payload)
        runs = np.frombuffer(frame.payload, "<u4", 2 * number, _PAGES.size).reshape(-1, 2)
    except (struct.error, ValueError) as error:
        raise ProtocolError(f"a {frame.kind.name} frame is cut short") from error
    if block >= len(blocks):
        raise ProtocolError(f"a {frame.kind.name} frame names RAM block {block} of {len(blocks)}")
    if len(runs) and int((runs[:, 0].astype(np.int64) + runs[:, 1]).max()) > blocks[block].pages:
        raise ProtocolError(f"a {frame.kind.name} frame leaves RAM block {blocks[block].name}")
    return block, runs, memoryview(frame.payload)[_PAGES.size + runs.nbytes:]


def fitting(writes: Iterable[DiskWrite], limit: int) -> list[DiskWrite]:
    """The same writes, each small enough for a frame: in nearly every case they are already."""
    most = limit - HEADER_BYTES - _DISK.size - _WRITE.size
    return [part for write in writes for part in (split(write, most) if write.op is DiskOp.WRITE else (write,))]


def encode_disk(kind: Kind, generation: Generation, epoch: Epoch, writes: Iterable[DiskWrite],
                limit: int) -> Iterator[list[Buffer]]:
    """DISK_PRELOAD or DISK frames with the `fitting` writes in their order, each frame no longer than `limit`."""
    room = limit - HEADER_BYTES - _DISK.size
    entries: list[bytes] = []
    contents: list[Buffer] = []
    left = room
    for write in writes:
        need = _WRITE.size + len(write.contents)
        if need > left:
            yield encode(kind, generation, epoch, (_DISK.pack(len(entries), 0), *entries, *contents))
            entries, contents, left = [], [], room
        entries.append(_WRITE.pack(write.disk, write.op, write.length, write.offset))
        if write.contents:
            contents.append(write.contents)
        left -= need
    if entries:
        yield encode(kind, generation, epoch, (_DISK.pack(len(entries), 0), *entries, *contents))


def decode_disk(frame: Frame, disks: Sequence[Disk]) -> tuple[DiskWrite, ...]:
    """The writes of a DISK_PRELOAD or DISK frame, checked against the table of disks; contents are not copied."""
    payload = memoryview(frame.payload)
    try:
        number, _ = _DISK.unpack_from(payload)
        place = _DISK.size + number * _WRITE.size
        entries = list(_WRITE.iter_unpack(payload[_DISK.size:place]))
    except struct.error as error:
        raise ProtocolError(f"a {frame.kind.name} frame is cut short") from error
    writes = []
    for disk, op, length, offset in entries:
        if disk >= len(disks) or op not in DiskOp.__members__.values():
            raise ProtocolError(f"a {frame.kind.name} frame has operation {op} on disk {disk} of {len(disks)}")
        if not length or offset + length > disks[disk].size:
            raise ProtocolError(f"a {frame.kind.name} frame leaves disk {disk}: {length} bytes at {offset}")
        if disks[disk].read_only and frame.kind is Kind.DISK:
            raise ProtocolError(f"a DISK frame writes to disk {disk}, which is read-only")
        size = length if op == DiskOp.WRITE else 0
        writes.append(DiskWrite(disk, DiskOp(op), offset, length, payload[place:place + size] if size else b""))
        place += size
    if len(entries) != number or place != len(payload):
        raise ProtocolError(f"a {frame.kind.name} frame's contents do not fit its writes")
    return tuple(writes)


def encode_commit(generation: Generation, epoch: Epoch, frames: int, pages: int, writes: int) -> list[Buffer]:
    return encode(Kind.COMMIT, generation, epoch, (_COMMIT.pack(frames, pages, writes),))


def decode_commit(frame: Frame) -> tuple[int, int, int]:
    """(frames, pages, disk writes) of the epoch."""
    if len(frame.payload) != _COMMIT.size:
        raise ProtocolError("a COMMIT frame of a wrong length")
    frames, pages, writes = _COMMIT.unpack(frame.payload)
    return frames, pages, writes


def encode_packets(kind: Kind, generation: Generation, epoch: Epoch, packets: Packets) -> list[Buffer]:
    """A HEARD or SAID frame. The caller bounds the packets."""
    return encode(kind, generation, epoch, (packets.mac, packets.framed))


def decode_packets(frame: Frame) -> Packets:
    if len(frame.payload) < _MAC_BYTES:
        raise ProtocolError(f"a {frame.kind.name} frame is cut short")
    return Packets(bytes(frame.payload[:_MAC_BYTES]), frame.payload[_MAC_BYTES:])


def encode_failure(generation: Generation, why: str) -> list[Buffer]:
    """A backup's BYE."""
    return encode(Kind.BYE, generation, payload=(why.encode(errors="replace")[:_MOST_WHY_BYTES],))


def decode_failure(frame: Frame) -> str:
    """Why the backup has failed; '' when it did not say."""
    return bytes(frame.payload[:_MOST_WHY_BYTES]).decode(errors="replace")


def prove(token: str, challenge: bytes) -> str:
    """The answer to a challenge: who knows the pair's token."""
    return hmac.new(token.encode(), challenge, hashlib.sha256).hexdigest()


def encode_hello(generation: Generation, hello: Hello) -> list[Buffer]:
    body = {"pair_id": hello.pair_id, "machine": hello.machine, "proof": hello.proof,
            "blocks": [[block.name, block.size] for block in hello.blocks],
            "disks": [[disk.device, disk.size, disk.read_only, disk.base] for disk in hello.disks],
            "accelerator": hello.accelerator}
    return encode(Kind.HELLO, generation, payload=(json.dumps(body).encode(),))


def decode_hello(frame: Frame, token: str, challenge: bytes) -> Hello:
    """Raises ProtocolError unless the peer knows the token."""
    if frame.kind is not Kind.HELLO:
        raise ProtocolError(f"{frame.kind.name} instead of HELLO")
    try:
        body: dict[str, Any] = json.loads(bytes(frame.payload))
        hello = Hello(str(body["pair_id"]), str(body["machine"]),
                      tuple(RamBlock(str(name), int(size)) for name, size in body["blocks"]),
                      str(body["proof"]),
                      tuple(Disk(str(device), int(size), bool(read_only), str(base))
                            for device, size, read_only, base in body["disks"]),
                      str(body.get("accelerator", "")))
        proof = hello.proof.encode()
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ProtocolError("a HELLO that cannot be read") from error
    if not hmac.compare_digest(proof, prove(token, challenge).encode()):
        raise ProtocolError("the peer does not know the pair's token")
    return hello


def encode_welcome(generation: Generation, shallow: Sequence[int]) -> list[Buffer]:
    """`shallow`: numbers of the disks whose replica lies on the same base as the primary's."""
    return encode(Kind.WELCOME, generation, payload=(json.dumps({"shallow": list(shallow)}).encode(),))


def decode_welcome(frame: Frame) -> frozenset[int]:
    if frame.kind is not Kind.WELCOME:
        raise ProtocolError(f"{frame.kind.name} instead of WELCOME")
    try:
        return frozenset(int(number) for number in json.loads(bytes(frame.payload))["shallow"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ProtocolError("a WELCOME that cannot be read") from error


class Decoder:
    """Bytes of one connection to frames. After an error it stays broken: close the connection."""

    def __init__(self, generation: Generation, limit: int) -> None:
        self._generation = generation
        self.limit = limit
        self._buffer = bytearray()
        self._broken: ProtocolError | None = None

    def feed(self, received: Buffer) -> list[Frame]:
        """The frames that `received` completes, in order."""
        if self._broken:
            raise self._broken
        self._buffer += received
        frames = []
        try:
            while (frame := self._next()) is not None:
                frames.append(frame)
        except ProtocolError as error:
            self._broken = error
            self._buffer.clear()
            if not frames:
                raise
        return frames

    def finish(self) -> None:
        """The connection ended; raises ProtocolError when it ended within a frame, or was broken before."""
        if self._broken:
            raise self._broken
        if self._buffer:
            raise ProtocolError("the connection ended within a frame")

    def _next(self) -> Frame | None:
        if len(self._buffer) < HEADER_BYTES:
            return None
        magic, version, kind, zero, generation, epoch, length = _HEADER.unpack_from(self._buffer)
        if magic != _MAGIC:
            raise ProtocolError("not a frame of this protocol")
        if version != VERSION:
            raise ProtocolError(f"a frame of version {version}; this side speaks {VERSION}: upgrade both agents")
        if HEADER_BYTES + length > self.limit:
            raise ProtocolError(f"a frame of {HEADER_BYTES + length} bytes; the limit is {self.limit}")
        if len(self._buffer) < HEADER_BYTES + length:
            return None
        (crc,) = _CRC.unpack_from(self._buffer, _HEADER.size)
        with memoryview(self._buffer) as view:
            payload = bytes(view[HEADER_BYTES:HEADER_BYTES + length])
            if zlib.crc32(payload, zlib.crc32(view[:_HEADER.size])) != crc:
                raise ProtocolError("a damaged frame")
        if zero or kind not in Kind.__members__.values():
            raise ProtocolError(f"a frame of unknown kind {kind}")
        if generation != self._generation:
            raise StaleGeneration(generation, self._generation)
        del self._buffer[:HEADER_BYTES + length]
        return Frame(Kind(kind), Generation(generation), Epoch(epoch), payload)
