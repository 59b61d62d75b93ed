"""core/nbd.py: both sides against the protocol's own words, cut and damaged everywhere, and against each other."""

import errno
import itertools
import random
import struct
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nova_ftvm.core import nbd
from nova_ftvm.core.disk import DiskOp, DiskWrite
from nova_ftvm.exception import ProtocolError

MAX = 1 << 17
SIZE = 1 << 20
EXPORTS = {0: SIZE, 3: 5 << 40}
GREETING = b"NBDMAGICIHAVEOPT\x00\x03"
LIST, INFO, GO, ABORT = 3, 6, 7, 2
WRITE, DISC, FLUSH, TRIM, WRITE_ZEROES = 1, 2, 3, 4, 6


def option(number: int, content: bytes = b"") -> bytes:
    return b"IHAVEOPT" + struct.pack(">II", number, len(content)) + content


def go(name: bytes, number: int = GO, infos: Sequence[int] = (3,)) -> bytes:
    return option(number, struct.pack(">I", len(name)) + name + struct.pack(f">H{len(infos)}H", len(infos), *infos))


def option_reply(number: int, kind: int, content: bytes = b"") -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, number, kind, len(content)) + content


def granted(number: int, size: int) -> bytes:
    return (option_reply(number, 3, struct.pack(">HQH", 0, size, 0b1100001))
            + option_reply(number, 3, struct.pack(">HIII", 3, 1, 4096, MAX)) + option_reply(number, 1))


def request(command: int, cookie: int, offset: int, length: int, contents: bytes = b"") -> bytes:
    return struct.pack(">IHHQQI", 0x25609513, 0, command, cookie, offset, length) + contents


def reply(cookie: int, error: int = 0) -> bytes:
    return struct.pack(">IIQ", 0x67446698, error, cookie)


def cut(data: bytes, most: Sequence[int]) -> Iterator[bytes]:
    """In pieces of these lengths, over and over."""
    done = turn = 0
    while done < len(data):
        yield data[done:done + most[turn % len(most)]]
        done += most[turn % len(most)]
        turn += 1


def put(server: nbd.Server, piece: bytes) -> list[DiskWrite]:
    """What a scattering read does."""
    writes: list[DiskWrite] = []
    while piece and not server.ended:
        count = 0
        for room in server.room():
            part = piece[:len(room)]
            room[:len(part)] = part
            piece = piece[len(part):]
            count += len(part)
        writes += server.received(count)
    return writes


def transmitting(disk: int = 0) -> nbd.Server:
    server = nbd.Server(EXPORTS, MAX)
    assert put(server, struct.pack(">I", 3) + go(str(disk).encode())) == []
    assert server.disk == disk
    server.unsent.clear()
    return server


def plain(writes: Sequence[DiskWrite]) -> list[tuple[int, DiskOp, int, bytes | int]]:
    """With contents that can be compared."""
    return [(w.disk, w.op, w.offset, bytes(w.contents) if w.op is DiskOp.WRITE else w.length) for w in writes]


# The server's handshake


def test_a_client_that_goes_is_told_size_flags_and_block_sizes() -> None:
    server = nbd.Server(EXPORTS, MAX)
    put(server, struct.pack(">I", 3) + go(b"3"))
    assert bytes(server.unsent) == GREETING + granted(GO, 5 << 40)
    assert server.disk == 3 and not server.ended


def test_to_ask_is_not_to_go() -> None:
    server = nbd.Server(EXPORTS, MAX)
    put(server, struct.pack(">I", 1) + go(b"0", INFO))
    assert bytes(server.unsent) == GREETING + granted(INFO, SIZE) and server.disk is None


# Encryption, structured replies, meta contexts, extended headers, and what is not invented yet.
@pytest.mark.parametrize("number", [5, 8, 9, 10, 11, 77])
def test_what_is_not_spoken_is_refused_and_the_client_may_go_on(number: int) -> None:
    server = nbd.Server(EXPORTS, MAX)
    put(server, struct.pack(">I", 3) + option(number, b"something") + go(b"0"))
    assert bytes(server.unsent) == GREETING + option_reply(number, (1 << 31) + 1) + granted(GO, SIZE)


@pytest.mark.parametrize("name", [b"1", b"", b"00", b"0 ", b"zero"])
def test_an_unknown_disk_is_refused_and_the_client_may_go_on(name: bytes) -> None:
    server = nbd.Server(EXPORTS, MAX)
    put(server, struct.pack(">I", 3) + go(name))
    assert bytes(server.unsent) == GREETING + option_reply(GO, (1 << 31) + 6) and server.disk is None
    put(server, go(b"0"))
    assert server.disk == 0


