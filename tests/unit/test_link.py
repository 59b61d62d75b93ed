"""engine/link.py: a connection that never blocks the loop, and a greeting that lets in whom it must."""

import dataclasses
import select
import socket
import threading
from collections.abc import Iterator

import pytest

from nova_ftvm.core import wire
from nova_ftvm.engine import link as links
from nova_ftvm.engine.link import Link, PeerLost
from nova_ftvm.exception import ProtocolError
from nova_ftvm.types import RamBlock
from tests.unit.engine_fakes import Peer, tcp_pair
from tests.unit.frames import BLOCKS, GENERATION, LIMIT

HELLO = wire.Hello("pair", "pc-i440fx-10.0", tuple(BLOCKS), "", accelerator="kvm")


@pytest.fixture
def ends() -> Iterator[tuple[Link, Peer]]:
    ours, theirs = tcp_pair()
    link, peer = Link(ours, GENERATION, LIMIT), Peer(theirs)
    yield link, peer
    link.close()
    peer.close()


def receive(link: Link) -> list[wire.Frame]:
    """What is on its way comes; loopback takes no time worth a name."""
    select.select([link], [], [], 2.0)
    return link.receive()


def test_sending_never_blocks_and_keeps_what_the_socket_does_not_take(ends: tuple[Link, Peer]) -> None:
    link, peer = ends
    payload = bytes(range(256)) * 2048
    for _ in range(40):
        link.send(wire.encode(wire.Kind.DEVICE, GENERATION, wire.Epoch(1), (payload,)))
    assert not link.idle
    received: list[wire.Frame] = []
    while len(received) < 40:
        received += peer.read()
        link.flush()
    assert link.idle and all(frame.payload == payload for frame in received)


def test_a_peer_that_closed_is_lost(ends: tuple[Link, Peer]) -> None:
    link, peer = ends
    peer.close()
    with pytest.raises(PeerLost, match="closed"):
        receive(link)
    with pytest.raises(PeerLost):
        for _ in range(50):
            link.send_bare(wire.Kind.BEAT)


def test_a_peer_that_ends_within_a_frame_is_a_broken_one(ends: tuple[Link, Peer]) -> None:
    link, peer = ends
    peer.raw(b"FTVM\x01")
    assert receive(link) == []
    peer.close()
    with pytest.raises(ProtocolError, match="within a frame"):
        receive(link)


def test_nothing_there_is_nothing(ends: tuple[Link, Peer]) -> None:
    assert ends[0].receive() == []


def test_frames_that_came_with_the_greeting_are_kept_in_order(ends: tuple[Link, Peer]) -> None:
    link, peer = ends
    for epoch in (1, 2, 3):
        peer.send(wire.Kind.ACK, epoch)
    assert link.await_frame().epoch == 1
    peer.send(wire.Kind.ACK, 4)
    received: list[wire.Frame] = []
    while len(received) < 3:
        received += receive(link)
    assert [frame.epoch for frame in received] == [2, 3, 4]


def test_a_greeting_that_does_not_come_is_not_waited_for_long(ends: tuple[Link, Peer]) -> None:
    with pytest.raises(PeerLost, match="no greeting"):
        ends[0].await_frame(0.01)


# The greeting


def greet(token: str = "token", hello: wire.Hello = HELLO, expected: wire.Hello = HELLO, generation: int = GENERATION
          ) -> tuple[Link | Exception, Link | Exception]:
    """(the primary's side, the backup's side): a link, or what was raised."""
    listener = links.listen("127.0.0.1")
    result: list[Link | Exception] = []

    def dial() -> None:
        try:
            result.append(links.dial("127.0.0.1", listener.getsockname()[1], generation, hello, token, LIMIT)[0])
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=dial)
    thread.start()
    listener.settimeout(5.0)
    connection, _ = listener.accept()
    backup: Link | Exception
    try:
        backup = links.answer(connection, GENERATION, "token", expected, LIMIT)
    except Exception as error:
        backup = error
    thread.join()
    listener.close()
    return result[0], backup


def test_who_knows_the_token_and_fits_is_let_in() -> None:
    primary, backup = greet()
    assert isinstance(primary, Link) and isinstance(backup, Link)
    primary.send(wire.encode(wire.Kind.DEVICE, GENERATION, wire.Epoch(1), (bytes(LIMIT - wire.HEADER_BYTES),)))
    received: list[wire.Frame] = []
    while not received:
        primary.flush()
        received += backup.receive()
    assert len(received[0].payload) == LIMIT - wire.HEADER_BYTES
    primary.close()
    backup.close()


@pytest.mark.parametrize(("arguments", "why"), [
    ({"hello": wire.Hello("other", HELLO.machine, HELLO.blocks, "")}, "belongs to pair other"),
    ({"hello": wire.Hello("pair", "pc-q35-10.0", HELLO.blocks, "")}, "install the same QEMU"),
    ({"hello": wire.Hello("pair", HELLO.machine, HELLO.blocks, "", accelerator="tcg")},
     "runs under TCG, the standby under KVM.*use hosts of one kind"),
    ({"hello": wire.Hello("pair", HELLO.machine, (*HELLO.blocks, RamBlock("pc.rom", 4096)), "")}, "differ.*pc.rom"),
    ({"hello": wire.Hello("pair", HELLO.machine, (RamBlock("pc.ram", 4096), HELLO.blocks[1]), "")}, "differ.*pc.ram"),
    ({"hello": wire.Hello("pair", HELLO.machine, HELLO.blocks[::-1], "")}, "differ.*in their order"),
])
def test_a_primary_that_does_not_fit_is_refused_and_told_why(arguments: dict, why: str) -> None:
    primary, backup = greet(**arguments)
    with pytest.raises(ProtocolError, match=why):
        raise backup
    with pytest.raises(ProtocolError, match=f"refuses this primary: .*{why}"):
        raise primary


def test_a_peer_that_does_not_know_the_token_is_told_nothing() -> None:
    primary, backup = greet(token="wrong")
    assert isinstance(primary, PeerLost)
    with pytest.raises(ProtocolError, match="does not know the pair's token"):
        raise backup


@pytest.mark.parametrize("side", ["hello", "expected"])
def test_a_peer_that_is_too_old_to_tell_its_accelerator_is_let_in(side: str) -> None:
    for end in (ends := greet(**{side: dataclasses.replace(HELLO, accelerator="")})):
        assert isinstance(end, Link), ends
        end.close()


def test_another_generation_is_refused_by_both() -> None:
    primary, backup = greet(generation=GENERATION + 1)
    assert isinstance(primary, ProtocolError)
    assert isinstance(backup, PeerLost | ProtocolError)


def test_a_long_frame_before_the_greeting_is_refused() -> None:
    ours, theirs = tcp_pair()
    peer = Peer(ours)
    peer.raw(b"".join(bytes(b) for b in wire.encode(wire.Kind.HELLO, GENERATION, payload=(bytes(1 << 17),))))
    with pytest.raises(ProtocolError, match="the limit is 65536"):
        links.answer(theirs, GENERATION, "token", HELLO, LIMIT)
    peer.close()


def test_nobody_there_is_said_with_the_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(PeerLost, match=f"127.0.0.1:{port} cannot be reached"):
        links.dial("127.0.0.1", port, GENERATION, HELLO, "token", LIMIT)


def test_a_backup_listens_on_ipv6_as_well() -> None:
    listener = links.listen("::1")
    assert listener.family == socket.AF_INET6 and listener.getsockname()[1] > 0
    listener.close()
