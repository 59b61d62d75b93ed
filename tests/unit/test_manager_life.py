"""A server's way to protection and back, told through the manager's methods."""

import itertools

import pytest

from nova_ftvm.failover import shown
from nova_ftvm.failover.cloud import CloudRefused
from nova_ftvm.failover.pairing import NotPlanned
from nova_ftvm.types import PairState
from tests.unit.failover_world import PORT, VM, World


@pytest.fixture
def world(tmp_path):
    return World(f"sqlite:///{tmp_path}/m.sqlite")


def test_a_wanted_server_becomes_protected(world):
    world.protect()
    assert world.pair.state is PairState.PROTECTED
    assert world.shown == ("protected", shown.PROTECTED)
    assert world.pair.backup_host == "hy" and world.pair.backup_id
    assert world.agents.named("start_backup") == [("start_backup", "hy", 1)]
    assert world.agents.named("start_primary") == [("start_primary", "hx", 1, "10.0.0.2", 4242)]


def test_the_state_is_shown_before_a_backup_can_exist(world):
    world.cloud.boot()
    world.pass_by()
    order = [call[0] for call in world.cloud.calls]
    assert order.index("set_metadata") < order.index("create_backup")
    assert world.shown[0] == "pending"


def test_the_backup_is_asked_for_on_every_capable_host_but_the_primarys(world):
    world.hosts.append("hz")
    world.cloud.boot()
    world.pass_by()
    assert world.cloud.named("create_backup") == [("create_backup", VM, ("hy", "hz"), 1)]


def test_metadata_is_not_written_again_when_nothing_changed(world):
    world.protect()
    writes = len(world.cloud.named("set_metadata"))
    for _ in range(5):
        world.pass_by(5)
    assert len(world.cloud.named("set_metadata")) == writes


def test_a_server_that_asks_for_nothing_is_left_alone(world):
    world.cloud.boot(metadata={})
    world.pass_by()
    assert world.pair is None
    assert world.cloud.calls == []


def test_the_flavor_can_ask_too(world):
    world.cloud.boot(metadata={}, extra_specs={"ftvm:enabled": "true"})
    world.pass_by()
    assert world.pair.state is PairState.PENDING


@pytest.mark.parametrize("changes, reason", [
    ({"volumes": 1}, "volumes"),
    ({"image_id": None}, "volumes"),
    ({"metadata": {"ft": "maybe"}}, "'maybe'"),
    ({"extra_specs": {"hw:mem_page_size": "large"}}, "huge pages"),
    ({"vm_state": "stopped"}, "stopped"),
])
def test_a_refused_server_says_why_and_has_no_pair(world, changes, reason):
    world.cloud.boot(**changes)
    world.pass_by()
    assert world.pair is None and not world.cloud.backups()
    assert world.shown[0] == "unprotected" and reason in world.shown[1]
    writes = len(world.cloud.calls)
    world.pass_by(5)
    assert len(world.cloud.calls) == writes


@pytest.mark.parametrize("vm_state", ["rescued", "resized", "shelved_offloaded", "error"])
def test_a_server_whose_metadata_nova_does_not_change_is_not_asked_to(world, vm_state):
    world.cloud.boot(vm_state=vm_state)
    world.pass_by(5)
    assert world.cloud.calls == []
    world.cloud.alter(VM, vm_state="stopped")
    world.pass_by()
    assert world.shown[0] == "unprotected" and "the server is stopped" in world.shown[1]


def test_a_refusal_becomes_protection_when_its_reason_is_gone(world):
    world.hosts.remove("hy")
    world.clock.time += 60
    world.cloud.boot()
    world.pass_by()
    assert world.shown[0] == "unprotected" and "start nova-ftvm-agent on another" in world.shown[1]
    world.hosts.append("hy")
    world.pass_by(5)
    assert world.pair.state is PairState.PENDING
    assert world.shown[0] == "pending"


def test_a_host_without_a_living_agent_protects_nothing(world):
    world.cloud.boot(host="other")
    world.pass_by()
    assert world.shown[0] == "unprotected" and "other does not report" in world.shown[1]


def test_an_incapable_host_shows_its_probes_reason(world):
    world.cloud.boot()
    world.report("hx", capable=False, reason="the kernel is older than 6.7")
    world.manager.reconciler.all()
    assert "the kernel is older than 6.7" in world.shown[1]


