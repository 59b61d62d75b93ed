"""Runs clients in the client namespace, beside the caller's own work."""

import json
import subprocess
import sys
import time
from types import TracebackType
from typing import Any, Self

from ftvm_lab.client import PORT, Report
from ftvm_lab.command import LabError, WaitedTooLong, run, wait_until
from ftvm_lab.layout import CLIENT

END_S = 45
IN_CLIENT = ("ip", "netns", "exec", CLIENT.namespace)


def wait_for_guest(address: str, timeout_s: float, port: int = PORT) -> None:
    """Until the guest's service accepts a connection."""
    attempt = f"import socket; socket.create_connection(({address!r}, {port}), 1)"

    def answers() -> bool:
        try:
            run([*IN_CLIENT, sys.executable, "-c", attempt])
        except LabError:
            return False
        return True

    wait_until(f"port {port} of the guest at {address} to answer", answers, timeout_s)


class ClientProgram:
    """A module of the lab at work until its standard input closes; it then prints its report as JSON.

    Leaving the context ends it, also when its report was not asked for.
    """

    def __init__(self, module: str, *arguments: str) -> None:
        self._argv = [*IN_CLIENT, sys.executable, "-m", module, *arguments]

    def __enter__(self) -> Self:
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

    def tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def end(self) -> Any:
        """Ends the program; its report."""
        try:
            output, _ = self._process.communicate(timeout=END_S)
        except subprocess.TimeoutExpired:
            raise WaitedTooLong("the client's report", END_S) from None
        if self._process.returncode:
            raise LabError(f"the client ended with {self._process.returncode}")
        return json.loads(output)


class Traffic(ClientProgram):
    """The demo's client."""

    def __init__(self, address: str) -> None:
        super().__init__("ftvm_lab.client", address)

    def mark(self) -> None:
        """Now is the moment from which the report counts the first reply."""
        self.tell(f"mark {time.monotonic()}")

    def finish(self) -> Report:
        return Report(**self.end())


def measure(address: str, seconds: float) -> Report:
    """The client's figures of so many seconds."""
    with Traffic(address) as traffic:
        time.sleep(seconds)
        return traffic.finish()
