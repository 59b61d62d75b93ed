"""Can this host protect guests? Checked once at the agent's start; what is missing is said in one sentence each.

Unsupported is not broken: a host that lacks something stays in the cloud, its servers run unprotected.
"""

import ctypes
import mmap
import os
import shutil
import subprocess

from nova_ftvm.exception import FtvmError, Unsupported
from nova_ftvm.host import pagemap, syscalls, userfault

_QEMU = ("qemu-system-x86_64", "/usr/libexec/qemu-kvm")
_OLDEST_QEMU = (8, 0)
_USER_MODE_ONLY = 1


def missing() -> list[str]:
    """What this host lacks; [] when it can protect guests."""
    if syscalls.MACHINE != "x86_64":
        return [f"the machine is {syscalls.MACHINE}: only x86_64 is supported"]
    return [sentence for check in (_privileges, _kernel, _qemu) if (sentence := check())]


def _privileges() -> str:
    with open("/proc/self/status") as status:
        effective = next(int(line.split()[1], 16) for line in status if line.startswith("CapEff:"))
    needed = {19: "CAP_SYS_PTRACE", 1: "CAP_DAC_OVERRIDE", 0: "CAP_CHOWN"}
    lacking = [name for bit, name in needed.items() if not effective >> bit & 1]
    return f"the agent lacks {', '.join(lacking)}: run it as root" if lacking else ""


def _kernel() -> str:
    """Write-protects a page of our own and looks whether a write to it is seen."""
    try:
        uffd = syscalls.checked(syscalls.libc.syscall(
            syscalls.NR_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK | _USER_MODE_ONLY), "userfaultfd")
    except OSError as error:
        return f"the kernel refuses userfaultfd ({error.strerror}): enable CONFIG_USERFAULTFD and run the agent as root"
    try:
        userfault.enable_async_protection(uffd)
        return "" if _sees_writes(uffd) else "the kernel's PAGEMAP_SCAN misses writes: run Linux 6.7 or newer"
    except Unsupported as error:
        return str(error)
    except OSError as error:
        return f"the kernel lacks PAGEMAP_SCAN ({error.strerror}): run Linux 6.7 or newer"
    finally:
        os.close(uffd)


def _sees_writes(uffd: int) -> bool:
    with mmap.mmap(-1, 2 * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory[0] = 1
        memory[mmap.PAGESIZE] = 1
        # SAFE: the address of a live mapping, given to the kernel only; `anchor` is dropped before the mapping closes.
        anchor = ctypes.c_char.from_buffer(memory)
        start = ctypes.addressof(anchor)
        del anchor
        userfault.register(uffd, start, len(memory))
        own = pagemap.Pagemap(os.getpid(), 16)
        try:
            own.take_written(start, start + len(memory))
            memory[mmap.PAGESIZE] = 2
            written = own.take_written(start, start + len(memory))
        finally:
            own.close()
        return written.tolist() == [[start + mmap.PAGESIZE, start + 2 * mmap.PAGESIZE]]


def _qemu() -> str:
    path = next((found for name in _QEMU if (found := shutil.which(name))), None)
    if path is None:
        return "no QEMU is installed: install QEMU 8.0 or newer"
    try:
        version = qemu_version(subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20,
                                              check=True).stdout)
    except (OSError, subprocess.SubprocessError, FtvmError) as error:
        return f"{path} does not tell its version ({error}): install QEMU 8.0 or newer"
    if version < _OLDEST_QEMU:
        return f"QEMU {version[0]}.{version[1]} tells no addresses of its RAM blocks: install QEMU 8.0 or newer"
    return ""


def qemu_version(text: str) -> tuple[int, int]:
    """(major, minor) of 'QEMU emulator version 10.0.2 (...)'."""
    try:
        major, minor = text.split("version ", 1)[1].split(".")[:2]
        return int(major), int(minor)
    except (IndexError, ValueError) as error:
        raise Unsupported(f"no version in {text[:60]!r}") from error
