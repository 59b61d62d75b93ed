"""NovaCloud's requests: paths, bodies and, above all, microversions."""

import time

import pytest
import requests
import requests_mock
from keystoneauth1 import loading
from oslo_config import cfg

from nova_ftvm.conf import manager as manager_conf
from nova_ftvm.failover import nova_cloud
from nova_ftvm.failover.cloud import Binding, CloudRefused, CloudUnavailable, Port
from nova_ftvm.failover.nova_cloud import NovaCloud

KEYSTONE = "http://keystone/v3"
NOVA = "http://nova/v2.1"
NEUTRON = "http://neutron"
PLACEMENT = "http://placement"
SHOWN = {
    "id": "vm", "name": "web", "tenant_id": "tenant", "OS-EXT-SRV-ATTR:host": "hx", "OS-EXT-STS:vm_state": "active",
    "OS-EXT-STS:task_state": None, "metadata": {"ft": "true"}, "updated": "2026-01-31T12:00:00Z",
    "flavor": {"original_name": "small", "extra_specs": {"ftvm:enabled": "true"}},
    "image": {"id": "image", "properties": {"hw_firmware_type": "bios"}},
    "os-extended-volumes:volumes_attached": [{"id": "volume"}]}


def catalogue():
    return [{"type": kind, "name": name, "id": name, "endpoints": [
        {"id": name, "interface": "public", "region": "R", "region_id": "R", "url": url}]}
        for kind, name, url in (("compute", "nova", NOVA), ("network", "neutron", NEUTRON),
                                ("placement", "placement", PLACEMENT), ("identity", "keystone", KEYSTONE))]


def version(url, ident, low, high):
    return {"id": ident, "status": "CURRENT", "min_version": low, "version": high, "max_version": high,
            "links": [{"rel": "self", "href": url}]}


@pytest.fixture
def api():
    with requests_mock.Mocker() as api:
        api.get(KEYSTONE, json={"version": {"id": "v3.14", "status": "stable",
                                            "links": [{"rel": "self", "href": KEYSTONE}]}})
        api.post(f"{KEYSTONE}/auth/tokens", headers={"X-Subject-Token": "t"}, json={"token": {
            "methods": ["password"], "expires_at": "2099-01-01T00:00:00.000000Z", "catalog": catalogue(),
            "project": {"id": "service-id", "name": "service", "domain": {"id": "default", "name": "Default"}},
            "user": {"id": "u", "name": "ftvm", "domain": {"id": "default", "name": "Default"}},
            "issued_at": "2026-01-01T00:00:00.000000Z", "roles": []}})
        for url in (NOVA, f"{NOVA}/"):
            api.get(url, json={"version": version(f"{NOVA}/", "v2.1", "2.1", "2.100")})
        for url in (NEUTRON, f"{NEUTRON}/"):
            api.get(url, json={"versions": [version(f"{NEUTRON}/v2.0/", "v2.0", "", "")]})
        for url in (PLACEMENT, f"{PLACEMENT}/"):
            api.get(url, json={"versions": [version("", "v1.0", "1.0", "1.39")]})
        yield api


@pytest.fixture
def cloud():
    conf = cfg.ConfigOpts()
    manager_conf.register(conf)
    conf([], default_config_files=[])
    group = manager_conf.AUTH_GROUP
    conf.set_override("auth_type", "password", group)
    conf.register_opts(loading.get_auth_plugin_conf_options("password"), group=group)
    for name, value in (("auth_url", KEYSTONE), ("username", "ftvm"), ("password", "x"), ("project_name", "service"),
                        ("user_domain_id", "default"), ("project_domain_id", "default"), ("region_name", "R")):
        conf.set_override(name, value, group)
    return NovaCloud(conf)


def microversion(request):
    return request.headers["OpenStack-API-Version"]


def test_a_request_never_waits_for_ever(cloud):
    assert cloud._conf.service_auth.timeout == 30


def test_a_clock_that_is_set_back_makes_no_request_wait(api, cloud, monkeypatch):
    """keystoneauth's adapters wait for the time at which they were built."""
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    api.get(f"{NOVA}/servers/vm", json={"server": SHOWN})
    now = time.time()
    for hours in (5, 2, 2, 1):
        monkeypatch.setattr(time, "time", lambda ahead=hours * 3600: now + ahead)
        assert cloud.server("vm").name == "web"
    assert slept == []
    assert [request.url for request in api.request_history].count(f"{KEYSTONE}/auth/tokens") == 3


def test_the_service_project_is_the_one_of_the_token(api, cloud):
    assert cloud.service_project() == "service-id"


