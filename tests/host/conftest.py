"""Fixtures of the tests on a real kernel and a real QEMU. What needs a guest is skipped only without its door."""

import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from nova_ftvm.core import domain
from tests.host import machine
from tests.host.images import Image, arguments
from tests.host.machine import Network, Qemu

#: A guest's workloads on the kernel's command line; see guest/*.c.
IDLE, CHURN, DATAGRAMS = "idle", "churn", "datagrams"


@pytest.fixture(scope="session")
def needs_guests() -> None:
    if reason := machine.lacking():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def ramdisk(needs_guests: None) -> Path:
    return machine.ramdisk(machine.guest_folder())


@pytest.fixture
def image_folder(needs_guests: None) -> Iterator[Path]:
    """On a disk: a file system in memory takes O_DIRECT, but does nothing of the kind."""
    with tempfile.TemporaryDirectory(prefix="images-", dir=machine.guest_folder()) as name:
        yield Path(name)


@pytest.fixture(scope="module")
def module_images(needs_guests: None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="images-", dir=machine.guest_folder()) as name:
        yield Path(name)


@pytest.fixture(scope="session")
def network(needs_guests: None) -> Iterator[Network]:
    made = Network()
    yield made
    made.remove()


Launch = Callable[..., Qemu]


def launcher(stack: ExitStack, folder: Path, ramdisk: Path, network: Network) -> Launch:
    """launch(side, *, work, machine_type, vcpus, memory_mib, extra, standby): a QEMU that ends with the stack."""
    numbers = itertools.count(1)

    def launch(side: str = "p", *, work: str = IDLE, machine_type: str = "pc", vcpus: int = 1,
               memory_mib: int = machine.MEMORY_MIB, extra: Sequence[str] = (), standby: bool = False) -> Qemu:
        own = folder / f"{side}{next(numbers)}"
        own.mkdir()
        qemu = Qemu(own, [
            "-M", machine_type, "-accel", "tcg", "-m", str(memory_mib), "-smp", str(vcpus), "-nodefaults",
            "-display", "none", "-vga", "std", "-kernel", str(machine.LAB_GUEST / "kernel"), "-initrd", str(ramdisk),
            "-append", f"console=ttyS0 quiet tsc=unstable ftvm.work={work}",
            "-netdev", f"tap,id=hostnet0,ifname=tap-{side},script=no,downscript=no",
            "-device", "virtio-net-pci,id=net0,netdev=hostnet0,mac=52:54:00:00:00:01", "-device", "virtio-rng-pci",
            "-device", "virtio-balloon-pci", *domain.NO_IOEVENTFD,
            *(domain.LEGACY_VIRTIO if machine_type == "pc" else ()), *extra,
            *(["-incoming", "defer", "-S"] if standby else [])], network)
        stack.callback(qemu.kill)
        return qemu

    return launch


@pytest.fixture
def launch(tmp_path: Path, ramdisk: Path, network: Network) -> Iterator[Launch]:
    with ExitStack() as stack:
        yield launcher(stack, tmp_path, ramdisk, network)


@pytest.fixture(scope="module")
def module_launch(tmp_path_factory: pytest.TempPathFactory, ramdisk: Path, network: Network) -> Iterator[Launch]:
    with ExitStack() as stack:
        yield launcher(stack, tmp_path_factory.mktemp("guests"), ramdisk, network)


def keeps_ledgers(launch: Launch, side: str, disks: Sequence[Image], names: Sequence[str], *, work: str = CHURN,
                  standby: bool = False) -> Qemu:
    """A guest with these disks, and a ledger of each of the named ones (vda, sdb), begun."""
    ledgers = [f"ledger:{name}" for name in names]
    qemu = launch(side, work=",".join([work, *ledgers]), vcpus=2, extra=arguments(disks), standby=standby)
    if not standby:
        qemu.await_boot()
        for name in names:
            qemu.await_log(f"ledger {name} begins")
    return qemu
