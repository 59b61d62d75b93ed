"""Nova, Neutron and Placement through openstacksdk: the only importer of it. cloud.Cloud says what each call means.

The SDK brings sessions, the catalogue and the adapters. The requests are plain, because microversions matter here:
from 2.95 on an evacuated server is stopped, below 2.47 only does a server name its flavor's id.
"""

import datetime
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import openstack
from keystoneauth1 import exceptions as ks_exceptions
from keystoneauth1 import loading
from openstack import exceptions as sdk_exceptions
from oslo_config import cfg

from nova_ftvm.conf import manager as manager_conf
from nova_ftvm.failover.cloud import (
    BACKUP_PREFIX,
    GENERATION_KEY,
    PRIMARY_KEY,
    Binding,
    CloudRefused,
    CloudUnavailable,
    Port,
    Server,
)

#: Shows the image's properties (2.98) and the flavor's extra specs (2.47) inside the server.
_READ = "2.98"
_FLAVOR_ID = "2.46"
_CREATE = "2.52"
_EVACUATE = "2.94"
_SERVICES = "2.53"
_PLACEMENT = "1.28"
_PAGE = 500

Json = dict[str, Any]


class NovaCloud:
    """cloud.Cloud on a real cloud. Thread-safe. Connects at the first call, so it starts before Keystone does."""

    def __init__(self, conf: cfg.ConfigOpts) -> None:
        self._conf = conf
        self._lock = threading.Lock()
        self._connection: openstack.connection.Connection | None = None
        self._connected_at = 0.0
        self._project_id: str | None = None
        self._service_ids: dict[str, str] = {}

    # -- cloud.Cloud

    def service_project(self) -> str:
        if self._project_id is None:
            self._project_id = self._sdk().current_project_id
            if not self._project_id:
                raise CloudUnavailable("[service_auth] names no project: set project_name")
        return self._project_id

    def servers(self) -> list[Server]:
        return self._list({"all_tenants": "1"})

    def server(self, server_id: str) -> Server | None:
        answer = self._call("compute", "GET", f"/servers/{server_id}", _READ, missing=True)
        return None if answer is None else _server(answer["server"])

    def backups_of(self, instance_id: str) -> list[Server]:
        named = self._list({"all_tenants": "1", "project_id": self.service_project(),
                            "name": f"^{BACKUP_PREFIX}{instance_id}$"})
        return [server for server in named if server.metadata.get(PRIMARY_KEY) == instance_id
                and server.project_id == self.service_project()]

    def create_backup(self, primary: Server, hosts: Sequence[str], generation: int) -> str:
        flavor = self._need("compute", "GET", f"/servers/{primary.id}", _FLAVOR_ID)["server"]["flavor"]["id"]
        answer = self._need("compute", "POST", "/servers", _CREATE, {
            "server": {
                "name": f"{BACKUP_PREFIX}{primary.id}", "imageRef": primary.image_id, "flavorRef": flavor,
                "networks": "none", "metadata": {PRIMARY_KEY: primary.id, GENERATION_KEY: str(generation)}},
            "os:scheduler_hints": {PRIMARY_KEY: primary.id, "ftvm:hosts": list(hosts)}})
        return answer["server"]["id"]

    def delete_server(self, server_id: str) -> None:
        self._call("compute", "DELETE", f"/servers/{server_id}", _READ, missing=True)

    def set_metadata(self, server_id: str, items: Mapping[str, str]) -> None:
        self._call("compute", "POST", f"/servers/{server_id}/metadata", _READ, {"metadata": dict(items)})

    def delete_metadata(self, server_id: str, key: str) -> None:
        self._call("compute", "DELETE", f"/servers/{server_id}/metadata/{key}", _READ, missing=True)

    def reset_state(self, server_id: str) -> None:
        self._action(server_id, {"os-resetState": {"state": "active"}}, _READ)

    def evacuate(self, server_id: str, host: str) -> None:
        self._action(server_id, {"evacuate": {"host": host}}, _EVACUATE)

    def moving_to(self, server_id: str) -> list[str]:
        answer = self._need("compute", "GET", f"/servers/{server_id}/migrations", _READ)
        return [migration["dest_compute"] for migration in answer["migrations"]]

    def force_down(self, host: str, down: bool) -> None:
        self._call("compute", "PUT", f"/os-services/{self._service_id(host)}", _SERVICES, {"forced_down": down})

    def delete_allocation(self, consumer_id: str) -> None:
        self._call("placement", "DELETE", f"/allocations/{consumer_id}", _PLACEMENT, missing=True)

    def release_allocation(self, server_id: str, host: str) -> None:
        root = self._compute_node(host)
        if root is None:
            return
        tree = self._need("placement", "GET", f"/resource_providers?in_tree={root}", _PLACEMENT)["resource_providers"]
        held = self._need("placement", "GET", f"/allocations/{server_id}", _PLACEMENT)
        kept = {provider: {"resources": share["resources"]} for provider, share in held["allocations"].items()
                if provider not in {provider["uuid"] for provider in tree}}
        # Nothing but this host: then the server has not left it, or is gone.
        if not kept or len(kept) == len(held["allocations"]):
            return
        try:
            self._call("placement", "PUT", f"/allocations/{server_id}", _PLACEMENT, {
                **{key: held[key] for key in ("project_id", "user_id", "consumer_generation")}, "allocations": kept})
        except CloudRefused as error:
            if error.status == 409:
                raise CloudUnavailable(f"somebody else changed the allocation: {error}") from error
            raise

    def ports(self, instance_id: str) -> list[Port]:
        answer = self._need("network", "GET", f"/ports?device_id={instance_id}&fields=id&fields=binding:vnic_type")
        return [Port(port["id"], port.get("binding:vnic_type", "normal")) for port in answer["ports"]]

    def bindings(self, port_id: str) -> list[Binding]:
        answer = self._call("network", "GET", f"/ports/{port_id}/bindings", missing=True)
        return [_binding(found) for found in (answer or {}).get("bindings", ())]

    def bind(self, port: Port, host: str) -> Binding:
        wanted = {"binding": {"host": host, "vnic_type": port.vnic_type, "profile": {}}}
        try:
            return _binding(self._need("network", "POST", f"/ports/{port.id}/bindings", body=wanted)["binding"])
        except CloudRefused as error:
            if error.status != 409:
                raise
        for binding in self.bindings(port.id):
            if binding.host == host:
                return binding
        raise CloudUnavailable(f"Neutron says that port {port.id} has a binding to {host}, and does not list it")

    def activate(self, port_id: str, host: str) -> None:
        try:
            self._call("network", "PUT", f"/ports/{port_id}/bindings/{host}/activate")
        except CloudRefused as error:
            if error.status != 409 or not any(found.active and found.host == host for found in self.bindings(port_id)):
                raise

    def unbind(self, port_id: str, host: str) -> None:
        self._call("network", "DELETE", f"/ports/{port_id}/bindings/{host}", missing=True)

    # -- within

    def _list(self, query: dict[str, str]) -> list[Server]:
        found: list[Server] = []
        marker: dict[str, str] = {}
        while True:
            answer = self._need("compute", "GET", "/servers/detail", _READ,
                                query={**query, "limit": str(_PAGE), **marker})
            page = answer["servers"]
            # A server of a cell that does not answer comes without most of its fields.
            found += [_server(server) for server in page if "metadata" in server]
            if not page or not answer.get("servers_links"):
                return found
            marker = {"marker": page[-1]["id"]}

    def _compute_node(self, host: str) -> str | None:
        """Its id, which is that of its root resource provider too."""
        marker: dict[str, str] = {}
        while True:
            nodes = self._need("compute", "GET", "/os-hypervisors/detail", _SERVICES,
                               query={"limit": str(_PAGE), **marker})["hypervisors"]
            for node in nodes:
                if node["service"]["host"] == host:
                    return str(node["id"])
            if len(nodes) < _PAGE:
                return None
            marker = {"marker": nodes[-1]["id"]}

    def _service_id(self, host: str) -> str:
        if host not in self._service_ids:
            services = self._need("compute", "GET", "/os-services", _SERVICES,
                                  query={"binary": "nova-compute", "host": host})["services"]
            if not services:
                raise CloudUnavailable(f"Nova knows no compute service on {host}")
            self._service_ids[host] = services[0]["id"]
        return self._service_ids[host]

    def _action(self, server_id: str, body: Json, microversion: str) -> None:
        self._call("compute", "POST", f"/servers/{server_id}/action", microversion, body)

    def _need(self, service: str, method: str, url: str, microversion: str | None = None, body: Json | None = None,
              query: dict[str, str] | None = None) -> Json:
        answer = self._call(service, method, url, microversion, body, query)
        if answer is None:
            raise CloudUnavailable(f"{method} {url}: an empty answer")
        return answer

    def _call(self, service: str, method: str, url: str, microversion: str | None = None, body: Json | None = None,
              query: dict[str, str] | None = None, missing: bool = False) -> Json | None:
        """One request. missing: 404 is an answer (None) and no failure."""
        what = f"{service}: {method} {url}"
        try:
            response = getattr(self._sdk(), service).request(
                url, method, json=body, params=query or {}, microversion=microversion, raise_exc=False)
        except (ks_exceptions.ClientException, sdk_exceptions.SDKException) as error:
            raise CloudUnavailable(f"{what}: {error}") from error
        if missing and response.status_code == 404:
            return None
        if response.status_code >= 500 or response.status_code in (401, 408, 429):
            raise CloudUnavailable(f"{what}: {response.status_code}: {_message(response)}")
        if response.status_code >= 400:
            raise CloudRefused(what, response.status_code, _message(response))
        return response.json() if response.content else None

    def _sdk(self) -> openstack.connection.Connection:
        with self._lock:
            # keystoneauth's adapters make no request before the wall clock's time at which they were built.
            if self._connection is None or time.time() < self._connected_at:
                try:
                    self._connection = _connect(self._conf)
                    self._connected_at = time.time()
                except (ks_exceptions.ClientException, sdk_exceptions.SDKException) as error:
                    raise CloudUnavailable(f"Keystone: {error}") from error
            return self._connection


