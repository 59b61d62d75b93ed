"""Reminders to whoever waits for the guest: it can be reached again. PURE.

A client whose segments nobody acknowledges sends them again after a timeout that it doubles each time, so it may be
silent for long when the guest runs again. RFC 6069 makes it undo one doubling for each ICMP message "host unreachable"
that quotes the oldest segment that it waits for; if the shorter timeout is over by then, it sends at once. Linux does
so (tcp_ld_RTO_revert). What the guest has said tells which segment that is: the number that it acknowledges.

    +--------------------+----------+----+------+---------------------------------------------------+
    | as the guest's     | Ethernet | IP | ICMP | IP, client to guest | client's port | guest's port |
    | (virtio, zeroes)   | (802.1Q) |    |      | 20 or 40 bytes      | sequence number: the one     |
    +--------------------+----------+----+------+ that was acknowledged last -----------------------+
      0, 10, 12 or 20      from the guest         quoted: what the client has sent and nobody heard
                           to the client

IPv4: type 3, code 1. IPv6: type 1, code 0, the only one that Linux takes for this.

It is true: the guest's host could not be reached when that segment came. It does no harm: to an established
connection the message is a soft error (RFC 1122, 4.2.3.9), and one that is not backing off, or has been answered
meanwhile, does nothing at all. One that is just being made would be ended by it: so a flow whose newest packet is a
SYN gets none, nor does one that has ended.

QEMU writes a virtio header before each packet when the interface has one, and does not say how long it is: the
interface's own address tells where Ethernet begins. A guest that sends under another address is not reminded of.
"""

import struct
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from nova_ftvm.core.packets import Packets
from nova_ftvm.types import Buffer

#: To each connection: doublings that are undone. From 20 ms, Linux's shortest usual timeout in a data centre, so many
#: come together in 1.3 s.
STEPS = 6
#: Those that spoke last.
MOST_FLOWS = 256
#: That are looked at, the newest first: the guest runs meanwhile, and its clients wait. [2 us each]
MOST_PACKETS = 2048

_LENGTH = 4
#: Of the virtio header: none, legacy, with mergeable buffers or VERSION_1, with a hash.
_VIRTIO_BYTES = (0, 10, 12, 20)
#: All that is looked at of a packet: the longest headers.
_HEAD_BYTES = 20 + 18 + 60 + 20
_ADDRESSES = 12
_VLAN, _IPV4, _IPV6 = b"\x81\x00", b"\x08\x00", b"\x86\xdd"
_IPV4_BYTES, _IPV6_BYTES = 20, 40
_TCP, _ICMP, _ICMPV6 = 6, 1, 58
_TCP_BYTES = 20
_FIN, _SYN, _RST, _ACK = 1, 2, 4, 16
_HOPS = 64
_DONT_FRAGMENT = 0x4000
_FRAGMENT_OFFSET = 0x1FFF

_IPV4_HEADER = struct.Struct(">BBHHHBBH4s4s")
_IPV6_HEADER = struct.Struct(">IHBB16s16s")
#: Type, code, checksum, unused.
_ICMP_HEADER = struct.Struct(">BBHI")
_HOST_UNREACHABLE, _NO_ROUTE = (3, 1), (1, 0)
#: The client's port, the guest's, the sequence number: as much as is quoted.
_QUOTED_TCP = struct.Struct(">2s2s4s")


class _Spoken(NamedTuple):
    """A TCP packet of the guest."""

    #: Its virtio and Ethernet headers, and of which protocol what follows is.
    virtio_bytes: int
    ethernet: bytes
    is_ipv6: bool
    guest: bytes
    client: bytes
    guest_port: bytes
    client_port: bytes
    acknowledged: bytes
    flags: int

    @property
    def flow(self) -> tuple[bytes, ...]:
        return self.ethernet[_ADDRESSES:], self.guest, self.client, self.guest_port, self.client_port


def reminders(said: Sequence[Packets]) -> dict[bytes, bytes]:
    """For the connections that the guest had when it said this, oldest first: by interface, framed as QEMU does."""
    known: set[tuple[bytes, tuple[bytes, ...]]] = set()
    made: dict[bytes, list[bytes]] = defaultdict(list)
    flows = 0
    for mac, spoken in _newest_first(said):
        flow = mac, spoken.flow
        if flow in known:
            continue
        known.add(flow)
        if spoken.flags & (_FIN | _SYN | _RST | _ACK) == _ACK:
            packet = _reminder(spoken)
            made[mac].append((len(packet).to_bytes(_LENGTH, "big") + packet) * STEPS)
            flows += 1
            if flows == MOST_FLOWS:
                break
    return {mac: b"".join(framed) for mac, framed in made.items()}


