"""What a line of /proc/PID/stat says of a process: does it live, or is it ending? PURE.

A QEMU that was killed gives the guest's memory back first, then closes its files, then takes the virtual machine down;
only after all that its pidfd tells. With a core dump seconds go by before the first of these. The kernel says what it
has decided long before, in the main thread:

    its flags (field 9)       PF_SIGNALED   a signal ends it; also while its core is dumped
                              PF_EXITING    it never returns to its program. Set BEFORE its files are closed, so a
                                            socket that death has closed is never seen without it
    its signals (field 31)    SIGKILL       given to each thread as soon as one of them ends the process. It returns to
                                            its program no more, but may be within the kernel still
    its state (field 3)       Z, X          nothing but its exit status is left
    the exit code (field 52)  SIGKILL       of the whole process, from the kill on; told to those that may trace it

A signal never ends one thread alone. A main thread that left its process by itself (QEMU's never does) would count as
the end: who answers no monitor any more can be protected no more. One that is stopped, traced, frozen or waits for a
disk has none of these signs: it lives. A thread that takes its SIGKILL has for some instructions neither that nor the
flags, and may be interrupted between them: then the exit code tells.
Source: proc_pid_stat(5); Linux, include/linux/sched.h (PF_*), kernel/exit.c (do_exit), kernel/signal.c (get_signal).
"""

_PF_EXITING, _PF_SIGNALED = 0x4, 0x400
_KILLED = 9
_SIGKILL = 1 << (_KILLED - 1)
#: Places of the fields behind the name, which is the second of all.
_STATE, _FLAGS, _SIGNALS, _EXIT_CODE = 3 - 3, 9 - 3, 31 - 3, 52 - 3


def is_ending(stat: bytes) -> bool:
    """Of /proc/PID/stat, which tells of the main thread: will no code of the process run any more?"""
    # The name is in parentheses, and may hold some itself.
    fields = stat[stat.rindex(b")") + 2:].split()
    return (fields[_STATE] in (b"Z", b"X") or bool(int(fields[_FLAGS]) & (_PF_EXITING | _PF_SIGNALED))
            or bool(int(fields[_SIGNALS]) & _SIGKILL) or int(fields[_EXIT_CODE]) == _KILLED)