def test_an_unarmed_domain_asks_for_a_hard_reboot(world):
    world.agents.unarmed = "it has no monitor of ours"
    world.cloud.boot()
    world.pass_by()
    assert world.shown == ("unprotected", "it has no monitor of ours")
    world.agents.unarmed = ""
    world.pass_by(5)
    assert world.pair.state is PairState.PENDING


def test_an_ordinary_server_gets_no_plan(world):
    world.cloud.boot()
    assert world.manager.standby_plan(VM, "hy") is None


def test_a_users_server_with_our_metadata_gets_no_plan(world):
    world.cloud.boot()
    world.pass_by()
    world.cloud.boot("forged", metadata={"ftvm:primary": VM, "ftvm:generation": "1"})
    assert world.manager.standby_plan("forged", "hy") is None


def test_a_backup_of_an_older_generation_is_not_booted(world):
    world.cloud.boot()
    world.pass_by()
    old = world.cloud.backups()[0].id
    world.manager.disarm(VM, "stop")
    with pytest.raises(NotPlanned):
        world.manager.standby_plan(old, "hy")


def test_the_plan_works_before_the_backups_id_is_written_down(world):
    world.cloud.boot()
    world.pass_by()
    pair = world.pair
    world.store.change(pair, backup_id=None)
    plan = world.manager.standby_plan(pair.backup_id, "hy")
    assert plan["instance_id"] == VM and plan["primary_host"] == "hx"
    assert plan["bindings"] == [{"port_id": PORT, "vif_type": "tap", "vif_details": {"port_filter": False},
                                 "vnic_type": "normal", "profile": {}}]
    assert world.pair.backup_id == pair.backup_id


def test_no_valid_host_gives_up_with_the_reason_and_tries_again_later(world):
    world.cloud.boot()
    world.pass_by()
    world.cloud.alter(world.cloud.backups()[0].id, vm_state="error", task_state=None, fault="No valid host was found")
    world.pass_by()
    world.pass_by(0.5)
    assert world.pair.state is PairState.DISABLED
    assert "No valid host was found" in world.shown[1]
    assert not world.cloud.backups()
    world.pass_by(10)
    assert world.pair.state is PairState.PENDING and world.pair.generation == 3


def test_a_standby_that_cannot_be_made_is_given_up_with_the_drivers_words(world):
    world.cloud.boot()
    world.pass_by()
    plan = world.manager.standby_plan(world.cloud.backups()[0].id, "hy")
    world.manager.standby_ready(plan["pair_id"], plan["generation"], "hy", "no room for its disk")
    world.work()
    assert world.pair.state is PairState.DISABLED
    assert "no room for its disk" in world.shown[1]


def test_engines_that_do_not_start_give_the_pair_up(world):
    world.cloud.boot()
    world.pass_by()
    world.agents.broken.add("start_primary")
    world.spawn_backup()
    assert world.pair.state is PairState.DISABLED
    assert "start_primary broke" in world.shown[1]
    assert not world.cloud.backups()


def test_the_back_off_grows_with_each_failure(world):
    world.cloud.boot()
    waits = []
    for _ in range(6):
        while world.pair is None or world.pair.state is not PairState.PENDING:
            world.pass_by(1)
        world.manager.report_protection(world.pair.id, world.pair.generation, "hx", "failed", "it broke")
        world.work()
        waits.append(round(world.pair.retry_at - world.pair.moved_at))
    assert waits == [2, 4, 8, 16, 32, 60]


def test_a_backup_that_never_gets_ready_is_given_up(world):
    world.cloud.boot()
    world.pass_by()
    world.pass_by(121)
    assert "not ready after 120 s" in world.pair.reason


def test_progress_is_shown_in_whole_percent_while_it_moves(world):
    world.start_copy()
    for said, shows in (("syncing 0.00 %", "0"), ("syncing 42.37 %", "42"), ("syncing 99.99 %", "99")):
        world.engine_state = said
        world.pass_by(5)
        assert world.shown == ("syncing", shown.SYNCING) and world.progress_shown == shows
    writes = len(world.cloud.calls)
    world.engine_state = "syncing 99.995 %"
    world.pass_by(5)
    assert len(world.cloud.calls) == writes


def test_progress_is_shown_as_soon_as_the_copy_begins(world):
    world.start_copy()
    assert world.shown[0] == "syncing" and world.progress_shown == "0"