@pytest.mark.parametrize("content", [b"", b"\0\0\0\1", b"\0\0\0\1" + b"0" + b"\0\1", b"\0\0\0\1" + b"0" + b"\0\0\0",
                                     b"\xff\xff\xff\xff" + b"0\0\0"])
def test_a_request_to_go_that_makes_no_sense_is_invalid(content: bytes) -> None:
    server = nbd.Server(EXPORTS, MAX)
    put(server, struct.pack(">I", 3) + option(GO, content))
    assert bytes(server.unsent) == GREETING + option_reply(GO, (1 << 31) + 3) and server.disk is None


def test_the_exports_are_listed() -> None:
    server = nbd.Server(EXPORTS, MAX)
    put(server, struct.pack(">I", 3) + option(LIST) + option(LIST, b"x"))
    assert bytes(server.unsent) == GREETING + b"".join(
        option_reply(LIST, 2, b"\0\0\0\1" + name) for name in (b"0", b"3")) + option_reply(LIST, 1) + option_reply(
        LIST, (1 << 31) + 3)


def test_a_client_that_gives_up_is_answered_and_ends() -> None:
    server = nbd.Server(EXPORTS, MAX)
    put(server, struct.pack(">I", 3) + option(ABORT))
    assert bytes(server.unsent) == GREETING + option_reply(ABORT, 1) and server.ended


