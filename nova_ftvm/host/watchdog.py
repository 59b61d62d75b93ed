"""The kernel as watchdog: a POSIX timer that delivers SIGKILL to its own process.

It needs no second process, and fires while the process is stopped (SIGSTOP), blocked or spinning. Arming it again and
again costs next to nothing: the timer is set anew only when a part of the limit is over. What it protects: a guest that
is held in a checkpoint by a process that hangs. Once the process is dead its gate's keeper lets QEMU finish, and the
guest runs on by itself.
"""

import ctypes
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from nova_ftvm.host.syscalls import checked, libc

_SIGEV_SIGNAL = 0
#: A timer that has this part of the limit left, beside the slack, is not set anew.
_ENOUGH = 0.9


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
        self._limit_s = limit_s
        #: When it fires; 0 for never.
        self._fires_at = 0.0

    def arm(self, slack_s: float = 0.0) -> None:
        """The limit, and so much more, from now; up to a tenth of the limit less, if it was armed just before."""
        latest = time.monotonic() + self._limit_s + slack_s
        if not 0.0 <= latest - self._fires_at <= (1 - _ENOUGH) * self._limit_s:
            self._set(self._limit_s + slack_s)
            self._fires_at = latest

    def disarm(self) -> None:
        self._set(0.0)
        self._fires_at = 0.0

    @contextmanager
    def held(self) -> Iterator[None]:
        """The block must end within the limit. An exception disarms too: the caller then closes the gate."""
        self.arm()
        try:
            yield
        finally:
            self.disarm()

    def _set(self, seconds: float) -> None:
        when = _Itimerspec(0, 0, *divmod(round(seconds * 1e9), 10**9))
        # SAFE: `when` is an itimerspec that outlives the call; no old value is asked for.
        checked(libc.timer_settime(self._timer, 0, ctypes.byref(when), None), "timer_settime")