def test_progress_goes_before_protected_is_shown(world):
    world.start_copy()
    pair = world.pair
    world.manager.report_protection(pair.id, pair.generation, "hx", "protected", "")
    world.work()
    assert world.shown == ("protected", shown.PROTECTED) and world.progress_shown is None
    changes = [call[0] for call in world.cloud.calls if call[0] in ("set_metadata", "delete_metadata")]
    assert changes[-2:] == ["delete_metadata", "set_metadata"]


@pytest.mark.parametrize("how", ["disarmed", "failed", "lost", "refused"])
def test_progress_goes_however_the_copy_ends(world, how):
    world.start_copy()
    pair = world.pair
    match how:
        case "disarmed":
            world.manager.disarm(VM, "stop")
        case "failed":
            world.manager.report_protection(pair.id, pair.generation, "hx", "failed", "its disk is full")
        case "lost":
            world.manager.request_degrade(pair.id, pair.generation, "hx", "the link is cut")
        case "refused":
            world.cloud.alter(VM, metadata={**world.cloud.store[VM].metadata, "ft": "false"})
    world.pass_by()
    assert world.shown[0] in ("unprotected", "degraded") and world.progress_shown is None


def test_a_large_disk_that_moves_by_less_than_a_percent_is_not_given_up(world):
    world.start_copy()
    for hundredths in range(1, 60):
        world.engine_state = f"syncing 3.{hundredths:02} %"
        world.pass_by(100)
        assert world.pair.state is PairState.SYNCING
    assert world.progress_shown == "3"
    for _ in range(2):
        world.pass_by(100)
    assert world.pair.state is PairState.DISABLED and "has not moved for 120 s" in world.pair.reason


def test_a_copy_that_falls_behind_a_busy_guest_is_not_given_up(world):
    world.start_copy()
    for percent in (50, 40, 30, 20):
        world.engine_state = f"syncing {percent} %"
        world.pass_by(100)
        assert world.pair.state is PairState.SYNCING and world.progress_shown == str(percent)


def test_a_volume_ends_protection_with_what_to_do_until_it_is_detached(world):
    world.protect()
    world.manager.disarm(VM, "the server is given a volume")
    world.cloud.alter(VM, volumes=1)
    world.work()
    world.pass_by(5)
    assert world.pair.state is PairState.DISABLED and world.shown[0] == "unprotected"
    assert "volumes are not replicated" in world.shown[1] and "remove volume" in world.shown[1]
    assert not world.cloud.backups()
    world.pass_by(60)
    assert not world.cloud.backups()
    world.cloud.alter(VM, volumes=0)
    world.pass_by(5)
    assert world.pair.state is PairState.PENDING


@pytest.mark.parametrize("state", [PairState.PENDING, PairState.SYNCING, PairState.PROTECTED])
def test_a_volume_that_came_while_the_pair_was_made_ends_it(world, state):
    world.protect() if state is PairState.PROTECTED else world.start_copy()
    if state is PairState.PENDING:
        world.manager.disarm(VM, "stop")
        world.work()
        world.pass_by(5)
    assert world.pair.state is state
    world.cloud.alter(VM, volumes=1)
    world.pass_by()
    assert world.pair.state is PairState.DISABLED and "volumes are not replicated" in world.shown[1]


def test_an_armed_server_with_a_disk_that_is_no_file_is_refused(world):
    world.agents.domain_xml = ("<domain><devices><disk type='network' device='disk'><target dev='vdb' bus='virtio'/>"
                               "</disk></devices></domain>")
    world.cloud.boot()
    world.pass_by()
    assert world.pair is None and not world.cloud.backups()
    assert world.shown[0] == "unprotected" and "disk vdb is no file" in world.shown[1]


def test_a_domain_that_cannot_be_read_stops_no_other_servers_pass(world):
    world.agents.domain_xml = "<domain"
    world.cloud.boot()
    world.cloud.boot("other", metadata={"ft": "maybe"})
    world.pass_by()
    assert "cannot be read" in world.shown[1]
    assert "'maybe'" in world.cloud.store["other"].metadata["ft:reason"]


def test_the_plan_has_the_sizes_of_the_primarys_disks(world):
    world.cloud.boot()
    world.pass_by()
    assert world.manager.standby_plan(world.pair.backup_id, "hy")["disks"] == {"vda": 1 << 30}


