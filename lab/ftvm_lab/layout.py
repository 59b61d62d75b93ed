"""Names, addresses and paths of the lab: the one place that fixes them.

A machine of the lab is a Node. One more compute host is one more word in
COMPUTE_NAMES. Nothing here touches the system.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

NAMESPACE_PREFIX = "ftvm-"
COMPUTE_NAMES = ("compute1", "compute2", "compute3")
REGION = "RegionOne"
PASSWORD = "lab"
#: Niceness of what a real cloud runs on other machines than the guests, or in its own time:
#: the few processors of one machine must not make the guests and their agents miss their deadlines.
BACKGROUND = 10


@dataclass(frozen=True, slots=True)
class Bridge:
    """One of the lab's networks; its bridge is in the control namespace."""

    name: str
    prefix: str

    @property
    def device(self) -> str:
        return f"br-{self.name}"


MGMT = Bridge("mgmt", "10.77.0")
PROVIDER = Bridge("prov", "10.88.0")
DATA = Bridge("data", "10.99.0")
BRIDGES = (MGMT, PROVIDER, DATA)


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the lab. `number` is the last byte of its addresses."""

    name: str
    number: int

    @property
    def namespace(self) -> str:
        return NAMESPACE_PREFIX + self.name

    def address(self, bridge: Bridge) -> str:
        return f"{bridge.prefix}.{self.number}"

    def mac(self, bridge: Bridge) -> str:
        """Fixed, so that a host that comes back is found at once."""
        return f"52:54:00:f7:{BRIDGES.index(bridge):02x}:{self.number:02x}"

    def port(self, bridge: Bridge) -> str:
        """The bridge's end of this node's link, in the control namespace."""
        return f"{bridge.name}-{self.name}"


CONTROL = Node("control", 1)
CLIENT = Node("client", 2)
COMPUTES = tuple(Node(name, 11 + place) for place, name in enumerate(COMPUTE_NAMES))


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the lab keeps its files.

    `root` has to be short: UNIX sockets below it may have 107 characters.
    """

    root: Path

    @classmethod
    def from_environment(cls) -> "Layout":
        return cls(Path(os.environ.get("FTVM_LAB_DIR", "/var/tmp/ftvm-lab")))

    @property
    def venv(self) -> Path:
        return Path(sys.prefix)

    @property
    def guest(self) -> Path:
        """The guest's kernel, ramdisk and disk, made by setup."""
        return self.venv.parent / "guest"

    @property
    def debian(self) -> Path:
        """The database guest's, likewise."""
        return self.venv.parent / "debian"

    @property
    def metadefs(self) -> Path:
        """Where the product's wheel installs its Glance definitions."""
        return self.venv / "etc" / "nova-ftvm" / "metadefs"

    @property
    def conf(self) -> Path:
        return self.root / "conf"

    @property
    def state(self) -> Path:
        return self.root / "state"

    @property
    def log(self) -> Path:
        return self.root / "log"

    @property
    def sockets(self) -> Path:
        return self.root / "run"

    @property
    def clouds(self) -> Path:
        return self.conf / "clouds.yaml"

    @property
    def hosts(self) -> Path:
        """Outside: one directory a compute host. Inside a host: empty."""
        return self.root / "hosts"

    @property
    def host(self) -> Path:
        """Inside a compute host: its own directory, at one path on all hosts."""
        return self.root / "host"

    def outside(self, node: Node) -> Path:
        return self.hosts / node.name

    def logs(self, node: Node) -> Path:
        return self.log if node == CONTROL else self.outside(node) / "log"

    def instances(self, node: Node) -> Path:
        """The disks of its guests, on a file system of their own."""
        return self.outside(node) / "nova" / "instances"

    def runtime(self, node: Node) -> Path:
        """The agent's runtime directory, as it is seen after the host died."""
        return self.outside(node) / "run-nova-ftvm"


def compute(name: str) -> Node:
    """The compute host of that name; ValueError with the known names."""
    for node in COMPUTES:
        if node.name == name:
            return node
    raise ValueError(f"no compute host {name!r}: there are {', '.join(COMPUTE_NAMES)}")
