"""The guest of guest/native.S: it runs natively under KVM, reads over its working set, and writes what it is asked to.

Also KVM's own counters of its page faults, which no load of the machine changes.
"""

import struct
from pathlib import Path

import numpy as np

from nova_ftvm.host import procmem
from nova_ftvm.host.memory import ram_blocks
from nova_ftvm.types import PAGE
from tests.host.machine import Qemu, wait_for
from tests.kvm import machine

_BASE_MIB = 16
_CONTROL = 0x200000
_PASSES, _DIFFERED, _WANTED, _WRITTEN, _REPEATED = range(5)
_START_S = 60.0


def rom(mib: int, vcpus: int = 1) -> Path:
    """mib: the working set of each processor, a power of 2."""
    return machine.build("native", PAGES=mib * 256, PROCESSORS=vcpus)


def memory_mib(mib: int, vcpus: int = 1) -> int:
    """What a QEMU needs for it."""
    return mib * vcpus + 2 * _BASE_MIB


class Native:
    """What the test says to the guest, and sees of it."""

    def __init__(self, qemu: Qemu, vcpus: int = 1) -> None:
        self.qemu = qemu
        self._vcpus = vcpus
        self._ram = next(block for block in ram_blocks(qemu.operator) if block.name == "pc.ram")

    def await_start(self) -> None:
        for processor in range(self._vcpus):
            wait_for(f"processor {processor} reads its working set",
                     lambda processor=processor: self._lives() and self.passes(processor) > 2, _START_S)

    def passes(self, processor: int = 0) -> int:
        """Over the working set, so far."""
        return self._words(processor)[_PASSES]

    def differed(self) -> int:
        """Pairs of pages that were not what the guest had written: its memory is spoilt."""
        return sum(self._words(processor)[_DIFFERED] for processor in range(self._vcpus))

    def written(self) -> int:
        """Pages that it was asked to write, and has."""
        return 2 * sum(self._words(processor)[_WRITTEN] for processor in range(self._vcpus))

    def ask_for(self, pages: int, *, repeated: bool = False) -> None:
        """The guest writes this number of pages once: random ones, or always the same ones."""
        for processor in range(self._vcpus):
            self._put(processor, _REPEATED, int(repeated))
            self._put(processor, _WANTED, pages // 2)

    def _words(self, processor: int) -> tuple[int, ...]:
        start = self._ram.address + _CONTROL + processor * PAGE
        into = np.empty(40, np.uint8)
        procmem.read(self.qemu.pid, np.array([[start, start + 40]], np.uint64), into)
        return struct.unpack("<5Q", into.tobytes())

    def _put(self, processor: int, word: int, value: int) -> None:
        start = self._ram.address + _CONTROL + processor * PAGE + 8 * word
        procmem.write(self.qemu.pid, np.array([[start, start + 8]], np.uint64),
                      np.frombuffer(struct.pack("<Q", value), np.uint8))

    def _lives(self) -> bool:
        assert self.qemu.process.poll() is None, (self.qemu.folder / "qemu.log").read_text()
        return True


class Processor:
    """The time that the thread of the guest's first processor has had of one of the host's, and its page faults."""

    def __init__(self, qemu: Qemu) -> None:
        self._operator = qemu.operator
        (first, *_) = self._operator.command("query-cpus-fast")
        self._path = first["qom-path"]
        self._schedstat = Path(f"/proc/{qemu.pid}/task/{first['thread-id']}/schedstat")

    def seconds(self) -> float:
        return int(self._schedstat.read_text().split()[0]) / 1e9

    def faults(self) -> int:
        """Those that KVM ended by mapping a page, since the guest was made."""
        (found,) = self._operator.command("query-stats", target="vcpu", vcpus=[self._path], providers=[
            {"provider": "kvm", "names": ["pf_fixed"]}])
        return int(found["stats"][0]["value"])
