"""host/: QEMU's doors, one at a time, on a real QEMU with a real guest."""

import os
import select
import socket
import time
from collections.abc import Iterator

import pytest

from nova_ftvm.core.reminders import STEPS, reminders
from nova_ftvm.exception import GuestGone, OutputLost, QemuError, Unsupported
from nova_ftvm.host import netfilter, qmp
from nova_ftvm.host.memory import TrackedMemory, ram_blocks
from nova_ftvm.host.netbuf import OutputBuffer
from nova_ftvm.host.processors import Processors
from nova_ftvm.host.replay import Replay
from nova_ftvm.host.userfault import WriteProtection
from tests.host.conftest import DATAGRAMS, IDLE, Launch
from tests.host.machine import (
    DATAGRAM_PORT,
    GUEST_ADDRESS,
    HOST_ADDRESS,
    MEMORY_MIB,
    Network,
    Qemu,
    Session,
    wait_for,
)

ETH_P_IP = 0x0800


@pytest.fixture(scope="module")
def guest(module_launch: Launch) -> Qemu:
    qemu = module_launch("p", work=DATAGRAMS)
    qemu.await_boot()
    return qemu


@pytest.fixture
def monitor(guest: Qemu) -> Iterator[qmp.Monitor]:
    with guest.monitor() as made:
        yield made


class Listener:
    """Takes the guest's numbered datagrams off the tap."""

    def __init__(self, network: Network) -> None:
        self.socket = network.socket(socket.SOCK_DGRAM)
        # What was held comes all at once.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self.socket.bind((HOST_ADDRESS, DATAGRAM_PORT))

    def hear(self, seconds: float) -> list[int]:
        """The numbers that come within the time."""
        numbers, deadline = [], time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if select.select([self.socket], [], [], left)[0]:
                numbers.append(int(self.socket.recv(100)))
        return numbers

    def drain(self) -> list[int]:
        return self.hear(0.05)


@pytest.fixture
def listener(network: Network) -> Iterator[Listener]:
    made = Listener(network)
    yield made
    made.socket.close()


# The monitor


def test_a_prepared_command_waits_for_its_end(guest: Qemu, monitor: qmp.Monitor) -> None:
    monitor.receive()
    monitor.prepare("stop", "save")
    time.sleep(0.05)
    assert guest.operator.command("query-status")["status"] == "running" and not monitor.receive()
    monitor.complete()
    wait_for("QEMU answers", lambda: {"return": {}, "id": "save"} in monitor.receive())
    assert monitor.command("query-status")["status"] == "paused"
    monitor.command("cont")


def test_a_prepared_command_is_taken_back_by_another_and_by_the_end_of_its_sender(guest: Qemu) -> None:
    with guest.monitor() as monitor:
        monitor.prepare("stop", "save")
        assert monitor.command("query-status")["status"] == "running"
        assert not [message for message in monitor.receive() if "id" in message]
        monitor.prepare("stop", "save")
    with guest.monitor() as monitor:
        assert monitor.command("query-status")["status"] == "running"
        monitor.prepare("stop", "save")
        assert monitor.command("query-status")["status"] == "running"
        monitor.complete()  # It was taken back, so all of it is sent.
        wait_for("QEMU answers", lambda: {"return": {}, "id": "save"} in monitor.receive())
        monitor.command("cont")


# Injection and memory


def test_protection_from_outside_leaves_guest_and_monitor_alive(guest: Qemu, monitor: qmp.Monitor) -> None:
    for _ in range(5):
        protection = WriteProtection(guest.pid, qmp.pidfd_of(monitor))
        guest.await_ticks(1)
        assert monitor.command("query-status")["status"] == "running"
        protection.close()
    guest.await_ticks()


def test_every_block_is_found_with_an_address_that_can_be_read(guest: Qemu, monitor: qmp.Monitor) -> None:
    blocks = ram_blocks(monitor)
    names = [block.name for block in blocks]
    assert names == sorted(names) and len(names) == len(set(names))
    assert {"pc.ram", "pc.bios", "pc.rom"} <= set(names) and any("vga.vram" in name for name in names)
    assert next(block.size for block in blocks if block.name == "pc.ram") == MEMORY_MIB << 20
    memory = TrackedMemory(guest.pid, qmp.pidfd_of(monitor), blocks)
    existing = dict(memory.take_existing())
    for block, runs in existing.items():
        assert memory.read(block, runs[:1]).count == runs[0][1]
    guest.await_ticks()
    assert memory.take_written()
    memory.close()
    guest.await_ticks()


