"""What protected servers leave on hosts and in the cloud; nothing should be there once they are deleted."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openstack.connection import Connection

from ftvm_lab import network
from ftvm_lab.layout import COMPUTES, Layout, Node
from ftvm_lab.machine import Machine
from ftvm_lab.processes import engine_log

#: What Nova keeps beside the servers' own folders.
NOVAS_OWN = {"_base", "locks", "compute_nodes", "snapshots"}


def on_hosts(layout: Layout) -> dict[str, list[str]]:
    """Host that runs -> the kinds of what is there, once for each thing: 'domain', 'tap'..."""
    return {
        node.name: sorted(thing.split()[0] for thing in on_host(layout, node))
        for node in COMPUTES
        if Machine(layout, node).pid1() is not None
    }


def on_host(layout: Layout, node: Node) -> Iterator[str]:
    """Domains, taps, folders of servers and engines, each with its kind and its name. Raises MachineDown."""
    machine = Machine(layout, node)
    for uuid in machine.call(["virsh", "list", "--all", "--uuid"]).split():
        yield f"domain {uuid}"
    for line in machine.call(["ip", "-brief", "link"]).splitlines():
        if line.startswith("tap"):
            yield f"tap {line.split()[0]}"
    for folder in layout.instances(node).iterdir():
        if folder.is_dir() and folder.name not in NOVAS_OWN:
            yield f"files {folder.name}"
    for pid in network.pids(node.namespace):
        if log := engine_log(pid):
            yield f"engine {Path(log).parent.name} {Path(log).stem}"


#: What each side of a protected server has.
OF_A_SIDE = ["domain", "engine", "files", "tap"]


def in_cloud(connection: Connection) -> list[str]:
    """Servers, ports and allocations, a line each."""
    compute: Any = connection.compute
    placement: Any = connection.placement
    found = [f"server {server.name}" for server in compute.servers(all_projects=True)]
    found += [f"port {port.id}" for port in connection.network.ports()]
    for provider in placement.resource_providers():
        answer = placement.get(f"/resource_providers/{provider.id}/allocations").json()
        found += [f"allocation of {consumer} on {provider.name}" for consumer in answer["allocations"]]
    return found
