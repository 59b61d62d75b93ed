"""Nova follows a promotion, whatever fails and whenever the manager dies."""

import pytest

from nova_ftvm.failover.arbiter import CATCH_UP
from nova_ftvm.failover.cloud import CloudRefused
from nova_ftvm.types import PairState
from tests.unit.failover_world import PORT, VM, Killed, World


@pytest.fixture
def world(tmp_path):
    world = World(f"sqlite:///{tmp_path}/c.sqlite")
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
        world = World(f"sqlite:///{tmp_path}/{kill_at}.sqlite")
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


def test_a_promotion_that_fails_needs_a_hand(world):
    pair = world.pair
    world.manager.request_promotion(pair.id, pair.generation, "hy", "silence")
    grant = world.manager.report_promoted(pair.id, pair.generation, "hy", {}, "the stream was refused")
    world.work()
    assert grant["granted"]
    assert world.pair.state is PairState.ERROR
    assert world.shown[0] == "error" and "the stream was refused" in world.shown[1]
    assert not world.manager.adoption(VM, "hy")["adopt"]
    assert not world.cloud.backups()


def test_a_failure_told_before_any_grant_changes_nothing(world):
    pair = world.pair
    assert not world.manager.report_promoted(pair.id, pair.generation, "hy", {}, "it died")["granted"]
    assert world.pair == pair


def test_a_backup_that_never_reports_needs_a_hand(world):
    pair = world.pair
    world.manager.request_promotion(pair.id, pair.generation, "hy", "silence")
    world.work()
    world.pass_by(121)
    assert world.pair.state is PairState.ERROR and "did not say" in world.pair.reason


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