def test_a_qemu_that_dies_is_told_by_every_door(launch: Launch) -> None:
    qemu = launch("b", standby=True)
    with qemu.monitor() as monitor:
        pidfd = qmp.pidfd_of(monitor)
        assert not select.select([pidfd], [], [], 0)[0]
        blocks = ram_blocks(monitor)
        memory = TrackedMemory(qemu.pid, pidfd, blocks)
        qemu.kill()
        assert select.select([pidfd], [], [], 5.0)[0]
        for door in (lambda: monitor.command("query-status"), memory.take_written,
                     lambda: list(memory.capture()), lambda: qmp.pidfd_of(monitor)):
            with pytest.raises(GuestGone):
                door()
        os.close(pidfd)


# The guest's output


@pytest.fixture
def buffer(monitor: qmp.Monitor) -> Iterator[OutputBuffer]:
    made = OutputBuffer(monitor, netfilter.interfaces(monitor))
    yield made
    made.close()
    netfilter.remove(monitor, netfilter.interfaces(monitor))


def filters(monitor: qmp.Monitor) -> list[str]:
    names = [child["name"] for child in monitor.command("qom-list", path="/objects")]
    return [name for name in [*names, *(device["label"] for device in monitor.command("query-chardev"))]
            if name.startswith("ftvm-")]


def test_nothing_leaves_before_the_release_and_then_all_in_order(guest: Qemu, buffer: OutputBuffer,
                                                                 listener: Listener) -> None:
    assert listener.hear(0.3), "the guest sends nothing"
    buffer.install()
    before = listener.drain()
    assert listener.hear(0.5) == []
    buffer.release()
    assert listener.hear(0.2) == [], "released before the cut"
    buffer.cut()
    assert listener.hear(0.2) == [], "the cut let something out"
    buffer.release()
    first = listener.drain()
    assert len(first) > 20
    assert listener.hear(0.3) == [], "what came after the cut belongs to the next epoch"
    buffer.release()
    assert listener.hear(0.2) == [], "it was released with the epoch before"
    buffer.cut()
    buffer.release()
    second = listener.drain()
    buffer.remove()
    third = listener.hear(0.3)
    numbers = before + first + second + sorted(third)
    assert second and third and numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def test_what_is_held_goes_when_the_filters_go_and_they_leave_nothing(guest: Qemu, buffer: OutputBuffer,
                                                                     monitor: qmp.Monitor, listener: Listener) -> None:
    buffer.install()
    before = listener.drain()
    assert filters(monitor) and listener.hear(0.3) == []
    buffer.remove()
    buffer.remove()
    numbers = sorted(before + listener.hear(0.3))
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert filters(monitor) == []


def test_a_dead_engines_guest_stays_silent_until_its_filters_are_removed(guest: Qemu, listener: Listener) -> None:
    with guest.monitor() as dead:
        lost = OutputBuffer(dead, netfilter.interfaces(dead))
        lost.install()
        listener.drain()
        lost.cut()
        lost.close()
    assert listener.hear(0.5) == [], "a guest spoke that nobody covered"
    guest.await_ticks()
    with guest.monitor() as monitor:
        buffer = OutputBuffer(monitor, netfilter.interfaces(monitor))
        buffer.install()
        listener.drain()
        assert listener.hear(0.3) == []
        buffer.remove()
        assert listener.hear(0.3) and filters(monitor) == []
        netfilter.remove(monitor, netfilter.interfaces(monitor))


def test_each_packet_is_told_of_at_once_though_it_is_held(guest: Qemu, buffer: OutputBuffer,
                                                         listener: Listener) -> None:
    buffer.install()
    listener.drain()
    for _ in range(3):
        assert select.select([buffer], [], [], 5.0)[0] and buffer.hear()
    assert listener.hear(0.2) == []


def test_a_filter_that_somebody_else_removes_is_told_once_and_for_all(guest: Qemu, buffer: OutputBuffer,
                                                                     monitor: qmp.Monitor, listener: Listener) -> None:
    buffer.install()
    (netdev,) = netfilter.interfaces(monitor)
    monitor.command("object-del", id=f"ftvm-out-{netdev}")
    monitor.command("chardev-remove", id=f"ftvm-out-{netdev}")
    assert select.select([buffer], [], [], 5.0)[0]
    with pytest.raises(OutputLost, match=f"closed the filter of {netdev}"):
        buffer.hear()
    assert not select.select([buffer], [], [], 0.1)[0] and not buffer.hear()
    buffer.remove()
    assert filters(monitor) == [] and listener.hear(0.3)


