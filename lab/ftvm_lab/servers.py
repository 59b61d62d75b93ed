"""Waiting for servers, seen through Nova's API as its administrator."""

from dataclasses import dataclass

from openstack.compute.v2.server import Server
from openstack.connection import Connection

from ftvm_lab.cloud import usable_hosts
from ftvm_lab.command import LabError, wait_until
from ftvm_lab.layout import COMPUTES

STATE_KEY = "ft:state"
REASON_KEY = "ft:reason"
BACKUP_PREFIX = "ftvm-backup-"
POLL_S = 0.1


class NotProtected(LabError):
    """The product will not protect the server; `reason` is what it shows."""

    def __init__(self, server: str, state: str, reason: str) -> None:
        super().__init__(f"server {server} is {state}: {reason or 'no reason given'}")
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Servers:
    """The questions that the scenarios ask about servers."""

    connection: Connection

    def get(self, server_id: str) -> Server:
        server: Server = self.connection.compute.get_server(server_id)
        return server

    def all(self) -> list[Server]:
        return list(self.connection.compute.servers(all_projects=True))

    def host(self, server_id: str) -> str:
        return str(self.get(server_id).compute_host)

    def address(self, server_id: str) -> str:
        (first, *_), *_ = self.get(server_id).addresses.values()
        return str(first["addr"])

    def port_id(self, server_id: str) -> str:
        (port,) = self.connection.network.ports(device_id=server_id)
        return str(port.id)

    def protection(self, server_id: str) -> tuple[str, str]:
        """ft:state and ft:reason; empty where the server has none."""
        metadata = self.get(server_id).metadata
        return metadata.get(STATE_KEY, ""), metadata.get(REASON_KEY, "")

    def wait_for_state(self, server_id: str, wanted: str, timeout_s: float) -> None:
        """Until ft:state is `wanted`; NotProtected at once when it is refused."""

        def reached() -> bool:
            state, reason = self.protection(server_id)
            if state != wanted and state in ("unprotected", "error"):
                raise NotProtected(server_id, state, reason)
            return state == wanted

        wait_until(f"ft:state of {server_id} to be {wanted}", reached, timeout_s, POLL_S)

    def wait_for_backup(self, server_id: str, timeout_s: float) -> Server:
        """The backup's server, once it has a host."""

        def found() -> Server | None:
            servers = self.connection.compute.servers(all_projects=True, name=BACKUP_PREFIX + server_id)
            # One that is deleted may be there beside its successor.
            return next((one for one in servers if one.compute_host and one.task_state != "deleting"), None)

        backup: Server = wait_until(f"a backup of {server_id}", found, timeout_s, POLL_S)
        return backup

    def wait_for_move(self, server_id: str, host: str, timeout_s: float) -> None:
        """Until Nova has the server ACTIVE on `host`, and nothing more to do with it."""

        def moved() -> bool:
            server = self.get(server_id)
            if server.status == "ERROR":
                raise LabError(f"server {server_id} is in ERROR: {server.fault}")
            is_idle = server.status == "ACTIVE" and server.task_state is None
            return bool(is_idle and server.compute_host == host)

        wait_until(f"{server_id} to be ACTIVE on {host}", moved, timeout_s, POLL_S)

    def delete(self, server_id: str) -> None:
        self.connection.compute.delete_server(server_id, ignore_missing=True)

    def wait_until_clean(self, timeout_s: float) -> None:
        """Until no server is left in any project, and every host can be used."""
        names = {node.name for node in COMPUTES}

        def is_clean() -> bool:
            return not self.all() and usable_hosts(self.connection) >= names

        wait_until("a clean cloud: no servers, all hosts up", is_clean, timeout_s, 0.5)
