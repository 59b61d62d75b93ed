"""core/packets.py: packets are held whole and in order, whatever pieces they come in, and no more than the limit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nova_ftvm.core.packets import HeldPackets, InFlight, Packets
from nova_ftvm.exception import OutputLost

LIMIT = 1 << 20
MAC, OTHER = b"\x52\0\0\0\0\1", b"\x52\0\0\0\0\2"

packets = st.lists(st.binary(max_size=40), max_size=20)


def framed(packet: bytes) -> bytes:
    return len(packet).to_bytes(4, "big") + packet


def stream(sent: list[bytes]) -> bytes:
    return b"".join(map(framed, sent))


def unframed(data: bytes) -> list[bytes]:
    found = []
    while data:
        end = 4 + int.from_bytes(data[:4], "big")
        found.append(data[4:end])
        data = data[end:]
    return found


def pieces(data: bytes, size: int) -> list[bytes]:
    return [data[at:at + size] for at in range(0, len(data), size)]


@given(packets, packets, st.integers(1, 60))
def test_a_cut_covers_what_was_sent_before_it_and_nothing_else(before: list[bytes], after: list[bytes],
                                                               size: int) -> None:
    held = HeldPackets(LIMIT)
    for piece in pieces(stream(before), size):
        held.add(piece)
    held.cut()
    for piece in pieces(stream(after), size):
        held.add(piece)
    assert held.size == len(stream(before + after))
    assert held.release() == stream(before) and held.release() == b""
    held.cut()
    assert held.release() == stream(after) and held.size == 0


@given(packets, st.binary(min_size=1, max_size=40), st.data())
def test_a_packet_that_is_not_whole_waits_for_its_rest(whole: list[bytes], last: bytes, data: st.DataObject) -> None:
    held = HeldPackets(LIMIT)
    there = data.draw(st.integers(0, len(framed(last)) - 1))
    held.add(stream(whole) + framed(last)[:there])
    held.cut()
    assert held.release() == stream(whole)
    held.add(framed(last)[there:])
    held.cut()
    assert held.release() == framed(last)


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=60), st.integers(1, 60))
def test_beyond_the_limit_whole_packets_are_dropped_and_the_rest_keeps_its_order(sent: list[bytes], size: int) -> None:
    held = HeldPackets(200)
    for piece in pieces(stream(sent), size):
        held.add(piece)
    held.cut()
    kept = unframed(held.release())
    assert len(stream(kept)) <= 200 and len(kept) + held.dropped == len(sent)
    rest = iter(sent)
    assert all(packet in rest for packet in kept), "in their order"
    assert not held.dropped or len(stream(sent)) > 200


def test_there_is_room_again_once_what_was_covered_is_gone() -> None:
    held = HeldPackets(100)
    held.add(framed(b"x" * 80))
    held.cut()
    held.add(framed(b"y" * 80))
    assert held.dropped == 1
    held.release()
    held.add(framed(b"z" * 80))
    held.cut()
    assert held.release() == framed(b"z" * 80) and held.dropped == 1


def test_what_is_no_packet_is_told() -> None:
    held = HeldPackets(LIMIT)
    with pytest.raises(OutputLost, match="4294967295 bytes"):
        held.add(b"\xff" * 8)


# What is under way


def named(text: str, mac: bytes = MAC) -> Packets:
    return Packets(mac, text.encode())


def test_what_came_after_the_last_committed_checkpoint_is_kept_and_what_it_covers_is_not() -> None:
    kept = InFlight(LIMIT)
    for epoch, text in ((1, "a"), (2, "b"), (2, "c"), (3, "d")):
        kept.on_heard(epoch, named(text))
    kept.on_heard(3, named("x", OTHER))
    kept.on_committed(1)
    assert kept.heard == {MAC: b"bcd", OTHER: b"x"}
    kept.on_committed(2)
    assert kept.heard == {MAC: b"d", OTHER: b"x"}
    kept.on_committed(3)
    assert kept.heard == {}


@pytest.mark.parametrize("before_its_commit", [True, False])
def test_what_was_said_is_said_again_only_by_a_guest_that_has_said_it(before_its_commit: bool) -> None:
    kept = InFlight(LIMIT)
    if before_its_commit:
        kept.on_said(1, named("a"))
        assert kept.said == {}, "a guest that goes on from before never said it"
    kept.on_committed(1)
    if not before_its_commit:
        kept.on_said(1, named("a"))
    assert kept.said == {MAC: b"a"}
    kept.on_committed(2)
    assert kept.said == {}, "the epoch after it began, so it had left"


def test_what_has_left_is_not_said_again() -> None:
    kept = InFlight(LIMIT)
    kept.on_committed(1)
    kept.on_said(1, named("a"))
    kept.on_heard(2, named("b"))
    kept.on_released(0)
    assert kept.said == {MAC: b"a"}
    kept.on_released(1)
    assert kept.said == {} and kept.heard == {MAC: b"b"}


def test_no_more_than_the_limit_is_kept_in_each_direction() -> None:
    kept = InFlight(3)
    for text in ("aa", "bb", "c"):
        kept.on_heard(2, named(text))
        kept.on_said(1, named(text))
    kept.on_committed(1)
    assert kept.heard == kept.said == {MAC: b"aac"}
    kept.on_committed(2)
    kept.on_heard(3, named("dd"))
    assert kept.heard == {MAC: b"dd"}


def spoken(kept: InFlight) -> list[bytes]:
    return [bytes(packets.framed) for packets in kept.spoken]


def test_what_committed_checkpoints_cover_is_remembered_though_it_has_left() -> None:
    kept = InFlight(LIMIT)
    kept.on_said(1, named("a"))
    kept.on_said(2, named("b", OTHER))
    assert spoken(kept) == []
    kept.on_committed(1)
    assert spoken(kept) == [b"a"], "a guest that goes on from here has not said the other"
    kept.on_committed(2)
    kept.on_said(2, named("c"))
    kept.on_released(2)
    kept.on_committed(3)
    kept.on_said(4, named("d"))
    assert kept.said == {} and spoken(kept) == [b"a", b"b", b"c"]
    assert [packets.mac for packets in kept.spoken] == [MAC, OTHER, MAC]


def test_of_what_was_said_the_latest_is_remembered_within_the_limit() -> None:
    kept = InFlight(5)
    for epoch, text in enumerate(("aa", "bb", "", "c", "dd", "too much"), 1):
        kept.on_committed(epoch)
        kept.on_said(epoch, named(text))
    assert spoken(kept) == [b"bb", b"c", b"dd"]


def test_what_is_remembered_does_not_hold_all_that_came_with_it() -> None:
    kept, received = InFlight(LIMIT), bytearray(b"an epoch, and what was said")
    kept.on_committed(1)
    kept.on_said(1, Packets(MAC, memoryview(received)[-4:]))
    kept.on_released(1)
    received[:] = b""  # BufferError, as long as somebody has a view of it.
    assert spoken(kept) == [b"said"]
