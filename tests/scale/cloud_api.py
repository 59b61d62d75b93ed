"""Keystone, Nova, Neutron and Placement as the manager sees them: their HTTP APIs over a population of servers.

Run as `python -m tests.scale.cloud_api FOLDER PAIRS` by the benchmark. What it answers has the size that Nova's and
Neutron's answers have; how long they take to find it is not modelled, but for an evacuation and a deletion, which take
their time. As Nova does, it sends a versioned notification for each change of a server.
"""

import itertools
import json
import queue
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import oslo_messaging

from nova_ftvm.failover import shown
from tests.scale import services
from tests.scale.population import Member, hosts_of, members

Json = dict[str, Any]
ROOT = f"http://127.0.0.1:{services.CLOUD_PORT}"
SERVICE_PROJECT = "5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e"
TENANT = "7e7e7e7e7e7e7e7e7e7e7e7e7e7e7e7e"
EVACUATION_S = 3.0
DELETION_S = 1.0
TOPIC = "ftvm_notifications"


class Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def described(server_id: str, name: str, project: str, host: str, metadata: dict[str, str]) -> Json:
    """A server as /servers/detail shows it to an administrator, about 2.5 KB of it."""
    link = f"{ROOT}/v2.1/servers/{server_id}"
    address = {"version": 4, "addr": "10.11.12.13", "OS-EXT-IPS:type": "fixed", "OS-EXT-IPS-MAC:mac_addr": "fa:16:3e:0"}
    return {
        "id": server_id, "name": name, "status": "ACTIVE", "tenant_id": project, "user_id": "1" * 32,
        "metadata": metadata, "hostId": "h" * 56, "created": "2026-01-31T12:00:00Z", "updated": "2026-01-31T12:00:00Z",
        "image": {"id": "1f2e3d4c-0000-4000-8000-000000000001", "links": [{"rel": "bookmark", "href": link}],
                  "properties": {"hw_machine_type": "pc", "hw_rng_model": "virtio", "hw_scsi_model": "virtio-scsi",
                                 "hw_cdrom_bus": "scsi", "os_type": "linux", "base_image_ref": "", "min_ram": "0"}},
        "flavor": {"vcpus": 1, "ram": 2048, "disk": 20, "ephemeral": 0, "swap": 0, "original_name": "small",
                   "extra_specs": {"ftvm:enabled": "true", "hw:cpu_sockets": "1"}},
        "addresses": {"provider": [address]}, "accessIPv4": "", "accessIPv6": "", "links": [
            {"rel": "self", "href": link}, {"rel": "bookmark", "href": link}],
        "OS-DCF:diskConfig": "AUTO", "progress": 0, "OS-EXT-AZ:availability_zone": "nova", "config_drive": "True",
        "key_name": None, "OS-SRV-USG:launched_at": "2026-01-31T12:00:00.000000", "OS-SRV-USG:terminated_at": None,
        "OS-EXT-SRV-ATTR:host": host, "OS-EXT-SRV-ATTR:instance_name": "instance-00000001",
        "OS-EXT-SRV-ATTR:hypervisor_hostname": host, "OS-EXT-SRV-ATTR:reservation_id": "r-00000001",
        "OS-EXT-SRV-ATTR:launch_index": 0, "OS-EXT-SRV-ATTR:hostname": name, "OS-EXT-SRV-ATTR:kernel_id": "",
        "OS-EXT-SRV-ATTR:ramdisk_id": "", "OS-EXT-SRV-ATTR:root_device_name": "/dev/vda",
        "OS-EXT-SRV-ATTR:user_data": None, "OS-EXT-STS:task_state": None, "OS-EXT-STS:vm_state": "active",
        "OS-EXT-STS:power_state": 1, "os-extended-volumes:volumes_attached": [], "host_status": "UP", "locked": False,
        "locked_reason": None, "description": None, "tags": [], "trusted_image_certificates": None,
        "server_groups": [], "security_groups": [{"name": "default"}], "pinned_availability_zone": None}


