"""core/reminders.py: who waits for the guest is told of the segment that it waits for, and nobody else of anything."""

import ipaddress
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nova_ftvm.core.packets import Packets
from nova_ftvm.core.reminders import MOST_FLOWS, MOST_PACKETS, STEPS, reminders
from tests.unit.test_packets import framed, stream, unframed

MAC, ROUTER = bytes.fromhex("525400000001"), bytes.fromhex("429637a97091")
FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
GUEST, CLIENT = "10.99.0.2", "10.99.0.1"
GUEST6, CLIENT6 = "fd00::2", "fd00::1"
TAG = bytes.fromhex("81000007")
VIRTIO = bytes.fromhex("01000000000022001000")


def tcp(port: int, acknowledged: int, flags: int, guest_port: int = 80) -> bytes:
    return struct.pack(">HHIIBBHHH", guest_port, port, 7, acknowledged, 5 << 4, flags, 500, 0, 0)


def said(port: int = 5000, acknowledged: int = 1, flags: int = ACK, *, guest: str = GUEST, client: str = CLIENT,
         options: bytes = b"", tag: bytes = b"", virtio: bytes = b"", protocol: int = 6, fragment: int = 0,
         text: bytes = b"") -> bytes:
    """A packet of the guest."""
    source, destination = (ipaddress.ip_address(address).packed for address in (guest, client))
    inner = tcp(port, acknowledged, flags) + text
    if len(source) == 16:
        kind, header = b"\x86\xdd", struct.pack(">IHBB", 6 << 28, len(inner), protocol, 64)
    else:
        kind, header = b"\x08\x00", struct.pack(
            ">BBHHHBBH", 0x45 + len(options) // 4, 0, 20 + len(options) + len(inner), 1, fragment, 64, protocol, 0)
    return virtio + ROUTER + MAC + tag + kind + header + source + destination + options + inner


def history(*sent: bytes) -> list[Packets]:
    return [Packets(MAC, framed(packet)) for packet in sent]


def of(*sent: bytes) -> list[bytes]:
    """The reminders, each once."""
    packets = unframed(reminders(history(*sent)).get(MAC, b""))
    assert all(packets[i:i + STEPS] == [packets[i]] * STEPS for i in range(0, len(packets), STEPS))
    return packets[::STEPS]


def quoted(packet: bytes) -> tuple[int, int]:
    """(the client's port, the sequence number); no matter which headers are before."""
    port, _, sequence = struct.unpack(">HHI", packet[-8:])
    return port, sequence


def is_whole(data: bytes) -> bool:
    """RFC 1071, as it is written there."""
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total == 0xFFFF


@given(st.integers(0, 0xFFFF), st.integers(0, 2**32 - 1), st.ip_addresses(v=4).map(str), st.ip_addresses(v=4).map(str))
def test_an_ipv4_client_is_told_that_its_oldest_segment_came_to_a_host_that_was_unreachable(
        port: int, acknowledged: int, guest: str, client: str) -> None:
    (packet,) = of(said(port, acknowledged, guest=guest, client=client))
    ends = ipaddress.ip_address(guest).packed, ipaddress.ip_address(client).packed
    assert packet[:14] == ROUTER + MAC + b"\x08\x00"
    outer, icmp = packet[14:34], packet[34:]
    assert (outer[0], outer[9], outer[12:16], outer[16:20]) == (0x45, 1, *ends)
    assert int.from_bytes(outer[2:4], "big") == len(packet) - 14
    assert icmp[:2] == b"\x03\x01" and icmp[4:8] == bytes(4)
    inner = icmp[8:28]
    assert (inner[0], inner[9], inner[16:20], inner[12:16]) == (0x45, 6, *ends)
    assert icmp[28:] == struct.pack(">HHI", port, 80, acknowledged)
    assert is_whole(outer) and is_whole(inner) and is_whole(icmp)


@given(st.integers(0, 0xFFFF), st.integers(0, 2**32 - 1), st.ip_addresses(v=6).map(str), st.ip_addresses(v=6).map(str))
def test_an_ipv6_client_is_told_that_there_was_no_route(port: int, acknowledged: int, guest: str, client: str) -> None:
    (packet,) = of(said(port, acknowledged, guest=guest, client=client))
    ends = ipaddress.ip_address(guest).packed, ipaddress.ip_address(client).packed
    assert packet[:14] == ROUTER + MAC + b"\x86\xdd"
    outer, icmp = packet[14:54], packet[54:]
    assert (outer[0], outer[6], outer[8:24], outer[24:40]) == (0x60, 58, *ends)
    assert int.from_bytes(outer[4:6], "big") == len(icmp)
    assert icmp[:2] == b"\x01\x00" and icmp[4:8] == bytes(4)
    inner = icmp[8:48]
    assert (inner[0], inner[6], inner[24:40], inner[8:24]) == (0x60, 6, *ends)
    assert icmp[48:] == struct.pack(">HHI", port, 80, acknowledged)
    assert is_whole(b"".join(ends) + struct.pack(">II", len(icmp), 58) + icmp)


@pytest.mark.parametrize("ends", [{}, {"guest": GUEST6, "client": CLIENT6}], ids=["ipv4", "ipv6"])
@pytest.mark.parametrize("tag", [b"", TAG], ids=["untagged", "tagged"])
@pytest.mark.parametrize("virtio", [b"", VIRTIO, VIRTIO + b"\0\0", VIRTIO + bytes(10)])
def test_it_goes_the_way_that_the_guests_own_packet_went(virtio: bytes, tag: bytes, ends: dict[str, str]) -> None:
    (packet,) = of(said(5000, 9, virtio=virtio, tag=tag, text=b"x" * 7000, **ends))
    (plain,) = of(said(5000, 9, **ends))
    assert packet == bytes(len(virtio)) + plain[:12] + tag + plain[12:]


def test_options_are_passed_over() -> None:
    assert of(said(5000, 9, options=bytes(40))) == of(said(5000, 9))


@pytest.mark.parametrize("in_one", [True, False], ids=["in-one-epoch", "in-three"])
def test_what_was_acknowledged_last_counts(in_one: bool) -> None:
    sent = [said(5000, 1), said(5001, 7), said(5000, 2, ACK | PSH, text=b"reply")]
    parts = [Packets(MAC, stream(sent))] if in_one else history(*sent)
    packets = unframed(reminders(parts)[MAC])
    assert [quoted(packet) for packet in packets] == [(5000, 2)] * STEPS + [(5001, 7)] * STEPS


def test_connections_are_told_apart_by_both_ends_and_the_network_that_they_are_in() -> None:
    flows = [said(), said(client="10.99.0.3"), said(guest="10.99.0.4"), said(5001), said(tag=TAG),
             said(guest=GUEST6, client=CLIENT6)]
    assert len(of(*flows, *flows)) == len(flows)


def test_each_interface_has_its_own() -> None:
    other = b"\x52\0\0\0\0\2"
    theirs = said().replace(MAC, other)
    made = reminders([Packets(MAC, framed(said())), Packets(other, framed(theirs)), Packets(other, framed(said()))])
    assert made == {MAC: stream(of(said()) * STEPS), other: stream([of(said())[0].replace(MAC, other)] * STEPS)}


@pytest.mark.parametrize("last", [FIN | ACK, RST, RST | ACK, SYN, SYN | ACK])
def test_a_connection_that_has_ended_or_is_just_being_made_is_left_alone(last: int) -> None:
    assert of(said(5000, 1), said(5001), said(5000, 2, last)) == of(said(5001))


def test_a_connection_that_was_made_since_is_reminded() -> None:
    assert of(said(5000, 1, SYN | ACK), said(5000, 1)) == of(said(5000, 1))
    assert of(said(5000, 1, FIN | ACK), said(5000, 9)) == of(said(5000, 9)), "another one, from the same port"


@pytest.mark.parametrize("other", [
    said(protocol=17), said(protocol=17, guest=GUEST6, client=CLIENT6), said(fragment=100),
    said().replace(MAC, ROUTER), ROUTER + MAC + b"\x08\x06" + bytes(60), said().replace(b"\x45", b"\x44", 1),
    said().replace(b"\x45", b"\x65", 1), b""],
    ids=["udp", "udp6", "fragment", "another-sender", "arp", "short-header", "version", "empty"])
def test_what_is_no_tcp_packet_of_the_guest_is_passed_over(other: bytes) -> None:
    assert of(other) == [] and of(other, said(), other) == of(said())


@pytest.mark.parametrize("packet", [said(), said(tag=TAG, virtio=VIRTIO), said(guest=GUEST6, client=CLIENT6)])
def test_what_is_cut_short_is_passed_over(packet: bytes) -> None:
    assert of(*(packet[:length] for length in range(len(packet)))) == []
    for length in range(len(framed(packet))):
        made = reminders([*history(said(5001)), Packets(MAC, framed(packet)[:length])])
        assert {quoted(one)[0] for one in unframed(made[MAC])} == {5001}


@given(st.lists(st.tuples(st.sampled_from([MAC, b""]), st.binary(max_size=200))),
       st.lists(st.tuples(st.integers(0, 60), st.integers(0, 255)), max_size=8))
def test_garbage_is_never_an_error(garbage: list[tuple[bytes, bytes]], flaws: list[tuple[int, int]]) -> None:
    flawed = bytearray(framed(said(virtio=VIRTIO)))
    for place, value in flaws:
        flawed[place] = value
    for made in reminders([*(Packets(mac, data) for mac, data in garbage), Packets(MAC, flawed),
                           Packets(MAC, memoryview(flawed))]).values():
        assert len(unframed(made)) % STEPS == 0


def test_of_many_connections_those_that_spoke_last_are_reminded() -> None:
    number = MOST_FLOWS + 10
    made = of(*(said(port, port) for port in range(number)))
    assert [quoted(packet) for packet in made] == [(port, port) for port in reversed(range(10, number))]


def test_of_many_packets_the_newest_are_looked_at() -> None:
    assert of(said(5000), *[said(5001)] * MOST_PACKETS) == of(said(5001))
    assert len(of(said(5000), *[said(5001)] * (MOST_PACKETS - 1))) == 2
