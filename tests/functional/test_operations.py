"""Every operation of Nova's on a protected server: what comes of it, and what is left.

What the driver sees of a pair's state is the arbiter's answer when it is to end the protection, and there are three:

    ended      the pair was pending, syncing, protected, degraded or in error, or had ended before
    failover   it is promoting, or degraded and Nova has not followed yet: it cannot be ended now
    silence    the manager does not answer

So each operation of the table meets each answer once, the first with a pair that is protected; and one operation meets
every state, which is the arbiter's part of the matter. `is_known` in operations.disarm() is the rest of it: the last
tests. What needs a live guest is tested in tests/system.
"""

import dataclasses
import enum
import pathlib
import time

import fixtures
from nova.tests import fixtures as nova_fixtures

from nova_ftvm.db.records import Pair
from nova_ftvm.types import Generation, InstanceId, PairId, PairState
from tests.functional import base

IMAGE = nova_fixtures.GlanceFixture.image1["id"]
OTHER_IMAGE = nova_fixtures.GlanceFixture.image2["id"]


class Answer(enum.Enum):
    ENDED = "the protection has ended"
    FAILOVER = "a failover is under way"
    SILENCE = "the manager does not answer"


@dataclasses.dataclass(frozen=True)
class Operation:
    """One row of the table."""

    name: str
    #: The body of Nova's server action; or the name of a method of OperationsTest.
    request: dict | str
    #: What the arbiter is told, after 'the server is'. Empty: protection goes on, and nobody is asked.
    reason: str
    #: The server's status when it is done; None: it is gone.
    status: str | None
    #: Nova's name of the action and of its event: where a user reads what came of it.
    action: str = ""
    event: str = ""
    refused: tuple[Answer, ...] = (Answer.FAILOVER, Answer.SILENCE)
    #: Does the event tell of a refusal? Nova makes images after the action has ended.
    tells: bool = True
    #: Can Nova's fake libvirt do it at all? If not, tests/system does.
    ends_here: bool = True
    #: Actions, and the status after each, that come before.
    first: tuple[tuple[dict, str], ...] = ()


STOPPED = (({"os-stop": None}, "SHUTOFF"),)
PAUSED = (({"pause": None}, "PAUSED"),)
SUSPENDED = (({"suspend": None}, "SUSPENDED"),)
#: What has such a status takes no properties.
UNWRITABLE = ("RESCUE", "VERIFY_RESIZE", "SHELVED_OFFLOADED")
SHELVED = (({"shelve": None}, "SHELVED_OFFLOADED"),)
RESCUED = (({"rescue": None}, "RESCUE"),)

