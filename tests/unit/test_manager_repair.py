"""Protection comes back by itself, neither too fast nor never, whatever took it away."""

import pytest

from nova_ftvm.failover import shown
from nova_ftvm.types import PairState
from tests.unit.failover_world import VM, Killed, World


@pytest.fixture
def world(tmp_path):
    return World(f"sqlite:///{tmp_path}/m.sqlite")


def until(world, *states, step_s=1, limit_s=300):
    """Time goes by until the pair is in one of the states."""
    for _ in range(int(limit_s / step_s)):
        if world.pair.state in states:
            return
        world.pass_by(step_s)
    raise AssertionError(f"still {world.pair.state} after {limit_s} s: {world.pair.reason}")


def repair(world, host="hy"):
    until(world, PairState.PENDING)
    world.spawn_backup(host)
    world.finish_copy()


def test_a_lost_backup_is_replaced(world):
    world.protect()
    world.lose_backup()
    assert world.shown[0] == "degraded"
    repair(world)
    assert world.pair.state is PairState.PROTECTED and world.shown == ("protected", shown.PROTECTED)
    assert world.pair.generation == 3


def test_without_repair_a_lost_backup_is_the_owners_affair(tmp_path):
    world = World(f"sqlite:///{tmp_path}/m.sqlite", repair=False)
    world.protect()
    world.lose_backup()
    for _ in range(20):
        world.pass_by(5)
    assert world.pair.state is PairState.DEGRADED and not world.cloud.backups()


def test_after_a_failover_the_new_backup_is_made_on_a_third_host(world):
    world.hosts.append("hz")
    world.protect()
    world.promote()
    repair(world, "hz")
    pair = world.pair
    assert (pair.state, pair.primary_host, pair.backup_host) == (PairState.PROTECTED, "hy", "hz")
    assert world.cloud.named("create_backup")[-1][2] == ("hz",)


def test_after_a_failover_the_old_host_takes_the_new_backup_when_it_is_back(world):
    world.protect()
    world.promote()
    for _ in range(10):
        world.pass_by(5)
    assert world.pair.state is PairState.DEGRADED
    assert world.shown[1].startswith("failed over from hx to hy; no backup yet; no other host can hold the backup")
    world.agents.silent.clear()
    world.cloud.done_evacuations.clear()
    repair(world, "hx")
    assert (world.pair.primary_host, world.pair.backup_host) == ("hy", "hx")


def test_a_backup_that_is_lost_as_soon_as_it_is_there_is_replaced_ever_more_seldom(world):
    world.protect()
    waits = []
    for _ in range(7):
        world.clock.time += 5
        world.lose_backup()
        waits.append(round(world.pair.retry_at - world.pair.moved_at))
        repair(world)
    assert waits == [2, 4, 8, 16, 32, 60, 60]


def test_a_protection_that_lasted_ends_the_row_of_failures(world):
    world.protect()
    for _ in range(4):
        world.lose_backup()
        repair(world)
    world.pass_by(61)
    world.lose_backup()
    assert world.pair.attempts == 1 and round(world.pair.retry_at - world.clock.now()) <= 2


def test_failures_of_both_kinds_are_one_row(world):
    """Lost while protected, and failed while it was made."""
    world.protect()
    world.lose_backup()
    until(world, PairState.PENDING)
    world.spawn_backup()
    pair = world.pair
    world.manager.report_protection(pair.id, pair.generation, "hx", "failed", "its disk is full")
    assert world.pair.attempts == 2


def test_pairing_never_runs_in_a_tight_loop(world):
    """Half an hour in which each backup dies in the second that it is protected."""
    world.cloud.boot()
    world.pass_by()
    end = world.clock.now() + 1800
    while world.clock.now() < end:
        if world.pair.state is PairState.PENDING:
            world.spawn_backup()
            world.finish_copy()
            world.lose_backup()
        world.pass_by(5)
    assert 20 < len(world.cloud.named("create_backup")) < 40


def test_a_backup_server_on_a_dead_host_is_not_waited_for(world):
    world.hosts.append("hz")
    world.protect()
    dead = world.pair.backup_id
    world.agents.silent.add("hy")
    world.cloud.dead.add("hy")
    world.pass_by(11)
    lost_at = world.clock.now()
    world.lose_backup()
    until(world, PairState.PENDING)
    assert world.clock.now() - lost_at < 10 and world.cloud.store[dead].task_state == "deleting"
    world.spawn_backup("hz")
    world.finish_copy()
    assert world.pair.state is PairState.PROTECTED
    world.cloud.dead.clear()  # Nova has noticed
    world.pass_by(11)
    world.pass_by(1)
    assert dead not in world.cloud.store and world.pair.backup_id in world.cloud.store


