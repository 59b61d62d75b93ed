"""A machine: network, UTS, mount and PID namespaces around one init process.

Keeps no record of its own: a machine runs if its network namespace holds a
process that is number 1 of a PID namespace. Killing that process is pulling the
plug: the kernel kills everything else in the PID namespace.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ftvm_lab import network
from ftvm_lab.command import CommandFailed, LabError, run, wait_until
from ftvm_lab.layout import Layout, Node

READY = Path("/run/ftvm-lab/ready")
PID_FILES = Path("/run/ftvm-lab")


class MachineDown(LabError):
    def __init__(self, node: Node) -> None:
        super().__init__(f"{node.name} is not running")


@dataclass(frozen=True, slots=True)
class Machine:
    layout: Layout
    node: Node

    def pid1(self) -> int | None:
        """Its init's process id as seen from outside, None if it does not run."""
        for pid in network.pids(self.node.namespace):
            if _inner_pid(pid) == 1:
                return pid
        return None

    def boot(self) -> None:
        """Starts the init process, and waits until it has mounted everything."""
        log = self.layout.logs(self.node) / "init.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            subprocess.Popen(
                self._boot_argv(),
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        wait_until(f"{self.node.name} to boot (see {log})", self._is_ready, timeout_s=20)

    def _boot_argv(self) -> list[str]:
        return [
            *("ip", "netns", "exec", self.node.namespace),
            *("unshare", "--uts", "--mount", "--pid", "--fork", "--mount-proc"),
            *(sys.executable, "-m", "ftvm_lab.init", str(self.layout.root), self.node.name),
        ]

    def _is_ready(self) -> bool:
        pid = self.pid1()
        return pid is not None and Path(f"/proc/{pid}/root{READY}").exists()

    def environment(self) -> dict[str, str]:
        """What a program on this machine gets; proxies of ours are not among it."""
        return {
            "PATH": f"{self.layout.venv / 'bin'}:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/root",
            "LANG": "C.UTF-8",
            "TERM": os.environ.get("TERM", "dumb"),
            "FTVM_LAB_DIR": str(self.layout.root),
        }

    def inside(self, argv: Sequence[str]) -> list[str]:
        """The command line that runs `argv` inside the machine."""
        pid = self.pid1()
        if pid is None:
            raise MachineDown(self.node)
        entry = ["nsenter", "--target", str(pid), "--mount", "--uts", "--net", "--pid"]
        return [*entry, "--", *argv]

    def call(self, argv: Sequence[str], timeout_s: float = 60) -> str:
        return run(self.inside(argv), environment=self.environment(), timeout_s=timeout_s)

    def start(
        self, service: str, argv: Sequence[str], *, niceness: int = 0, environment: Mapping[str, str] | None = None
    ) -> None:
        """Starts a service in the background; its output goes to <service>.out."""
        log = self.layout.logs(self.node) / f"{service}.out"
        log.touch()
        seen_inside = self._inside_path(log)
        command = [
            *("start-stop-daemon", "--start", "--background", "--make-pidfile"),
            *("--pidfile", str(PID_FILES / f"{service}.pid")),
            *("--output", str(seen_inside), "--nicelevel", str(niceness)),
            *("--startas", argv[0], "--", *argv[1:]),
        ]
        run(self.inside(command), environment={**self.environment(), **(environment or {})})

    def _inside_path(self, path: Path) -> Path:
        outside = self.layout.outside(self.node)
        if path.is_relative_to(outside):
            return self.layout.host / path.relative_to(outside)
        return path

    def stop(self, service: str) -> None:
        """Ends a service: asks for 10 s, then kills."""
        command = [
            *("start-stop-daemon", "--stop", "--oknodo", "--remove-pidfile"),
            *("--retry", "TERM/10/KILL/5", "--pidfile", str(PID_FILES / f"{service}.pid")),
        ]
        self.call(command)

    def runs(self, service: str) -> bool:
        command = ["start-stop-daemon", "--status", "--pidfile", str(PID_FILES / f"{service}.pid")]
        try:
            self.call(command)
        except (CommandFailed, MachineDown):
            return False
        return True

    def shut_down(self) -> None:
        """Asks init to end everything; kills after 20 s."""
        pid = self.pid1()
        if pid is None:
            return
        os.kill(pid, signal.SIGTERM)
        try:
            wait_until(f"{self.node.name} to end", lambda: self.pid1() is None, timeout_s=20)
        except LabError:
            self.kill()

    def kill(self) -> None:
        """SIGKILL to the init process; returns when nothing of the machine runs."""
        pid = self.pid1()
        if pid is None:
            raise MachineDown(self.node)
        os.kill(pid, signal.SIGKILL)
        wait_until(f"{self.node.name} to die", lambda: self.pid1() is None, timeout_s=10, every_s=0.02)


def _inner_pid(pid: int) -> int | None:
    """The process's number in its innermost PID namespace, if it is not ours."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    numbers = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[1:]
    return int(numbers[-1]) if len(numbers) > 1 else None
