"""A server's life with the driver: protected, failed over, ended."""

import fixtures
from nova import context as nova_context
from nova.tests import fixtures as nova_fixtures

from nova_ftvm.core import domain
from nova_ftvm.core.kind import Abilities, Needs
from tests.functional import base

IMAGE = nova_fixtures.GlanceFixture.image1["id"]


class ProtectedServerTest(base.CloudTestCase):
    def test_a_server_that_asks_boots_armed(self):
        server = self.boot(ft="true")
        xml = self.domain_on(self.host_of(server), server["id"]).XMLDesc(0)
        self.assertEqual(f"/run/nova-ftvm/{server['id']}/monitor", domain.monitor_path(xml))

    def test_a_server_under_kvm_is_promised_the_tsc_of_its_host(self):
        for agent in self.ftvm.agents.values():
            agent.abilities = Abilities(kvm=True, tsc_hz=2_100_000_000, tsc_adjust=True)
        server = self.boot(ft="true")
        xml = self.domain_on(self.host_of(server), server["id"]).XMLDesc(0)
        self.assertEqual(Needs(kvm=True, tsc_hz=2_100_000_000), domain.needs(xml))
        self.assertEqual("", domain.obstacle(xml))

    def test_a_server_that_does_not_ask_boots_as_on_plain_libvirt(self):
        server = self.boot()
        xml = self.domain_on(self.host_of(server), server["id"]).XMLDesc(0)
        self.assertIsNone(domain.monitor_path(xml))
        self.assertNotIn("qemu:", xml)
        self.assertEqual([], self.ftvm.manager.disarmed)

    def test_a_wish_that_cannot_be_read_boots_an_ordinary_server(self):
        server = self.boot(ft="maybe")
        xml = self.domain_on(self.host_of(server), server["id"]).XMLDesc(0)
        self.assertIsNone(domain.monitor_path(xml))

    def test_a_server_with_volumes_boots_ordinary(self):
        volume = {"source_type": "volume", "destination_type": "volume"}
        root = {"source_type": "image", "destination_type": "local", "uuid": IMAGE, "boot_index": 0}
        for image, devices in (
                ("", [{**volume, "uuid": self.cinder.IMAGE_BACKED_VOL, "boot_index": 0}]),
                (IMAGE, [root, {**volume, "uuid": self.cinder.SWAP_OLD_VOL, "boot_index": -1}])):
            server = self.boot(ft="true", image=image, more={"block_device_mapping_v2": devices})
            xml = self.domain_on(self.host_of(server), server["id"]).XMLDesc(0)
            self.assertIsNone(domain.monitor_path(xml))

    def test_a_server_whose_disks_are_no_files_boots_ordinary(self):
        def on_the_network(backend, *args, **kwargs):
            disk = libvirt_info(backend, *args, **kwargs)
            disk.source_type, disk.source_protocol, disk.source_name = "network", "rbd", "pool/disk"
            return disk

        libvirt_info = nova_fixtures.LibvirtImageBackendFixture._fake_libvirt_info
        self.useFixture(fixtures.MonkeyPatch(
            "nova.tests.fixtures.LibvirtImageBackendFixture._fake_libvirt_info", on_the_network))
        server = self.boot(ft="true")
        self.assertIsNone(domain.monitor_path(self.domain_on(self.host_of(server), server["id"]).XMLDesc(0)))

    def test_a_server_boots_ordinary_when_no_agent_answers(self):
        for host in self.HOSTS:
            self.ftvm.stop(host)
        server = self.boot(ft="true")
        self.assertIsNone(domain.monitor_path(self.domain_on(self.host_of(server), server["id"]).XMLDesc(0)))

    def test_a_server_boots_and_is_deleted_when_no_manager_answers(self):
        self.ftvm.stop("manager")
        server = self.boot(ft="true")
        self.api.delete_server(server["id"])
        self.wait_until_gone(server)

    def test_the_standby_is_on_another_host_and_paused(self):
        server = self.boot(ft="true")
        backup = self.back_up(server)
        source, target = self.host_of(server), self.host_of(backup)
        self.assertNotEqual(source, target)
        standby = self.domain_on(target, server["id"])
        mark = domain.standby_mark(standby.XMLDesc(0))
        self.assertEqual(backup["id"], mark.backup_id)
        self.assertFalse(standby.isPersistent())
        self.assertIsNone(self.domain_on(target, backup["id"]))
        self.assertEqual([(mark.pair_id, 1, target, "")], self.ftvm.manager.ready)

    def test_evacuation_adopts_the_promoted_guest(self):
        server = self.boot(ft="true")
        backup = self.back_up(server)
        target = self.host_of(backup)
        guest = self.domain_on(target, server["id"])
        self.promote(server, target)
        self.mark_promoted(backup)
        after = self.evacuate(server, target)
        self.assertEqual("ACTIVE", after["status"])
        self.assertEqual(server["id"], after["id"])
        self.assertIs(guest, self.domain_on(target, server["id"]))
        self.assertTrue(guest.isActive())
        self.assertTrue(guest.isPersistent())
        self.assertIsNone(domain.standby_mark(guest.XMLDesc(0)))
        self.assertNotIn("-incoming", guest.XMLDesc(2))

    def test_deleting_the_backup_after_the_adoption_leaves_the_server_alone(self):
        server = self.boot(ft="true")
        backup = self.back_up(server)
        target = self.host_of(backup)
        self.promote(server, target)
        self.mark_promoted(backup)
        self.evacuate(server, target)
        self.service_api.delete_server(backup["id"])
        self.wait_until_gone(backup)
        self.assertTrue(self.domain_on(target, server["id"]).isActive())
        self.assertTrue(self.computes[target].driver.instance_on_disk(self.record_of(server)))
        self.assertEqual("ACTIVE", self.api.get_server(server["id"])["status"])

    def test_deleting_the_backup_between_promotion_and_adoption_leaves_the_guest_alone(self):
        server = self.boot(ft="true")
        backup = self.back_up(server)
        target = self.host_of(backup)
        self.promote(server, target)
        self.service_api.delete_server(backup["id"])
        self.wait_until_gone(backup)
        guest = self.domain_on(target, server["id"])
        self.assertTrue(guest.isActive())
        self.assertEqual("ACTIVE", self.evacuate(server, target)["status"])
        self.assertIs(guest, self.domain_on(target, server["id"]))

    def test_deleting_the_backup_before_a_promotion_removes_the_standby(self):
        server = self.boot(ft="true")
        backup = self.back_up(server)
        target = self.host_of(backup)
        self.service_api.delete_server(backup["id"])
        self.wait_until_gone(backup)
        self.assertIsNone(self.domain_on(target, server["id"]))
        self.assertFalse(self.claims(target))
        self.assertTrue(self.domain_on(self.host_of(server), server["id"]).isActive())

    def test_the_standby_stays_when_nobody_can_tell_whether_it_was_promoted(self):
        server = self.boot(ft="true")
        backup = self.back_up(server)
        target = self.host_of(backup)
        self.ftvm.stop(target)
        self.service_api.delete_server(backup["id"])
        self._wait_for_state_change(backup, "ERROR")
        self.assertTrue(self.domain_on(target, server["id"]).isActive())
        self.ftvm.start_agent(target, self.libvirt_of(target))
        self.service_api.delete_server(backup["id"])
        self.wait_until_gone(backup)
        self.assertIsNone(self.domain_on(target, server["id"]))

    def test_an_evacuation_without_the_arbiter_discards_the_standby_and_boots_anew(self):
        server = self.boot(ft="true")
        backup = self.back_up(server)
        target = self.host_of(backup)
        standby = self.domain_on(target, server["id"])
        self.mark_promoted(backup)
        self.assertEqual("ACTIVE", self.evacuate(server, target)["status"])
        guest = self.domain_on(target, server["id"])
        self.assertIsNot(standby, guest)
        self.assertIsNone(domain.standby_mark(guest.XMLDesc(0)))
        self.assertFalse(self.claims(target))

    def test_an_evacuation_is_refused_while_the_arbiter_cannot_be_asked(self):
        server = self.boot(ft="true")
        backup = self.back_up(server)
        source, target = self.host_of(server), self.host_of(backup)
        self.mark_promoted(backup)
        self.ftvm.stop("manager")
        self.evacuate(server, target, arrives=False)
        self.assertEqual(source, self.host_of(server))
        self.assertTrue(domain.standby_mark(self.domain_on(target, server["id"]).XMLDesc(0)))

    def test_an_evacuation_to_a_third_place_waits_for_the_manager(self):
        server = self.boot(ft="true")
        source = self.host_of(server)
        target = next(host for host in self.HOSTS if host != source)
        self.api.api_post(f"/servers/{server['id']}/metadata", {"metadata": {"ft:state": "protected"}})
        self.ftvm.manager.disarms = False
        self.evacuate(server, target, arrives=False)
        self.assertEqual(source, self.host_of(server))
        self.assertIsNone(self.domain_on(target, server["id"]))
        self.assertEqual([(server["id"], "the server is evacuated")], self.ftvm.manager.disarmed)

    def test_a_promoted_guest_that_ended_before_its_adoption_boots_from_its_disks(self):
        server = self.boot(ft="true")
        backup = self.back_up(server)
        target = self.host_of(backup)
        self.promote(server, target)
        self.mark_promoted(backup)
        self.domain_on(target, server["id"]).destroy()
        self.ftvm.manager.disarms = False
        self.assertEqual("ACTIVE", self.evacuate(server, target)["status"])
        self.assertTrue(self.domain_on(target, server["id"]).isPersistent())
        self.assertFalse(self.claims(target))

    def test_a_backup_deleted_behind_a_dead_compute_service_is_swept(self):
        server = self.boot(ft="true")
        backup = self.back_up(server)
        target = self.host_of(backup)
        self.computes[target].stop()
        self.admin_api.put_service_force_down(
            self.admin_api.get_services(host=target, binary="nova-compute")[0]["id"], True)
        self.service_api.delete_server(backup["id"])
        self.wait_until_gone(backup)
        self.assertTrue(self.claims(target))
        self.restart_compute_service(target)
        self.assertFalse(self.claims(target))
        self.assertIsNone(self.domain_on(target, server["id"]))

    def test_an_adopted_server_can_be_stopped_started_and_deleted(self):
        server = self.boot(ft="true")
        backup = self.back_up(server)
        target = self.host_of(backup)
        self.promote(server, target)
        self.mark_promoted(backup)
        self.evacuate(server, target)
        self.api.post_server_action(server["id"], {"os-stop": None})
        self._wait_for_state_change(server, "SHUTOFF")
        self.api.post_server_action(server["id"], {"os-start": None})
        self._wait_for_state_change(server, "ACTIVE")
        guest = self.domain_on(target, server["id"])
        self.assertIsNotNone(domain.monitor_path(guest.XMLDesc(0)))
        self.assertNotIn("-incoming", guest.XMLDesc(0))
        self.api.delete_server(server["id"])
        self.wait_until_gone(server)
        self.assertIsNone(self.domain_on(target, server["id"]))

    def test_the_returned_host_destroys_its_remains_and_disarms_nobody(self):
        server = self.boot(ft="true")
        backup = self.back_up(server)
        source, target = self.host_of(server), self.host_of(backup)
        self.promote(server, target)
        self.mark_promoted(backup)
        self.evacuate(server, target)
        for partner in ("manager", source):
            self.ftvm.stop(partner)
        self.ftvm.manager.disarmed.clear()
        self.restart_compute_service(source)
        self.assertIsNone(self.domain_on(source, server["id"]))
        self.assertTrue(self.domain_on(target, server["id"]).isActive())
        self.assertEqual([], self.ftvm.manager.disarmed)

    def test_a_restarted_compute_service_leaves_the_standby_alone(self):
        server = self.boot(ft="true")
        backup = self.back_up(server)
        target = self.host_of(backup)
        standby = self.domain_on(target, server["id"])
        self.restart_compute_service(target)
        self._run_periodics()
        self.assertIs(standby, self.domain_on(target, server["id"]))
        for each, status in ((server, "ACTIVE"), (backup, "ACTIVE")):
            found = self.admin_api.get_server(each["id"])
            self.assertEqual((status, 1), (found["status"], found["OS-EXT-STS:power_state"]))


