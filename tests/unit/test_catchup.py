"""Nova follows a promotion, whatever fails and whenever the manager dies."""

import pytest

from nova_ftvm.failover.arbiter import CATCH_UP
from nova_ftvm.failover.cloud import CloudRefused
from nova_ftvm.types import PairState
from tests.unit.failover_world import PORT, VM, Killed, World


@pytest.fixture
def world(tmp_path):
    world = World(f"sqlite:///{tmp_path}/c.sqlite", repair=False)
    world.protect()
    return world


def assert_followed(world, backup_id):
    server = world.cloud.store[VM]
    assert (server.host, server.vm_state, server.task_state) == ("hy", "active", None)
    assert set(world.cloud.bound[PORT]) == {"hy"} and world.cloud.bound[PORT]["hy"].active
    assert all(backup.task_state == "deleting" for backup in world.cloud.backups())
    assert backup_id not in world.cloud.allocations
    pair = world.pair
    assert (pair.state, pair.step, pair.primary_host, pair.active_host) == (PairState.DEGRADED, "", "hy", "hy")
    assert pair.backup_id is None and pair.backup_host is None
    assert {"detected_at", "granted_at", "running_at", "nova_done_at"} <= set(pair.timeline)
    assert world.shown == ("degraded", "failed over from hx to hy; no backup yet")


def test_nova_follows(world):
    backup_id = world.pair.backup_id
    started = world.clock.now()
    assert world.promote()["granted"]
    assert_followed(world, backup_id)
    assert world.clock.now() - started < 1.0


def test_the_steps_come_in_the_order_that_nova_needs(world):
    before = len(world.cloud.calls)
    backup_id = world.pair.backup_id
    world.promote()
    names = [call[:2] for call in world.cloud.calls[before:]]
    order = [names.index(call) for call in [
        ("activate", PORT), ("set_metadata", backup_id), ("delete_allocation", backup_id), ("force_down", "hx"),
        ("evacuate", VM), ("unbind", PORT), ("delete_server", backup_id)]]
    assert order == sorted(order)


def test_the_bindings_are_active_before_the_guest_reports(world):
    pair = world.pair
    world.manager.request_promotion(pair.id, pair.generation, "hy", "silence")
    world.work()
    assert world.cloud.bound[PORT]["hy"].active
    assert world.pair.state is PairState.PROMOTING


def test_a_promotion_is_answered_without_a_call_to_anyone(world):
    pair = world.pair
    calls = len(world.cloud.calls), len(world.agents.calls)
    world.manager.request_promotion(pair.id, pair.generation, "hy", "silence")
    assert (len(world.cloud.calls), len(world.agents.calls)) == calls


def test_a_dead_host_stays_forced_down_until_its_agent_reports(world):
    world.promote()
    assert world.cloud.forced_down["hx"]
    world.pass_by(5)
    assert world.cloud.forced_down["hx"], "no sign of life"
    world.agents.silent.clear()
    world.pass_by(5)
    assert world.cloud.forced_down["hx"], "its nova-compute has not cleaned up yet"
    assert world.store.hosts()["hx"].forced_down_by_us
    world.cloud.done_evacuations.clear()
    world.pass_by(5)
    assert not world.cloud.forced_down["hx"]
    assert not world.store.hosts()["hx"].forced_down_by_us


def test_a_last_report_from_before_the_death_does_not_lift_the_host(world):
    world.promote()
    world.cloud.done_evacuations.clear()
    world.manager.reconciler.all()
    assert world.cloud.forced_down["hx"]


def test_a_host_that_an_operator_forced_down_is_left_alone(world):
    world.cloud.forced_down["hx"] = True
    world.pass_by(5)
    assert world.cloud.forced_down["hx"]