@pytest.mark.parametrize("settings", [{}, {"repair": False}])
def test_a_primary_whose_agent_comes_back_after_it_was_lost_in_the_first_copy_is_protected_again(tmp_path, settings):
    world = World(f"sqlite:///{tmp_path}/m.sqlite", **settings)
    world.start_copy()
    world.agents.silent.add("hx")
    world.pass_by(11)
    assert world.pair.state is PairState.ERROR
    for _ in range(5):
        world.pass_by(5)
    assert world.shown[0] == "error" and "evacuate the server" in world.shown[1]
    world.agents.silent.clear()
    repair(world)
    assert world.pair.state is PairState.PROTECTED and world.pair.active_since == 1


def test_a_primary_whose_host_died_in_the_first_copy_is_protected_where_it_was_evacuated_to(world):
    world.hosts.append("hz")
    world.start_copy()
    world.agents.silent.add("hx")
    world.pass_by(11)
    assert world.pair.state is PairState.ERROR
    world.manager.disarm(VM, "evacuated")
    world.cloud.alter(VM, host="hz")
    repair(world)
    assert (world.pair.state, world.pair.primary_host, world.pair.active_host) == (PairState.PROTECTED, "hz", "hz")


def test_a_primary_that_was_moved_without_a_word_is_protected_where_it_is(world):
    world.hosts.append("hz")
    world.start_copy()
    world.agents.silent.add("hx")
    world.pass_by(11)
    world.cloud.alter(VM, host="hz")
    repair(world)
    assert (world.pair.state, world.pair.active_host) == (PairState.PROTECTED, "hz")


def test_when_nobody_is_heard_nobody_is_taken_for_dead(world):
    world.start_copy()
    world.agents.silent |= {"hx", "hy"}
    for _ in range(12):
        world.pass_by(5)
    assert world.pair.state is PairState.SYNCING
    world.agents.silent.remove("hy")
    world.pass_by(5)
    assert world.pair.state is PairState.SYNCING, "hx may need a moment longer to reach the broker"
    world.agents.silent.remove("hx")
    world.pass_by(5)
    world.pass_by(20)
    assert world.pair.state is PairState.SYNCING
    world.agents.silent.add("hx")
    world.pass_by(11)
    assert world.pair.state is PairState.ERROR


def test_a_manager_that_was_away_takes_nobody_for_dead_when_it_starts(world):
    world.start_copy()
    world.clock.time += 60
    world.new_manager("m1")
    world.report("hy", engines=world.engines_of("hy"))
    world.manager.reconciler.all()
    assert world.pair.state is PairState.SYNCING
    world.pass_by(1)
    world.pass_by(20)
    assert world.pair.state is PairState.SYNCING


@pytest.mark.parametrize("silent", [["hy"], ["hx"], ["hx", "hy"]])
def test_a_protected_server_shows_whose_agent_is_silent(world, silent):
    world.hosts.append("hz")
    world.protect()
    world.agents.silent |= set(silent)
    world.pass_by(11)
    assert world.pair.state is PairState.PROTECTED
    assert world.shown == ("protected", f"{shown.PROTECTED}; but no agent reports from {' and '.join(silent)}: see to "
                                        "it")
    world.agents.silent.clear()
    world.pass_by(1)
    assert world.shown == ("protected", shown.PROTECTED)


def test_hosts_that_were_both_lost_and_come_back_are_protected_again(world):
    world.hosts.append("hz")
    world.protect()
    world.agents.silent |= {"hx", "hy"}
    world.pass_by(60)
    world.agents.silent.clear()
    world.engines_of = lambda host: []
    world.pass_by(1)
    assert world.pair.state is PairState.DISABLED and "no engine is left" in world.pair.reason
    del world.engines_of
    repair(world)
    assert world.pair.state is PairState.PROTECTED


def test_a_manager_killed_anywhere_in_a_repair_leaves_one_backup(tmp_path):
    kill_at, survived = 1, False
    while not survived:
        world = World(f"sqlite:///{tmp_path}/{kill_at}.sqlite")
        world.protect()
        pair = world.pair
        world.manager.request_degrade(pair.id, pair.generation, "hx", "lost")
        world.fuse.kill_at = world.fuse.count + kill_at
        try:
            world.work()
            repair(world)
            survived = True
        except Killed:
            world.new_manager("m2")
        for _ in range(60):
            if world.pair.state is PairState.SYNCING and not world.pair.step:
                world.finish_copy()
            if world.pair.state is PairState.PROTECTED:
                break
            world.pass_by(10)
            if world.pair.state is PairState.PENDING and any(
                    backup.vm_state == "building" for backup in world.cloud.backups()):
                world.spawn_backup()
        assert world.pair.state is PairState.PROTECTED, kill_at
        live = [backup.id for backup in world.cloud.backups() if backup.task_state != "deleting"]
        assert live == [world.pair.backup_id], kill_at
        kill_at += 1
    assert kill_at > 20