class BackupServerTest(base.CloudTestCase):
    """What a backup server is, and what a user's server that claims to be one is."""

    def test_a_forged_backup_is_an_ordinary_server(self):
        server = self.boot(ft="true")
        self.ftvm.manager.plans = {}
        forged = self.boot(hints={"ftvm:primary": server["id"], "ftvm:hosts": ["nowhere"]},
                           **{"ftvm:primary": server["id"]})
        self.assertTrue(self.domain_on(self.host_of(forged), forged["id"]).isActive())
        self.assertEqual([], self.ftvm.manager.ready)

    def test_a_backup_that_the_manager_does_not_expect_never_boots(self):
        server = self.boot(ft="true")
        stray = self.boot(api=self.service_api, networks="none", expected="ERROR",
                          hints={"ftvm:primary": server["id"]}, **{"ftvm:primary": server["id"]})
        self.assertIn("expects no backup", self.admin_api.get_server(stray["id"])["fault"]["message"])
        for host in self.HOSTS:
            self.assertIsNone(self.domain_on(host, stray["id"]))

    def test_a_failed_standby_leaves_nothing_behind_and_is_reported(self):
        server = self.boot(ft="true")
        target = next(host for host in self.HOSTS if host != self.host_of(server))
        self.ftvm.agents[target].capable = False
        self.back_up(server, expected="ERROR")
        self.assertIn("the kernel is too old", self.ftvm.manager.ready[0][3])
        self.assertIsNone(self.domain_on(target, server["id"]))
        self.assertFalse(self.claims(target))

    def test_a_host_of_another_kind_refuses_the_standby_and_makes_nothing(self):
        server = self.boot(ft="true")
        target = next(host for host in self.HOSTS if host != self.host_of(server))
        self.ftvm.agents[target].abilities = Abilities(kvm=False)
        self.back_up(server, expected="ERROR")
        self.assertIn("KVM does not work there", self.ftvm.manager.ready[0][3])
        self.assertIsNone(self.domain_on(target, server["id"]))
        self.assertFalse(self.claims(target))

    def test_a_standby_that_comes_too_late_is_undone(self):
        server = self.boot(ft="true")
        target = next(host for host in self.HOSTS if host != self.host_of(server))
        self.ftvm.manager.grants = False
        self.back_up(server, expected="ERROR")
        self.assertIsNone(self.domain_on(target, server["id"]))
        self.assertFalse(self.claims(target))

    def test_power_operations_on_a_backup_are_refused_and_change_nothing(self):
        server = self.boot(ft="true")
        backup = self.back_up(server)
        target = self.host_of(backup)
        for action in ({"os-stop": None}, {"reboot": {"type": "HARD"}}, {"pause": None}, {"suspend": None}):
            self.service_api.post_server_action(backup["id"], action)
            self._wait_for_server_parameter(backup, {"status": "ACTIVE", "OS-EXT-STS:task_state": None})
            self.assertTrue(self.domain_on(target, server["id"]).isActive())
        self.assertEqual([], self.ftvm.manager.disarmed)