def test_a_living_source_is_forced_down_only_around_the_request(world):
    pair = world.pair
    backup_id = pair.backup_id
    world.manager.request_promotion(pair.id, pair.generation, "hy", "QEMU died")
    world.manager.report_promoted(pair.id, pair.generation, "hy",
                                  {"detected_at": 1.0, "granted_at": 1.1, "running_at": 1.2}, "")
    world.work()
    assert_followed(world, backup_id)
    calls = [call for call in world.cloud.calls if call[0] in ("force_down", "evacuate")]
    assert calls == [("force_down", "hx", True), ("evacuate", VM, "hy"), ("force_down", "hx", False)]
    assert ("fence", "hx", 2) in world.agents.calls
    assert not world.store.hosts()["hx"].forced_down_by_us


def test_a_living_source_is_lifted_even_when_nova_refuses(world):
    world.cloud.refuse["evacuate"] = [CloudRefused("evacuate", 409, "no")]
    pair = world.pair
    world.manager.request_promotion(pair.id, pair.generation, "hy", "QEMU died")
    world.manager.report_promoted(pair.id, pair.generation, "hy", {}, "")
    world.work()
    assert world.cloud.forced_down["hx"] is False
    assert world.pair.step == "evacuate"


@pytest.mark.parametrize("changes", [
    {"vm_state": "stopped"}, {"vm_state": "paused"}, {"vm_state": "error"}, {"task_state": "powering-off"}])
def test_a_server_in_another_state_is_reset_first(world, changes):
    backup_id = world.pair.backup_id
    world.cloud.alter(VM, **changes)
    world.promote()
    assert_followed(world, backup_id)
    assert world.cloud.named("reset_state")


def test_a_failed_evacuation_is_reset_and_asked_for_again(world):
    backup_id = world.pair.backup_id
    world.cloud.fail_evacuations = 2
    world.promote()
    for _ in range(10):
        world.pass_by(5)
    assert_followed(world, backup_id)
    assert len(world.cloud.named("evacuate")) == 3


def test_an_evacuation_that_hangs_is_reset_and_asked_for_again(world):
    backup_id = world.pair.backup_id
    world.cloud._evacuated = lambda *_: None
    world.promote()
    assert world.pair.step == "evacuate" and world.pair.attempts == 1
    del world.cloud._evacuated
    for _ in range(3):
        world.pass_by(5)
    assert_followed(world, backup_id)


def test_an_error_after_the_move_is_reset_in_place(world):
    backup_id = world.pair.backup_id

    def broken(server_id, host):
        world.cloud.alter(server_id, host=host, vm_state="error", task_state=None)

    world.cloud._evacuated = broken
    world.promote()
    assert_followed(world, backup_id)
    assert len(world.cloud.named("evacuate")) == 1


def test_the_owner_is_told_when_nova_does_not_follow(world):
    world.cloud.refuse["evacuate"] = [CloudRefused("evacuate", 409, "No room")] * 3
    world.promote()
    for _ in range(2):
        world.pass_by(10)
    assert "Nova does not follow" in world.shown[1] and "No room" in world.shown[1]
    for _ in range(3):
        world.pass_by(60)
    assert world.shown == ("degraded", "failed over from hx to hy; no backup yet")


@pytest.mark.parametrize("call", ["ports", "bindings", "activate", "set_metadata", "delete_allocation", "force_down",
                                  "evacuate", "server", "unbind", "delete_server", "servers"])
def test_an_api_that_is_away_for_a_moment_delays_only(world, call):
    backup_id = world.pair.backup_id
    world.cloud.broken[call] = 2
    world.promote()
    for _ in range(6):
        try:
            world.pass_by(10)
        except Exception as error:
            assert call == "servers", error
    assert_followed(world, backup_id)


def test_an_accepted_request_whose_answer_is_lost_is_not_repeated(world):
    backup_id = world.pair.backup_id
    evacuate = world.cloud.evacuate

    def lost(server_id, host):
        evacuate(server_id, host)
        world.cloud.evacuate = evacuate
        world.cloud.broken["evacuate"] = 1
        evacuate(server_id, host)

    world.cloud.evacuate = lost
    world.promote()
    for _ in range(2):
        world.pass_by(2)
    assert_followed(world, backup_id)
    assert len(world.cloud.named("evacuate")) == 1


