"""NTP: a server beside the cloud, and what the guest's chrony says of itself. Nobody sets this machine's clock."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ftvm_lab.command import LabError, run, wait_until
from ftvm_lab.layout import CLIENT, PROVIDER, Layout
from ftvm_lab.traffic import IN_CLIENT

#: No command socket, no memory of its own; what it tells is this machine's clock, as stratum 1.
_SERVER = """\
local stratum 1
allow {network}
bindaddress {address}
cmdport 0
bindcmdaddress /
pidfile {pid_file}
"""
END_S = 10.0


@dataclass(frozen=True, slots=True)
class Tracking:
    """`chronyc tracking` in the guest. Seconds, and parts of a million."""

    is_synchronised: bool
    #: What is left to be slewed; positive: the clock is behind.
    left_s: float
    last_offset_s: float
    rms_offset_s: float
    #: By how much the guest's clock is slow without correction; negative as chronyc tells it.
    frequency_ppm: float
    skew_ppm: float
    root_delay_s: float
    root_dispersion_s: float


@contextmanager
def served(layout: Layout) -> Iterator[None]:
    """A server at the client namespace's address, with `-x`: it never touches the clock."""
    settings, log, pid_file = layout.conf / "ntp.conf", layout.log / "ntp.log", layout.state / "ntp.pid"
    address, network = CLIENT.address(PROVIDER), f"{PROVIDER.prefix}.0/24"
    settings.write_text(_SERVER.format(network=network, address=address, pid_file=pid_file))
    argv = [*IN_CLIENT, str(layout.debian / "chronyd"), "-x", "-d", "-u", "root", "-f", str(settings)]
    with log.open("a") as output, subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output) as one:
        try:
            wait_until("the NTP server", lambda: _is_ready(one, pid_file, log), END_S, every_s=0.05)
            yield
        finally:
            one.terminate()
            one.wait(END_S)


def _is_ready(server: "subprocess.Popen[bytes]", pid_file: Path, log: Path) -> bool:
    """ip(8) becomes the server, so it has that process's number."""
    if server.poll() is not None:
        raise LabError(f"the NTP server ended: {log.read_text()[-500:]}")
    return pid_file.exists() and pid_file.read_text().strip() == str(server.pid)


def tracking(layout: Layout, address: str) -> Tracking:
    return read_tracking(run([*IN_CLIENT, str(layout.debian / "chronyc"), "-h", address, "-c", "tracking"]))


def read_tracking(text: str) -> Tracking:
    """chronyc -c: reference id, its name, stratum, time, then the numbers, and the leap status at the end."""
    words = text.strip().split(",")
    if len(words) != 14:
        raise LabError(f"chronyc said nothing of use: {text}")
    left, last, rms, frequency, _, skew, delay, dispersion = map(float, words[4:12])
    # A server that was not asked for long is unreachable, and the status still normal: its id is what is missing.
    is_synchronised = words[13] != "Not synchronised" and words[0] != "00000000"
    return Tracking(is_synchronised, left, last, rms, frequency, skew, delay, dispersion)


def wait_for_sync(layout: Layout, address: str, timeout_s: float) -> Tracking:
    """Until the guest's chrony follows its server, with nothing much left to be corrected."""

    def follows() -> Tracking | None:
        try:
            found = tracking(layout, address)
        except LabError:
            return None
        return found if found.is_synchronised else None

    return wait_until(f"chrony in the guest at {address} to be synchronised", follows, timeout_s, every_s=1.0)
