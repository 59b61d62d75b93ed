"""The lab's network namespaces, bridges and links, made with ip(8); links are slowed and cut with tc(8).

All bridges are in the control namespace; a node has one link to each bridge
that it is attached to. On a compute host the provider link ends in a bridge of
its own, where the guests' taps go.
"""

from collections.abc import Iterable
from ipaddress import ip_interface

from ftvm_lab.command import CommandFailed, run
from ftvm_lab.layout import BRIDGES, CLIENT, COMPUTES, CONTROL, PROVIDER, Bridge, Node


def _ip(lines: Iterable[str], namespace: str | None = None) -> None:
    where = ["-n", namespace] if namespace else []
    run(["ip", *where, "-batch", "-"], standard_input="\n".join(lines) + "\n")


def namespaces() -> list[str]:
    """The lab's namespaces that exist now."""
    existing = {line.split()[0] for line in run(["ip", "netns", "list"]).splitlines() if line}
    return [node.namespace for node in (*COMPUTES, CLIENT, CONTROL) if node.namespace in existing]


def create_control() -> None:
    _ip([f"netns add {CONTROL.namespace}"])
    lines = ["link set lo up"]
    for bridge in BRIDGES:
        lines += [
            # A bridge without an address of its own takes its lowest port's, and would change it when a host dies:
            # nobody would reach the control plane until every ARP cache had noticed.
            f"link add {bridge.device} address {CONTROL.mac(bridge)} type bridge mcast_snooping 0",
            f"addr add {CONTROL.address(bridge)}/24 dev {bridge.device}",
            f"link set {bridge.device} up",
        ]
    _ip(lines, CONTROL.namespace)


def create_client(node: Node) -> None:
    """A namespace with one leg in the provider network."""
    _ip([f"netns add {node.namespace}"])
    _ip(["link set lo up"], node.namespace)
    _attach(node, PROVIDER)
    _ip([f"addr add {node.address(PROVIDER)}/24 dev eth-{PROVIDER.name}"], node.namespace)


def set_rto_min(node: Node, milliseconds: int) -> None:
    """The least time after which that namespace's TCP sends again what the provider network did not acknowledge."""
    own = ip_interface(f"{node.address(PROVIDER)}/24")
    way = f"dev eth-{PROVIDER.name} proto kernel scope link src {own.ip}"
    _ip([f"route change {own.network} {way} rto_min {milliseconds}ms"], node.namespace)


def create_host(node: Node) -> None:
    """A compute host's namespace, with a link to every bridge."""
    _ip([f"netns add {node.namespace}"])
    _ip(["link set lo up"], node.namespace)
    for bridge in BRIDGES:
        _attach(node, bridge)
    lines = [f"addr add {node.address(bridge)}/24 dev eth-{bridge.name}" for bridge in BRIDGES if bridge != PROVIDER]
    lines += [
        f"link add {PROVIDER.device} type bridge mcast_snooping 0",
        f"link set {PROVIDER.device} up",
        f"link set eth-{PROVIDER.name} master {PROVIDER.device}",
    ]
    _ip(lines, node.namespace)


def _attach(node: Node, bridge: Bridge) -> None:
    port = node.port(bridge)
    _ip(
        [
            f"link add {port} type veth peer name eth-{bridge.name} address {node.mac(bridge)} netns {node.namespace}",
            f"link set {port} master {bridge.device} up",
        ],
        CONTROL.namespace,
    )
    _ip([f"link set eth-{bridge.name} up"], node.namespace)


def unplug(node: Node) -> None:
    """Takes all links of a host down at once, as a loss of power does."""
    _ip([f"link set {node.port(bridge)} down" for bridge in BRIDGES], CONTROL.namespace)


def plug(node: Node) -> None:
    _ip([f"link set {node.port(bridge)} up" for bridge in BRIDGES], CONTROL.namespace)


def set_link(node: Node, bridge: Bridge, *, up: bool) -> None:
    _ip([f"link set {node.port(bridge)} {'up' if up else 'down'}"], CONTROL.namespace)


def drop_towards(node: Node, bridge: Bridge) -> None:
    """What others send to the node is lost without a word; what it sends arrives."""
    _set_queue(node, bridge, "pfifo", "limit", "0")


def squeeze_towards(node: Node, bridge: Bridge, mbit_s: float) -> None:
    """So much arrives at the node, and no more; what does not fit waits for up to half a second, or is lost."""
    _set_queue(node, bridge, "tbf", "rate", f"{mbit_s:g}mbit", "burst", "64kb", "latency", "500ms")


def clear_towards(node: Node, bridge: Bridge) -> None:
    """Whatever was set before, all arrives again."""
    _set_queue(node, bridge, "noqueue")


def _set_queue(node: Node, bridge: Bridge, *discipline: str) -> None:
    """At the bridge's end of the link, where the sender notices nothing."""
    run(["tc", "-n", CONTROL.namespace, "qdisc", "replace", "dev", node.port(bridge), "root", *discipline])


def remove_host(node: Node) -> None:
    """Removes the host's links, and its namespace with what its kernel still held."""
    _ip([f"link del {node.port(bridge)}" for bridge in BRIDGES], CONTROL.namespace)
    remove(node.namespace)


def remove(namespace: str) -> None:
    run(["ip", "netns", "del", namespace])


def pids(namespace: str) -> list[int]:
    """The processes inside a namespace; none if it does not exist."""
    try:
        return [int(word) for word in run(["ip", "netns", "pids", namespace]).split()]
    except CommandFailed:
        return []