TABLE = (
    Operation("stop", {"os-stop": None}, "stopped", "SHUTOFF", "stop", "compute_stop_instance",
              refused=(Answer.FAILOVER,)),
    Operation("start", {"os-start": None}, "started", "ACTIVE", "start", "compute_start_instance", first=STOPPED),
    Operation("soft_reboot", {"reboot": {"type": "SOFT"}}, "rebooted", "ACTIVE", "reboot", "compute_reboot_instance"),
    Operation("hard_reboot", {"reboot": {"type": "HARD"}}, "rebooted", "ACTIVE", "reboot", "compute_reboot_instance"),
    Operation("pause", {"pause": None}, "paused", "PAUSED", "pause", "compute_pause_instance"),
    Operation("unpause", {"unpause": None}, "", "ACTIVE", "unpause", "compute_unpause_instance", first=PAUSED),
    Operation("suspend", {"suspend": None}, "suspended", "SUSPENDED", "suspend", "compute_suspend_instance"),
    Operation("resume", {"resume": None}, "", "ACTIVE", "resume", "compute_resume_instance", first=SUSPENDED),
    Operation("shelve", {"shelve": None}, "shelved", "SHELVED_OFFLOADED", "shelve", "compute_shelve_instance",
              refused=(Answer.FAILOVER,)),
    Operation("unshelve", {"unshelve": None}, "unshelved", "ACTIVE", "unshelve", "compute_unshelve_instance",
              first=SHELVED),
    Operation("rescue", {"rescue": None}, "rescued", "RESCUE", "rescue", "compute_rescue_instance"),
    Operation("unrescue", {"unrescue": None}, "", "ACTIVE", "unrescue", "compute_unrescue_instance", first=RESCUED),
    Operation("rebuild", {"rebuild": {"imageRef": OTHER_IMAGE}}, "rebuilt", "ACTIVE", "rebuild",
              "compute_rebuild_instance"),
    Operation("resize", "resize", "resized or migrated", "VERIFY_RESIZE", "resize", "compute_resize_instance"),
    Operation("cold_migrate", {"migrate": None}, "resized or migrated", "VERIFY_RESIZE", "migrate",
              "compute_resize_instance"),
    Operation("image_create", {"createImage": {"name": "copy"}}, "copied to an image", "ACTIVE", "createImage",
              "compute_snapshot_instance", tells=False),
    Operation("backup_create", {"createBackup": {"name": "copy", "backup_type": "daily", "rotation": 1}},
              "copied to an image", "ACTIVE", "createBackup", "compute_backup_instance"),
    Operation("attach_interface", "attach_interface", "given an interface", "ACTIVE", "attach_interface",
              "compute_attach_interface"),
    Operation("detach_interface", "detach_interface", "rid of an interface", "ACTIVE", "detach_interface",
              "compute_detach_interface", ends_here=False),
    Operation("attach_volume", "attach_volume", "given a volume", "ACTIVE", "attach_volume", "compute_attach_volume"),
    Operation("delete", "delete", "deleted or recreated", None, refused=()),
    Operation("force_delete", {"forceDelete": None}, "deleted or recreated", None, refused=()),
    Operation("lock", {"lock": None}, "", "ACTIVE"),
    Operation("unlock", {"unlock": None}, "", "ACTIVE", first=(({"lock": None}, "ACTIVE"),)),
    Operation("crash_dump", {"trigger_crash_dump": None}, "", "ACTIVE", "trigger_crash_dump",
              "compute_trigger_crash_dump"),
    Operation("set_metadata", "set_metadata", "", "ACTIVE"),
    Operation("unset_metadata", "unset_metadata", "", "ACTIVE"),
    Operation("rename", "rename", "", "ACTIVE"),
)


class PairedServersTest(base.CloudTestCase):
    """Servers with a row in the manager's store."""

    def setUp(self):
        super().setUp()
        self.useFixture(fixtures.MonkeyPatch("nova.virt.libvirt.LibvirtDriver._live_snapshot", lambda *args: None))
        self.useFixture(fixtures.MonkeyPatch(
            "nova.virt.libvirt.LibvirtDriver.migrate_disk_and_power_off", self._move_disks))

    @staticmethod
    def _move_disks(driver, context, instance, dest, flavor, network_info, *args):
        """Nova's, without the disks, which are the lab's to test."""
        driver.power_off(instance)
        return "{}"

    def paired(self, state=PairState.PROTECTED, first=()):
        """A server that the manager has taken up, its pair in `state`."""
        server = self.boot(host="alpha", ft="true")
        self.api.api_post(f"/servers/{server['id']}/metadata", {"metadata": {"ft:state": state.value}})
        pathlib.Path(base.CONF.instances_path, server["id"]).mkdir()
        for request, status in first:
            self.api.post_server_action(server["id"], request)
            self._wait_for_server_parameter(server, {"status": status, "OS-EXT-STS:task_state": None})
        over = state is PairState.PROMOTING
        self.ftvm.manager.disarmed.clear()
        self.ftvm.manager.store.add(Pair(
            id=PairId(f"pair-{server['id']}"), instance_id=InstanceId(server["id"]), project_id="demo",
            primary_host="alpha", backup_host="beta", backup_id=None, state=state, generation=Generation(5),
            active_host="beta" if over else "alpha", active_since=Generation(5 if over else 1),
            step="bindings" if over else "", token="secret"))
        return server

    def row(self, server):
        pair = self.ftvm.manager.store.pair_of(server["id"])
        return pair.state, pair.generation

    def settled(self, server, status):
        return self._wait_for_server_parameter(server, {"status": status, "OS-EXT-STS:task_state": None})

    def outcome(self, server, action, event):
        """Result and details of the action's event, once it has ended."""
        deadline = time.monotonic() + 20
        while (found := self._event(server, action, event)) is None and time.monotonic() < deadline:
            time.sleep(0.1)
        self.assertIsNotNone(found, f"{event} of {action} has not ended")
        return found["result"], found.get("details")

    def _event(self, server, action, event):
        for found in self.admin_api.get_instance_actions(server["id"]):
            if found["action"] == action:
                details = self.admin_api.get_instance_action_details(server["id"], found["request_id"])
                for entry in details["events"]:
                    if entry["event"] == event and entry["result"]:
                        return entry
        return None

    def assert_nothing_left(self, server, status):
        """Guest and reservation are where the server is, and nowhere else."""
        moved = status == "VERIFY_RESIZE"
        host = None if status in (None, "SHELVED_OFFLOADED") else self.host_of(server)
        for each in self.HOSTS:
            here = self.domain_on(each, server["id"])
            self.assertEqual(host == each, here is not None and (not moved or here.isActive()), each)
            self.assertFalse(self.claims(each))
        reserved = self._get_allocations_by_server_uuid(server["id"])
        self.assertEqual([self._get_provider_uuid_by_host(host)] if host else [], list(reserved))


