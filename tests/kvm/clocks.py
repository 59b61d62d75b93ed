"""What a guest's clocks do while it is checkpointed and at a promotion: guest/clocks.S, read from outside.

The guest writes into a record what it sees; here the record is read where it lies in QEMU's memory, which costs the
guest nothing. `measure` is for those who want the shares of real time alone.
"""

import contextlib
import dataclasses
import enum
import fcntl
import functools
import os
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from nova_ftvm.host import procmem
from nova_ftvm.host.memory import ram_blocks
from tests.host.machine import Qemu, wait_for
from tests.kvm import machine
from tests.kvm.checkpoints import Checkpoints

#: Between two checkpoints of a protected guest.
EPOCH_S = 0.01
#: Interrupts a second that guest/clocks.S asks for.
PIT_HZ, TIMER_HZ = 50, 100
_REPORT, _RECORD_BYTES = 0x2000, 0x100
_RECORD = struct.Struct("<5I4xQQ3BxII")
_START_S = 20.0
_SETTLE_S = 0.5
#: Longer than the guest needs for its record: one that is still half written is looked at again.
_AGAIN_S = 0.00005

_KVM_CREATE_VM, _KVM_CREATE_VCPU, _KVM_GET_TSC_KHZ = 0xAE01, 0xAE41, 0xAEA3
_KVM_GET_MSRS = 0xC008AE88
#: One MSR: how many, which, its value.
_MSR = struct.Struct("<I4xI4xQ")
_TSC = 0x10


@contextlib.contextmanager
def _vcpu() -> Iterator[int]:
    """A processor of a virtual machine that does nothing."""
    with open("/dev/kvm", "r+b", buffering=0) as kvm, ExitStack() as stack:
        vm = fcntl.ioctl(kvm, _KVM_CREATE_VM, 0)
        stack.callback(os.close, vm)
        vcpu = fcntl.ioctl(vm, _KVM_CREATE_VCPU, 0)
        stack.callback(os.close, vcpu)
        yield vcpu


@functools.cache
def tsc_hz() -> int:
    """The frequency of this host's TSC, as KVM has measured it; to the kHz."""
    with _vcpu() as vcpu:
        return 1000 * fcntl.ioctl(vcpu, _KVM_GET_TSC_KHZ, 0)


@functools.cache
def has_own_tsc() -> bool:
    """Does a guest's TSC begin at zero, as on processors with vmx or svm? Else it is the host's, and cannot be set."""
    with _vcpu() as vcpu:
        asked = bytearray(_MSR.pack(1, _TSC, 0))
        fcntl.ioctl(vcpu, _KVM_GET_MSRS, asked)
        return bool(_MSR.unpack(asked)[2] < tsc_hz())


def cpu(*more: str) -> str:
    """A processor as a protected guest gets it: its TSC invariant, of a frequency that is said, with a TSC_ADJUST."""
    return ",".join((machine.CPU, "+invtsc", "+tsc-adjust", f"tsc-frequency={tsc_hz()}", "-svm", "-vmx", *more))


def machine_type(name: str = "pc") -> str:
    """A machine as a protected guest gets it: PIT and PICs are QEMU's."""
    return f"{name},kernel-irqchip=split"


