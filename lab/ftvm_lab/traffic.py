"""Runs the client in the client namespace, beside the caller's own work."""

import json
import subprocess
import sys
import time
from types import TracebackType

from ftvm_lab.client import PORT, Report
from ftvm_lab.command import LabError, WaitedTooLong, run, wait_until
from ftvm_lab.layout import CLIENT

END_S = 45
_IN_CLIENT = ("ip", "netns", "exec", CLIENT.namespace)


def wait_for_guest(address: str, timeout_s: float) -> None:
    """Until the guest's session service accepts a connection."""
    attempt = f"import socket; socket.create_connection(({address!r}, {PORT}), 1)"

    def answers() -> bool:
        try:
            run([*_IN_CLIENT, sys.executable, "-c", attempt])
        except LabError:
            return False
        return True

    wait_until(f"the guest at {address} to answer", answers, timeout_s)


class Traffic:
    """A client at work. Leaving the context ends it, also when its report was not asked for."""

    def __init__(self, address: str) -> None:
        self._argv = [*_IN_CLIENT, sys.executable, "-m", "ftvm_lab.client", address]

    def __enter__(self) -> "Traffic":
        self._process = subprocess.Popen(self._argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()

    def mark(self) -> None:
        """Now is the moment from which the report counts the first reply."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"mark {time.monotonic()}\n")
        self._process.stdin.flush()

    def finish(self) -> Report:
        """Ends the client; its report."""
        try:
            output, _ = self._process.communicate(timeout=END_S)
        except subprocess.TimeoutExpired:
            raise WaitedTooLong("the client's report", END_S) from None
        if self._process.returncode:
            raise LabError(f"the client ended with {self._process.returncode}")
        return Report(**json.loads(output))


def measure(address: str, seconds: float) -> Report:
    """The client's figures of so many seconds."""
    with Traffic(address) as traffic:
        time.sleep(seconds)
        return traffic.finish()