class OperationsTest(PairedServersTest):
    """The table; its tests are made below."""

    def check(self, operation):
        if operation.ends_here:
            self._ends_well(operation)
        if operation.reason:
            for answer in (Answer.FAILOVER, Answer.SILENCE):
                if answer in operation.refused:
                    self._is_refused(operation, answer)
                else:
                    self._goes_on(operation, answer)

    def _ends_well(self, operation):
        server = self.paired(first=operation.first)
        self.ask(operation, server)
        self._is_done(operation, server)
        orders = self.ftvm.manager.disarmed
        if operation.reason:
            self.assertEqual((server["id"], f"the server is {operation.reason}"), orders[0])
            self.assertEqual((PairState.DISABLED, 6), self.row(server))
            if operation.status in UNWRITABLE:
                self.assertEqual("unprotected", self.api.get_server(server["id"])["metadata"]["ft:state"])
        else:
            self.assertEqual([], orders)
            self.assertEqual((PairState.PROTECTED, 5), self.row(server))

    def _goes_on(self, operation, answer):
        server = self._answered(operation, answer)
        before = self.row(server)
        self.ask(operation, server)
        self._is_done(operation, server)
        self.assertEqual(before, self.row(server))
        self._end(answer)

    def _is_refused(self, operation, answer):
        server = self._answered(operation, answer)
        before = self.row(server)
        shown = self.admin_api.get_server(server["id"])
        guest = self.domain_on("alpha", server["id"])
        bindings, images = self._ports(server), self._images()
        self.ask(operation, server)
        if operation.tells:
            result, details = self.outcome(server, operation.action, operation.event)
            self.assertEqual("Error", result)
            self.assertIn(f"the server cannot be {operation.reason} before its protection has ended", details)
        after = self.settled(server, shown["status"])
        for key in ("OS-EXT-STS:power_state", "OS-EXT-SRV-ATTR:host", "addresses", "OS-EXT-STS:vm_state"):
            self.assertEqual(shown[key], after[key], key)
        self.assertIs(guest, self.domain_on("alpha", server["id"]))
        if operation.name != "unshelve":
            # Nova binds before it spawns, and leaves that to the next try.
            self.assertEqual(bindings, self._ports(server))
        if operation.name != "shelve":
            # Its image is made before, and Nova leaves it empty.
            self._wait_for_assert(lambda: self.assertEqual(images, self._images()))
        self.assertEqual(before, self.row(server))
        self._wait_for_assert(lambda: self.assert_nothing_left(server, shown["status"]))
        self._end(answer)

    def _images(self):
        return sorted(image["name"] for image in self.glance.images.values())

    def _answered(self, operation, answer):
        server = self.paired(PairState.PROMOTING if answer is Answer.FAILOVER else PairState.PROTECTED,
                             operation.first)
        if answer is Answer.SILENCE:
            self.ftvm.stop("manager")
        return server

    def _end(self, answer):
        if answer is Answer.SILENCE:
            self.ftvm.start_manager()

    def _is_done(self, operation, server):
        if operation.status is None:
            self.wait_until_gone(server)
        else:
            if operation.event:
                self.assertEqual("Success", self.outcome(server, operation.action, operation.event)[0])
            self.settled(server, operation.status)
        self.assert_nothing_left(server, operation.status)

    def ask(self, operation, server):
        if isinstance(operation.request, dict):
            self.api.post_server_action(server["id"], operation.request)
        else:
            getattr(self, operation.request)(server)

    # What is no server action

    def resize(self, server):
        larger = self._create_flavor(memory_mb=4096, disk=20)
        self.api.post_server_action(server["id"], {"resize": {"flavorRef": larger}})

    def delete(self, server):
        self.api.delete_server(server["id"])

    def attach_interface(self, server):
        try:
            self.api.attach_interface(server["id"], {"interfaceAttachment": {"net_id": self.neutron.network_1["id"]}})
        except base.ApiError as refused:
            self.assertIn("the server cannot be given an interface before its protection has ended", str(refused))

    def detach_interface(self, server):
        self.api.detach_interface(server["id"], self._ports(server)[0]["id"])

    def attach_volume(self, server):
        # The first one stays attached.
        volume = (self.cinder.SWAP_OLD_VOL if self.cinder.volume_to_attachment[self.cinder.IMAGE_BACKED_VOL]
                  else self.cinder.IMAGE_BACKED_VOL)
        self.api.post_server_volume(server["id"], {"volumeAttachment": {"volumeId": volume}})

    def set_metadata(self, server):
        self.api.api_post(f"/servers/{server['id']}/metadata", {"metadata": {"colour": "blue", "ft:state": "mine"}})

    def unset_metadata(self, server):
        self.api.api_delete(f"/servers/{server['id']}/metadata/ft:state")

    def rename(self, server):
        self.api.put_server(server["id"], {"server": {"name": "another"}})


    def test_what_asks_nobody(self):
        for operation in TABLE:
            if not operation.reason:
                self.check(operation)
                self.ftvm.manager.disarmed.clear()


