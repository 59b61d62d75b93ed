"""core/wire.py: what goes in comes out, whatever way it is cut; what is not right is refused, all of it."""

import dataclasses
import json
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nova_ftvm.core import dirty, wire
from nova_ftvm.core.disk import DiskOp, DiskWrite
from nova_ftvm.exception import ProtocolError, StaleGeneration
from nova_ftvm.types import PAGE, Epoch, Generation, RamBlock
from tests.unit.frames import (
    BLOCKS,
    DISKS,
    GENERATION,
    LIMIT,
    decode,
    disk_frames,
    epoch_frames,
    join,
    page_frames,
    pages,
    write,
)

BEAT = join(wire.encode(wire.Kind.BEAT, GENERATION))
ACK = join(wire.encode(wire.Kind.ACK, GENERATION, Epoch(5)))
CHALLENGE = bytes(range(32))
HELLO = wire.Hello("pair", "pc-i440fx-10.0", tuple(BLOCKS), wire.prove("token", CHALLENGE), tuple(DISKS), "kvm")

kinds = st.sampled_from(wire.Kind)
frames = st.tuples(kinds, st.integers(0, 2**64 - 1), st.binary(max_size=300))


def refused(data: bytes, match: str, error: type[ProtocolError] = ProtocolError, limit: int = LIMIT) -> None:
    """`data` is refused, nothing of it comes out, and the decoder gives nothing more."""
    decoder = wire.Decoder(GENERATION, limit)
    with pytest.raises(error, match=match):
        decoder.feed(data)
    for _ in range(2):
        with pytest.raises(error, match=match):
            decoder.feed(BEAT)
    with pytest.raises(error, match=match):
        decoder.finish()


def forged(magic: bytes = b"FTVM", version: int = wire.VERSION, kind: int = 9, zero: int = 0,
           generation: int = GENERATION, epoch: int = 0, length: int | None = None, payload: bytes = b"") -> bytes:
    """A frame with a right checksum and anything else."""
    header = struct.pack(">4sBBHQQI", magic, version, kind, zero, generation, epoch,
                         len(payload) if length is None else length)
    return header + struct.pack(">I", zlib.crc32(payload, zlib.crc32(header))) + payload


@given(st.lists(frames, max_size=8), st.lists(st.integers(1, 200), max_size=40))
def test_frames_come_out_whole_and_in_order_however_they_are_cut(sent: list, cuts: list[int]) -> None:
    data = b"".join(join(wire.encode(kind, GENERATION, Epoch(epoch), (payload[:7], payload[7:])))
                    for kind, epoch, payload in sent)
    decoder = wire.Decoder(GENERATION, LIMIT)
    received, start = [], 0
    for cut in [*cuts, len(data)]:
        received += decoder.feed(memoryview(data)[start:start + cut])
        start += cut
    received += decoder.feed(data[start:])
    decoder.finish()
    assert [(f.kind, f.epoch, bytes(f.payload)) for f in received] == sent
    assert all(f.generation == GENERATION for f in received)


def test_one_byte_at_a_time_is_enough() -> None:
    decoder = wire.Decoder(GENERATION, LIMIT)
    received = [frame for byte in BEAT + ACK for frame in decoder.feed(bytes([byte]))]
    assert [(f.kind, f.epoch) for f in received] == [(wire.Kind.BEAT, 0), (wire.Kind.ACK, 5)]