def test_a_server_is_read_with_its_image_properties_and_extra_specs(api, cloud):
    api.get(f"{NOVA}/servers/vm", json={"server": SHOWN})
    server = cloud.server("vm")
    assert (server.host, server.vm_state, server.volumes, server.image_id) == ("hx", "active", 1, "image")
    assert server.extra_specs == {"ftvm:enabled": "true"}
    assert server.image_properties == {"hw_firmware_type": "bios"}
    assert server.updated_at == 1769860800.0
    assert microversion(api.last_request) == "compute 2.98"


def test_a_server_without_an_image_is_read(api, cloud):
    api.get(f"{NOVA}/servers/vm", json={"server": {**SHOWN, "image": ""}})
    assert cloud.server("vm").image_id is None


def test_an_unknown_server_is_none(api, cloud):
    api.get(f"{NOVA}/servers/vm", status_code=404, json={"itemNotFound": {"code": 404, "message": "no"}})
    assert cloud.server("vm") is None


def test_all_pages_are_read_and_servers_of_silent_cells_left_out(api, cloud):
    api.get(f"{NOVA}/servers/detail", [
        {"json": {"servers": [SHOWN, {"id": "silent", "status": "UNKNOWN"}], "servers_links": [{"rel": "next"}]}},
        {"json": {"servers": [{**SHOWN, "id": "vm2"}]}}])
    assert [server.id for server in cloud.servers()] == ["vm", "vm2"]
    assert api.last_request.qs["marker"] == ["silent"] and api.last_request.qs["all_tenants"] == ["1"]


def test_a_backup_is_asked_for_with_the_primarys_image_and_flavor(api, cloud):
    api.get(f"{NOVA}/servers/vm", json={"server": {**SHOWN, "flavor": {"id": "42"}}})
    made = api.post(f"{NOVA}/servers", status_code=202, json={"server": {"id": "backup"}})
    primary = nova_cloud._server(SHOWN)
    assert cloud.create_backup(primary, ["hy", "hz"], 3) == "backup"
    assert made.last_request.json() == {
        "server": {"name": "ftvm-backup-vm", "imageRef": "image", "flavorRef": "42", "networks": "none",
                   "metadata": {"ftvm:primary": "vm", "ftvm:generation": "3"}},
        "os:scheduler_hints": {"ftvm:primary": "vm", "ftvm:hosts": ["hy", "hz"]}}
    assert microversion(api.request_history[-2]) == "compute 2.46"


def test_an_evacuation_leaves_the_server_running(api, cloud):
    api.post(f"{NOVA}/servers/vm/action", json={"adminPass": "x"})
    cloud.evacuate("vm", "hy")
    assert api.last_request.json() == {"evacuate": {"host": "hy"}}
    assert microversion(api.last_request) == "compute 2.94"


def test_a_live_migration_names_where_it_goes(api, cloud):
    api.get(f"{NOVA}/servers/vm/migrations", json={"migrations": [{"dest_compute": "hy", "status": "running"}]})
    assert cloud.moving_to("vm") == ["hy"]


def test_a_host_is_forced_down_by_its_services_id(api, cloud):
    api.get(f"{NOVA}/os-services", json={"services": [{"id": "s1", "host": "hx"}]})
    api.put(f"{NOVA}/os-services/s1", json={})
    cloud.force_down("hx", True)
    assert api.last_request.json() == {"forced_down": True}
    assert microversion(api.last_request) == "compute 2.53"


def test_a_refusal_carries_novas_own_words(api, cloud):
    api.get(f"{NOVA}/os-services", json={"services": [{"id": "s1", "host": "hx"}]})
    api.put(f"{NOVA}/os-services/s1", status_code=400, json={"badRequest": {"code": 400, "message": "`done` records"}})
    with pytest.raises(CloudRefused) as caught:
        cloud.force_down("hx", False)
    assert caught.value.status == 400 and caught.value.message == "`done` records"


def test_an_existing_binding_is_used_again(api, cloud):
    api.post(f"{NEUTRON}/v2.0/ports/p/bindings", status_code=409,
             json={"NeutronError": {"type": "PortBindingAlreadyExists", "message": "exists", "detail": ""}})
    api.get(f"{NEUTRON}/v2.0/ports/p/bindings", json={"bindings": [
        {"host": "hy", "status": "INACTIVE", "vif_type": "tap", "vif_details": {}, "vnic_type": "normal",
         "profile": {}}]})
    assert cloud.bind(Port("p", "normal"), "hy") == Binding("hy", False, "tap")


def test_a_binding_is_asked_for_and_activated(api, cloud):
    asked = api.post(f"{NEUTRON}/v2.0/ports/p/bindings", status_code=201, json={"binding": {
        "host": "hy", "status": "INACTIVE", "vif_type": "ovs", "vif_details": {"port_filter": True}}})
    assert cloud.bind(Port("p", "normal"), "hy").vif_details == {"port_filter": True}
    assert asked.last_request.json() == {"binding": {"host": "hy", "vnic_type": "normal", "profile": {}}}
    api.put(f"{NEUTRON}/v2.0/ports/p/bindings/hy/activate", json={})
    cloud.activate("p", "hy")