def test_a_guest_that_is_not_listened_to_waits_for_no_longer_than_there_is_room(guest: Qemu, buffer: OutputBuffer,
                                                                              listener: Listener) -> None:
    """An engine that is busy with something else: hundreds of packets are on their way to it."""
    buffer.install()
    listener.drain()
    time.sleep(3.0)
    guest.await_ticks()
    buffer.cut()
    buffer.release()
    numbers = listener.hear(0.3)
    assert len(numbers) > 200 and numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def test_processors_that_compute_are_told_from_those_that_sleep(launch: Launch) -> None:
    shares = {}
    for work in (IDLE, "spin"):
        qemu = launch(work[0], work=work)
        qemu.await_boot()
        with qemu.monitor() as monitor:
            processors = Processors(monitor)
            looks = []
            for _ in range(200):
                looks.append(processors.asleep())
                time.sleep(0.005)
            processors.close()
        shares[work] = sum(looks) / len(looks)
    assert shares[IDLE] > 0.5 > shares["spin"], shares


def test_input_is_not_held(guest: Qemu, buffer: OutputBuffer, network: Network) -> None:
    session = Session(network)
    buffer.install()
    pending = session.send()
    assert not session.hears_within(0.3)
    buffer.remove()
    session.receive(pending)
    session.close()


# Packets under way


class Knocker:
    """Asks the guest for a service that it does not have: each datagram that it gets is refused."""

    def __init__(self, network: Network) -> None:
        self.socket = network.socket(socket.SOCK_DGRAM)
        self.socket.connect((GUEST_ADDRESS, 9))
        self.socket.setblocking(False)

    def knock(self) -> None:
        self.socket.send(b"knock, knock")

    def is_refused(self, seconds: float = 2.0) -> bool:
        if not select.select([self.socket], [], [], seconds)[0]:
            return False
        with pytest.raises(ConnectionRefusedError):
            self.socket.recv(1)
        return True


@pytest.fixture
def knocker(network: Network) -> Iterator[Knocker]:
    made = Knocker(network)
    yield made
    made.socket.close()


def test_a_guest_hears_again_what_came_for_it(guest: Qemu, buffer: OutputBuffer, monitor: qmp.Monitor,
                                             knocker: Knocker) -> None:
    buffer.install()
    buffer.cut()
    knocker.knock()
    heard = wait_for("the tee tells what came", lambda: [one for one in buffer.overheard() if b"knock" in one.framed])
    assert not knocker.is_refused(0.3), "the guest was heard"
    buffer.remove()
    assert knocker.is_refused() and not knocker.is_refused(0.3)
    Replay(monitor).replay({one.mac: bytes(one.framed) for one in heard}, {}, {})
    assert knocker.is_refused(), "the guest did not hear it again"
    assert filters(monitor) == []


def test_what_a_checkpoint_covers_came_before_it(guest: Qemu, buffer: OutputBuffer, knocker: Knocker) -> None:
    buffer.install()
    knocker.knock()
    time.sleep(0.3)
    buffer.cut()
    assert not any(b"knock" in one.framed for one in buffer.overheard())


def test_what_a_guest_has_said_can_be_said_again(guest: Qemu, buffer: OutputBuffer, monitor: qmp.Monitor,
                                               listener: Listener) -> None:
    buffer.install()
    listener.drain()
    time.sleep(0.3)
    buffer.cut()
    (covered,) = buffer.covered()
    buffer.release()
    first = listener.drain()
    buffer.remove()
    listener.drain()
    Replay(monitor).replay({}, {covered.mac: bytes(covered.framed), b"nobody": b"else"}, {})
    again = listener.hear(0.3)
    assert first and [number for number in again if number in first] == first
    assert filters(monitor) == []


def test_a_guests_clients_are_reminded_by_its_own_interface(guest: Qemu, buffer: OutputBuffer, monitor: qmp.Monitor,
                                                            network: Network) -> None:
    session = Session(network)
    buffer.install()
    pending = session.send()
    port = session.connection.getsockname()[1].to_bytes(2, "big")
    time.sleep(0.3)
    buffer.cut()
    covered = list(buffer.covered())
    buffer.release()
    session.receive(pending)
    buffer.remove()
    bridge = network.socket(socket.SOCK_RAW, socket.AF_PACKET)
    bridge.settimeout(2.0)
    bridge.bind(("br0", ETH_P_IP))
    Replay(monitor).replay({}, {}, reminders(covered))
    heard = 0
    while heard < STEPS:
        packet = bridge.recv(1 << 16)
        heard += packet[23] == socket.IPPROTO_ICMP and packet[34:36] == b"\3\1" and port == packet[62:64]
    bridge.close()
    session.exchange(3)
    session.close()
    assert filters(monitor) == []