def rom(vcpus: int = 1, *, deadline: bool = False, kvmclock: bool = True) -> Path:
    return machine.build("clocks", CPUS=vcpus, PERIOD=tsc_hz() // TIMER_HZ if deadline else 0, PVCLOCK=int(kvmclock))


class Told(enum.Flag):
    """What CPUID tells the guest of its clocks."""

    INVARIANT = 1
    KVMCLOCK = 2


@dataclasses.dataclass(frozen=True, slots=True)
class Reading:
    """One processor's record, and when it was read (s, monotonic)."""

    at_s: float
    looks: int
    pit: int
    lapic: int
    tsc_back: int
    kvmclock_back: int
    tsc: int
    kvmclock_ns: int
    #: Of the CMOS: second, minute, hour.
    time_of_day: tuple[int, ...]
    told: Told
    told_khz: int

    @property
    def seconds(self) -> dict[str, float]:
        """What each clock says that has passed since some moment in the past of that clock."""
        return {"tsc": self.tsc / tsc_hz(), "kvmclock": self.kvmclock_ns / 1e9, "lapic": self.lapic / TIMER_HZ,
                "pit": self.pit / PIT_HZ}


def shares(first: Reading, last: Reading) -> dict[str, float]:
    """Of the real time between the readings, what each clock has counted."""
    passed_s, before = last.at_s - first.at_s, first.seconds
    return {name: (value - before[name]) / passed_s for name, value in last.seconds.items()}


class Clocks:
    """The records of a guest that runs guest/clocks.S."""

    def __init__(self, qemu: Qemu) -> None:
        self._qemu = qemu
        with qemu.monitor() as monitor:
            ram = next(block for block in ram_blocks(monitor) if block.name == "pc.ram")
        self._address = ram.address + _REPORT

    def read(self, processor: int = 0) -> Reading:
        """The record as it is now; one that is being written is waited for."""
        start = self._address + _RECORD_BYTES * processor
        into = np.empty(_RECORD.size, np.uint8)
        while True:
            procmem.read(self._qemu.pid, np.array([[start, start + _RECORD.size]], np.uint64), into)
            at_s = time.monotonic()
            looks, pit, lapic, tsc_back, kvmclock_back, tsc, ns, *bcd, told, told_khz = _RECORD.unpack(into.tobytes())
            if not looks & 1:
                return Reading(at_s, looks, pit, lapic, tsc_back, kvmclock_back, tsc, ns,
                               tuple(int(f"{digits:x}") for digits in bcd), Told(told), told_khz)
            time.sleep(_AGAIN_S)

    def fresh(self, processor: int = 0) -> Reading:
        """A record just written: the clocks in it are of now, but for what a look takes."""
        seen = self.read(processor)
        return self._when(lambda now: now.looks != seen.looks, processor)

    def at_tick(self) -> Reading:
        """The first processor's, just after an interrupt of the PIT: no part of its period is lost."""
        seen = self.read()
        woken = self._when(lambda now: now.pit != seen.pit, 0)
        # The interrupt is counted first; then the processor looks at the other clocks.
        return self._when(lambda now: now.looks != woken.looks, 0)

    def await_start(self, vcpus: int = 1) -> None:
        for processor in range(vcpus):
            wait_for(f"processor {processor} looks at its clocks", lambda processor=processor: self._lives() and (
                self.read(processor).looks > 20), _START_S)

    def _lives(self) -> bool:
        assert self._qemu.process.poll() is None, (self._qemu.folder / "qemu.log").read_text()
        return True

    def _when(self, is_it: Callable[[Reading], bool], processor: int) -> Reading:
        deadline = time.monotonic() + _START_S
        while not is_it(now := self.read(processor)):
            assert time.monotonic() < deadline and self._lives(), "the guest's timers stand still"
        return now


@contextlib.contextmanager
def place() -> Iterator[Callable[..., Qemu]]:
    """machine.launcher's `launch` where there is no fixture; all goes away with the block."""
    with tempfile.TemporaryDirectory(prefix="ftvm-clocks-") as folder, ExitStack() as stack:
        yield machine.launcher(stack, Path(folder))


def measure(seconds: float) -> dict[str, float]:
    """Of real time, what "tsc", "kvmclock", "lapic" and "pit" count: an idle guest with a checkpoint each 10 ms.

    Its machine and its processor are what the product gives a guest.
    """
    with place() as launch:
        return protected_shares(launch("p", rom(), machine_type=machine_type(), cpu=cpu()), seconds)


def protected_shares(qemu: Qemu, seconds: float) -> dict[str, float]:
    """The same of a guest that runs."""
    clocks = Clocks(qemu)
    clocks.await_start()
    with contextlib.closing(Checkpoints(qemu)) as checkpoints:
        checkpoints.run(_SETTLE_S, EPOCH_S)
        first = clocks.at_tick()
        checkpoints.run(seconds, EPOCH_S)
        return shares(first, clocks.at_tick())