def test_a_backups_host_that_always_refuses_is_asked_ever_more_seldom(world):
    world.cloud.boot()
    asked = []
    while world.clock.now() < 1000 + 3600:
        world.pass_by(5)
        if world.pair.state is PairState.PENDING:
            asked.append(world.clock.now())
            plan = world.manager.standby_plan(world.pair.backup_id, "hy")
            world.manager.standby_ready(plan["pair_id"], plan["generation"], "hy", "instances_path is shared")
            world.work()
            assert world.shown == ("unprotected", "protection failed on hy: instances_path is shared")
    assert len(asked) < 65 and min(later - earlier for earlier, later in itertools.pairwise(asked[6:])) >= 60
    assert not world.cloud.backups()


def test_switching_off_disarms_and_on_again_makes_a_new_pair(world):
    world.protect()
    world.cloud.alter(VM, metadata={**world.cloud.store[VM].metadata, "ft": "false"})
    world.pass_by()
    assert world.pair.state is PairState.DISABLED and not world.cloud.backups()
    assert world.shown[0] == "unprotected" and "switched off" in world.shown[1]
    assert set(world.cloud.bound[PORT]) == {"hx"}
    world.cloud.alter(VM, metadata={**world.cloud.store[VM].metadata, "ft": "true"})
    world.pass_by(5)
    assert world.pair.state is PairState.PENDING and world.pair.generation == 3


def test_a_degraded_server_shows_why_and_its_backup_goes(world):
    world.protect()
    pair = world.pair
    grant = world.manager.request_degrade(pair.id, pair.generation, "hx", "no acknowledgement for 500 ms")
    world.work()
    assert grant["granted"] and grant["generation"] == 2
    assert world.shown == ("degraded", "no backup: no acknowledgement for 500 ms")
    assert not world.cloud.backups() and set(world.cloud.bound[PORT]) == {"hx"}
    assert ("stop_engine", "hy", 2) in world.agents.calls
    assert ("stop_engine", "hx", 2) not in world.agents.calls


def test_ft_off_and_on_repairs_a_degraded_server(world):
    world.protect()
    pair = world.pair
    world.manager.request_degrade(pair.id, pair.generation, "hx", "lost")
    world.work()
    world.cloud.alter(VM, metadata={"ft": "false"})
    world.pass_by(5)
    world.cloud.alter(VM, metadata={"ft": "true"})
    world.pass_by(5)
    world.spawn_backup()
    pair = world.pair
    world.manager.report_protection(pair.id, pair.generation, "hx", "protected", "")
    assert world.pair.state is PairState.PROTECTED


def test_disarm_answers_after_the_primarys_engine_has_stopped(world):
    world.protect()
    assert world.manager.disarm(VM, "reboot") == {"disarmed": True}
    assert world.pair.state is PairState.DISABLED
    assert world.agents.calls[-1] == ("stop_engine", "hx", 2)
    assert world.cloud.backups()


@pytest.mark.parametrize("how", ["detached", "deleted"])
def test_a_port_that_outlives_its_server_keeps_no_binding_on_the_backups_host(world, how):
    world.protect()
    assert set(world.cloud.bound[PORT]) == {"hx", "hy"}
    world.manager.disarm(VM, f"an interface is {how}")
    world.cloud.port_list = []
    if how == "deleted":
        del world.cloud.store[VM]
    world.work()
    assert set(world.cloud.bound[PORT]) == {"hx"}


def test_disarm_does_not_wait_for_a_silent_agent(world):
    world.protect()
    world.agents.silent.add("hx")
    assert world.manager.disarm(VM, "stop") == {"disarmed": True}
    assert world.pair.state is PairState.DISABLED


def test_disarm_of_a_server_without_a_pair_is_fine(world):
    assert world.manager.disarm(VM, "stop") == {"disarmed": True}


def test_disarm_is_refused_while_the_backup_is_promoted(world):
    world.protect()
    pair = world.pair
    world.manager.request_promotion(pair.id, pair.generation, "hy", "silence")
    assert world.manager.disarm(VM, "stop")["disarmed"] is False
    assert world.pair.state is PairState.PROMOTING


def test_a_rebooted_server_is_protected_again_after_a_while(world):
    world.protect()
    world.manager.disarm(VM, "reboot")
    world.work()
    world.pass_by(1)
    assert world.pair.state is PairState.DISABLED
    world.pass_by(3)
    assert world.pair.state is PairState.PENDING