class PlannedEndTest(base.CloudTestCase):
    def setUp(self):
        super().setUp()
        #: What had been disarmed when libvirt was asked to copy a disk, for each time.
        self.snapshots = []
        self.useFixture(fixtures.MonkeyPatch(
            "nova.virt.libvirt.LibvirtDriver._live_snapshot",
            lambda *args: self.snapshots.append([server for server, _ in self.ftvm.manager.disarmed])))

    def protected(self, host=None):
        """A server that the manager has taken up."""
        server = self.boot(host=host, ft="true")
        self.api.api_post(f"/servers/{server['id']}/metadata", {"metadata": {"ft:state": "protected"}})
        return server

    def act(self, server, action):
        self.api.post_server_action(server["id"], action)
        return self._wait_for_server_parameter(server, {"OS-EXT-STS:task_state": None})

    def test_each_planned_end_disarms_first(self):
        for action, reason in (({"reboot": {"type": "HARD"}}, "rebooted"), ({"pause": None}, "paused"),
                               ({"suspend": None}, "suspended"), ({"os-stop": None}, "stopped")):
            server = self.protected()
            self.act(server, action)
            self.assertEqual((server["id"], f"the server is {reason}"), self.ftvm.manager.disarmed[0])
            self.ftvm.manager.disarmed.clear()

    def test_an_operation_that_could_run_the_server_twice_waits_for_the_manager(self):
        server = self.protected()
        guest = self.domain_on(self.host_of(server), server["id"])
        self.ftvm.stop("manager")
        for action in ({"reboot": {"type": "HARD"}}, {"pause": None}, {"suspend": None}):
            after = self.act(server, action)
            self.assertEqual(("ACTIVE", 1), (after["status"], after["OS-EXT-STS:power_state"]))
            self.assertIs(guest, self.domain_on(self.host_of(server), server["id"]))

    def test_a_refusal_of_the_manager_counts_as_well(self):
        server = self.protected()
        self.ftvm.manager.disarms = False
        self.assertEqual("ACTIVE", self.act(server, {"pause": None})["status"])

    def test_stopping_and_deleting_work_without_the_manager(self):
        server = self.protected()
        self.ftvm.stop("manager")
        self.api.post_server_action(server["id"], {"os-stop": None})
        self._wait_for_state_change(server, "SHUTOFF")
        self.api.delete_server(server["id"])
        self.wait_until_gone(server)

    def test_an_attached_interface_stays_on_qemus_backend(self):
        server = self.protected()
        self.api.attach_interface(server["id"], {"interfaceAttachment": {"port_id": self.neutron.port_1["id"]}})
        self.assertEqual("the server is given an interface", self.ftvm.manager.disarmed[0][1])
        attached = self.domain_on(self.host_of(server), server["id"]).attached
        self.assertEqual(1, len(attached))
        self.assertIn('<driver name="qemu"', attached[0])

    def test_the_pause_of_a_checkpoint_is_not_seen(self):
        server = self.protected()
        host = self.host_of(server)
        self.domain_on(host, server["id"]).suspend()
        self.computes[host].manager._sync_power_states(nova_context.get_admin_context())
        self._wait_for_server_parameter(server, {"status": "ACTIVE", "OS-EXT-STS:power_state": 1})

    def test_the_pause_of_a_guest_whose_disk_is_full_is_seen(self):
        server = self.protected()
        host = self.host_of(server)
        guest = self.domain_on(host, server["id"])
        guest.suspend()
        guest.reason = 5
        self.computes[host].manager._sync_power_states(nova_context.get_admin_context())
        self._wait_for_server_parameter(server, {"status": "ACTIVE", "OS-EXT-STS:power_state": 3})

    def test_a_snapshot_disarms_first_and_leaves_the_guest_running(self):
        server = self.protected()
        guest = self.domain_on(self.host_of(server), server["id"])
        after = self.act(server, {"createImage": {"name": "copy"}})
        self.assertEqual([(server["id"], "the server is copied to an image")], self.ftvm.manager.disarmed)
        self.assertEqual(("ACTIVE", 1), (after["status"], after["OS-EXT-STS:power_state"]))
        self.assertIs(guest, self.domain_on(self.host_of(server), server["id"]))
        self.assertEqual([[server["id"]]], self.snapshots)

    def test_a_snapshot_waits_for_the_manager_and_leaves_no_image(self):
        server = self.protected()
        guest = self.domain_on(self.host_of(server), server["id"])
        self.ftvm.stop("manager")
        after = self.act(server, {"createImage": {"name": "copy"}})
        self.assertEqual(("ACTIVE", 1), (after["status"], after["OS-EXT-STS:power_state"]))
        self.assertTrue(guest.isPersistent())
        self.assertEqual([], self.snapshots)
        self.assertNotIn("copy", [image["name"] for image in self.glance.images.values()])

    def test_a_volume_disarms_when_it_is_attached_and_when_it_is_detached(self):
        # Nova compares with the process's [DEFAULT]host before it detaches; all hosts of the tests share one.
        server = self.protected(host=base.CONF.host)
        volume = self.cinder.IMAGE_BACKED_VOL
        self.api.post_server_volume(server["id"], {"volumeAttachment": {"volumeId": volume}})
        given, rid = ((server["id"], f"the server is {what} a volume") for what in ("given", "rid of"))
        self.wait_until_disarmed(given)
        self._wait_for_volume_attach(server["id"], volume)
        self.api.delete_server_volume(server["id"], volume)
        self.wait_until_disarmed(given, rid)

    def test_a_volume_is_not_attached_behind_an_armed_pair(self):
        server = self.protected()
        guest = self.domain_on(self.host_of(server), server["id"])
        self.ftvm.stop("manager")
        self.api.post_server_volume(server["id"], {"volumeAttachment": {"volumeId": self.cinder.IMAGE_BACKED_VOL}})
        self._wait_for_volume_detach(server["id"], self.cinder.IMAGE_BACKED_VOL)
        self.assertEqual([], guest.attached)
        self.assertEqual("ACTIVE", self.api.get_server(server["id"])["status"])

    def test_an_interface_is_not_attached_behind_an_armed_pair(self):
        server = self.protected()
        self.ftvm.stop("manager")
        port = self.neutron.port_1
        refused = self.assertRaises(base.ApiError, self.api.attach_interface, server["id"],
                                    {"interfaceAttachment": {"port_id": port["id"]}})
        self.assertIn("the server cannot be given an interface before its protection has ended", str(refused))
        self.assertEqual(1, self.domain_on(self.host_of(server), server["id"]).XMLDesc(0).count("<interface"))


