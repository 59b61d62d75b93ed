"""Running other programs and waiting for things: always with a bound."""

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


class LabError(Exception):
    """Something that the lab's user can read and act on."""


class CommandFailed(LabError):
    """A program ended with an error; `output` is what it said."""

    def __init__(self, argv: Sequence[str], code: int, output: str) -> None:
        super().__init__(f"{' '.join(argv)}\nended with {code}: {output.strip()[-2000:]}")
        self.code = code
        self.output = output


class WaitedTooLong(LabError):
    """A condition did not come true in its time."""

    def __init__(self, what: str, timeout_s: float) -> None:
        super().__init__(f"waited {timeout_s:.0f} s in vain for: {what}")
        self.what = what


def run(
    argv: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    standard_input: str | None = None,
    timeout_s: float = 60,
) -> str:
    """The program's standard output; CommandFailed if it fails."""
    try:
        done = subprocess.run(
            argv,
            env=environment,
            input=standard_input,
            stdin=subprocess.DEVNULL if standard_input is None else None,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        raise WaitedTooLong(" ".join(argv), timeout_s) from None
    if done.returncode:
        raise CommandFailed(argv, done.returncode, done.stdout + done.stderr)
    return done.stdout


def wait_until(what: str, probe: Callable[[], T | None], timeout_s: float, every_s: float = 0.2) -> T:
    """The first true result of `probe`; WaitedTooLong after `timeout_s`."""
    end = time.monotonic() + timeout_s
    while not (result := probe()):
        if time.monotonic() > end:
            raise WaitedTooLong(what, timeout_s)
        time.sleep(every_s)
    return result


class Progress:
    """Prints one line a step, with the seconds since the start."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._start

    def step(self, text: str) -> None:
        print(f"[{self.elapsed_s:6.1f} s] {text}", flush=True)