class Cloud:
    """The state. Every method is called with the lock held."""

    def __init__(self, population: list[Member], notify: Callable[[str, str], None]) -> None:
        self.lock = threading.Lock()
        self._notify = notify
        self.servers: dict[str, Json] = {}
        self._listed: dict[str, bytes] = {}
        self._bindings: dict[str, dict[str, str]] = {}
        self._ports = {member.instance_id: member.port_id for member in population}
        self._down = dict.fromkeys(hosts_of(population), False)
        for member in population:
            instance, backup = member.instance_id, member.backup_id
            self._put(described(instance, f"web-{member.number}", TENANT, member.primary_host, {
                "ft": "true", "ft:state": "protected", "ft:reason": shown.PROTECTED}))
            self._put(described(backup, f"ftvm-backup-{instance}", SERVICE_PROJECT, member.backup_host, {
                "ftvm:primary": instance, "ftvm:generation": "1"}))
            self._bindings[member.port_id] = {member.primary_host: "ACTIVE", member.backup_host: "INACTIVE"}

    def _put(self, server: Json) -> None:
        self.servers[server["id"]] = server
        self._listed[server["id"]] = json.dumps(server).encode()

    def _alter(self, server_id: str, event: str = "instance.update", **changes: Any) -> None:
        self._put({**self.server(server_id), **changes})
        self._notify(event, server_id)

    def server(self, server_id: str) -> Json:
        if server_id not in self.servers:
            raise Refused(404, "no such server")
        return self.servers[server_id]

    def listed(self, query: dict[str, str]) -> bytes:
        """One page, without taking the servers' texts apart."""
        ids = list(self.servers)
        if "name" in query:
            name = query["name"].strip("^$")
            ids = [found for found in ids if self.servers[found]["name"] == name]
        start = ids.index(query["marker"]) + 1 if query.get("marker") in self.servers else 0
        end = start + int(query["limit"])
        more = b', "servers_links": [{"rel": "next", "href": ""}]' if end < len(ids) else b""
        return b'{"servers": [' + b", ".join(self._listed[found] for found in ids[start:end]) + b"]" + more + b"}"

    def set_metadata(self, server_id: str, items: dict[str, str]) -> None:
        self._alter(server_id, metadata={**self.server(server_id)["metadata"], **items})

    def delete_metadata(self, server_id: str, key: str) -> None:
        self._alter(server_id, metadata={
            name: value for name, value in self.server(server_id)["metadata"].items() if name != key})

    def delete(self, server_id: str) -> None:
        if self.server(server_id)["OS-EXT-STS:task_state"] == "deleting":
            return
        self._alter(server_id, **{"OS-EXT-STS:task_state": "deleting"})
        if not self._down[self.servers[server_id]["OS-EXT-SRV-ATTR:host"]]:
            self._later(DELETION_S, lambda: self._gone(server_id))

    def _gone(self, server_id: str) -> None:
        del self.servers[server_id], self._listed[server_id]
        self._notify("instance.delete.end", server_id)

    def act(self, server_id: str, action: Json) -> None:
        server = self.server(server_id)
        if "os-resetState" in action:
            self._alter(server_id, **{"OS-EXT-STS:task_state": None, "OS-EXT-STS:vm_state": "active"})
            return
        if not self._down[server["OS-EXT-SRV-ATTR:host"]] or server["OS-EXT-STS:task_state"]:
            raise Refused(409, "the compute service is in use, or the server is busy")
        host = action["evacuate"]["host"]
        self._alter(server_id, **{"OS-EXT-STS:task_state": "rebuilding"})
        for part, state in ((0.3, "rebuild_block_device_mapping"), (0.6, "rebuild_spawning")):
            self._later(EVACUATION_S * part, lambda state=state: self._alter(
                server_id, **{"OS-EXT-STS:task_state": state}))
        self._later(EVACUATION_S, lambda: self._alter(server_id, "instance.rebuild.end", **{
            "OS-EXT-SRV-ATTR:host": host, "OS-EXT-STS:task_state": None}))

    def _later(self, delay_s: float, change: Callable[[], None]) -> None:
        DUE.put((time.monotonic() + delay_s, next(_ORDER), change))

    def force_down(self, host: str, down: bool) -> None:
        self._down[host] = down

    def ports(self, instance_id: str) -> list[Json]:
        return [{"id": self._ports[instance_id], "binding:vnic_type": "normal"}] if instance_id in self._ports else []

    def bindings(self, port_id: str) -> list[Json]:
        return [self._binding(host, status) for host, status in self._bindings[port_id].items()]

    def _binding(self, host: str, status: str) -> Json:
        return {"host": host, "status": status, "vif_type": "ovs", "vnic_type": "normal", "profile": {},
                "vif_details": {"port_filter": True, "bridge_name": "br-int", "datapath_type": "system"}}

    def bind(self, port_id: str, host: str) -> Json:
        if host in self._bindings[port_id]:
            raise Refused(409, "the binding exists")
        self._bindings[port_id][host] = "INACTIVE"
        return self._binding(host, "INACTIVE")

    def activate(self, port_id: str, host: str) -> None:
        found = self._bindings[port_id]
        found |= {name: "ACTIVE" if name == host else "INACTIVE" for name in found}

    def unbind(self, port_id: str, host: str) -> None:
        if self._bindings[port_id].pop(host, None) is None:
            raise Refused(404, "no such binding")


