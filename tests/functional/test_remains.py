"""A host lives through the failover of its server: what is left there goes, and a server that comes back stays."""

from nova_ftvm.cloud import remains
from tests.functional import base


class RemainsTest(base.CloudTestCase):
    def setUp(self):
        super().setUp()
        self.server = self.boot(ft="true")
        # The manager's; by it the driver knows whose server it is.
        self.api.api_post(f"/servers/{self.server['id']}/metadata", {"metadata": {"ft:state": "protected"}})
        self.source = self.host_of(self.server)

    def fail_over(self):
        """Only the guest's QEMU died: its host, and Nova there, live."""
        source = self.host_of(self.server)
        backup = self.back_up(self.server)
        target = self.host_of(backup)
        self.promote(self.server, target)
        self.mark_promoted(backup)
        self.domain_on(source, self.server["id"]).destroy()
        service = self.admin_api.get_services(host=source, binary="nova-compute")[0]["id"]
        self.admin_api.put_service_force_down(service, True)
        self.admin_api.post_server_action(self.server["id"], {"evacuate": {"host": target}})
        self._wait_for_server_parameter(
            self.server, {"OS-EXT-SRV-ATTR:host": target, "OS-EXT-STS:task_state": None})
        self._wait_for_migration_status(self.server, ["done"])
        self.service_api.delete_server(backup["id"])
        self.wait_until_gone(backup)
        return target, service

    def look(self, host):
        """Nova's periodic look at a host's resources."""
        driver = self.computes[host].driver
        driver.get_available_resource(driver.get_available_nodes()[0])

    def test_they_go_without_a_restart_and_the_host_may_serve_again(self):
        target, service = self.fail_over()
        self.assertIsNotNone(self.domain_on(self.source, self.server["id"]))
        self.look(self.source)
        self.assertIsNone(self.domain_on(self.source, self.server["id"]))
        self.assertTrue(self.domain_on(target, self.server["id"]).isActive())
        self.admin_api.put_service_force_down(service, False)
        self.assertEqual([], self.ftvm.manager.disarmed)

    def test_a_server_that_came_back_outlives_the_next_start_of_nova(self):
        for _ in range(2):
            left = self.host_of(self.server)
            _, service = self.fail_over()
            self.look(left)
            self.admin_api.put_service_force_down(service, False)
        self.assertEqual(self.source, self.host_of(self.server))
        self.restart_compute_service(self.source)
        self.assertTrue(self.domain_on(self.source, self.server["id"]).isActive())

    def test_what_cannot_be_removed_does_not_stop_novas_look_at_the_host(self):
        self.fail_over()

        def fails(*args, **kwargs):
            raise RuntimeError("libvirt is away")

        real, remains.libvirt_driver.LibvirtDriver.destroy = remains.libvirt_driver.LibvirtDriver.destroy, fails
        try:
            self.look(self.source)
        finally:
            remains.libvirt_driver.LibvirtDriver.destroy = real
        self.assertIsNotNone(self.domain_on(self.source, self.server["id"]))
        self.look(self.source)
        self.assertIsNone(self.domain_on(self.source, self.server["id"]))
