"""The NBD protocol, newstyle-fixed, both sides. PURE: bytes in, writes and bytes out; no socket, no clock.

What is spoken is what a mirror needs: one export a connection, changes only, simple replies.

    client                                              server
      |                       <- NBDMAGIC | IHAVEOPT | flags u16
      | flags u32 ->
      | IHAVEOPT | option u32 | length u32 | ...   ->          GO (or INFO) and the export's name: a disk's number
      |       <- reply magic u64 | option | type | length | ...     INFO of the export, of block sizes; ACK

      0           4       6         8          16         24         28
      | magic u32 | flags | command | cookie   | offset   | length   | contents, of a WRITE      (big endian)
      |       <- magic u32 | error u32 | cookie u64                    in any order

On the primary's host the engine is the server and QEMU's mirror the client; on the backup's, the standby's QEMU is the
server and the engine the client. The server offers neither FLUSH nor FUA: QEMU flushes a mirror's target whenever the
guest stops, and there is nothing here to flush to.
Source: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md
"""

import errno
import struct
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from nova_ftvm.core.disk import DiskOp, DiskWrite, split
from nova_ftvm.exception import ProtocolError

_GREETING = struct.Struct(">8s8sH")
_NBDMAGIC, _IHAVEOPT = b"NBDMAGIC", b"IHAVEOPT"
_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2
_CLIENT_FLAGS = struct.Struct(">I")
_OPTION = struct.Struct(">8sII")
_OPT_EXPORT_NAME, _OPT_ABORT, _OPT_LIST, _OPT_INFO, _OPT_GO = 1, 2, 3, 6, 7

_OPTION_REPLY = struct.Struct(">QIII")
_OPTION_REPLY_MAGIC = 0x3E889045565A9
_REP_ACK, _REP_SERVER, _REP_INFO = 1, 2, 3
_REP_ERROR = 1 << 31
_REP_ERR_UNSUP, _REP_ERR_INVALID, _REP_ERR_UNKNOWN = _REP_ERROR + 1, _REP_ERROR + 3, _REP_ERROR + 6
_INFO_EXPORT, _INFO_BLOCK_SIZE = 0, 3
_INFO_OF_EXPORT = struct.Struct(">HQH")
_INFO_OF_BLOCK_SIZE = struct.Struct(">HIII")
_HAS_FLAGS, _READ_ONLY, _SEND_TRIM, _SEND_WRITE_ZEROES = 1 << 0, 1 << 1, 1 << 5, 1 << 6

_REQUEST = struct.Struct(">IHHQQI")
_REQUEST_MAGIC = 0x25609513
_CMD_WRITE, _CMD_DISC, _CMD_TRIM, _CMD_WRITE_ZEROES = 1, 2, 4, 6
_OPS = {_CMD_WRITE: DiskOp.WRITE, _CMD_WRITE_ZEROES: DiskOp.ZERO, _CMD_TRIM: DiskOp.DISCARD}
_COMMANDS = {op: command for command, op in _OPS.items()}
_REPLY = struct.Struct(">IIQ")
_REPLY_MAGIC = 0x67446698
#: A reply without an error, up to its cookie.
_DONE = struct.pack(">II", _REPLY_MAGIC, 0)

#: The guest's sectors: QEMU must never read around what is written to make it fit a block.
_MIN_BLOCK, _PREFERRED_BLOCK = 1, 4096
#: A name is at most 4096 bytes, and no option is much longer than a name.
_MOST_OPTION_BYTES = 4096 + 64
_STAGING_BYTES = 1 << 16
#: What a server takes that does not say otherwise.
_USUAL_MAX_PAYLOAD = 32 << 20
#: A length has 32 bits; this is a multiple of any block.
_MOST_BYTES_WITHOUT_CONTENTS = 1 << 30
#: Requests that QEMU's server works at; beyond it stops reading.
_MOST_IN_FLIGHT = 16