def _newest_first(said: Sequence[Packets]) -> Iterator[tuple[bytes, _Spoken]]:
    """The TCP packets among them, and the interfaces."""
    left = MOST_PACKETS
    for packets in reversed(said):
        for head in reversed(_heads(packets.framed)):
            if not left:
                return
            left -= 1
            spoken = _read(head, packets.mac)
            if spoken is not None:
                yield packets.mac, spoken


def _heads(framed: Buffer) -> list[bytes]:
    """The beginning of each packet that is there."""
    found, at, end = [], 0, len(framed)
    while at + _LENGTH <= end:
        length = int.from_bytes(framed[at:at + _LENGTH], "big")
        at += _LENGTH
        found.append(bytes(framed[at:at + min(length, _HEAD_BYTES)]))
        at += length
    return found


def _read(head: bytes, mac: bytes) -> _Spoken | None:
    """None for what is no whole TCP packet of that interface."""
    for virtio_bytes in _VIRTIO_BYTES:
        if head[virtio_bytes + len(mac):virtio_bytes + _ADDRESSES] == mac:
            break
    else:
        return None
    kind = virtio_bytes + _ADDRESSES
    if head[kind:kind + 2] == _VLAN:
        kind += 4
    ip = kind + 2
    ethernet = head[virtio_bytes:ip]
    if head[kind:ip] == _IPV4 and len(head) >= ip + _IPV4_BYTES and head[ip] >> 4 == 4:
        header_bytes = (head[ip] & 15) * 4
        is_later_fragment = int.from_bytes(head[ip + 6:ip + 8], "big") & _FRAGMENT_OFFSET
        if head[ip + 9] != _TCP or header_bytes < _IPV4_BYTES or is_later_fragment:
            return None
        is_ipv6, guest, client = False, head[ip + 12:ip + 16], head[ip + 16:ip + 20]
    elif head[kind:ip] == _IPV6 and len(head) >= ip + _IPV6_BYTES and head[ip] >> 4 == 6 and head[ip + 6] == _TCP:
        header_bytes = _IPV6_BYTES
        is_ipv6, guest, client = True, head[ip + 8:ip + 24], head[ip + 24:ip + 40]
    else:
        return None
    tcp = ip + header_bytes
    if len(head) < tcp + _TCP_BYTES:
        return None
    return _Spoken(virtio_bytes, ethernet, is_ipv6, guest, client, head[tcp:tcp + 2], head[tcp + 2:tcp + 4],
                   head[tcp + 8:tcp + 12], head[tcp + 13])


def _reminder(spoken: _Spoken) -> bytes:
    tcp = _QUOTED_TCP.pack(spoken.client_port, spoken.guest_port, spoken.acknowledged)
    if spoken.is_ipv6:
        quoted = _ipv6(spoken.client, spoken.guest, _TCP, _TCP_BYTES) + tcp
        size = _ICMP_HEADER.size + len(quoted)
        pseudo = spoken.guest + spoken.client + struct.pack(">II", size, _ICMPV6)
        packet = _ipv6(spoken.guest, spoken.client, _ICMPV6, size) + _icmp(_NO_ROUTE, quoted, pseudo)
    else:
        quoted = _ipv4(spoken.client, spoken.guest, _TCP, _TCP_BYTES) + tcp
        message = _icmp(_HOST_UNREACHABLE, quoted)
        packet = _ipv4(spoken.guest, spoken.client, _ICMP, len(message)) + message
    return bytes(spoken.virtio_bytes) + spoken.ethernet + packet


def _ipv4(source: bytes, destination: bytes, protocol: int, size: int) -> bytes:
    fields = (0x45, 0, _IPV4_BYTES + size, 0, _DONT_FRAGMENT, _HOPS, protocol)
    checksum = _checksum(_IPV4_HEADER.pack(*fields, 0, source, destination))
    return _IPV4_HEADER.pack(*fields, checksum, source, destination)


def _ipv6(source: bytes, destination: bytes, protocol: int, size: int) -> bytes:
    return _IPV6_HEADER.pack(6 << 28, size, protocol, _HOPS, source, destination)


def _icmp(kind: tuple[int, int], quoted: bytes, pseudo: bytes = b"") -> bytes:
    checksum = _checksum(pseudo + _ICMP_HEADER.pack(*kind, 0, 0) + quoted)
    return _ICMP_HEADER.pack(*kind, checksum, 0) + quoted


def _checksum(data: bytes) -> int:
    """The Internet's, of an even number of bytes that are not all zero: a sum that carries around is a remainder."""
    return -int.from_bytes(data, "big") % 0xFFFF
