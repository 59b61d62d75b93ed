"""Process 1 of a machine: mounts its file systems, reaps, shuts down on SIGTERM.

Run as `python -m ftvm_lab.init ROOT NODE` inside fresh namespaces. Starts no
service: those are started from outside, by ftvm_lab.machine.
"""

import os
import signal
import socket
import sys
import time
from pathlib import Path

from ftvm_lab import hostfs
from ftvm_lab.layout import CONTROL, Layout, compute
from ftvm_lab.machine import READY

SHUTDOWN_S = 15


def main() -> None:
    layout = Layout(Path(sys.argv[1]))
    node = CONTROL if sys.argv[2] == CONTROL.name else compute(sys.argv[2])
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, signal.SIGTERM})
    socket.sethostname(node.name)
    hostfs.forget_namespaces()
    if node == CONTROL:
        hostfs.mount_control()
    else:
        hostfs.mount_compute(layout, node)
    READY.parent.mkdir(parents=True)
    READY.touch()
    while signal.sigwait({signal.SIGCHLD, signal.SIGTERM}) != signal.SIGTERM:
        _reap()
    _shut_down()


def _reap() -> bool:
    """Collects the children that ended; False if there are no more children."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def _shut_down() -> None:
    """Asks the services to end, and leaves their workers to them."""
    end = time.monotonic() + SHUTDOWN_S
    for pid in Path("/proc/self/task/1/children").read_text().split():
        os.kill(int(pid), signal.SIGTERM)
    while _reap() and (left_s := end - time.monotonic()) > 0:
        signal.sigtimedwait({signal.SIGCHLD}, left_s)


if __name__ == "__main__":
    main()
