"""What the hosts' kernels count of a protected server: processor time, memory, bytes sent. Read from outside.

A part that is not there (a backup, of an unprotected server) has no figures.
"""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ftvm_lab import processes
from ftvm_lab.bench_figures import Epochs, Snapshot, epochs_between
from ftvm_lab.command import LabError, run
from ftvm_lab.computes import AGENT, COMPUTE, LIBVIRTD
from ftvm_lab.layout import DATA, Layout, Node
from ftvm_lab.machine import Machine

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / (1 << 20)
#: The engine writes its statistics once a second.
STATISTICS_S = 1.5


@dataclass(frozen=True, slots=True)
class Probes:
    """backup: None for a server that is not protected."""

    layout: Layout
    server_id: str
    primary: Node
    backup: Node | None

    def _parts(self) -> dict[str, Callable[[], int]]:
        parts: dict[str, Callable[[], int]] = {
            "guest": lambda: processes.qemu(self.primary, self.server_id),
            "agent": lambda: self._service(self.primary, AGENT),
            # Both hear of each stop of the guest.
            "libvirtd": lambda: self._service(self.primary, LIBVIRTD),
            "nova_compute": lambda: self._service(self.primary, COMPUTE),
        }
        backup = self.backup
        if backup is not None:
            parts |= {
                "engine": lambda: processes.engine(self.primary, self.server_id, "primary"),
                "backup_engine": lambda: processes.engine(backup, self.server_id, "backup"),
                "backup_guest": lambda: processes.qemu(backup, self.server_id),
                "backup_agent": lambda: self._service(backup, AGENT),
            }
        return parts

    def _service(self, node: Node, name: str) -> int:
        return processes.only(Machine(self.layout, node), name)[0]

    def read(self) -> Snapshot:
        pids: dict[str, int] = {}
        for name, find in self._parts().items():
            with suppress(LabError):
                pids[name] = find()
        return Snapshot(
            at=time.time(),
            cpu_s={name: cpu_s(Path(f"/proc/{pid}/stat").read_text()) for name, pid in pids.items()},
            rss_mib={name: _rss_mib(pid) for name, pid in pids.items()},
            link_bytes=_sent_bytes(self.primary) if self.backup is not None else 0,
        )

    def epochs(self, start: float, end: float) -> Epochs | None:
        """The checkpoints of a time that is over; waits until the engine has written them. None without protection."""
        if self.backup is None:
            return None
        time.sleep(max(0.0, end + STATISTICS_S - time.time()))
        file = self.layout.runtime(self.primary) / self.server_id / "epochs.jsonl"
        if not file.exists():
            raise LabError(f"the primary's agent left no statistics: {file} is not there")
        return epochs_between(file.read_text(), start, end)


def cpu_s(stat: str) -> float:
    """User and system seconds of a process with all its threads, from /proc/PID/stat."""
    words = stat.rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / _TICKS


def _rss_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_MIB


def _sent_bytes(node: Node) -> int:
    """By the host, to the network of the epochs, headers and all."""
    return sent_bytes(run(["ip", "netns", "exec", node.namespace, "cat", "/proc/net/dev"]), f"eth-{DATA.name}")


def sent_bytes(text: str, device: str) -> int:
    """From /proc/net/dev: eight columns of what came, then what went."""
    for line in text.splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == device:
            return int(numbers.split()[8])
    raise LabError(f"there is no device {device}: {text}")
