"""core/reminders.py before a real Linux client: what makes it send at once, and what it does without."""

import os
import select
import shutil
import socket
import struct
import time
from collections.abc import Iterator

import pytest

from nova_ftvm.core.packets import Packets
from nova_ftvm.core.reminders import reminders
from tests.host.machine import GUEST_ADDRESS, HOST_ADDRESS, Network, wait_for
from tests.unit.test_packets import framed, unframed

pytestmark = pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="not root, or no ip")

MAC = "52:54:00:00:00:01"
PORT = 7000
GUEST_ADDRESS_6, HOST_ADDRESS_6 = "fd00:99::2", "fd00:99::1"
_EVERYTHING = 3
#: A client that waits for longer than that has doubled its timeout five times.
LONG_S = 0.6


class Away:
    """A host's TCP behind one link to its clients' network; it can be made deaf without losing its connections."""

    def __init__(self, clients: Network, family: socket.AddressFamily) -> None:
        self._network = Network()
        self._ip = ("-6",) if family == socket.AF_INET6 else ("-4",)
        self.address, self._there = {socket.AF_INET: (GUEST_ADDRESS, HOST_ADDRESS),
                                     socket.AF_INET6: (GUEST_ADDRESS_6, HOST_ADDRESS_6)}[family]
        self._prefix = 64 if family == socket.AF_INET6 else 24
        self._network.ip("addr", "flush", "dev", "br0")
        clients.ip("link", "add", "veth", "type", "veth", "peer", "name", "uplink", "address", MAC, "netns",
                   self._network.name)
        clients.ip("link", "set", "veth", "master", "br0", "up")
        self._network.ip("link", "set", "uplink", "up")
        if family == socket.AF_INET6:
            clients.ip("addr", "add", f"{self._there}/64", "dev", "br0", "nodad")
            clients.ip("-6", "route", "replace", "fd00:99::/64", "dev", "br0", "proto", "kernel", "metric", "256",
                       "rto_min", "20ms")
        else:
            clients.set_rto_min(20)
        # A client that resolves the address anew would send nothing.
        clients.ip("neigh", "replace", self.address, "lladdr", MAC, "dev", "br0", "nud", "permanent")
        self.hear()
        self.listener = self._network.socket(family=family)
        self.listener.bind(("", PORT))
        self.listener.listen()
        self.wire = self._network.socket(socket.SOCK_RAW, socket.AF_PACKET)
        self.wire.bind(("uplink", _EVERYTHING))

    def hear(self) -> None:
        self._network.ip(*self._ip, "addr", "add", f"{self.address}/{self._prefix}", "dev", "uplink",
                         *(["nodad"] if ":" in self.address else []))

    def turn_deaf(self) -> None:
        self._network.ip(*self._ip, "addr", "del", f"{self.address}/{self._prefix}", "dev", "uplink")

    def packets(self, seconds: float) -> Iterator[tuple[float, bool, bytes]]:
        """(when, was it sent from here, the packet) of what is on the link within the time."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if select.select([self.wire], [], [], left)[0]:
                packet, (_, _, kind, *_) = self.wire.recvfrom(1 << 16)
                yield time.monotonic(), kind == socket.PACKET_OUTGOING, packet

    def segments(self, text: bytes, seconds: float) -> Iterator[float]:
        """When segments with that text come, within the time."""
        for when, is_ours, packet in self.packets(seconds):
            if not is_ours and packet.endswith(text):
                yield when

    def close(self) -> None:
        self.listener.close()
        self.wire.close()
        self._network.remove()


class Client:
    def __init__(self, network: Network, away: Away) -> None:
        self.here = network.socket(family=away.listener.family)
        self.here.settimeout(10.0)
        self.here.connect((away.address, PORT))
        self.there, _ = away.listener.accept()
        self.port = self.here.getsockname()[1]
        # So that it knows how long a reply takes: nothing.
        for _ in range(5):
            self.here.send(b"hello")
            self.there.send(self.there.recv(10))
            self.here.recv(10)

    def is_heard(self) -> bytes:
        return self.there.recv(100) if select.select([self.there], [], [], 0)[0] else b""

    def close(self) -> None:
        self.here.close()
        self.there.close()


@pytest.fixture
def network() -> Iterator[Network]:
    made = Network()
    yield made
    made.remove()


@pytest.fixture(params=[socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])
def away(network: Network, request: pytest.FixtureRequest) -> Iterator[Away]:
    made = Away(network, request.param)
    yield made
    made.close()


def test_a_client_that_backs_off_sends_at_once_when_it_is_reminded(network: Network, away: Away) -> None:
    reminded, other = clients = Client(network, away), Client(network, away)
    said = [packet for _, is_ours, packet in away.packets(0.1)
            if is_ours and struct.pack(">HH", PORT, reminded.port) in packet]
    away.turn_deaf()
    reminded.here.send(b"still there?")
    other.here.send(b"no reminder.")
    last = None
    for when in away.segments(b"still there?", 10.0):
        if last and when - last > LONG_S:
            gap, last = when - last, when
            break
        last = when
    else:
        pytest.fail("the client did not send again")
    away.hear()
    # It waits for twice as long now. A part of that is left alone.
    assert not list(away.segments(b"still there?", 0.3 * gap)), "it sends again though its timeout is not over"
    assert not reminded.is_heard() and not other.is_heard()
    made = unframed(reminders([Packets(bytes.fromhex(MAC.replace(":", "")), b"".join(map(framed, said)))]).popitem()[1])
    for packet in made:
        away.wire.send(packet)
    came = next(away.segments(b"still there?", 2 * gap), None)
    assert came and came - last < 1.5 * gap, "it waited for its timeout"
    wait_for("the segment is heard", reminded.is_heard)
    assert not other.is_heard(), "a client was reminded of what is none of its business"
    came = next(away.segments(b"no reminder.", 4 * gap), None)
    assert came and came - last > 1.5 * gap
    wait_for("TCP goes on by itself", other.is_heard)
    reminded.there.send(b"yes")
    assert reminded.here.recv(10) == b"yes", "the connection is as it was"
    for client in clients:
        client.close()


def test_a_client_that_waits_for_nothing_is_not_disturbed(network: Network, away: Away) -> None:
    client = Client(network, away)
    said = [packet for _, is_ours, packet in away.packets(0.1) if is_ours]
    made = unframed(reminders([Packets(bytes.fromhex(MAC.replace(":", "")), b"".join(map(framed, said)))]).popitem()[1])
    for packet in made:
        away.wire.send(packet)
    assert not [packet for _, is_ours, packet in away.packets(0.2) if not is_ours and b"hello" in packet]
    client.here.send(b"hello")
    wait_for("it goes on", client.is_heard)
    client.there.send(b"yes")
    assert client.here.recv(10) == b"yes"
    client.close()