@given(st.data())
def test_a_bit_that_flips_anywhere_is_refused_and_nothing_comes_out(data: st.DataObject) -> None:
    frame = bytearray(join(wire.encode(wire.Kind.DEVICE, GENERATION, Epoch(1), (b"device state",))))
    bit = data.draw(st.integers(0, 8 * len(frame) - 1))
    frame[bit // 8] ^= 1 << bit % 8
    decoder = wire.Decoder(GENERATION, LIMIT)
    try:
        assert decoder.feed(bytes(frame)) == []
    except ProtocolError:
        return
    # The length grew: the frame waits for more, and is refused when that comes, or when the connection ends.
    with pytest.raises(ProtocolError):
        decoder.feed(bytes(LIMIT))
        decoder.finish()


@given(st.binary(min_size=wire.HEADER_BYTES, max_size=400))
def test_garbage_is_refused(garbage: bytes) -> None:
    decoder = wire.Decoder(GENERATION, LIMIT)
    with pytest.raises(ProtocolError):
        decoder.feed(b"x" + garbage)


@pytest.mark.parametrize(("frame", "match"), [
    (forged(magic=b"HTTP"), "not a frame of this protocol"),
    (forged(version=1), "version 1.*upgrade both"),
    (forged(length=LIMIT), "the limit is"),
    (forged(length=2**32 - 1), "the limit is"),
    (forged(kind=0), "unknown kind 0"),
    (forged(kind=99), "unknown kind 99"),
    (forged(zero=1), "unknown kind"),
    (BEAT[:-1] + bytes([BEAT[-1] ^ 1]), "damaged"),
])
def test_a_frame_that_no_peer_sends_is_refused(frame: bytes, match: str) -> None:
    refused(frame, match)


@pytest.mark.parametrize("generation", [GENERATION - 1, GENERATION + 1, 0, 2**64 - 1])
def test_another_generation_is_refused_and_named(generation: int) -> None:
    refused(forged(generation=generation), f"generation {generation} is over, the pair is at 7", StaleGeneration)


def test_what_came_whole_before_a_bad_frame_is_given_and_then_nothing_more() -> None:
    decoder = wire.Decoder(GENERATION, LIMIT)
    assert [f.kind for f in decoder.feed(BEAT + ACK + forged(version=9) + BEAT)] == [wire.Kind.BEAT, wire.Kind.ACK]
    with pytest.raises(ProtocolError, match="version 9"):
        decoder.feed(BEAT)
    with pytest.raises(ProtocolError, match="version 9"):
        decoder.finish()


@pytest.mark.parametrize("cut", range(1, len(ACK)))
def test_an_end_within_a_frame_is_told_apart_from_an_end(cut: int) -> None:
    decoder = wire.Decoder(GENERATION, LIMIT)
    assert decoder.feed(ACK[:cut]) == []
    with pytest.raises(ProtocolError, match="ended within a frame"):
        decoder.finish()
    whole = wire.Decoder(GENERATION, LIMIT)
    whole.feed(ACK)
    whole.finish()


def test_a_too_long_frame_is_refused_at_its_header() -> None:
    frame = join(wire.encode(wire.Kind.DEVICE, GENERATION, Epoch(1), (bytes(1000),)))
    refused(frame[:wire.HEADER_BYTES], "the limit is 500", limit=500)


# Pages


@settings(max_examples=50)
@given(st.sets(st.integers(0, 63), max_size=64).map(sorted), st.integers(wire.HEADER_BYTES + 8 + PAGE + 8, 1 << 17))
def test_pages_come_back_in_frames_within_the_limit(numbers: list[int], limit: int) -> None:
    contents = np.repeat(np.array(numbers, np.uint8), PAGE)
    sent = dirty.Pages(0, dirty.compress(np.array(numbers, np.int64)), contents)
    raw = page_frames(wire.Kind.PAGES, 1, sent, limit)
    assert all(len(frame) <= limit for frame in raw)
    received = [wire.decode_pages(frame, BLOCKS) for frame in decode(*raw)]
    assert [n for piece in received for n in dirty.expand(piece.runs).tolist()] == numbers
    assert b"".join(piece.contents.tobytes() for piece in received) == contents.tobytes()


def test_frames_over_the_limit_are_split() -> None:
    assert len(page_frames(wire.Kind.PRELOAD, 0, pages(list(range(64))), 1 << 16)) == 5
    assert len(page_frames(wire.Kind.PRELOAD, 0, pages(list(range(0, 64, 2))), 1 << 16)) == 3


def test_encoding_does_not_copy_the_pages() -> None:
    some = pages([1, 2, 3])
    ((_, frame),) = wire.encode_pages(wire.Kind.PAGES, GENERATION, Epoch(1), some, LIMIT)
    assert np.shares_memory(np.frombuffer(frame[-1], np.uint8), some.contents)


def page_frame(block: int = 0, runs: tuple[tuple[int, int], ...] = ((0, 1),), number: int | None = None,
               contents: int = PAGE) -> wire.Frame:
    payload = struct.pack(">HHI", block, 0, len(runs) if number is None else number)
    payload += np.array(runs, "<u4").reshape(-1, 2).tobytes() + bytes(contents)
    return wire.Frame(wire.Kind.PAGES, GENERATION, Epoch(1), payload)


@pytest.mark.parametrize(("frame", "match"), [
    (page_frame(runs=((64, 1),)), "leaves RAM block pc.ram"),
    (page_frame(runs=((63, 2),), contents=2 * PAGE), "leaves RAM block pc.ram"),
    (page_frame(runs=((2**32 - 1, 1),)), "leaves RAM block pc.ram"),
    (page_frame(block=1, runs=((4, 1),)), "leaves RAM block vga.vram"),
    (page_frame(block=2), "names RAM block 2 of 2"),
    (page_frame(contents=PAGE - 1), "do not fit"),
    (page_frame(contents=2 * PAGE), "do not fit"),
    (page_frame(runs=((0, 2**32 - 1), (0, 2))), "leaves RAM block pc.ram"),
    (page_frame(number=2**31, contents=0), "cut short"),
    (wire.Frame(wire.Kind.PAGES, GENERATION, Epoch(1), b"\0"), "cut short"),
    (wire.Frame(wire.Kind.PAGES, GENERATION, Epoch(1), b""), "cut short"),
])
def test_pages_that_do_not_fit_the_table_are_refused(frame: wire.Frame, match: str) -> None:
    with pytest.raises(ProtocolError, match=match):
        wire.decode_pages(frame, BLOCKS)


def test_the_last_page_of_a_block_of_odd_size_is_a_page() -> None:
    assert wire.decode_pages(page_frame(block=1, runs=((3, 1),)), BLOCKS).count == 1


@given(st.binary(max_size=200))
def test_no_payload_breaks_the_decoding_of_pages(payload: bytes) -> None:
    try:
        decoded = wire.decode_pages(wire.Frame(wire.Kind.PAGES, GENERATION, Epoch(1), payload), BLOCKS)
    except ProtocolError:
        return
    assert dirty.count(decoded.runs) * PAGE == len(decoded.contents)


def test_commit_says_frames_and_pages() -> None:
    commit = decode(*epoch_frames(1, [pages([1, 2]), pages([0], block=1)]))[-1]
    assert wire.decode_commit(commit) == (3, 3, 0)
    with pytest.raises(ProtocolError, match="wrong length"):
        wire.decode_commit(wire.Frame(wire.Kind.COMMIT, GENERATION, Epoch(1), bytes(commit.payload)[:-1]))


# The greeting


def test_hello_comes_back_from_a_peer_that_knows_the_token() -> None:
    (frame,) = decode(join(wire.encode_hello(GENERATION, HELLO)))
    hello = wire.decode_hello(frame, "token", CHALLENGE)
    assert (hello.pair_id, hello.machine, hello.proof) == (HELLO.pair_id, HELLO.machine, HELLO.proof)
    assert [(b.name, b.size) for b in hello.blocks] == [(b.name, b.size) for b in BLOCKS]


def test_a_hello_of_a_peer_that_does_not_tell_its_accelerator_is_read() -> None:
    (frame,) = decode(join(wire.encode_hello(GENERATION, HELLO)))
    body = json.loads(bytes(frame.payload))
    assert body.pop("accelerator") == "kvm"
    old = dataclasses.replace(frame, payload=json.dumps(body).encode())
    told = wire.decode_hello(frame, "token", CHALLENGE)
    assert told.accelerator == "kvm"
    assert wire.decode_hello(old, "token", CHALLENGE) == dataclasses.replace(told, accelerator="")


@pytest.mark.parametrize(("token", "challenge"), [("other", CHALLENGE), ("token", bytes(32)), ("", CHALLENGE)])
def test_a_wrong_token_or_a_recorded_answer_is_refused(token: str, challenge: bytes) -> None:
    (frame,) = decode(join(wire.encode_hello(GENERATION, HELLO)))
    with pytest.raises(ProtocolError, match="does not know the pair's token"):
        wire.decode_hello(frame, token, challenge)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"{}", b"\xff\xfe", b"[" * 60000, (
    b'{"pair_id": "p", "machine": "m", "proof": "", "blocks": [["a", Infinity]], "disks": []}'), (
    b'{"pair_id": "p", "machine": "m", "proof": "\\ud800", "blocks": [], "disks": []}'), json.dumps(
    {"pair_id": "p", "machine": "m", "blocks": [["a"]], "proof": "", "disks": []}).encode(), json.dumps(
    {"pair_id": "p", "machine": "m", "blocks": 3, "proof": "", "disks": []}).encode()], ids=range(11))