class Server:
    """The server's side of one connection.

    The caller reads into `room()`, tells `received` how much that was, sends `unsent` at once, and `answers()` when the
    writes may count as done. After a ProtocolError nothing more may be read.
    """

    def __init__(self, exports: Mapping[int, int], max_payload: int) -> None:
        """exports: bytes of each disk, by its number. max_payload: bytes of a WRITE at most."""
        self._exports = exports
        self._max_payload = max_payload
        #: The disk that is written over this connection; None while that is not settled.
        self.disk: int | None = None
        #: The client said that it ends.
        self.ended = False
        self.unsent = bytearray(_GREETING.pack(_NBDMAGIC, _IHAVEOPT, _FIXED_NEWSTYLE | _NO_ZEROES))
        self._answers = bytearray()
        self._take: Callable[[int, int], int] = self._take_flags
        self._writes: list[DiskWrite] = []
        self._staging = np.empty(_STAGING_BYTES, np.uint8).data
        self._staged = 0
        # A WRITE whose contents are still coming.
        self._partial: DiskWrite | None = None
        self._missing = self._staging[:0]
        self._cookie = b""

    def room(self) -> list[memoryview]:
        """Where the next bytes belong: contents straight into their own buffer, all else into the staging."""
        if self._partial is not None:
            return [self._missing, self._staging]
        return [self._staging[self._staged:]]

    def received(self, count: int) -> list[DiskWrite]:
        """`count` bytes came into `room()`. The writes that are whole now, in order."""
        if self._partial is not None:
            count = self._fill(count)
        end = self._staged + count
        start = 0
        while not self.ended and (taken := self._take(start, end)):
            start += taken
        self._staged = end - start
        if start and self._staged:
            self._staging[:self._staged] = bytes(self._staging[start:end])
        writes, self._writes = self._writes, []
        return writes

    def answers(self) -> bytearray:
        """Replies to the writes that were given so far, each once."""
        answers, self._answers = self._answers, bytearray()
        return answers

    def _fill(self, count: int) -> int:
        """Puts what came first to the open contents; how much of `count` is left for the staging."""
        assert self._partial is not None
        filled = min(count, len(self._missing))
        self._missing = self._missing[filled:]
        if not self._missing:
            self._finish(self._partial, self._cookie)
            self._partial = None
        return count - filled

    def _finish(self, write: DiskWrite, cookie: bytes) -> None:
        self._writes.append(write)
        self._answers += _DONE + cookie

    # Each takes one message from staging[start:end]: its length, or 0 when it is not whole.

    def _take_flags(self, start: int, end: int) -> int:
        if end - start < _CLIENT_FLAGS.size:
            return 0
        (flags,) = _CLIENT_FLAGS.unpack_from(self._staging, start)
        if not flags & _FIXED_NEWSTYLE or flags & ~(_FIXED_NEWSTYLE | _NO_ZEROES):
            raise ProtocolError(f"an NBD client with the flags {flags:#x}")
        self._take = self._take_option
        return _CLIENT_FLAGS.size

    def _take_option(self, start: int, end: int) -> int:
        if end - start < _OPTION.size:
            return 0
        magic, option, length = _OPTION.unpack_from(self._staging, start)
        if magic != _IHAVEOPT or length > _MOST_OPTION_BYTES:
            raise ProtocolError(f"no NBD option: {magic!r}, {length} bytes")
        content = start + _OPTION.size
        if end < content + length:
            return 0
        self._answer_option(option, bytes(self._staging[content:content + length]))
        return _OPTION.size + length

    def _answer_option(self, option: int, content: bytes) -> None:
        if option in (_OPT_GO, _OPT_INFO):
            self._answer_go(option, content)
        elif option == _OPT_LIST and not content:
            for disk in self._exports:
                name = str(disk).encode()
                self._reply_option(option, _REP_SERVER, struct.pack(">I", len(name)) + name)
            self._reply_option(option, _REP_ACK)
        elif option == _OPT_ABORT:
            self._reply_option(option, _REP_ACK)
            self.ended = True
        elif option == _OPT_EXPORT_NAME:
            raise ProtocolError("an NBD client of the old style: this option has no answer")
        else:
            self._reply_option(option, _REP_ERR_UNSUP if option != _OPT_LIST else _REP_ERR_INVALID)

    def _answer_go(self, option: int, content: bytes) -> None:
        """content: length of the name u32, name, number of wanted infos u16, that many u16."""
        name_end = 4 + int.from_bytes(content[:4], "big")
        infos = content[name_end:]
        if len(infos) < 2 or len(infos) != 2 + 2 * int.from_bytes(infos[:2], "big"):
            return self._reply_option(option, _REP_ERR_INVALID)
        disk = next((disk for disk in self._exports if str(disk).encode() == content[4:name_end]), None)
        if disk is None:
            return self._reply_option(option, _REP_ERR_UNKNOWN)
        self._reply_option(option, _REP_INFO, _INFO_OF_EXPORT.pack(
            _INFO_EXPORT, self._exports[disk], _HAS_FLAGS | _SEND_TRIM | _SEND_WRITE_ZEROES))
        self._reply_option(option, _REP_INFO, _INFO_OF_BLOCK_SIZE.pack(
            _INFO_BLOCK_SIZE, _MIN_BLOCK, _PREFERRED_BLOCK, self._max_payload))
        self._reply_option(option, _REP_ACK)
        if option == _OPT_GO:
            self.disk = disk
            self._take = self._take_request
        return None

    def _reply_option(self, option: int, kind: int, content: bytes = b"") -> None:
        self.unsent += _OPTION_REPLY.pack(_OPTION_REPLY_MAGIC, option, kind, len(content)) + content

    def _take_request(self, start: int, end: int) -> int:
        head = start + _REQUEST.size
        if end < head:
            return 0
        magic, _, command, cookie, offset, length = _REQUEST.unpack_from(self._staging, start)
        if magic != _REQUEST_MAGIC:
            raise ProtocolError("no NBD request: its magic is wrong")
        op = _OPS.get(command)
        if op is None:
            self._refuse(command, cookie)
            return _REQUEST.size
        disk = self.disk
        assert disk is not None
        if offset + length > self._exports[disk]:
            raise ProtocolError(f"{op.name} of {length} bytes at {offset} leaves disk {disk}, "
                                f"which has {self._exports[disk]}")
        if op is not DiskOp.WRITE:
            self._finish(DiskWrite(disk, op, offset, length), cookie.to_bytes(8, "big"))
            return _REQUEST.size
        if length > self._max_payload:
            raise ProtocolError(f"WRITE of {length} bytes; at most {self._max_payload} were agreed on")
        if end >= head + length:
            contents = bytes(self._staging[head:head + length])
            self._finish(DiskWrite(disk, op, offset, length, contents), cookie.to_bytes(8, "big"))
            return _REQUEST.size + length
        self._begin(disk, offset, length, head, end)
        self._cookie = cookie.to_bytes(8, "big")
        return end - start

    def _begin(self, disk: int, offset: int, length: int, head: int, end: int) -> None:
        """Opens a WRITE; the first of its contents are in staging[head:end]."""
        # Not a bytearray: that is filled with zeros first, by 256 page faults for each MiB.
        contents = np.empty(length, np.uint8).data
        contents[:end - head] = self._staging[head:end]
        self._partial = DiskWrite(disk, DiskOp.WRITE, offset, length, contents)
        self._missing = contents[end - head:]

    def _refuse(self, command: int, cookie: int) -> None:
        if command == _CMD_DISC:
            self.ended = True
        else:
            self.unsent += _REPLY.pack(_REPLY_MAGIC, errno.EINVAL, cookie)


