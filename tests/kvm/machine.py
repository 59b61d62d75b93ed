"""What the tests under KVM stand on: bare-metal guests, built here, and QEMUs that run them from `-bios`.

A build machine may have a KVM without vmx or svm in its processor. Guest code in kernel mode is emulated there, a
million instructions a second at most: too slow for a Linux guest. Code in user mode (CPL 3, 64 bits) runs natively,
through KVM's own page tables and mmu notifiers: it is all that dirty tracking needs. Each guest is one of guest/*.S.
"""

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.host.machine import QEMU, ROOT, Qemu

SOURCES = Path(__file__).parent / "guest"
KVM, TCG = "kvm", "tcg"
#: `-cpu host` needs MSRs that a KVM without vmx or svm does not have.
CPU = "qemu64"

_KVM_CREATE_VM = 0xAE01
_PR_SET_THP_DISABLE = 41

_libc = ctypes.CDLL(None, use_errno=True)


def lacking() -> str:
    """What the tests under KVM need and this machine lacks; '' when it has all."""
    for name in ("as", "ld", QEMU):
        if shutil.which(name) is None:
            return f"{name} is not installed"
    if os.geteuid():
        return "not root"
    try:
        with open("/dev/kvm", "r+b", buffering=0) as kvm:
            os.close(fcntl.ioctl(kvm, _KVM_CREATE_VM, 0))
    except OSError as error:
        return f"/dev/kvm makes no virtual machine: {error}"
    return ""


def build(name: str, **symbols: int) -> Path:
    """The 64 KiB ROM of guest/NAME.S, assembled with these symbols, its reset vector at the end."""
    source = SOURCES / f"{name}.S"
    words = [f"{symbol}={value}" for symbol, value in sorted(symbols.items())]
    digest = hashlib.sha256(source.read_bytes() + " ".join(words).encode()).hexdigest()[:16]
    folder = ROOT / "build" / "kvm"
    folder.mkdir(parents=True, exist_ok=True)
    rom = folder / f"{name}-{digest}.rom"
    if not rom.exists():
        made = rom.with_suffix(f".{os.getpid()}.o")
        partial = rom.with_suffix(f".{os.getpid()}.partial")
        try:
            definitions = [part for word in words for part in ("--defsym", word)]
            subprocess.run(["as", *definitions, "-o", made, source], check=True)
            subprocess.run(["ld", "-Ttext=0", "--oformat", "binary", "-o", partial, made], check=True)
            assert partial.stat().st_size == 1 << 16, f"{source} makes no ROM of 64 KiB"
            partial.rename(rom)
        finally:
            made.unlink(missing_ok=True)
            partial.unlink(missing_ok=True)
    return rom


def launcher(stack: ExitStack, folder: Path) -> Callable[..., Qemu]:
    """launch(name, rom, *, accel, machine_type, cpu, vcpus, memory_mib, extra, standby): a QEMU of the stack's life."""

    def launch(name: str, rom: Path, *, accel: str = KVM, machine_type: str = "pc", cpu: str = CPU, vcpus: int = 1,
               memory_mib: int = 64, extra: Sequence[str] = (), standby: bool = False) -> Qemu:
        own = folder / name
        own.mkdir()
        qemu = Qemu(own, ["-M", machine_type, "-accel", accel, "-cpu", cpu, "-m", str(memory_mib), "-smp", str(vcpus),
                          "-nodefaults", "-display", "none", "-vga", "std", "-bios", str(rom), *extra,
                          *(["-incoming", "defer", "-S"] if standby else [])])
        stack.callback(qemu.kill)
        return qemu

    return launch


def huge_mib(qemu: Qemu) -> int:
    """Of QEMU's memory, what lies in huge pages."""
    rollup = Path(f"/proc/{qemu.pid}/smaps_rollup").read_text()
    return int(rollup.split("AnonHugePages:")[1].split()[0]) >> 10


@contextmanager
def small_pages() -> Iterator[None]:
    """What is started meanwhile has no huge pages."""
    # SAFE: five integers; inherited by children, and kept by exec.
    assert _libc.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0
    try:
        yield
    finally:
        # SAFE: as above.
        _libc.prctl(_PR_SET_THP_DISABLE, 0, 0, 0, 0)