def test_a_hello_that_cannot_be_read_is_refused(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        wire.decode_hello(wire.Frame(wire.Kind.HELLO, GENERATION, Epoch(0), body), "token", CHALLENGE)


@pytest.mark.parametrize("proof", ["é" * 64, "", "0" * 64], ids=["not-ascii", "empty", "wrong"])
def test_a_proof_of_odd_characters_is_refused_like_any_other(proof: str) -> None:
    hello = wire.Hello("pair", "pc", (RamBlock("a", 1),), proof)
    (frame,) = decode(join(wire.encode_hello(GENERATION, hello)))
    with pytest.raises(ProtocolError):
        wire.decode_hello(frame, "token", CHALLENGE)


def test_another_kind_instead_of_hello_is_refused() -> None:
    with pytest.raises(ProtocolError, match="BEAT instead of HELLO"):
        wire.decode_hello(wire.Frame(wire.Kind.BEAT, Generation(7), Epoch(0)), "token", CHALLENGE)


# Disks

operations = st.builds(
    lambda disk, op, offset, contents, length: DiskWrite(
        disk, op, offset, len(contents) if op is DiskOp.WRITE else length,
        contents if op is DiskOp.WRITE else b""),
    st.integers(0, 1), st.sampled_from(DiskOp), st.integers(0, 1 << 15), st.binary(min_size=1, max_size=2000),
    st.integers(1, 1 << 15))


@given(st.lists(operations, max_size=30), st.integers(400, 5000))
def test_disk_writes_come_back_as_they_were_whatever_the_frames_limit(writes: list[DiskWrite], limit: int) -> None:
    frames = disk_frames(wire.Kind.DISK, 3, writes, limit)
    assert all(len(frame) <= limit for frame in frames)
    back = [write for frame in decode(*frames) for write in wire.decode_disk(frame, DISKS)]
    disks, copies = ([bytearray(disk.size) for disk in DISKS] for _ in range(2))
    for target, some in ((disks, writes), (copies, back)):
        for change in some:
            contents = bytes(change.contents) if change.op is DiskOp.WRITE else bytes([change.op]) * change.length
            target[change.disk][change.offset:change.offset + change.length] = contents
    assert disks == copies


@pytest.mark.parametrize(("wrong", "why"), [
    (DiskWrite(9, DiskOp.WRITE, 0, 1, b"x"), "on disk 9 of 3"),
    (DiskWrite(0, 7, 0, 1, b""), "operation 7"),
    (DiskWrite(1, DiskOp.WRITE, (1 << 16) - 1, 2, b"xx"), "leaves disk 1"),
    (DiskWrite(1, DiskOp.ZERO, 0, 0), "leaves disk 1"),
    (DiskWrite(2, DiskOp.ZERO, 0, 1), "read-only"),
    (DiskWrite(0, DiskOp.WRITE, 0, 5, b"four"), "do not fit"),
    (DiskWrite(0, DiskOp.ZERO, 0, 5, b"four"), "do not fit"),
])
def test_a_disk_write_that_no_correct_peer_sends_is_refused(wrong: DiskWrite, why: str) -> None:
    (frame,) = decode(*disk_frames(wire.Kind.DISK, 1, [wrong]))
    with pytest.raises(ProtocolError, match=why):
        wire.decode_disk(frame, DISKS)


@given(st.data())
def test_a_disk_frame_that_is_cut_is_refused(data: st.DataObject) -> None:
    (frame,) = decode(*disk_frames(wire.Kind.DISK, 1, [write(0, 0, b"abc"), write(1, 5, b"de")]))
    cut = data.draw(st.integers(0, len(frame.payload) - 1))
    with pytest.raises(ProtocolError):
        wire.decode_disk(wire.Frame(frame.kind, GENERATION, Epoch(1), bytes(frame.payload)[:cut]), DISKS)


def test_the_welcome_names_the_disks_on_the_same_base() -> None:
    (frame,) = decode(join(wire.encode_welcome(GENERATION, [0, 2])))
    assert wire.decode_welcome(frame) == {0, 2}


@pytest.mark.parametrize("body", [b"", b"[]", b'{"shallow": [null]}', b'{"shallow": 3}'])
def test_a_welcome_that_cannot_be_read_is_refused(body: bytes) -> None:
    with pytest.raises(ProtocolError, match="WELCOME"):
        wire.decode_welcome(wire.Frame(wire.Kind.WELCOME, GENERATION, Epoch(0), body))


@pytest.mark.parametrize(("why", "told"), [
    ("No space left on device", "No space left on device"), ("/a/\udcff", "/a/?"), ("", ""), ("x" * 9999, "x" * 1024)])
def test_whatever_a_backup_says_of_its_failure_is_short_text(why, told):
    (frame,) = decode(join(wire.encode_failure(GENERATION, why)))
    assert (frame.kind, wire.decode_failure(frame)) == (wire.Kind.BYE, told)


def test_a_peer_that_says_more_of_its_failure_or_no_text_is_not_believed_for_long():
    frame = wire.Frame(wire.Kind.BYE, GENERATION, Epoch(0), b"\xff" * 4096)
    assert wire.decode_failure(frame) == "\ufffd" * 1024