def test_every_kill_point_is_survived_by_another_manager(tmp_path):
    """The manager is killed before and after each effect, in turn; another one then goes on from the row."""
    kill_at, killed = 1, True
    seen = set()
    while killed:
        world = World(f"sqlite:///{tmp_path}/{kill_at}.sqlite", repair=False)
        world.protect()
        backup_id = world.pair.backup_id
        pair = world.pair
        world.agents.silent.add("hx")
        world.manager.request_promotion(pair.id, pair.generation, "hy", "silence")
        world.manager.report_promoted(pair.id, pair.generation, "hy", {
            "detected_at": 1.0, "granted_at": 1.1, "running_at": 1.2}, "")
        world.fuse.kill_at = world.fuse.count + kill_at
        try:
            world.work()
            killed = False
        except Killed:
            world.new_manager("m2")
            seen.add(world.pair.step)
            world.pass_by(1)
            for _ in range(4):
                world.pass_by(160)  # the dead manager's claim runs out
        assert_followed(world, backup_id)
        assert len(world.cloud.named("evacuate")) <= 1, kill_at
        kill_at += 1
    assert kill_at > 25
    assert seen == {*CATCH_UP, ""}


def test_every_kill_point_of_a_start_anew_is_survived_by_another_manager(tmp_path):
    kill_at, killed = 1, True
    while killed:
        world = World(f"sqlite:///{tmp_path}/{kill_at}.sqlite", repair=False)
        world.protect()
        pair = world.pair
        world.agents.silent.add("hx")
        world.manager.request_promotion(pair.id, pair.generation, "hy", "silence")
        world.fuse.kill_at = world.fuse.count + kill_at
        try:
            world.manager.report_promoted(pair.id, pair.generation, "hy", {}, "the stream was refused")
            world.work()
            killed = False
        except Killed:
            world.new_manager("m2")
            world.manager.report_promoted(pair.id, pair.generation, "hy", {}, "the stream was refused")
            for _ in range(5):
                world.pass_by(160)
        assert world.cloud.store[VM].host == "hy" and world.cloud.store[VM].vm_state == "active", kill_at
        assert (world.pair.state, world.pair.step, world.pair.primary_host) == (PairState.DEGRADED, "", "hy"), kill_at
        assert len(world.cloud.named("evacuate")) == 1 and ("discard_standby", "hy") in world.agents.calls, kill_at
        kill_at += 1
    assert kill_at > 25


def test_a_reservation_that_cannot_be_freed_holds_nothing_up(world):
    backup_id = world.pair.backup_id
    world.cloud.refuse["release_allocation"] = [CloudRefused("placement", 403, "not for you")]
    world.promote()
    assert_followed(world, backup_id)


def test_a_manager_restarted_under_the_same_name_goes_on_at_once(world):
    backup_id = world.pair.backup_id
    world.fuse.kill_at = world.fuse.count + 20
    with pytest.raises(Killed):
        world.promote()
    world.new_manager("m1")
    world.pass_by(1)
    assert_followed(world, backup_id)


def test_two_managers_do_not_work_on_one_pair_side_by_side(world):
    pair = world.pair
    assert world.store.claim(pair.id, "other", 100.0)
    assert world.manager.follow(pair.id) == 2.0
    world.clock.time += 101
    assert world.manager.follow(pair.id) is None


def test_a_server_deleted_meanwhile_takes_its_guest_with_it(world):
    pair = world.pair
    world.manager.request_promotion(pair.id, pair.generation, "hy", "silence")
    world.manager.report_promoted(pair.id, pair.generation, "hy", {}, "")
    del world.cloud.store[VM]
    world.work()
    assert ("fence", "hy", 2) in world.agents.calls
    world.agents.silent.clear()
    for _ in range(4):
        world.clock.time += 1
        world.manager.reconciler.all()
        world.work()
    assert world.pair is None and not world.cloud.backups()


