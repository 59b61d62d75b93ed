"""The lab's cloud through openstacksdk and the real client, from the control namespace."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import openstack
from openstack.connection import Connection
from pyroute2 import netns

from ftvm_lab.command import run
from ftvm_lab.layout import BACKGROUND, CONTROL, Layout

#: The last microversion with which an evacuated server stays running is 2.94.
COMPUTE_MICROVERSION = "2.94"


def enter_control() -> None:
    """Moves this process into the control plane's network namespace, for good."""
    netns.setns(CONTROL.namespace)


def client_environment(layout: Layout, cloud: str) -> dict[str, str]:
    """For openstack(1): which cloud, and no proxy on the way."""
    inherited = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return inherited | {
        "OS_CLIENT_CONFIG_FILE": str(layout.clouds),
        "OS_CLOUD": cloud,
        "OS_COMPUTE_API_VERSION": COMPUTE_MICROVERSION,
    }


def connect(layout: Layout, cloud: str = "admin") -> Connection:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        del os.environ[name]
    connection = openstack.connection.Connection(
        config=openstack.config.OpenStackConfig(config_files=[str(layout.clouds)]).get_one(cloud)
    )
    connection.compute.default_microversion = COMPUTE_MICROVERSION
    return connection


@dataclass(frozen=True, slots=True)
class Client:
    """openstack(1) as one of the lab's users; needs the control namespace."""

    layout: Layout
    cloud: str

    def __call__(self, arguments: Sequence[str], timeout_s: float = 180) -> str:
        return run(
            ["nice", "-n", str(BACKGROUND), str(self.layout.venv / "bin/openstack"), *arguments],
            environment=client_environment(self.layout, self.cloud),
            timeout_s=timeout_s,
        )


def usable_hosts(connection: Connection) -> set[str]:
    """The compute hosts that are up, enabled and not forced down."""
    return {
        service.host
        for service in connection.compute.services(binary="nova-compute")
        if service.state == "up" and service.status == "enabled" and not service.is_forced_down
    }