class Client:
    """The client's side of one connection.

    The caller sends `unsent` and what `request` gives, and hands what comes to `received`. Requests are done in any
    order, so that one that overlaps another must wait for its answer: see `may_send`.
    """

    def __init__(self, export: str) -> None:
        self._export = export
        self.unsent = bytearray()
        #: May requests be sent?
        self.ready = False
        self.size = 0
        self.max_payload = _USUAL_MAX_PAYLOAD
        self._in_flight: dict[int, DiskWrite] = {}
        self._cookies = 0
        self._buffer = bytearray()
        self._take: Callable[[], int] = self._take_greeting
        self._answered: list[tuple[DiskWrite, int]] = []

    def may_send(self, write: DiskWrite) -> bool:
        """Is there room for it, and does it touch nothing that is still being written?"""
        if len(self._in_flight) >= _MOST_IN_FLIGHT:
            return False
        start, end = write.offset, write.offset + write.length
        return all(end <= other.offset or start >= other.offset + other.length for other in self._in_flight.values())

    def request(self, write: DiskWrite) -> bytes:
        """The head of a request; a WRITE's contents follow it. `write` must have passed `may_send` and `pieces`."""
        self._cookies += 1
        self._in_flight[self._cookies] = write
        return _REQUEST.pack(_REQUEST_MAGIC, 0, _COMMANDS[write.op], self._cookies, write.offset, write.length)

    def pieces(self, write: DiskWrite) -> Iterator[DiskWrite]:
        """The write in pieces that the server takes."""
        return split(write, self.max_payload if write.op is DiskOp.WRITE else _MOST_BYTES_WITHOUT_CONTENTS)

    def received(self, came: bytes) -> list[tuple[DiskWrite, int]]:
        """The requests that are answered now, each with its error number; 0 for a request that was done."""
        self._buffer += came
        while taken := self._take():
            del self._buffer[:taken]
        answered, self._answered = self._answered, []
        return answered

    # Each takes one message from the buffer's start: its length, or 0 when it is not whole.

    def _take_greeting(self) -> int:
        if len(self._buffer) < _GREETING.size:
            return 0
        magic, style, flags = _GREETING.unpack_from(self._buffer)
        if magic != _NBDMAGIC or style != _IHAVEOPT or not flags & _FIXED_NEWSTYLE:
            raise ProtocolError("no NBD server of the fixed newstyle")
        name = self._export.encode()
        self.unsent += _CLIENT_FLAGS.pack(flags & (_FIXED_NEWSTYLE | _NO_ZEROES))
        # No INFO is asked for: a client that asks for block sizes has to keep to the least one.
        self.unsent += _OPTION.pack(_IHAVEOPT, _OPT_GO, 4 + len(name) + 2)
        self.unsent += struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
        self._take = self._take_option_reply
        return _GREETING.size

    def _take_option_reply(self) -> int:
        if len(self._buffer) < _OPTION_REPLY.size:
            return 0
        magic, option, kind, length = _OPTION_REPLY.unpack_from(self._buffer)
        if magic != _OPTION_REPLY_MAGIC or option != _OPT_GO or length > _MOST_OPTION_BYTES:
            raise ProtocolError("no answer to the NBD option GO")
        end = _OPTION_REPLY.size + length
        if len(self._buffer) < end:
            return 0
        content = bytes(self._buffer[_OPTION_REPLY.size:end])
        if kind & _REP_ERROR:
            why = content.decode(errors="replace") or f"error {kind - _REP_ERROR}"
            raise ProtocolError(f"the NBD server refuses export {self._export}: {why}")
        if kind == _REP_INFO:
            self._take_info(content)
        elif kind == _REP_ACK:
            self._begin()
        return end

    def _take_info(self, content: bytes) -> None:
        kind = int.from_bytes(content[:2], "big")
        try:
            if kind == _INFO_EXPORT:
                _, self.size, flags = _INFO_OF_EXPORT.unpack(content)
                if flags & _READ_ONLY or not flags & _SEND_WRITE_ZEROES or not flags & _SEND_TRIM:
                    raise ProtocolError(f"NBD export {self._export} takes no writes, zeroes or trims ({flags:#x})")
            elif kind == _INFO_BLOCK_SIZE:
                self.max_payload = min(self.max_payload, _INFO_OF_BLOCK_SIZE.unpack(content)[3])
        except struct.error as error:
            raise ProtocolError("an NBD INFO of a wrong length") from error

    def _begin(self) -> None:
        if not self.size or not self.max_payload:
            raise ProtocolError(f"the NBD server tells no size of export {self._export}")
        self.ready = True
        self._take = self._take_reply

    def _take_reply(self) -> int:
        if len(self._buffer) < _REPLY.size:
            return 0
        magic, error, cookie = _REPLY.unpack_from(self._buffer)
        if magic != _REPLY_MAGIC:
            raise ProtocolError("no NBD reply: its magic is wrong")
        write = self._in_flight.pop(cookie, None)
        if write is None:
            raise ProtocolError("an NBD reply to no request")
        self._answered.append((write, error))
        return _REPLY.size