@pytest.mark.parametrize("late", [False, True])
def test_a_server_whose_deletion_was_lost_with_its_host_does_not_come_back(world, late):
    """Nova gives the order to the dead host, and waits for it: until the host is known to be down."""
    pair = world.pair
    world.agents.silent.add("hx")
    world.cloud.dead.add("hx")
    world.manager.request_promotion(pair.id, pair.generation, "hy", "silence")
    world.manager.report_promoted(pair.id, pair.generation, "hy", {}, "")
    if late:
        force_down = world.cloud.force_down

        def just_before(host, down):
            world.cloud.force_down = force_down
            world.cloud.delete_server(VM)
            force_down(host, down)

        world.cloud.force_down = just_before
    else:
        world.cloud.delete_server(VM)
    for _ in range(5):
        world.work()
        world.clock.time += 5
        world.manager.reconciler.all()
    assert VM not in world.cloud.store and not world.cloud.named("reset_state")
    assert ("fence", "hy", 2) in world.agents.calls
    assert world.pair is None and not world.cloud.backups()


def test_a_promotion_that_fails_ends_in_a_boot_from_the_backups_disks(world):
    """Nova asks the driver, which adopts a guest if there is one, and boots from the files that it finds if not."""
    pair = world.pair
    world.agents.silent.add("hx")
    world.manager.request_promotion(pair.id, pair.generation, "hy", "silence")
    grant = world.manager.report_promoted(pair.id, pair.generation, "hy", {}, "the stream was refused")
    assert grant["granted"]
    assert world.manager.adoption(VM, "hy")["adopt"], "the disks are the server's newest: nobody may take them away"
    world.work()
    assert ("discard_standby", "hy") in world.agents.calls
    assert world.cloud.store[VM].host == "hy" and not world.cloud.forced_down.get("hy")
    assert (world.pair.state, world.pair.active_host, world.pair.generation) == (PairState.DEGRADED, "hy", 2)
    assert "running_at" not in world.pair.timeline
    assert world.shown == ("degraded", "failed over from hx to hy, started anew there from its disks; no backup yet")


def test_a_failed_promotion_is_told_twice_and_ends_once(world):
    pair = world.pair
    world.manager.request_promotion(pair.id, pair.generation, "hy", "silence")
    for _ in range(2):
        assert world.manager.report_promoted(pair.id, pair.generation, "hy", {}, "it died")["granted"]
        world.work()
    assert len(world.cloud.named("evacuate")) == 1


def test_a_server_that_was_not_resumed_waits_for_its_hosts_agent(world):
    pair = world.pair
    world.manager.request_promotion(pair.id, pair.generation, "hy", "silence")
    world.manager.report_promoted(pair.id, pair.generation, "hy", {}, "it died")
    world.agents.silent |= {"hx", "hy"}
    world.work()
    for _ in range(3):
        world.pass_by(10)
    assert not world.cloud.named("evacuate")
    assert "does not start anew on hy: the agent of hy does not answer" in world.shown[1]
    world.agents.silent.remove("hy")
    world.pass_by(60)
    assert world.cloud.store[VM].host == "hy" and world.pair.step == ""


def test_a_failure_told_before_any_grant_changes_nothing(world):
    pair = world.pair
    assert not world.manager.report_promoted(pair.id, pair.generation, "hy", {}, "it died")["granted"]
    assert world.pair == pair


def test_a_backup_that_reports_nothing_and_has_no_engine_left_is_booted_anew(world):
    pair = world.pair
    world.manager.request_promotion(pair.id, pair.generation, "hy", "silence")
    world.work()
    world.pass_by(9)
    assert world.pair.state is PairState.PROMOTING
    world.pass_by(2)
    assert world.pair.state is PairState.DEGRADED and world.cloud.store[VM].host == "hy"