DUE: "queue.PriorityQueue[tuple[float, int, Callable[[], None]]]" = queue.PriorityQueue()
_ORDER = itertools.count()


def carry_out(cloud: Cloud) -> None:
    """What takes its time, each at its moment."""
    while True:
        due, number, change = DUE.get()
        if (left := due - time.monotonic()) > 0:
            DUE.put((due, number, change))
            time.sleep(min(left, 0.02))
            continue
        with cloud.lock:
            change()


class Handler(BaseHTTPRequestHandler):
    """The APIs by their paths."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    cloud: Cloud

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def do_DELETE(self) -> None:
        self._answer("DELETE")

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, method: str) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else {}
        url = urllib.parse.urlsplit(self.path)
        parts = [urllib.parse.unquote(part) for part in url.path.split("/") if part]
        headers: dict[str, str] = {}
        try:
            with self.cloud.lock:
                status, found = route(self.cloud, method, parts, dict(urllib.parse.parse_qsl(url.query)), body)
        except Refused as refused:
            status, found = refused.status, {"error": {"code": refused.status, "message": str(refused)}}
        if parts[-2:] == ["auth", "tokens"]:
            headers["X-Subject-Token"] = "t"
        text = found if isinstance(found, bytes) else b"" if found is None else json.dumps(found).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Type": "application/json", "Content-Length": str(len(text))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text)


def route(cloud: Cloud, method: str, parts: list[str], query: dict[str, str], body: Json) -> tuple[int, Any]:
    """Status and answer."""
    match parts:
        case ["v3", *rest]:
            return (201, token()) if rest else (200, {"version": version("/v3", "v3.14", "", "")})
        case ["v2.1", *rest]:
            return compute(cloud, method, rest, query, body) if rest else (
                200, {"version": version("/v2.1/", "v2.1", "2.1", "2.100")})
        case ["network", "v2.0", *rest] if rest:
            return network(cloud, method, rest, query, body)
        case ["network", *_]:
            return 200, {"versions": [version("/network/v2.0/", "v2.0", "", "")]}
        case ["placement", *rest]:
            return placement(method, rest)
    raise Refused(404, f"nothing at {'/'.join(parts)}")


def version(path: str, name: str, low: str, high: str) -> Json:
    return {"id": name, "status": "CURRENT", "min_version": low, "version": high, "max_version": high,
            "links": [{"rel": "self", "href": ROOT + path}]}


def token() -> Json:
    catalogue = [{"type": kind, "name": kind, "id": kind, "endpoints": [
        {"id": kind, "interface": "public", "region": "R", "region_id": "R", "url": ROOT + path}]}
        for kind, path in (("identity", "/v3"), ("compute", "/v2.1"), ("network", "/network"),
                           ("placement", "/placement"))]
    domain = {"id": "default", "name": "Default"}
    return {"token": {"methods": ["password"], "expires_at": "2099-01-01T00:00:00.000000Z", "catalog": catalogue,
                      "project": {"id": SERVICE_PROJECT, "name": "service", "domain": domain}, "roles": [],
                      "user": {"id": "u", "name": "ftvm", "domain": domain},
                      "issued_at": "2026-01-01T00:00:00.000000Z"}}


def compute(cloud: Cloud, method: str, parts: list[str], query: dict[str, str], body: Json) -> tuple[int, Any]:
    match method, parts:
        case "GET", ["servers", "detail"]:
            return 200, cloud.listed(query)
        case "GET", ["servers", _, "migrations"]:
            return 200, {"migrations": []}
        case "GET", ["servers", server_id]:
            return 200, {"server": cloud.server(server_id)}
        case "DELETE", ["servers", server_id]:
            return 204, cloud.delete(server_id)
        case "POST", ["servers", server_id, "metadata"]:
            return 200, cloud.set_metadata(server_id, body["metadata"])
        case "DELETE", ["servers", server_id, "metadata", key]:
            return 204, cloud.delete_metadata(server_id, key)
        case "POST", ["servers", server_id, "action"]:
            return 202, cloud.act(server_id, body)
        case "GET", ["os-services"]:
            return 200, {"services": [{"id": query["host"], "host": query["host"]}]}
        case "PUT", ["os-services", host]:
            return 200, cloud.force_down(host, body["forced_down"])
        case "GET", ["os-hypervisors", "detail"]:
            return 200, {"hypervisors": []}
    raise Refused(404, f"Nova has no {method} {parts}")


def network(cloud: Cloud, method: str, parts: list[str], query: dict[str, str], body: Json) -> tuple[int, Any]:
    match method, parts:
        case "GET", ["ports"]:
            return 200, {"ports": cloud.ports(query["device_id"])}
        case "GET", ["ports", port_id, "bindings"]:
            return 200, {"bindings": cloud.bindings(port_id)}
        case "POST", ["ports", port_id, "bindings"]:
            return 201, {"binding": cloud.bind(port_id, body["binding"]["host"])}
        case "PUT", ["ports", port_id, "bindings", host, "activate"]:
            return 200, cloud.activate(port_id, host)
        case "DELETE", ["ports", port_id, "bindings", host]:
            return 204, cloud.unbind(port_id, host)
    raise Refused(404, f"Neutron has no {method} {parts}")


def placement(method: str, parts: list[str]) -> tuple[int, Any]:
    match method, parts:
        case "DELETE", ["allocations", _]:
            return 204, None
        case "GET", []:
            return 200, {"versions": [version("/placement", "v1.0", "1.0", "1.39")]}
    raise Refused(404, f"Placement has no {method} {parts}")


class Notices:
    """Nova's notifications, sent by a thread: no request waits for the broker."""

    def __init__(self, folder: Path) -> None:
        conf = services.configuration(folder)
        transport = oslo_messaging.get_notification_transport(conf)
        conf.set_override("control_exchange", "nova")
        self._notifier = oslo_messaging.Notifier(transport, "compute:bench", driver="messagingv2", topics=[TOPIC])
        self._waiting: queue.Queue[tuple[str, str]] = queue.Queue()
        threading.Thread(target=self._send, daemon=True).start()

    def put(self, event: str, server_id: str) -> None:
        self._waiting.put((event, server_id))

    def _send(self) -> None:
        while True:
            event, server_id = self._waiting.get()
            self._notifier.info({}, event, {"nova_object.data": {"uuid": server_id}})


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


def main() -> None:
    population = members(int(sys.argv[2]))
    cloud = Cloud(population, Notices(Path(sys.argv[1])).put)
    threading.Thread(target=carry_out, args=(cloud,), daemon=True).start()
    Handler.cloud = cloud
    Server(("127.0.0.1", services.CLOUD_PORT), Handler).serve_forever()


if __name__ == "__main__":
    main()