def test_what_is_active_already_is_no_failure(api, cloud):
    api.put(f"{NEUTRON}/v2.0/ports/p/bindings/hy/activate", status_code=409,
            json={"NeutronError": {"message": "already active"}})
    api.get(f"{NEUTRON}/v2.0/ports/p/bindings", json={"bindings": [{"host": "hy", "status": "ACTIVE"}]})
    cloud.activate("p", "hy")
    with pytest.raises(CloudRefused):
        api.put(f"{NEUTRON}/v2.0/ports/p/bindings/hz/activate", status_code=409, json={})
        cloud.activate("p", "hz")


def test_deleting_what_is_gone_is_fine(api, cloud):
    for url in (f"{NOVA}/servers/b", f"{PLACEMENT}/allocations/b", f"{NEUTRON}/v2.0/ports/p/bindings/hy"):
        api.delete(url, status_code=404, json={})
    cloud.delete_server("b")
    cloud.delete_allocation("b")
    api.delete(f"{NOVA}/servers/b/metadata/ft:progress", status_code=404, json={})
    cloud.unbind("p", "hy")
    cloud.delete_metadata("b", "ft:progress")


def test_one_key_of_metadata_is_deleted(api, cloud):
    deleted = api.delete(f"{NOVA}/servers/vm/metadata/ft:progress", status_code=204)
    cloud.delete_metadata("vm", "ft:progress")
    assert deleted.called_once


@pytest.mark.parametrize("answer", [{"status_code": 503}, {"status_code": 401}, {"exc": ConnectionError}])
def test_a_service_that_fails_is_tried_again_later(api, cloud, answer):
    if "exc" in answer:
        answer = {"exc": requests.exceptions.ConnectionError}
    api.post(f"{NOVA}/servers/vm/metadata", **answer)
    with pytest.raises(CloudUnavailable):
        cloud.set_metadata("vm", {"ft:state": "pending"})


def test_keystone_that_is_away_is_tried_again_later(cloud):
    with requests_mock.Mocker() as api, pytest.raises(CloudUnavailable):
        api.register_uri(requests_mock.ANY, requests_mock.ANY, status_code=503)
        cloud.service_project()


@pytest.fixture
def reserved(api):
    """A server that was evacuated from hx to hy: on hx in a tree of two providers, and in a shared pool."""
    api.get(f"{NOVA}/os-hypervisors/detail", json={"hypervisors": [
        {"id": "node-y", "service": {"host": "hy"}}, {"id": "node-x", "service": {"host": "hx"}}]})
    api.get(f"{PLACEMENT}/resource_providers?in_tree=node-x", json={"resource_providers": [
        {"uuid": "node-x"}, {"uuid": "node-x-numa"}]})
    api.get(f"{PLACEMENT}/allocations/vm", json={
        "project_id": "p", "user_id": "u", "consumer_generation": 4, "allocations": {
            provider: {"generation": 7, "resources": {"VCPU": 1}}
            for provider in ("node-x", "node-x-numa", "node-y", "pool")}})
    api.put(f"{PLACEMENT}/allocations/vm", status_code=204)
    return api


def written(api):
    return [request for request in api.request_history if request.method == "PUT"]


def test_only_what_the_server_reserves_on_its_old_host_is_freed(reserved, cloud):
    cloud.release_allocation("vm", "hx")
    [request] = written(reserved)
    assert request.json() == {
        "project_id": "p", "user_id": "u", "consumer_generation": 4,
        "allocations": {"node-y": {"resources": {"VCPU": 1}}, "pool": {"resources": {"VCPU": 1}}}}
    assert microversion(request) == "placement 1.28"


def test_a_host_that_nova_does_not_know_any_more_frees_nothing(reserved, cloud):
    cloud.release_allocation("vm", "hz")
    assert not written(reserved)


@pytest.mark.parametrize("left", [{}, {"node-y": {"resources": {"VCPU": 1}}}, {"node-x": {"resources": {"VCPU": 1}}}])
def test_a_reservation_that_is_gone_or_is_all_there_is_stays_as_it_is(reserved, cloud, left):
    reserved.get(f"{PLACEMENT}/allocations/vm", json={
        "project_id": "p", "user_id": "u", "consumer_generation": 4, "allocations": left})
    cloud.release_allocation("vm", "hx")
    assert not written(reserved)


def test_a_reservation_that_somebody_changed_meanwhile_is_looked_at_again_later(reserved, cloud):
    reserved.put(f"{PLACEMENT}/allocations/vm", status_code=409, json={"errors": [{"detail": "generation conflict"}]})
    with pytest.raises(CloudUnavailable, match="generation conflict"):
        cloud.release_allocation("vm", "hx")