def test_a_backup_whose_engine_is_at_it_has_time_until_the_steps_limit(world):
    pair = world.pair
    world.engines_of = lambda host: [] if host == "hx" else [
        {"pair_id": pair.id, "role": "backup", "generation": pair.generation, "state": "ask_promotion"}]
    world.manager.request_promotion(pair.id, pair.generation, "hy", "silence")
    world.work()
    world.pass_by(119)
    assert world.pair.state is PairState.PROMOTING
    world.pass_by(2)
    assert world.pair.state is PairState.DEGRADED and ("discard_standby", "hy") in world.agents.calls


def lose_both(world):
    """hy is granted the pair, and dies as hx did."""
    pair = world.pair
    world.hosts.append("hz")
    world.manager.request_promotion(pair.id, pair.generation, "hy", "silence")
    world.agents.silent |= {"hx", "hy"}
    world.work()
    world.pass_by(100)
    world.pass_by(121)


def test_silence_is_no_evidence_that_the_granted_backup_does_not_run(world):
    lose_both(world)
    assert world.pair.state is PairState.PROMOTING and world.pair.active_host == "hy"
    assert world.shown[0] == "promoting" and "hy is silent" in world.shown[1] and len(world.shown[1]) < 255
    assert world.manager.disarm(VM, "evacuated")["disarmed"] is False
    world.agents.silent.remove("hx")
    world.pass_by(10)
    assert world.pair.state is PairState.PROMOTING, "hx's guest is over, whoever else is dead"


def test_a_granted_backup_that_comes_back_much_later_is_followed(world):
    lose_both(world)
    pair = world.pair
    world.agents.silent.remove("hy")
    world.manager.report_promoted(pair.id, 1, "hy", {"running_at": 1.0}, "")
    world.work()
    assert world.cloud.store[VM].host == "hy" and ("discard_standby", "hy") not in world.agents.calls


def test_a_granted_host_that_comes_back_without_a_guest_boots_it(world):
    lose_both(world)
    world.agents.silent.remove("hy")
    world.pass_by(5)
    assert world.cloud.store[VM].host == "hy" and world.pair.state is PairState.DEGRADED


def test_the_owner_may_give_up_a_granted_host_that_is_gone_for_good(world):
    lose_both(world)
    world.cloud.alter(VM, metadata={**world.cloud.store[VM].metadata, "ft": "false"})
    for _ in range(4):
        world.pass_by(5)
    assert world.pair.state is PairState.DISABLED
    assert world.manager.disarm(VM, "started")["disarmed"]
    world.agents.silent.remove("hx")
    world.cloud.alter(VM, metadata={**world.cloud.store[VM].metadata, "ft": "true"})
    world.pass_by(60)
    assert (world.pair.state, world.pair.active_host) == (PairState.PENDING, "hx")


def test_a_guest_that_is_over_is_not_given_the_voice_while_its_engine_is_there(world):
    """hx was frozen: its old guest is back before it is fenced, and Nova shows the server as ACTIVE there."""
    lose_both(world)
    pair = world.pair
    world.cloud.alter(VM, metadata={**world.cloud.store[VM].metadata, "ft": "false"})
    for _ in range(4):
        world.pass_by(5)
    world.agents.silent.remove("hx")
    old = [{"pair_id": pair.id, "role": "primary", "generation": 1, "state": ""}]
    world.engines_of = lambda host: old if host == "hx" else []
    world.cloud.alter(VM, metadata={**world.cloud.store[VM].metadata, "ft": "true"})
    world.pass_by(60)
    assert world.pair.state is PairState.DISABLED and "is over" in world.shown[1]
    assert world.report("hx", engines=old) == [pair.id], "and it is fenced"
    assert not [call for call in world.agents.named("stop_engine") if call[1] == "hx"], "which lets its output go"
    world.engines_of = lambda host: []
    world.pass_by(5)
    assert (world.pair.state, world.pair.active_host) == (PairState.PENDING, "hx")