class PlacementOfPairsTest(base.CloudTestCase):
    HOSTS = ("alpha", "beta", "gamma")

    def test_a_backup_goes_only_to_listed_hosts(self):
        server = self.boot(host="alpha", ft="true")
        self.assertEqual("gamma", self.host_of(self.back_up(server, hosts=["gamma"])))

    def test_a_backup_never_joins_its_primary(self):
        server = self.boot(host="alpha", ft="true")
        self.ftvm.manager.plans = {}
        stray = self.boot(api=self.service_api, networks="none", expected="ERROR",
                          hints={"ftvm:primary": server["id"], "ftvm:hosts": ["alpha"]},
                          **{"ftvm:primary": server["id"]})
        self.assertIn("No valid host", self.admin_api.get_server(stray["id"])["fault"]["message"])

    def test_a_server_is_kept_off_its_backups_host_until_the_promotion(self):
        server = self.boot(host="alpha", ft="true")
        backup = self.back_up(server, hosts=["beta"])
        self.assertEqual("gamma", self.evacuate(server, None)["OS-EXT-SRV-ATTR:host"])
        self.mark_promoted(backup)
        self.promote(server, "beta")
        self.assertEqual("beta", self.evacuate(server, "beta")["OS-EXT-SRV-ATTR:host"])

    def test_a_hint_of_any_other_project_means_nothing(self):
        server = self.boot(host="alpha", ft="true")
        self.boot(hints={"ftvm:primary": server["id"], "ftvm:hosts": ["nowhere"]})
