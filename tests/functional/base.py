"""A small cloud of two or three compute hosts in this process. The only importer of nova.tests besides libvirt_fake."""

import os
import pathlib
import sys
import time

import fixtures
import nova.conf
from nova import context as nova_context
from nova import objects
from nova.tests.functional.api import client as api_client
from nova.tests.functional.libvirt import base
from oslo_utils.fixture import uuidsentinel

from nova_ftvm.cloud import claims, driver, settings
from tests.functional import libvirt_fake, services

CONF = nova.conf.CONF
SERVICE_PROJECT = uuidsentinel.service_project
ApiError = api_client.OpenStackApiException
assert settings.CONF is CONF

# What nova-ftvm-compute does; the shim's own installation has a test of its own.
sys.modules["nova.virt.ftvm"] = driver


def make_images(driver, context, instance, mapping, *args, **kwargs):
    """Nova's, with files that are empty. Those of primaries are on hosts of their own and not seen here."""
    if claims.of(instance.uuid, driver.ft_host):
        for name in mapping:
            if name.startswith("disk"):
                pathlib.Path(CONF.instances_path, instance.uuid, name).touch()
    return False, False


class CloudTestCase(base.ServersTestBase):
    """Compute hosts 'alpha' and 'beta', each with an agent, and a manager. API calls are an admin's."""

    ADMIN_API = True
    #: As in life, the API does not see what happens on the compute host.
    CAST_AS_CALL = False
    microversion = "2.94"
    HOSTS = ("alpha", "beta")

    def setUp(self):
        self.useFixture(fixtures.MonkeyPatch("nova.tests.fixtures.libvirt.Domain", libvirt_fake.FaithfulDomain))
        self.useFixture(fixtures.MonkeyPatch("nova.tests.fixtures.libvirt.Connection.defineXML", libvirt_fake.define))
        self.useFixture(fixtures.MonkeyPatch("nova.tests.fixtures.libvirt.Connection.createXML", libvirt_fake.create))
        super().setUp()
        self.useFixture(fixtures.MonkeyPatch("nova.virt.libvirt.LibvirtDriver._create_image", make_images))
        self.ftvm = self.useFixture(services.FtvmServices(CONF))
        self.ftvm.start_manager()
        for host in self.HOSTS:
            self.start_compute(host)
            self.ftvm.start_agent(host, self.libvirt_of(host))
        self.service_api = self._service_client()

    def run(self, result=None):
        # Nova empties the test object at its end; pytest wants to take its own method off afterwards.
        method = self.__dict__.get(self._testMethodName)
        try:
            return super().run(result)
        finally:
            if method is not None:
                setattr(self, self._testMethodName, method)

    def _setup_services(self):
        self.flags(service_project_id=SERVICE_PROJECT, rpc_timeout_s=1.0, group="ftvm")
        self.flags(api_paste_config=os.path.join(sys.prefix, "etc", "nova", "api-paste.ini"), group="wsgi")
        super()._setup_services()

    def _setup_compute_service(self):
        self.flags(compute_driver="ftvm.FTVMLibvirtDriver")

    def _setup_scheduler_service(self):
        self.flags(available_filters=["nova.scheduler.filters.all_filters",
                                      "nova_ftvm.cloud.filters.FaultToleranceFilter"], group="filter_scheduler")
        self.flags(enabled_filters=[*CONF.filter_scheduler.enabled_filters, "FaultToleranceFilter"],
                   group="filter_scheduler")
        return self.start_service("scheduler")

    def _service_client(self):
        made = api_client.TestOpenStackClient("ftvm", self.admin_api.base_url, project_id=SERVICE_PROJECT,
                                              roles=["admin", "member", "reader"])
        made.microversion = self.microversion
        return made

    # What a test says

    def libvirt_of(self, host):
        return self.computes[host].driver._host.get_connection()

    def domain_on(self, host, server_id):
        return next((found for found in self.libvirt_of(host)._vms.values() if found.UUIDString() == server_id), None)

    def boot(self, host=None, api=None, hints=None, expected="ACTIVE", networks="auto", image=None, flavor=None,
             more=None, **metadata):
        """more: further members of the request."""
        api = api or self.api
        body = self._build_server(networks=networks, host=host, image_uuid=image, flavor_id=flavor)
        body["metadata"] = metadata
        body.update(more or {})
        request = {"server": body}
        if hints:
            request["os:scheduler_hints"] = hints
        server = api.post_server(request)
        return self._wait_for_state_change(server, expected)

    def host_of(self, server):
        return self.admin_api.get_server(server["id"])["OS-EXT-SRV-ATTR:host"]

    def back_up(self, server, expected="ACTIVE", hosts=None, disks=None, image=None):
        """Makes the backup server as the manager does. Returns it. disks: sizes of the primary's, by target."""
        primary_host = self.host_of(server)
        others = hosts or [host for host in self.HOSTS if host != primary_host]
        plans = self.ftvm.manager.plans
        plan = {"pair_id": uuidsentinel.pair, "instance_id": server["id"], "generation": 1,
                "primary_host": primary_host, "domain_xml": self.domain_on(primary_host, server["id"]).XMLDesc(0),
                "disks": disks or {},
                "bindings": [self._bind(port, others[0]) for port in self._ports(server)]}

        class AnyBackup(dict):
            def get(self, key, default=None):
                return plan

        self.ftvm.manager.plans = AnyBackup()
        try:
            return self.boot(api=self.service_api, networks="none", expected=expected, image=image,
                             hints={"ftvm:primary": server["id"], "ftvm:hosts": others},
                             **{"ftvm:primary": server["id"]})
        finally:
            self.ftvm.manager.plans = plans

    def promote(self, server, host):
        """What agent and manager do in a failover, as far as Nova can see it."""
        self.ftvm.agents[host].promoted.add(server["id"])
        self.ftvm.manager.promoted_on[server["id"]] = host
        self.domain_on(host, server["id"]).resume()
        for port in self._ports(server):
            self.neutron.activate_port_binding(port["id"], host)

    def mark_promoted(self, backup):
        """What the manager does before it evacuates: the filter lets the server come, and Placement has room for it."""
        self.service_api.api_post(f"/servers/{backup['id']}/metadata", {"metadata": {"ftvm:role": "promoted"}})
        self._delete_server_allocations(backup["id"])

    def evacuate(self, server, host, arrives=True):
        """host: None lets the scheduler choose."""
        source = self.host_of(server)
        self.computes[source].stop()
        self.admin_api.put_service_force_down(
            self.admin_api.get_services(host=source, binary="nova-compute")[0]["id"], True)
        self.admin_api.post_server_action(server["id"], {"evacuate": {"host": host} if host else {}})
        expected = {"OS-EXT-STS:task_state": None}
        self._wait_for_migration_status(server, ["done"] if arrives else ["failed", "error"])
        if arrives and host:
            expected["OS-EXT-SRV-ATTR:host"] = host
        return self._wait_for_server_parameter(server, expected)

    def record_of(self, server):
        return objects.Instance.get_by_uuid(nova_context.get_admin_context(), server["id"])

    def claims(self, host):
        return claims.held(host)

    def wait_until_disarmed(self, *orders):
        """The manager hears these orders and no others; Nova gives some of them after its API has answered."""
        deadline = time.monotonic() + 20
        while len(self.ftvm.manager.disarmed) < len(orders) and time.monotonic() < deadline:
            time.sleep(0.05)
        self.assertEqual(list(orders), self.ftvm.manager.disarmed)

    def wait_until_gone(self, server):
        for _ in range(40):
            try:
                self.admin_api.get_server(server["id"])
            except api_client.OpenStackApiNotFoundException:
                return
            time.sleep(0.25)
        self.fail("the server is still there")

    def _ports(self, server):
        return [port for port in self.neutron.list_ports(is_admin=True)["ports"]
                if port.get("device_id") == server["id"]]

    def _bind(self, port, host):
        binding = self.neutron.create_port_binding(port["id"], {"binding": {"host": host, "profile": {}}})["binding"]
        return {"port_id": port["id"], **{key: binding[key]
                                          for key in ("vif_type", "vif_details", "vnic_type", "profile")}}