@pytest.mark.parametrize(("kind", "queue"), [(netfilter.HEARD, "tx"), (netfilter.SAID, "rx")])
def test_a_replay_that_died_half_way_hinders_nobody_and_goes_with_the_next_protection(
        kind: str, queue: str, guest: Qemu, monitor: qmp.Monitor, network: Network, knocker: Knocker,
        listener: Listener) -> None:
    ours, theirs = netfilter.pair(1 << 16)
    (netdev,) = netfilter.interfaces(monitor)
    netfilter.add(monitor, kind, netdev, theirs, type="filter-redirector", queue=queue, way="indev")
    # Half a packet, and the end of the engine.
    ours.sendall((100).to_bytes(4, "big") + bytes(10))
    ours.close()
    knocker.knock()
    assert knocker.is_refused() and listener.hear(0.3)
    netfilter.remove(monitor, [netdev])
    assert filters(monitor) == []


def test_much_is_not_worth_to_be_told(guest: Qemu, buffer: OutputBuffer, network: Network) -> None:
    """Whoever sends so much is not waiting for one reply."""
    flood = network.socket(socket.SOCK_DGRAM)
    buffer.install()
    buffer.cut()
    told = 0
    for _ in range(20):
        for _ in range(20):
            flood.sendto(bytes(1400), (GUEST_ADDRESS, 9))
        time.sleep(0.02)
        told += sum(len(one.framed) for one in buffer.overheard())
    flood.close()
    assert 0 < told <= 128 << 10
    guest.await_ticks()


def test_interfaces_of_every_model_are_found_by_their_backends(launch: Launch) -> None:
    qemu = launch("b", standby=True, extra=(
        "-netdev", "user,id=second", "-device", "e1000,id=net1,netdev=second", "-netdev", "user,id=nobody",
        "-netdev", "user,id=third", "-device", "rtl8139,id=net2,netdev=third"))
    with qemu.monitor() as monitor:
        assert sorted(netfilter.interfaces(monitor)) == ["hostnet0", "second", "third"]
        buffer = OutputBuffer(monitor, netfilter.interfaces(monitor))
        buffer.install()
        assert len(filters(monitor)) == 18
        buffer.remove()
        assert filters(monitor) == []


def refused(qemu: Qemu) -> str:
    with qemu.monitor() as monitor:
        buffer = OutputBuffer(monitor, netfilter.interfaces(monitor))
        with pytest.raises(Unsupported) as raised:
            buffer.install()
        assert filters(monitor) == [], "a refusal leaves nothing behind"
        buffer.close()
    return str(raised.value)


def test_multiqueue_is_refused_with_what_to_do(launch: Launch, network: Network) -> None:
    network.ip("tuntap", "add", "tap-q", "mode", "tap", "multi_queue")
    try:
        qemu = launch("b", standby=True, extra=(
            "-netdev", "tap,id=many,ifname=tap-q,script=no,downscript=no,queues=2",
            "-device", "virtio-net-pci,id=net9,netdev=many,mq=on,vectors=6"))
        assert "without vhost and multiqueue" in refused(qemu)
    finally:
        network.ip("link", "del", "tap-q")


@pytest.mark.skipif(not os.path.exists("/dev/vhost-net"), reason="no /dev/vhost-net: the kernel has no vhost")
def test_vhost_is_refused_with_what_to_do(launch: Launch, network: Network) -> None:
    network.ip("tuntap", "add", "tap-v", "mode", "tap")
    try:
        qemu = launch("b", standby=True, extra=(
            "-netdev", "tap,id=fast,ifname=tap-v,script=no,downscript=no,vhost=on",
            "-device", "virtio-net-pci,id=net9,netdev=fast"))
        assert "without vhost and multiqueue" in refused(qemu)
    finally:
        network.ip("link", "del", "tap-v")


def test_a_monitor_serves_commands_errors_and_events(guest: Qemu, monitor: qmp.Monitor) -> None:
    monitor.command("stop")
    monitor.command("cont")
    assert [message["event"] for message in monitor.receive() if "event" in message] == ["STOP", "RESUME"]
    with pytest.raises(QemuError, match="QEMU refused no-such-command"):
        monitor.command("no-such-command")
    assert guest.is_running()
