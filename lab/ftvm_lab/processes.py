"""The processes of a machine, found and signalled from outside: by their number, and in its own namespace only."""

import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from ftvm_lab import network
from ftvm_lab.command import LabError, wait_until
from ftvm_lab.layout import Node
from ftvm_lab.machine import PID_FILES, Machine

END_S = 10.0


class NoProcess(LabError):
    """What should run there does not."""


def qemu(node: Node, server_id: str) -> int:
    """The QEMU of the server's guest, or of its standby."""
    for pid in network.pids(node.namespace):
        words = _command_line(pid)
        if "qemu-system" in words[0] and server_id in words:
            return pid
    raise NoProcess(f"no QEMU of server {server_id} runs on {node.name}")


def engine(node: Node, server_id: str, role: str) -> int:
    for pid in network.pids(node.namespace):
        if engine_log(pid).endswith(f"/{server_id}/{role}.log"):
            return pid
    raise NoProcess(f"no {role} engine of server {server_id} runs on {node.name}")


def engine_log(pid: int) -> str:
    """.../SERVER/ROLE.log, which the agent opened for the engine; '' if that is none. The forked keeper of its gate
    has closed it, and is none."""
    with suppress(OSError):
        if "nova_ftvm.cmd.engine" in _command_line(pid):
            return os.readlink(f"/proc/{pid}/fd/1")
    return ""


def service(machine: Machine, name: str) -> list[int]:
    """The service's process, and what it started: a program may be a script around another one."""
    file = Path(f"/proc/{machine.pid1()}/root{PID_FILES}/{name}.pid")
    pids = network.pids(machine.node.namespace)
    if file.exists():
        number = int(file.read_text())
        for pid in pids:
            if _machine_pid(pid) == number:
                return [pid, *_descendants(pid, pids)]
    raise NoProcess(f"{name} does not run on {machine.node.name}")


def only(machine: Machine, name: str) -> list[int]:
    """The service's process without its children: an agent's engines are no part of it."""
    return service(machine, name)[:1]


def send(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def kill(pids: Iterable[int]) -> None:
    """Returns when they are gone."""
    doomed = list(pids)
    send(doomed, signal.SIGKILL)
    wait_until(f"the processes {doomed} to end", lambda: not any(map(_lives, doomed)), END_S, every_s=0.01)


def freeze(node: Node) -> list[int]:
    """Stops every process of the machine; the numbers of those that it stopped."""
    frozen: list[int] = []
    while fresh := [pid for pid in network.pids(node.namespace) if pid not in frozen]:
        send(fresh, signal.SIGSTOP)
        frozen += fresh
    return frozen


def _machine_pid(pid: int) -> int | None:
    """Its number inside the machine."""
    words = _status(pid).get("NSpid", "").split()
    return int(words[-1]) if len(words) > 1 else None


def _lives(pid: int) -> bool:
    state = _status(pid).get("State", "Z")
    return not state.startswith(("Z", "X"))


def _descendants(pid: int, among: Iterable[int]) -> Iterator[int]:
    children = [other for other in among if _status(other).get("PPid") == str(pid)]
    for child in children:
        yield child
        yield from _descendants(child, among)


def _status(pid: int) -> dict[str, str]:
    """Nothing of a process that is gone."""
    with suppress(FileNotFoundError, ProcessLookupError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return {}


def _command_line(pid: int) -> list[str]:
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    return [""]