def _test_of(operation):
    return lambda self: self.check(operation)


for _row in TABLE:
    if _row.reason:
        setattr(OperationsTest, f"test_{_row.name}", _test_of(_row))


class StatesTest(PairedServersTest):
    """One operation in every state: what the arbiter makes of it is the same for all that ask for an end."""

    def test_a_reboot_ends_protection_in_every_state_that_has_any(self):
        for state in PairState:
            if state is PairState.PROMOTING:
                continue
            server = self.paired(state)
            self.api.post_server_action(server["id"], {"reboot": {"type": "HARD"}})
            self.assertEqual("Success", self.outcome(server, "reboot", "compute_reboot_instance")[0], state)
            self.assertEqual((PairState.DISABLED, 5 if state is PairState.DISABLED else 6), self.row(server), state)
            self.settled(server, "ACTIVE")
            self.assert_nothing_left(server, "ACTIVE")

    def test_a_server_that_lost_its_properties_is_known_by_its_domain(self):
        server = self.paired()
        for key in ("ft", "ft:state"):
            self.api.api_delete(f"/servers/{server['id']}/metadata/{key}")
        self.api.post_server_action(server["id"], {"reboot": {"type": "HARD"}})
        self.outcome(server, "reboot", "compute_reboot_instance")
        self.assertEqual((server["id"], "the server is rebooted"), self.ftvm.manager.disarmed[0])
        self.assertEqual((PairState.DISABLED, 6), self.row(server))

    def test_a_server_that_was_never_armed_needs_nobody(self):
        server = self.boot()
        self.ftvm.stop("manager")
        self.api.post_server_action(server["id"], {"reboot": {"type": "HARD"}})
        self.assertEqual("Success", self.outcome(server, "reboot", "compute_reboot_instance")[0])
        self.settled(server, "ACTIVE")

    def test_the_pause_of_a_checkpoint_makes_no_error_of_a_refused_reboot(self):
        server = self.paired(PairState.PROMOTING)
        self.domain_on("alpha", server["id"]).suspend()
        self.api.post_server_action(server["id"], {"reboot": {"type": "HARD"}})
        self.assertEqual("Error", self.outcome(server, "reboot", "compute_reboot_instance")[0])
        self.assertEqual(1, self.settled(server, "ACTIVE")["OS-EXT-STS:power_state"])

    def test_a_refused_live_migration_leaves_the_server_where_it_is(self):
        for state in (PairState.PROMOTING, PairState.PROTECTED):
            server = self.paired(state)
            if state is PairState.PROTECTED:
                self.ftvm.stop("manager")
            self.api.post_server_action(server["id"], {"os-migrateLive": {"host": None, "block_migration": "auto"}})
            self._wait_for_migration_status(server, ["error"])
            self.settled(server, "ACTIVE")
            self.assertEqual("alpha", self.host_of(server))
            self.assert_nothing_left(server, "ACTIVE")