def _connect(conf: cfg.ConfigOpts) -> openstack.connection.Connection:
    group = manager_conf.AUTH_GROUP
    auth = loading.load_auth_from_conf_options(conf, group)
    session = loading.load_session_from_conf_options(conf, group, auth=auth)
    adapter = conf[group]
    interfaces = adapter.valid_interfaces or ["internal", "public"]
    connection = openstack.connection.Connection(
        session=session, region_name=adapter.region_name, interface=list(interfaces))
    connection.authorize()
    for service in ("compute", "network", "placement"):
        getattr(connection, service)  # built now: the SDK builds them lazily, and not for several threads at once
    return connection


def _server(shown: Json) -> Server:
    image = shown.get("image") or {}
    return Server(
        id=shown["id"], name=shown["name"], project_id=shown["tenant_id"],
        host=shown.get("OS-EXT-SRV-ATTR:host"), vm_state=shown.get("OS-EXT-STS:vm_state", ""),
        task_state=shown.get("OS-EXT-STS:task_state"), metadata=shown["metadata"],
        extra_specs=shown.get("flavor", {}).get("extra_specs", {}),
        image_properties={key: str(value) for key, value in (image.get("properties") or {}).items()},
        image_id=image.get("id"), volumes=len(shown.get("os-extended-volumes:volumes_attached", ())),
        updated_at=_seconds(shown.get("updated")), fault=shown.get("fault", {}).get("message", ""))


def _binding(shown: Json) -> Binding:
    return Binding(host=shown["host"], active=shown.get("status") == "ACTIVE", vif_type=shown.get("vif_type") or "",
                   vif_details=shown.get("vif_details") or {}, vnic_type=shown.get("vnic_type") or "normal",
                   profile=shown.get("profile") or {})


def _seconds(timestamp: str | None) -> float:
    """Nova's '2026-01-31T12:00:00Z' as wall-clock seconds; 0 without one."""
    if not timestamp:
        return 0.0
    return datetime.datetime.fromisoformat(timestamp.replace("Z", "+00:00")).timestamp()


def _message(response: Any) -> str:
    """The API's own words: each service wraps them differently."""
    try:
        answer = response.json()
    except ValueError:
        return response.text[:200]
    if isinstance(answer, dict):
        for value in answer.values():
            if isinstance(value, dict) and "message" in value:
                return str(value["message"])
            if isinstance(value, list) and value and isinstance(value[0], dict):
                return str(value[0].get("detail", value[0]))
    return str(answer)[:200]