def test_a_deleted_servers_pair_goes_with_everything_of_it(world):
    world.protect()
    del world.cloud.store[VM]
    for _ in range(3):
        world.pass_by(1)
    assert world.pair is None and not world.cloud.backups()


def test_a_server_that_a_list_misses_is_not_taken_for_deleted(world):
    world.protect()
    world.cloud.servers = list
    world.pass_by()
    assert world.pair.state is PairState.PROTECTED


def test_an_orphaned_backup_is_swept(world):
    world.protect()
    world.store.forget(world.pair)
    world.cloud.alter(VM, metadata={})
    world.pass_by()
    world.pass_by(1)
    assert not world.cloud.backups()


def test_a_users_server_that_looks_like_a_backup_is_not_swept(world):
    world.cloud.boot("forged", name=f"ftvm-backup-{VM}", metadata={"ftvm:primary": VM})
    world.pass_by()
    world.pass_by(1)
    assert "forged" in world.cloud.store


def test_a_stopped_server_does_not_disarm_a_pair_whose_backup_may_ask(world):
    world.protect()
    world.cloud.alter(VM, vm_state="stopped")
    world.pass_by(1)
    assert world.pair.state is PairState.PROTECTED
    world.pass_by(11)
    assert world.pair.state is PairState.DISABLED


def test_a_pair_without_engines_is_made_anew(world):
    world.protect()
    world.engines_of = lambda host: []
    world.pass_by(5)
    assert world.pair.state is PairState.PROTECTED
    world.pass_by(6)
    assert world.pair.state is PairState.DISABLED and "no engine is left" in world.pair.reason


def test_a_deleted_backup_server_gives_the_pair_up(world):
    world.protect()
    del world.cloud.store[world.pair.backup_id]
    world.pass_by()
    assert world.pair.state is PairState.DISABLED and "deleted" in world.pair.reason


def test_a_cloud_that_is_away_leaves_everything_as_it_is(world):
    world.cloud.boot()
    world.cloud.broken["create_backup"] = 2
    world.pass_by()
    assert world.pair.state is PairState.PENDING and not world.cloud.backups()
    world.clock.time += 2
    world.work()
    world.clock.time += 4
    world.work()
    assert len(world.cloud.backups()) == 1


def test_a_refused_backup_server_says_what_nova_said(world):
    world.cloud.boot()
    world.cloud.refuse["create_backup"] = [CloudRefused("create", 403, "Quota exceeded for instances")]
    world.pass_by()
    assert world.pair.state is PairState.DISABLED
    assert "image and flavor" in world.shown[1] and "Quota exceeded" in world.shown[1]


def test_a_notification_makes_one_server_looked_at(world):
    world.cloud.boot()
    world.manager.reconciler.some([VM])
    assert world.pair.state is PairState.PENDING


def test_a_notification_of_the_backup_wakes_its_pair(world):
    world.cloud.boot()
    world.pass_by()
    backup = world.cloud.backups()[0].id
    world.cloud.alter(backup, vm_state="error", task_state=None, fault="No valid host")
    world.manager.reconciler.some([backup])
    assert world.pair.state is PairState.DISABLED


def test_a_long_reason_is_cut_to_what_nova_takes(world):
    world.cloud.boot()
    world.report("hx", capable=False, reason="x" * 500)
    world.manager.reconciler.all()
    assert len(world.shown[1]) == 255


def test_a_manager_killed_anywhere_while_pairing_leaves_one_backup(tmp_path):
    kill_at, survived = 1, False
    while not survived:
        world = World(f"sqlite:///{tmp_path}/{kill_at}.sqlite")
        world.cloud.boot()
        start = world.fuse.count
        world.fuse.kill_at = start + kill_at
        try:
            world.pass_by()
            world.spawn_backup()
            survived = True
        except BaseException as error:
            if type(error).__name__ != "Killed":
                raise
        world.new_manager("m2")
        for _ in range(60):
            if world.pair is not None and world.pair.state is PairState.SYNCING and not world.pair.step:
                break
            world.pass_by(5)
            if world.pair and world.pair.state is PairState.PENDING and any(
                    backup.vm_state == "building" for backup in world.cloud.backups()):
                world.spawn_backup()
        assert world.pair.state is PairState.SYNCING, kill_at
        live = [backup for backup in world.cloud.backups() if backup.task_state != "deleting"]
        assert [backup.id for backup in live] == [world.pair.backup_id], kill_at
        kill_at += 1
    assert kill_at > 10