class ResizedServerTest(PairedServersTest):
    """What follows a resize: the pair was ended on the way in, and nothing brings it back before the end."""

    def test_confirm_and_revert_ask_for_no_word_and_leave_one_reservation(self):
        for request, host, status in (({"confirmResize": None}, "beta", "confirmed"),
                                      ({"revertResize": None}, "alpha", "reverted")):
            server = self.paired()
            self.api.post_server_action(server["id"], {"migrate": None})
            self.settled(server, "VERIFY_RESIZE")
            self.api.post_server_action(server["id"], request)
            self._wait_for_migration_status(server, [status])
            self.settled(server, "ACTIVE")
            self.assertEqual(host, self.host_of(server))
            self._wait_for_assert(lambda server=server, host=host: self.assertEqual(
                [self._get_provider_uuid_by_host(host)], list(self._get_allocations_by_server_uuid(server["id"]))))
            self.assertEqual((PairState.DISABLED, 6), self.row(server))


class BackupServersTest(base.CloudTestCase):
    """An administrator works on the server that holds a backup's place."""

    def test_every_operation_but_deletion_is_refused_and_leaves_the_standby(self):
        server = self.boot(ft="true")
        backup = self.back_up(server)
        host = self.host_of(backup)
        standby = self.domain_on(host, server["id"])
        reserved = self._get_allocations_by_server_uuid(backup["id"])
        for request in ({"os-stop": None}, {"reboot": {"type": "SOFT"}}, {"reboot": {"type": "HARD"}}, {"pause": None},
                        {"suspend": None}, {"shelve": None}, {"rescue": None}, {"createImage": {"name": "copy"}},
                        {"rebuild": {"imageRef": IMAGE}}, {"migrate": None},
                        {"os-migrateLive": {"host": None, "block_migration": "auto"}}):
            self.service_api.post_server_action(backup["id"], request)
            self._wait_for_server_parameter(backup, {"OS-EXT-STS:task_state": None, "status": "ACTIVE"})
            self.assertEqual(host, self.host_of(backup), request)
            self.assertIs(standby, self.domain_on(host, server["id"]), request)
            self.assertTrue(standby.isActive(), request)
            self._wait_for_assert(lambda request=request: self.assertEqual(
                list(reserved), list(self._get_allocations_by_server_uuid(backup["id"])), request))
        self.assertEqual([], self.ftvm.manager.disarmed)
        self.assertEqual("ACTIVE", self.api.get_server(server["id"])["status"])
