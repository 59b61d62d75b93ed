"""Precedence: in a checkpoint's pause, those that the guest waits for go before whatever else runs on the host.

They are two threads, QEMU's main one and the engine, and each needs a processor for some tenths of a millisecond, many
times in turn. For as long as the pause lasts both have the lowest real-time priority (SCHED_RR, 1), with
SCHED_RESET_ON_FORK: what they start meanwhile has none of it. The guest's processors stand still then; they and all of
QEMU's other threads never have it.

An engine that dies in a pause leaves QEMU with it. The gate's keeper takes it back (host/gate.py), and if that is dead
too the next engine does: nobody else gives a thread just this.
Measured: doc/source/contributor/decisions/precedence.rst.
"""

import contextlib
import logging
import os

LOG = logging.getLogger(__name__)

_OURS = os.SCHED_RR | os.SCHED_RESET_ON_FORK
_LOWEST, _NONE = os.sched_param(1), os.sched_param(0)
_SELF = 0


class Precedence:
    """ports.Precedence, of this thread and the main thread of one QEMU."""

    def __init__(self, qemu_pid: int) -> None:
        self._takers = [_SELF]
        self._is_refused = False
        _give_back(qemu_pid)
        # Who has given it another policy has had a reason.
        if _policy(qemu_pid) == os.SCHED_OTHER:
            self._takers.append(qemu_pid)

    def take(self) -> None:
        """Without the right to do so nothing happens: pauses are longer then on a host that is busy."""
        if self._is_refused:
            return
        try:
            for thread in self._takers:
                os.sched_setscheduler(thread, _OURS, _LOWEST)
        except ProcessLookupError:
            pass  # QEMU ended, which is seen elsewhere.
        except PermissionError as error:
            self._is_refused = True
            LOG.warning("no real-time priority in pauses, which needs CAP_SYS_NICE: %s", error)
            self.leave()

    def leave_qemu(self) -> None:
        """Idempotent, and for the gate's keeper too."""
        for thread in self._takers[1:]:
            _give_back(thread)

    def leave(self) -> None:
        """Idempotent."""
        self.leave_qemu()
        _give_back(_SELF)


class NoPrecedence:
    """ports.Precedence, where none is wanted."""

    def take(self) -> None: ...

    def leave_qemu(self) -> None: ...

    def leave(self) -> None: ...


def _give_back(thread: int) -> None:
    if _policy(thread) == _OURS:
        # To end it needs the right as well: an engine that has lost it leaves what an older one left.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.sched_setscheduler(thread, os.SCHED_OTHER, _NONE)


def _policy(thread: int) -> int | None:
    """None: there is no such thread any more."""
    try:
        return os.sched_getscheduler(thread)
    except ProcessLookupError:
        return None