def test_a_new_backup_goes_where_the_last_one_was_not_lost_if_it_can(world):
    world.hosts.append("hz")
    world.protect()
    lost = world.pair.backup_host
    other = ({"hy", "hz"} - {lost}).pop()
    world.lose_backup()
    repair(world, other)
    assert world.cloud.named("create_backup")[-1][2] == (other,)
    world.lose_backup()
    world.hosts.remove(lost)
    world.clock.time += 45
    repair(world, other)
    assert world.cloud.named("create_backup")[-1][2] == (other,), "there is no other"


def test_a_lost_backup_is_not_held_against_its_host_for_long(world):
    world.hosts.append("hz")
    world.protect()
    world.lose_backup()
    world.clock.time += 120
    repair(world)
    assert world.cloud.named("create_backup")[-1][2] == ("hy", "hz")


def test_two_managers_that_see_the_same_need_make_one_backup(world):
    """The other one's whole pass comes between the first one's judgement and its move."""
    world.protect()
    world.lose_backup()
    world.clock.time += 5
    world.report_all_alive()
    first = world.manager
    second = world.new_manager("m2")
    ports = world.cloud.ports

    def meanwhile(instance_id):
        world.cloud.ports = ports
        second.reconciler.all()
        return ports(instance_id)

    world.cloud.ports = meanwhile
    first.reconciler.all()
    for manager in (first, second):
        manager.follow(world.pair.id)
    assert world.pair.generation == 3
    assert len(world.cloud.named("create_backup")) == 2, "the first one was made at the beginning"
    assert [move for move in world.moves if move == ("degraded", "pending")] == [("degraded", "pending")]


def test_each_move_is_announced_once_and_nothing_else_is(world):
    world.protect()
    for _ in range(3):
        world.pass_by(5)
    pair = world.pair
    world.manager.request_promotion(pair.id, 99, "hy", "silence")
    world.lose_backup()
    world.manager.request_degrade(pair.id, pair.generation, "hx", "asked again")
    assert world.moves == [(None, "pending"), ("pending", "syncing"), ("syncing", "protected"),
                           ("protected", "degraded")]


def test_a_move_that_was_lost_to_another_manager_is_not_announced(world):
    world.protect()
    stale = world.pair
    world.lose_backup()
    before = list(world.moves)
    with pytest.raises(Exception, match="any more"):
        world.manager.arbiter.give_up(stale, "late")
    assert world.moves == before


def test_a_backup_server_that_nova_does_not_delete_holds_nothing_up_and_is_asked_for_again(world):
    """Its host's nova-compute hangs, and its agent lives."""
    world.hosts.append("hz")
    world.protect()
    stuck = world.pair.backup_id
    world.cloud.dead.add("hy")
    world.lose_backup()
    until(world, PairState.PENDING, limit_s=40)
    asked = len(world.cloud.named("delete_server"))
    world.spawn_backup("hz")
    world.finish_copy()
    world.pass_by(11)
    assert world.pair.state is PairState.PROTECTED
    assert ("delete_server", stuck) in world.cloud.named("delete_server")[asked:]


@pytest.mark.parametrize("lost", ["hx", "hy"])
@pytest.mark.parametrize("planned", [True, False])
def test_a_host_that_is_lost_while_the_backup_is_made_is_noticed_soon(world, lost, planned):
    world.hosts.append("hz")
    world.cloud.boot()
    world.pass_by()
    world.cloud.alter(world.pair.backup_id, host="hy")
    if planned:
        world.manager.standby_plan(world.pair.backup_id, "hy")
    world.agents.silent.add(lost)
    world.pass_by(11)
    assert world.pair.generation == 2 and f"the agent of {lost} was lost" in world.pair.reason
    if lost == "hy":
        until(world, PairState.PENDING)
        assert world.cloud.named("create_backup")[-1][2] == ("hz",)
    else:
        world.agents.silent.clear()
        until(world, PairState.PENDING)


@pytest.mark.parametrize("state", ["degraded", "unprotected"])
def test_a_clock_that_was_set_back_delays_no_repair(world, state):
    world.protect()
    world.lose_backup() if state == "degraded" else world.manager.disarm(VM, "reboot")
    world.work()
    world.clock.time -= 3600
    world.pass_by(5)
    assert world.pair.state is PairState.PENDING
