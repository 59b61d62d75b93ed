"""host/: QEMU's doors, one at a time, on a real QEMU with a real guest."""

import os
import select
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nova_ftvm.exception import GuestGone, QemuError, Unsupported
from nova_ftvm.host import qmp
from nova_ftvm.host.activity import Activity
from nova_ftvm.host.memory import TrackedMemory, ram_blocks
from nova_ftvm.host.netbuf import OutputBuffers, interfaces
from nova_ftvm.host.userfault import WriteProtection
from tests.host.conftest import DATAGRAMS, IDLE, Launch
from tests.host.machine import DATAGRAM_PORT, HOST_ADDRESS, MEMORY_MIB, Network, Qemu, Session


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


def flush(monitor: qmp.Monitor, lines: bytes) -> None:
    """Sends a batch and waits for its answers."""
    monitor.send(lines)
    wanted, deadline = lines.count(b"\n"), time.monotonic() + 5
    while wanted and time.monotonic() < deadline:
        for message in monitor.receive():
            assert "error" not in message
            wanted -= "return" in message
        time.sleep(0.001)
    assert not wanted


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


# The output's buffers


def test_nothing_leaves_before_the_release_and_then_all_in_order(guest: Qemu, monitor: qmp.Monitor,
                                                                 listener: Listener) -> None:
    buffers = OutputBuffers(monitor, interfaces(monitor))
    assert listener.hear(0.3), "the guest sends nothing"
    buffers.install()
    listener.drain()
    assert listener.hear(0.5) == []
    flush(monitor, buffers.release)
    listener.drain()  # What the guest sent after the late buffer came and before the early one did: held, and safe.
    flush(monitor, buffers.release)
    assert listener.hear(0.2) == [], "released before the barrier"
    flush(monitor, buffers.barrier)
    assert listener.hear(0.2) == [], "the barrier let something out"
    flush(monitor, buffers.release)
    first = listener.drain()
    assert len(first) > 20
    assert listener.hear(0.3) == [], "what came after the barrier belongs to the next epoch"
    flush(monitor, buffers.barrier)
    flush(monitor, buffers.release)
    second = listener.drain()
    buffers.remove()
    third = listener.hear(0.3)
    numbers = first + second + third
    assert second and third and numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def test_the_leftovers_of_a_dead_engine_are_replaced_and_lost_is_nothing(guest: Qemu, listener: Listener) -> None:
    with guest.monitor() as dead:
        OutputBuffers(dead, interfaces(dead)).install()
        listener.drain()
        assert listener.hear(0.2) == []
    with guest.monitor() as monitor:
        buffers = OutputBuffers(monitor, interfaces(monitor))
        buffers.install()
        before = listener.drain()
        assert listener.hear(0.2) == []
        buffers.remove()
        buffers.remove()
        numbers = before + listener.hear(0.3)
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        objects = {child["name"] for child in monitor.command("qom-list", path="/objects")}
        assert not any(name.startswith("ftvm-") for name in objects)


def test_each_packet_is_told_of_at_once_though_it_is_held(guest: Qemu, monitor: qmp.Monitor, listener: Listener,
                                                         tmp_path: Path) -> None:
    activity = Activity(monitor, str(tmp_path / "output.fifo"))
    buffers = OutputBuffers(monitor, interfaces(monitor), activity.signs.path)
    buffers.install()
    try:
        assert activity.hear(), "the sign's own beginning"
        listener.drain()
        for _ in range(3):
            assert select.select([activity], [], [], 5.0)[0] and activity.hear()
        assert listener.hear(0.2) == []
    finally:
        buffers.remove()
        activity.hear()
        assert not select.select([activity], [], [], 0.2)[0], "a sign of what is not held any more"
        activity.close()


def test_a_guest_goes_on_when_whoever_heard_its_signs_dies(guest: Qemu, listener: Listener, tmp_path: Path) -> None:
    with guest.monitor() as monitor:
        activity = Activity(monitor, str(tmp_path / "output.fifo"))
        OutputBuffers(monitor, interfaces(monitor), activity.signs.path).install()
        activity.close()
    guest.await_ticks()
    with guest.monitor() as monitor:
        OutputBuffers(monitor, interfaces(monitor)).remove()
    assert listener.hear(0.3)


def test_processors_that_compute_are_told_from_those_that_sleep(launch: Launch, tmp_path: Path) -> None:
    shares = {}
    for work in (IDLE, "spin"):
        qemu = launch(work[0], work=work)
        qemu.await_boot()
        with qemu.monitor() as monitor:
            activity = Activity(monitor, str(tmp_path / work))
            looks = []
            for _ in range(200):
                looks.append(activity.asleep())
                time.sleep(0.005)
            activity.close()
        shares[work] = sum(looks) / len(looks)
    assert shares[IDLE] > 0.5 > shares["spin"], shares


def test_input_is_not_held(guest: Qemu, monitor: qmp.Monitor, network: Network) -> None:
    session = Session(network)
    buffers = OutputBuffers(monitor, interfaces(monitor))
    buffers.install()
    pending = session.send()
    assert not session.hears_within(0.3)
    buffers.remove()
    session.receive(pending)
    session.close()


def test_interfaces_of_every_model_are_found_by_their_backends(launch: Launch) -> None:
    qemu = launch("b", standby=True, extra=(
        "-netdev", "user,id=second", "-device", "e1000,id=net1,netdev=second", "-netdev", "user,id=nobody",
        "-netdev", "user,id=third", "-device", "rtl8139,id=net2,netdev=third"))
    with qemu.monitor() as monitor:
        assert sorted(interfaces(monitor)) == ["hostnet0", "second", "third"]
        buffers = OutputBuffers(monitor, interfaces(monitor))
        buffers.install()
        buffers.remove()


def refused(qemu: Qemu) -> str:
    with qemu.monitor() as monitor:
        buffers = OutputBuffers(monitor, interfaces(monitor))
        with pytest.raises(Unsupported) as raised:
            buffers.install()
        objects = {child["name"] for child in monitor.command("qom-list", path="/objects")}
        assert not any(name.startswith("ftvm-") for name in objects), "a refusal leaves nothing behind"
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
