"""A compute host's only L2 agent: every tap goes into the provider bridge.

Run as `python -m ftvm_lab.taps` inside a compute host. Nova makes a tap for a
server, libvirt one for a standby; both are wired as soon as the kernel reports them.
"""

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

from ftvm_lab.command import CommandFailed, run
from ftvm_lab.layout import PROVIDER

TAP = re.compile(r"^\d+: (tap[^:@\s]+)[:@]")


def main() -> None:
    monitor = subprocess.Popen(["ip", "-o", "monitor", "link"], stdout=subprocess.PIPE, text=True)
    assert monitor.stdout is not None
    _wire_all(run(["ip", "-o", "link"]).splitlines())
    _wire_all(monitor.stdout)


def _wire_all(lines: Iterable[str]) -> None:
    for line in lines:
        if match := TAP.match(line):
            _wire(match[1])


def _wire(tap: str) -> None:
    device = Path("/sys/class/net") / tap
    if not device.exists() or (device / "brport").exists():
        return
    try:
        run(["ip", "link", "set", tap, "master", PROVIDER.device, "up"])
    except CommandFailed as error:
        print(f"{tap} is gone again: {error}", flush=True)
    else:
        print(f"{tap} is in {PROVIDER.device}", flush=True)


if __name__ == "__main__":
    main()
