"""A compute host's life: power on, services, power failure, cut links."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ftvm_lab import clocks, network, storage
from ftvm_lab.command import LabError, wait_until
from ftvm_lab.ftvm_settings import FILE_NAME
from ftvm_lab.layout import BACKGROUND, COMPUTES, Layout, Node
from ftvm_lab.machine import Machine

AGENT = "nova-ftvm-agent"
COMPUTE = "nova-compute"
LIBVIRTD = "libvirtd"
REMOTE = "remote"
LIBVIRT_SOCKET = "run/libvirt/libvirt-sock"


def services(plain: bool) -> tuple[str, ...]:
    """In the order of their start."""
    return ("taps", REMOTE, LIBVIRTD, *(() if plain else (AGENT,)), COMPUTE)


def is_plain(layout: Layout) -> bool:
    return (layout.conf / "plain").exists()


def power_on(layout: Layout, node: Node) -> None:
    """Boots the host and starts its services. The control plane has to be up."""
    boot(layout, node)
    start(Machine(layout, node), COMPUTE)


def boot(layout: Layout, node: Node) -> None:
    """Boots the host, and starts what needs no API; libvirtd answers when it returns."""
    if node.namespace in network.namespaces():
        raise LabError(f"{node.name} is on already")
    for name in ("log", "locks"):
        (layout.outside(node) / name).mkdir(parents=True, exist_ok=True)
    storage.attach(layout, node)
    clocks.install(layout, node)
    network.create_host(node)
    machine = Machine(layout, node)
    machine.boot()
    for service in services(is_plain(layout)):
        if service != COMPUTE:
            start(machine, service)


def start(machine: Machine, service: str) -> None:
    niceness = BACKGROUND if service == COMPUTE else 0
    environment = clocks.environment(machine.layout) if service in (AGENT, COMPUTE) else {}
    if service == COMPUTE:
        environment["RSYNC_RSH"] = " ".join(remote_shell(machine.layout))
    machine.start(service, _command(machine.layout, service), niceness=niceness, environment=environment)
    if service == LIBVIRTD:
        socket = Path(f"/proc/{machine.pid1()}/root") / LIBVIRT_SOCKET
        wait_until(f"libvirtd on {machine.node.name}", socket.exists, timeout_s=30)


def remote_shell(layout: Layout) -> list[str]:
    return [str(layout.venv / "bin/python"), "-m", "ftvm_lab.remote"]


def _command(layout: Layout, service: str) -> list[str]:
    programs = layout.venv / "bin"
    commands = {
        "taps": [str(programs / "python"), "-m", "ftvm_lab.taps"],
        REMOTE: remote_shell(layout),
        LIBVIRTD: ["/usr/sbin/libvirtd", "--listen"],
        AGENT: [str(programs / AGENT), "--config-file", str(layout.host / FILE_NAME)],
        COMPUTE: [
            *(str(programs / COMPUTE), "--config-file", str(layout.host / "nova.conf")),
            *("--log-file", str(layout.host / "log/nova-compute.log")),
        ],
    }
    return commands[service]


@contextmanager
def engine_options(layout: Layout, **options: float) -> Iterator[None]:
    """The agents' [engine] options meanwhile, on all hosts, which have to be on. Engines that run keep theirs."""
    files = {node: layout.outside(node) / FILE_NAME for node in COMPUTES}
    before = {node: file.read_text() for node, file in files.items()}
    added = "".join(f"{name} = {value}\n" for name, value in options.items())
    try:
        for node, file in files.items():
            file.write_text(f"{before[node]}\n[engine]\n{added}")
        _restart_agents(layout)
        yield
    finally:
        for node, file in files.items():
            file.write_text(before[node])
        _restart_agents(layout)


def _restart_agents(layout: Layout) -> None:
    """A host without power has none; it reads the file when it gets its power back."""
    for node in COMPUTES:
        machine = Machine(layout, node)
        if machine.pid1() is not None:
            machine.stop(AGENT)
            start(machine, AGENT)


def kill(layout: Layout, node: Node) -> None:
    """A power failure.

    The links go first: the kernel closes a killed process's connections, and a
    host without power tells nobody. The namespace goes last, with what the host's
    kernel still remembered.
    """
    network.unplug(node)
    Machine(layout, node).kill()
    network.remove_host(node)
