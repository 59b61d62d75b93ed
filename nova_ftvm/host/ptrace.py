"""Makes another process do a few system calls: seize, step over one `syscall` instruction each, detach.

The process is stopped for some milliseconds, once a protection. Its registers are put back whatever happens,
and a system call that the stop interrupted is restarted as the kernel would have done.
x86-64 only. Source of the idea: CRIU's parasite, reduced to what one call needs.
"""

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from nova_ftvm.exception import GuestGone
from nova_ftvm.host.syscalls import checked, libc

_SEIZE, _INTERRUPT, _GETREGS, _SETREGS, _STEP, _DETACH = 0x4206, 0x4207, 12, 13, 9, 17
_WALL = 0x40000000
_NO_SYSCALL = (1 << 64) - 1
_SYSCALL_INSTRUCTION = b"\x0f\x05"

# The kernel's private results for an interrupted call (include/linux/errno.h).
_RESTART_SAME_CALL = (-512, -513, -514)
_RESTART_BLOCK = -516
_EINTR = 4

_REGISTERS = ("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi",
              "orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs")
_ARGUMENTS = ("rdi", "rsi", "rdx", "r10", "r8", "r9")


class _Registers(ctypes.Structure):
    """struct user_regs_struct of x86-64."""

    _fields_ = [(name, ctypes.c_ulonglong) for name in _REGISTERS]


_ptrace = libc.ptrace
_ptrace.restype = ctypes.c_long
_ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]

Call = tuple[int, Sequence[int]]


class Seized:
    """A process that is stopped under our control; see `seized`."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._gadget = _find_syscall_instruction(pid)
        self._original = self._get()

    def call(self, number: int, *arguments: int) -> int:
        """Does one system call in the process. Returns its raw result (negative: -errno)."""
        registers = _Registers.from_buffer_copy(self._original)
        registers.rip = self._gadget
        registers.rax = number
        registers.orig_rax = _NO_SYSCALL
        for name, value in zip(_ARGUMENTS, arguments, strict=False):
            setattr(registers, name, value)
        self._set(registers)
        _request(_STEP, self._pid)
        _wait_for_stop(self._pid)
        return ctypes.c_longlong(self._get().rax).value

    def restore(self) -> None:
        """Puts the registers back, with an interrupted call set up to be done again."""
        registers = self._original
        result = ctypes.c_longlong(registers.rax).value
        if ctypes.c_longlong(registers.orig_rax).value >= 0:
            if result in _RESTART_SAME_CALL:
                registers.rax = registers.orig_rax
                registers.rip -= len(_SYSCALL_INSTRUCTION)
            elif result == _RESTART_BLOCK:
                # Its restart block may be gone: let the caller see a signal, as every caller must expect.
                registers.rax = (1 << 64) - _EINTR
        self._set(registers)

    def _get(self) -> _Registers:
        registers = _Registers()
        # SAFE: the kernel fills exactly one user_regs_struct, and `registers` outlives the call.
        _request(_GETREGS, self._pid, ctypes.addressof(registers))
        return registers

    def _set(self, registers: _Registers) -> None:
        # SAFE: the kernel reads exactly one user_regs_struct, and `registers` outlives the call.
        _request(_SETREGS, self._pid, ctypes.addressof(registers))


@contextmanager
def seized(pid: int) -> Iterator[Seized]:
    """Stops the process's main thread for the length of the block; raises PermissionError without CAP_SYS_PTRACE."""
    _request(_SEIZE, pid)
    try:
        _request(_INTERRUPT, pid)
        _wait_for_stop(pid)
        process = Seized(pid)
        try:
            yield process
        finally:
            process.restore()
    finally:
        _request(_DETACH, pid)


def _request(request: int, pid: int, pointer: int = 0) -> None:
    # SAFE: only GETREGS and SETREGS pass a pointer; ptrace is used by one thread of ours, the one that seized.
    checked(_ptrace(request, pid, 0, pointer), f"ptrace {request:#x}")


def _wait_for_stop(pid: int) -> None:
    _, status = os.waitpid(pid, _WALL)
    if not os.WIFSTOPPED(status):
        raise GuestGone(f"process {pid} ended while it was traced")


def _find_syscall_instruction(pid: int) -> int:
    """Address of a `syscall` instruction in the process's C library."""
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in maps:
            if "r-xp" not in line or "libc" not in line:
                continue
            start, end = (int(x, 16) for x in line.split()[0].split("-"))
            memory.seek(start)
            offset = memory.read(end - start).find(_SYSCALL_INSTRUCTION)
            if offset >= 0:
                return start + offset
    raise GuestGone(f"process {pid} maps no C library")