@pytest.mark.parametrize(("sent", "match"), [
    (struct.pack(">I", 2) + go(b"0"), "flags 0x2"), (struct.pack(">I", 7) + go(b"0"), "flags 0x7"),
    (struct.pack(">I", 3) + b"ihaveopt" + go(b"0")[8:], "no NBD option"),
    (struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", GO, 1 << 20), "1048576 bytes"),
    (struct.pack(">I", 3) + option(1, b"0"), "old style")])
def test_what_is_no_handshake_is_refused(sent: bytes, match: str) -> None:
    with pytest.raises(ProtocolError, match=match):
        put(nbd.Server(EXPORTS, MAX), sent)


# The server's requests

requests = st.lists(st.tuples(st.sampled_from([WRITE, TRIM, WRITE_ZEROES]), st.integers(0, SIZE),
                              st.sampled_from([0, 1, 512, 4096, 66000, MAX])), max_size=12)


@settings(max_examples=80, deadline=None)
@given(requests, st.lists(st.integers(1, 150_000), min_size=1, max_size=5))
def test_writes_come_out_whole_and_in_order_however_they_are_cut(wanted: list[tuple[int, int, int]],
                                                                  most: list[int]) -> None:
    server = transmitting()
    sent, expected = b"", []
    for cookie, (command, offset, length) in enumerate(wanted):
        offset = min(offset, SIZE - length)
        contents = random.Random(cookie).randbytes(length) if command == WRITE else b""
        sent += request(command, cookie, offset, length, contents)
        op = {WRITE: DiskOp.WRITE, TRIM: DiskOp.DISCARD, WRITE_ZEROES: DiskOp.ZERO}[command]
        expected.append((0, op, offset, contents if command == WRITE else length))
    came: list[DiskWrite] = []
    answered = bytearray()
    for piece in cut(sent, most):
        came += put(server, piece)
        answered += server.answers()
        assert len(answered) == 16 * len(came), "a write is answered when it is whole, not before, not twice"
    assert plain(came) == expected
    assert bytes(answered) == b"".join(map(reply, range(len(wanted)))) and not server.unsent


def test_every_boundary_of_a_whole_conversation_is_a_boundary_like_any_other() -> None:
    requests = (request(WRITE, 1, 8, 3, b"abc") + request(0, 2, 0, 512) + request(TRIM, 3, 0, 512)
                + request(WRITE, 4, 0, 0) + request(DISC, 5, 0, 0))
    sent = struct.pack(">I", 3) + option(8) + go(b"0") + requests
    for first in range(len(sent)):
        server = nbd.Server(EXPORTS, MAX)
        came = put(server, sent[:first]) + put(server, sent[first:])
        assert plain(came) == [(0, DiskOp.WRITE, 8, b"abc"), (0, DiskOp.DISCARD, 0, 512), (0, DiskOp.WRITE, 0, b"")]
        assert bytes(server.answers()) == reply(1) + reply(3) + reply(4)
        assert bytes(server.unsent).endswith(granted(GO, SIZE) + reply(2, errno.EINVAL)) and server.ended


def test_contents_are_read_straight_to_their_place() -> None:
    server = transmitting()
    put(server, request(WRITE, 1, 0, MAX))
    room = server.room()[0]
    assert len(room) == MAX
    room[:] = b"x" * MAX
    (write,) = server.received(MAX)
    room[:1] = b"y"
    assert bytes(write.contents[:2]) == b"yx"


@pytest.mark.parametrize("command", [0, FLUSH, 5, 7, 99])
def test_reads_and_what_is_not_offered_are_invalid(command: int) -> None:
    server = transmitting()
    assert put(server, request(command, 7, 0, 512)) == []
    assert bytes(server.unsent) == reply(7, errno.EINVAL) and not server.answers() and not server.ended


@pytest.mark.parametrize(("sent", "match"), [
    (b"\0" + request(WRITE, 1, 0, 512)[1:], "magic"),
    (request(WRITE, 1, 0, MAX + 1), f"at most {MAX} were agreed on"),
    (request(WRITE, 1, SIZE - 511, 512), "WRITE of 512 bytes at 1048065 leaves disk 0"),
    (request(TRIM, 1, SIZE, 1), "DISCARD of 1 bytes at 1048576 leaves disk 0"),
    (request(WRITE_ZEROES, 1, (1 << 64) - 1, 1), "leaves disk 0")])
def test_what_leaves_the_disk_or_what_was_agreed_on_is_refused(sent: bytes, match: str) -> None:
    server = transmitting()
    with pytest.raises(ProtocolError, match=match):
        put(server, sent)
    assert not server.answers()


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damage_is_refused_or_stays_within_the_disk(data: st.DataObject) -> None:
    sent = bytearray(struct.pack(">I", 3) + option(8) + go(b"0") + request(WRITE, 1, 0, 512, b"x" * 512)
                     + request(TRIM, 2, 0, SIZE) + request(WRITE, 3, 512, 3, b"abc"))
    for _ in range(data.draw(st.integers(1, 3))):
        sent[data.draw(st.integers(0, len(sent) - 1))] = data.draw(st.integers(0, 255))
    server = nbd.Server(EXPORTS, MAX)
    try:
        for piece in cut(bytes(sent), [data.draw(st.integers(1, 700))]):
            for write in put(server, piece):
                assert write.disk in EXPORTS and write.offset + write.length <= EXPORTS[write.disk]
                assert len(write.contents) == (write.length if write.op is DiskOp.WRITE else 0)
    except ProtocolError as error:
        assert str(error)


# The client


def connected(name: str = "0", max_payload: int | None = None) -> nbd.Client:
    client = nbd.Client(name)
    client.received(GREETING)
    block_size = b"" if max_payload is None else option_reply(GO, 3, struct.pack(">HIII", 3, 1, 4096, max_payload))
    client.received(option_reply(GO, 3, struct.pack(">HQH", 0, SIZE, 0b1100001)) + block_size + option_reply(GO, 1))
    assert client.ready and client.size == SIZE
    client.unsent.clear()
    return client


def changed(op: DiskOp, offset: int, length: int) -> DiskWrite:
    return DiskWrite(0, op, offset, length, b"x" * length if op is DiskOp.WRITE else b"")


def test_the_client_asks_for_its_export() -> None:
    client = nbd.Client("7")
    assert not client.unsent, "the server speaks first"
    client.received(GREETING)
    assert bytes(client.unsent) == struct.pack(">I", 3) + go(b"7", infos=())


@pytest.mark.parametrize(("answer", "match"), [
    (b"NBDMAGIC" + bytes.fromhex("00420281861253") + bytes(20), "fixed newstyle"),
    (b"NBDMAGICIHAVEOPT\0\0", "fixed newstyle"),
    (GREETING + option_reply(GO, (1 << 31) + 6, b"export '0' not present"), "export '0' not present"),
    (GREETING + option_reply(GO, (1 << 31) + 2), "error 2"),
    (GREETING + option_reply(GO, 1), "no size"),
    (GREETING + option_reply(GO, 3, struct.pack(">HQ", 0, 1)), "wrong length"),
    (GREETING + option_reply(GO, 3, struct.pack(">HQH", 0, SIZE, 0b1100011)), "takes no writes"),
    (GREETING + option_reply(GO, 3, struct.pack(">HQH", 0, SIZE, 0b0000001)), "takes no writes"),
    (GREETING + option_reply(8, 1), "no answer"), (GREETING + bytes(20), "no answer"),
    (GREETING + option_reply(GO, 1)[:16] + b"\xff\xff\xff\xff", "no answer")])
def test_a_server_that_does_not_fit_is_refused(answer: bytes, match: str) -> None:
    client = nbd.Client("0")
    with pytest.raises(ProtocolError, match=match):
        client.received(answer)
    assert not client.ready


def test_what_the_client_asks_the_server_understands() -> None:
    client, server = nbd.Client("3"), nbd.Server(EXPORTS, MAX)
    while not client.ready:
        client.received(bytes(server.unsent))
        server.unsent.clear()
        put(server, bytes(client.unsent))
        client.unsent.clear()
    assert (client.size, client.max_payload) == (5 << 40, MAX)
    wanted = [DiskWrite(3, DiskOp.WRITE, 4096, 3, b"abc"), DiskWrite(3, DiskOp.ZERO, 4 << 40, 1 << 30),
              DiskWrite(3, DiskOp.DISCARD, 0, 512)]
    came = [write for change in wanted for write in put(server, client.request(change) + bytes(change.contents))]
    assert plain(came) == plain(wanted)
    assert not any(map(client.may_send, wanted))
    assert client.received(bytes(server.answers())) == [(write, 0) for write in wanted]


def test_answers_come_in_any_order_with_their_errors_wherever_they_are_cut() -> None:
    writes = [changed(DiskOp.WRITE, 4096 * n, 4096) for n in range(3)]
    for first in range(48):
        client = connected()
        cookies = [struct.unpack(">Q", client.request(write)[8:16])[0] for write in writes]
        sent = reply(cookies[2]) + reply(cookies[0], errno.ENOSPC) + reply(cookies[1])
        assert client.received(sent[:first]) + client.received(sent[first:]) == [
            (writes[2], 0), (writes[0], errno.ENOSPC), (writes[1], 0)]


@pytest.mark.parametrize("answer", [reply(99), b"\0" * 16, reply(1) + reply(1)])
def test_an_answer_to_nothing_is_refused(answer: bytes) -> None:
    client = connected()
    client.request(changed(DiskOp.ZERO, 0, 512))
    with pytest.raises(ProtocolError):
        client.received(answer)


@pytest.mark.parametrize(("offset", "length", "may"), [
    (0, 4096, True), (8192, 4096, True), (4096, 1, False), (8191, 1, False), (0, 4097, False), (0, SIZE, False),
    (5000, 10, False)])
def test_what_overlaps_must_wait(offset: int, length: int, may: bool) -> None:
    client = connected()
    client.request(changed(DiskOp.WRITE, 4096, 4096))
    assert client.may_send(changed(DiskOp.ZERO, offset, length)) is may
    client.received(reply(1))
    assert client.may_send(changed(DiskOp.ZERO, offset, length))


def test_no_more_is_under_way_than_the_server_works_at() -> None:
    client = connected()
    for number in range(16):
        assert client.may_send(changed(DiskOp.ZERO, 512 * number, 512))
        client.request(changed(DiskOp.ZERO, 512 * number, 512))
    assert not client.may_send(changed(DiskOp.ZERO, 8192, 512))
    client.received(reply(5))
    assert client.may_send(changed(DiskOp.ZERO, 8192, 512))


@given(st.sampled_from(DiskOp), st.integers(0, 1000), st.integers(1, 5000), st.integers(1, 900))
def test_pieces_are_the_whole(op: DiskOp, offset: int, length: int, most: int) -> None:
    client = connected(max_payload=most)
    write = DiskWrite(0, op, offset, length, random.Random(1).randbytes(length) if op is DiskOp.WRITE else b"")
    pieces = list(client.pieces(write))
    assert b"".join(bytes(piece.contents) for piece in pieces) == write.contents
    assert pieces[0].offset == offset and sum(piece.length for piece in pieces) == length
    assert all(one.offset + one.length == other.offset for one, other in itertools.pairwise(pieces))
    assert all(len(piece.contents) <= most and piece.op is op for piece in pieces)


def test_a_length_never_leaves_its_32_bits() -> None:
    lengths = [piece.length for piece in connected().pieces(DiskWrite(0, DiskOp.ZERO, 0, 5 << 40))]
    assert sum(lengths) == 5 << 40 and max(lengths) < 1 << 32