def test_a_server_deleted_while_its_backup_is_promoted_goes_with_its_guest(world):
    pair = world.pair
    world.manager.request_promotion(pair.id, pair.generation, "hy", "silence")
    world.work()
    del world.cloud.store[VM]
    world.clock.time += 1
    world.manager.reconciler.all()
    assert world.pair.state is PairState.PROMOTING, "its guest would be left behind"
    world.manager.report_promoted(pair.id, pair.generation, "hy", {}, "")
    world.work()
    assert ("fence", "hy", 2) in world.agents.calls
    for _ in range(4):
        world.clock.time += 1
        world.manager.reconciler.all()
        world.work()
    assert world.pair is None


def test_what_the_server_reserves_on_its_old_host_is_freed_when_it_has_left(world):
    world.promote()
    order = [call[0] for call in world.cloud.calls]
    assert world.cloud.named("release_allocation") == [("release_allocation", VM, "hx")]
    assert order.index("release_allocation") > order.index("evacuate")


def test_only_the_promoted_host_may_adopt_and_only_until_nova_has_followed(world):
    assert not world.manager.adoption(VM, "hy")["adopt"]
    world.promote(work=False)
    assert world.manager.adoption(VM, "hy") == {"adopt": True, "pair_id": world.pair.id, "generation": 2}
    assert not world.manager.adoption(VM, "hz")["adopt"]
    world.work()
    assert not world.manager.adoption(VM, "hy")["adopt"]


def test_a_disarm_during_the_catch_up_is_refused_as_the_old_host_may_ask(world):
    world.promote(work=False)
    assert world.manager.disarm(VM, "start")["disarmed"] is False
    assert world.pair.step in CATCH_UP and world.pair.state is PairState.DEGRADED


def test_ft_off_waits_for_the_catch_up(world):
    backup_id = world.pair.backup_id
    world.promote(work=False)
    world.cloud.alter(VM, metadata={**world.cloud.store[VM].metadata, "ft": "false"})
    world.manager.reconciler.all()
    world.work()
    assert world.cloud.store[VM].host == "hy" and backup_id not in world.cloud.allocations
    world.pass_by(5)
    assert world.pair.state is PairState.DISABLED


# A switchover: Nova's own live migration to the backup's host


def live_migrate(world, to, ends=True):
    """Nova has begun it; the backup takes the guest, and Nova's record follows after a while, if it does."""
    world.cloud.alter(VM, task_state="migrating")
    world.cloud.moves[VM] = [to]
    if ends:
        world.cloud._due.append((world.clock.now() + 1.0,
                                 lambda: world.cloud.alter(VM, host=to, task_state=None)))


def test_a_switchover_is_left_to_novas_live_migration(world):
    backup_id = world.pair.backup_id
    live_migrate(world, "hy")
    assert world.promote()["granted"]
    assert_followed(world, backup_id)
    assert not world.cloud.named("evacuate") and not world.cloud.named("force_down")
    assert not world.cloud.named("reset_state")


def test_a_live_migration_elsewhere_does_not_keep_the_server_from_its_guest(world):
    backup_id = world.pair.backup_id
    live_migrate(world, "hz", ends=False)
    assert world.promote()["granted"]
    assert_followed(world, backup_id)
    assert len(world.cloud.named("evacuate")) == 1


def test_a_live_migration_that_never_ends_is_followed_by_an_evacuation(world):
    backup_id = world.pair.backup_id
    live_migrate(world, "hy", ends=False)
    assert world.promote()["granted"]
    world.clock.sleep(world.manager._settings.retry_s + 1)
    world.work()
    assert_followed(world, backup_id)
    assert len(world.cloud.named("evacuate")) == 1
