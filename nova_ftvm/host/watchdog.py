"""The kernel as watchdog: a POSIX timer that delivers SIGKILL to its own process.

It needs no second process, fires while the process is stopped (SIGSTOP), blocked or spinning, and costs about
2 µs to arm. What it protects: a guest that is held in a checkpoint by a process that hangs. Once the process is
dead its gate's keeper lets QEMU finish, and the guest runs on by itself.
"""

import ctypes
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from nova_ftvm.host.syscalls import checked, libc

_SIGEV_SIGNAL = 0


class _Sigevent(ctypes.Structure):
    """struct sigevent: 64 bytes."""

    _fields_ = [("value", ctypes.c_void_p), ("signo", ctypes.c_int), ("notify", ctypes.c_int),
                ("rest", ctypes.c_char * 48)]


class _Itimerspec(ctypes.Structure):
    _fields_ = [("interval_s", ctypes.c_long), ("interval_ns", ctypes.c_long),
                ("value_s", ctypes.c_long), ("value_ns", ctypes.c_long)]


class Watchdog:
    """Kills this process when `held()` lasts longer than the limit."""

    def __init__(self, limit_s: float) -> None:
        event = _Sigevent(signo=signal.SIGKILL, notify=_SIGEV_SIGNAL)
        self._timer = ctypes.c_void_p()
        # SAFE: both structures outlive the call; the kernel writes one timer_t.
        checked(libc.timer_create(time.CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(self._timer)), "timer_create")
        self._limit_ns = round(limit_s * 1e9)

    def arm(self, slack_s: float = 0.0) -> None:
        """The limit, and so much more, from now."""
        self._set(self._limit_ns + round(slack_s * 1e9))

    def disarm(self) -> None:
        self._set(0)

    @contextmanager
    def held(self) -> Iterator[None]:
        """The block must end within the limit. An exception disarms too: the caller then closes the gate."""
        self.arm()
        try:
            yield
        finally:
            self.disarm()

    def _set(self, nanoseconds: int) -> None:
        when = _Itimerspec(0, 0, *divmod(nanoseconds, 10**9))
        # SAFE: `when` is an itimerspec that outlives the call; no old value is asked for.
        checked(libc.timer_settime(self._timer, 0, ctypes.byref(when), None), "timer_settime")
