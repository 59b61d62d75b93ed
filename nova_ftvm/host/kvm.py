"""What this host's KVM can: asked of /dev/kvm once, at the agent's start. Never starts a guest. Caller: cmd/agent.py.

libvirt asks the same questions for its capabilities (<counter name='tsc'>), and QEMU for what a processor may have.
"""

import contextlib
import fcntl
import os
import struct
from collections.abc import Iterator

from nova_ftvm.core.kind import Abilities

# Linux's include/uapi/linux/kvm.h: _IO(0xAE, ..) and _IOWR(0xAE, 0x05, struct kvm_cpuid2).
_CREATE_VM = 0xAE01
_CHECK_EXTENSION = 0xAE03
_CREATE_VCPU = 0xAE41
_GET_TSC_KHZ = 0xAEA3
_GET_SUPPORTED_CPUID = 0xC008AE05
_CAP_TSC_CONTROL = 60

#: function, index, flags, eax, ebx, ecx, edx, and room.
_CPUID_ENTRY = struct.Struct("=7I12x")
_CPUID_HEAD = struct.Struct("=II")
_MOST_ENTRIES = 256
_EBX, _EDX = 4, 6
#: (function, index), register and bit of what a guest may be told.
_INVARIANT_TSC = ((0x80000007, 0), _EDX, 1 << 8)
_TSC_ADJUST = ((7, 0), _EBX, 1 << 1)

#: A TSC that this host's own kernel found unstable is not among them.
_CLOCKSOURCES = "/sys/devices/system/clocksource/clocksource0/available_clocksource"


def abilities(device: str = "/dev/kvm", clocksources: str = _CLOCKSOURCES) -> Abilities:
    """Makes a virtual machine of one processor, which never runs, and asks it."""
    try:
        with _opened(device) as kvm, _made(kvm, _CREATE_VM) as machine, _made(machine, _CREATE_VCPU) as vcpu:
            cpuid = _supported_cpuid(kvm)
            is_clock = _has(cpuid, *_INVARIANT_TSC) and _host_trusts_its_tsc(clocksources)
            return Abilities(kvm=True, tsc_hz=_tsc_hz(vcpu) if is_clock else 0,
                             tsc_scaling=fcntl.ioctl(kvm, _CHECK_EXTENSION, _CAP_TSC_CONTROL) > 0,
                             tsc_adjust=_has(cpuid, *_TSC_ADJUST))
    except OSError:
        # No module, no right, or a processor in the way of it: QEMU could not use it either.
        return Abilities()


@contextlib.contextmanager
def _opened(device: str) -> Iterator[int]:
    descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _made(parent: int, request: int) -> Iterator[int]:
    """A virtual machine of KVM, or its processor 0."""
    descriptor = fcntl.ioctl(parent, request, 0)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _tsc_hz(vcpu: int) -> int:
    try:
        return fcntl.ioctl(vcpu, _GET_TSC_KHZ, 0) * 1000
    except OSError:
        # KVM knows no rate that it could keep.
        return 0


def _supported_cpuid(kvm: int) -> dict[tuple[int, int], tuple[int, ...]]:
    """Whole entries by (function, index)."""
    asked = bytearray(_CPUID_HEAD.size + _MOST_ENTRIES * _CPUID_ENTRY.size)
    _CPUID_HEAD.pack_into(asked, 0, _MOST_ENTRIES, 0)
    # SAFE: the kernel writes no more than the entries that the head announces, and the buffer has room for them.
    fcntl.ioctl(kvm, _GET_SUPPORTED_CPUID, asked)
    number, _ = _CPUID_HEAD.unpack_from(asked)
    entries = _CPUID_ENTRY.iter_unpack(asked[_CPUID_HEAD.size:_CPUID_HEAD.size + number * _CPUID_ENTRY.size])
    return {(entry[0], entry[1]): entry for entry in entries}


def _has(cpuid: dict[tuple[int, int], tuple[int, ...]], leaf: tuple[int, int], register: int, bit: int) -> bool:
    return leaf in cpuid and bool(cpuid[leaf][register] & bit)


def _host_trusts_its_tsc(clocksources: str) -> bool:
    try:
        with open(clocksources) as names:
            return "tsc" in names.read().split()
    except OSError:
        return False
