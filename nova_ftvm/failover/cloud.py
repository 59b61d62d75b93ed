"""What the control path needs of OpenStack, in its own words. nova_cloud.py does it; tests bring a fake.

Every call is bounded in time and is idempotent, or says how it is not.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from nova_ftvm.exception import FtvmError

#: Metadata of a backup server.
PRIMARY_KEY = "ftvm:primary"
GENERATION_KEY = "ftvm:generation"
ROLE_KEY = "ftvm:role"
PROMOTED = "promoted"
BACKUP_PREFIX = "ftvm-backup-"


class CloudRefused(FtvmError):
    """The API understood and said no. Trying the same again helps only when something else changes."""

    def __init__(self, what: str, status: int, message: str) -> None:
        super().__init__(f"{what}: refused with {status}: {message}")
        self.status = status
        self.message = message


class CloudUnavailable(FtvmError):
    """No answer, or a failure of the service. Try again later."""


@dataclasses.dataclass(frozen=True, slots=True)
class Server:
    """A server as Nova shows it to an administrator."""

    id: str
    name: str
    project_id: str
    host: str | None
    vm_state: str
    task_state: str | None
    metadata: Mapping[str, str]
    extra_specs: Mapping[str, str]
    image_properties: Mapping[str, str]
    image_id: str | None
    volumes: int
    #: Wall-clock seconds of Nova's last change.
    updated_at: float
    fault: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Port:
    id: str
    vnic_type: str


@dataclasses.dataclass(frozen=True, slots=True)
class Binding:
    """A port's binding to one host."""

    host: str
    active: bool
    vif_type: str = ""
    vif_details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    vnic_type: str = "normal"
    profile: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Cloud(Protocol):
    """All calls raise CloudRefused or CloudUnavailable, and nothing else."""

    def service_project(self) -> str:
        """Id of the project that the manager is authenticated for: backups live there, and only there."""

    def servers(self) -> list[Server]:
        """Every server of every project. Servers of a cell that does not answer are left out."""

    def server(self, server_id: str) -> Server | None:
        """None: Nova says that there is no such server."""

    def backups_of(self, instance_id: str) -> list[Server]:
        """The backup servers of one server, in the service project."""

    def create_backup(self, primary: Server, hosts: Sequence[str], generation: int) -> str:
        """Asks for a backup server on one of `hosts`; returns its id at once. NOT idempotent: see backups_of."""

    def delete_server(self, server_id: str) -> None:
        """Asks for it; a server that is gone already is fine."""

    def set_metadata(self, server_id: str, items: Mapping[str, str]) -> None: ...

    def delete_metadata(self, server_id: str, key: str) -> None:
        """A key that is not there is fine."""

    def reset_state(self, server_id: str) -> None:
        """vm_state active, task_state none; the guest is not touched."""

    def evacuate(self, server_id: str, host: str) -> None:
        """Asks for it; the server is not stopped afterwards. NOT idempotent: Nova begins another one, and forgets the
        task that the server has."""

    def moving_to(self, server_id: str) -> list[str]:
        """The hosts that Nova is live-migrating the server to: one, or none."""

    def force_down(self, host: str, down: bool) -> None:
        """Tells Nova that the host's compute service is down, or takes it back."""

    def delete_allocation(self, consumer_id: str) -> None:
        """Frees the consumer's reservation in Placement; none is fine."""

    def release_allocation(self, server_id: str, host: str) -> None:
        """Frees what the server still reserves of a host that it has left; nothing is fine."""

    def ports(self, instance_id: str) -> list[Port]: ...

    def bindings(self, port_id: str) -> list[Binding]:
        """A port that is gone has none."""

    def bind(self, port: Port, host: str) -> Binding:
        """Makes an inactive binding, or returns the one that exists."""

    def activate(self, port_id: str, host: str) -> None:
        """Makes the host's binding the active one; it is fine when it is already."""

    def unbind(self, port_id: str, host: str) -> None:
        """Deletes the host's binding; none is fine."""
