"""A protected server is live-migrated to its backup's host: Nova's own way, and the guest is the backup's."""

import functools

from nova_ftvm.core import domain
from tests.functional import base


class SwitchoverTest(base.CloudTestCase):
    def setUp(self):
        super().setUp()
        self.ready = self.grants = True
        self.generation = 1
        self.handed_over = []
        manager = self.ftvm.manager
        manager.switchover = lambda context, instance_id, host: {"ready": self.ready, "reason": "it is syncing"}
        manager.adoption = lambda context, instance_id, host: {
            "adopt": manager.promoted_on.get(instance_id) == host, "pair_id": None, "generation": self.generation}
        for host in self.HOSTS:
            self.ftvm.agents[host].hand_over = functools.partial(self._hand_over, host)

    def _hand_over(self, source, context, instance_id):
        """The agent's, and what the arbiter makes of it."""
        self.handed_over.append((source, instance_id))
        self.generation += 1
        if self.grants:
            target = next(host for host in self.HOSTS if host != source)
            self.promote({"id": instance_id}, target)
        return {"handed_over": True}

    def _migrate(self, server, host, ends="completed"):
        self.admin_api.post_server_action(server["id"], {"os-migrateLive": {"host": host, "block_migration": "auto"}})
        self._wait_for_migration_status(server, [ends])
        return self._wait_for_server_parameter(server, {"OS-EXT-STS:task_state": None})

    def test_the_backups_guest_becomes_the_server(self):
        server = self.boot(ft="true")
        backup = self.back_up(server)
        source, target = self.host_of(server), self.host_of(backup)
        guest = self.domain_on(target, server["id"])
        after = self._migrate(server, target)
        self.assertEqual(("ACTIVE", target), (after["status"], after["OS-EXT-SRV-ATTR:host"]))
        self.assertEqual([(source, server["id"])], self.handed_over)
        self.assertIs(guest, self.domain_on(target, server["id"]))
        self.assertTrue(guest.isActive() and guest.isPersistent())
        self.assertIsNone(domain.standby_mark(guest.XMLDesc(0)))
        self.assertFalse(self.claims(target))
        self.assertIsNone(self.domain_on(source, server["id"]))
        # The pair goes through a failover: it must not be ended on the way.
        self.assertEqual([], self.ftvm.manager.disarmed)
        (port,) = self._ports(server)
        self.assertEqual(target, port["binding:host_id"])

    def test_a_pair_that_is_not_ready_keeps_the_server_where_it_is(self):
        server = self.boot(ft="true")
        backup = self.back_up(server)
        source, target = self.host_of(server), self.host_of(backup)
        self.ready = False
        after = self._migrate(server, target, ends="error")
        self.assertEqual(("ACTIVE", source), (after["status"], after["OS-EXT-SRV-ATTR:host"]))
        self.assertEqual([], self.handed_over + self.ftvm.manager.disarmed)
        self.assertTrue(self.domain_on(target, server["id"]))

    def test_a_backup_that_does_not_get_the_guest_stays_a_standby(self):
        server = self.boot(ft="true")
        backup = self.back_up(server)
        source, target = self.host_of(server), self.host_of(backup)
        self.grants = False
        after = self._migrate(server, target, ends="failed")
        self.assertEqual(("ACTIVE", source), (after["status"], after["OS-EXT-SRV-ATTR:host"]))
        self.assertTrue(self.domain_on(source, server["id"]).isActive())
        self.assertTrue(self.claims(target))
        self.assertTrue(domain.standby_mark(self.domain_on(target, server["id"]).XMLDesc(0)))

    def test_nothing_moves_when_no_agent_can_hand_the_guest_over(self):
        server = self.boot(ft="true")
        backup = self.back_up(server)
        source, target = self.host_of(server), self.host_of(backup)
        self.ftvm.agents[source].hand_over = lambda context, instance_id: {"handed_over": False}
        after = self._migrate(server, target, ends="failed")
        self.assertEqual(("ACTIVE", source), (after["status"], after["OS-EXT-SRV-ATTR:host"]))
        self.assertTrue(self.claims(target))
