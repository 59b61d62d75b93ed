"""What servers and backups leave in the whole cloud, and what they should: on every host, in Neutron, Placement, Glance
and the manager's database. Whatever is there and belongs to nobody is a leftover.

Each thing is one line of text, so that a difference can be read.
"""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from ftvm_lab import leftovers
from ftvm_lab.command import WaitedTooLong, wait_until
from ftvm_lab.failover import Stage
from ftvm_lab.ftvm_settings import manager_file
from ftvm_lab.layout import COMPUTES, CONTROL
from ftvm_lab.machine import Machine, MachineDown
from ftvm_lab.servers import BACKUP_PREFIX

GONE_S = 90.0
#: Neutron's answers for a port that no server has, and for one that is gone: it tells no bindings of them.
NO_BINDINGS = (400, 404)
_OFF = ("SHELVED_OFFLOADED",)


def found(stage: Stage) -> set[str]:
    """Everything that is there."""
    lines: set[str] = set()
    for node in COMPUTES:
        with suppress(MachineDown):
            lines |= {f"{node.name}: {thing}" for thing in leftovers.on_host(stage.layout, node)}
    return lines | set(_in_the_cloud(stage))


def _in_the_cloud(stage: Stage) -> Iterator[str]:
    connection = stage.servers.connection
    for server in stage.servers.all():
        yield f"server {server.name if server.name.startswith(BACKUP_PREFIX) else server.id}"
    for port in connection.network.ports():
        if not port.device_owner.startswith("compute:"):
            yield f"port {port.id} of nobody"
        answer = connection.network.get(f"/ports/{port.id}/bindings", raise_exc=False)
        if answer.status_code in NO_BINDINGS:
            continue
        for binding in answer.json()["bindings"]:
            yield f"port {port.id} bound to {binding['host'] or 'no host'}, {binding['status']}"
    for provider in connection.placement.resource_providers():
        reserved = connection.placement.get(f"/resource_providers/{provider.id}/allocations").json()["allocations"]
        yield from (f"{provider.name}: reservation of {consumer}" for consumer in reserved)
    yield from (f"image {image.name}" for image in connection.image.images() if not image.name.startswith("ftvm-"))
    yield from (f"pair of {instance_id}" for instance_id in _pairs(stage))


def _pairs(stage: Stage) -> list[str]:
    argv = ["nova-ftvm-manage", "--config-file", str(manager_file(stage.layout)), "pair", "list"]
    known = [server.id for server in stage.servers.all()]
    listing = Machine(stage.layout, CONTROL).call(argv)
    rows = [line for line in listing.splitlines()[1:] if line.strip()]
    named = [instance_id for instance_id in known if instance_id in listing]
    return [*named, *(["a server that is gone"] * (len(rows) - len(named)))]


@dataclass(frozen=True, slots=True)
class Expected:
    """What one server should leave."""

    stage: Stage
    server_id: str
    #: With a backup, and engines on both sides?
    protected: bool = False
    images: tuple[str, ...] = ()

    def lines(self) -> set[str]:
        server = self.stage.servers.get(self.server_id)
        ports = [port.id for port in self.stage.servers.connection.network.ports(device_id=self.server_id)]
        lines = {f"server {self.server_id}", f"pair of {self.server_id}", *(f"image {name}" for name in self.images)}
        if server.status in _OFF:
            return lines | {f"port {port} bound to no host, ACTIVE" for port in ports}
        lines |= _guest(str(server.compute_host), self.server_id, ports)
        lines |= {f"port {port} bound to {server.compute_host}, ACTIVE" for port in ports}
        lines.add(f"{server.compute_host}: reservation of {self.server_id}")
        if self.protected:
            lines |= self._backup(str(server.compute_host), ports)
        return lines

    def _backup(self, primary_host: str, ports: Iterable[str]) -> set[str]:
        name = BACKUP_PREFIX + self.server_id
        backup = next((server for server in self.stage.servers.all() if server.name == name), None)
        if backup is None:
            return {f"server {name}"}
        host = str(backup.compute_host)
        return {
            *_guest(host, self.server_id, ports),
            f"server {name}",
            f"{host}: reservation of {backup.id}",
            f"{host}: engine {self.server_id} backup",
            f"{primary_host}: engine {self.server_id} primary",
            *(f"port {port} bound to {host}, INACTIVE" for port in ports),
        }


def _guest(host: str, server_id: str, ports: Iterable[str]) -> set[str]:
    # Of a server that is off, too: Nova leaves them until it moves or goes.
    taps = {f"{host}: tap tap{port[:11]}" for port in ports}
    return {f"{host}: domain {server_id}", f"{host}: files {server_id}", *taps}


def check(stage: Stage, *expected: Expected, free_ports: Iterable[str] = ()) -> None:
    """Nothing is there but what is expected: now, or as soon as all clean-up has been done.

    free_ports: those that a user made, and no server has.
    """
    free = {f"port {port} of nobody" for port in free_ports}

    def differences() -> str:
        wanted = {line for each in expected for line in each.lines()} | free
        there = found(stage)
        return "\n".join([*(f"left: {line}" for line in sorted(there - wanted)),
                          *(f"missing: {line}" for line in sorted(wanted - there))])

    try:
        wait_until("what is there to be what should be there", lambda: not differences(), GONE_S, 1.0)
    except WaitedTooLong as error:
        raise AssertionError(differences()) from error
