"""At most so many first copies a host, the oldest first, and everybody comes to it."""

import random

import pytest

from nova_ftvm.failover import line, shown
from nova_ftvm.types import Generation, InstanceId, PairId, PairState
from tests.unit.failover_world import VM, World
from tests.unit.test_arbiter import pair_in


def syncing(name, primary, backup, moved_at=0.0, **changes):
    return pair_in(**{"state": PairState.SYNCING, **changes}, id=PairId(name), instance_id=InstanceId(name),
                   primary_host=primary, active_host=primary, backup_host=backup, moved_at=moved_at)


def test_a_host_counts_as_primarys_and_as_backups_side():
    running = [syncing("a", "hx", "hy", 1), syncing("b", "hz", "hx", 2)]
    assert line.ahead(syncing("c", "hx", "hw", 3), running, 2) == 2
    assert line.ahead(syncing("c", "hw", "hx", 3), running, 2) == 2
    assert line.ahead(syncing("c", "hy", "hz", 3), running, 2) == 0
    assert line.ahead(syncing("c", "hy", "hz", 3), running, 1) == 1


def test_only_pairs_that_synchronise_count():
    others = [syncing(state.value, "hx", "hy", 1, state=state) for state in PairState if state is not PairState.SYNCING]
    assert line.ahead(syncing("c", "hx", "hy", 3), others, 1) == 0


def test_an_older_pair_keeps_its_place_on_a_host_that_has_room():
    """It waits for hx. Were its place on hy given away, it might wait for ever."""
    running, waiting = syncing("a", "hx", "hz", 1), syncing("b", "hx", "hy", 2)
    assert line.ahead(waiting, [running], 1) == 1
    assert line.ahead(syncing("c", "hy", "hw", 3), [running, waiting], 1) == 1


def test_of_two_of_the_same_moment_one_is_first():
    one, two = syncing("a", "hx", "hy", 1), syncing("b", "hx", "hy", 1)
    assert sorted([line.ahead(one, [one, two], 1), line.ahead(two, [one, two], 1)]) == [0, 1]


@pytest.mark.parametrize("limit", [1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_the_limit_holds_and_everybody_comes_to_it(seed, limit):
    """Pairs come and end at random, and are looked at in any order, as by several managers."""
    dice = random.Random(seed)
    hosts = [f"h{number}" for number in range(6)]
    pairs, copying, done, born = {}, set(), 0, 0
    for now in range(4000):
        if born < 120 and dice.random() < 0.3:
            primary, backup = dice.sample(hosts, 2)
            pairs[f"p{born}"] = syncing(f"p{born}", primary, backup, float(now))
            born += 1
        for name in dice.sample(sorted(pairs), len(pairs)):
            if name in copying:
                if dice.random() < 0.2:
                    copying.remove(name)
                    del pairs[name]
                    done += 1
            elif line.ahead(pairs[name], pairs.values(), limit) == 0:
                copying.add(name)
        for host in hosts:
            assert sum(host in line.sides(pairs[name]) for name in copying) <= limit
        if pairs:
            oldest = min(pairs.values(), key=lambda pair: (pair.moved_at, pair.id))
            assert line.ahead(oldest, pairs.values(), limit) == 0
    assert done == born == 120


@pytest.fixture
def world(tmp_path):
    return World(f"sqlite:///{tmp_path}/m.sqlite", hosts=("hx", "hy", "hz"), sync_limit_per_host=1)


def occupy(world, name, primary, backup):
    """Another server's first copy, or its place in the line."""
    return world.store.add(syncing(name, primary, backup, generation=Generation(1)))


def test_a_pair_over_the_limit_shows_how_many_are_first_and_starts_when_there_is_room(world):
    world.cloud.boot()
    world.pass_by()
    others = [occupy(world, "a", "hy", "hz"), occupy(world, "b", "hy", "hw")]
    world.clock.time += 1
    world.spawn_backup()
    assert world.shown == ("syncing", "the first copy waits in line: 2 others are first on hx or hy")
    assert not world.agents.named("start_backup")
    world.store.change(others[0], state=PairState.PROTECTED)
    world.clock.time += 2
    world.work()
    assert world.shown == ("syncing", "the first copy waits in line: 1 other is first on hx or hy")
    world.store.change(others[1], state=PairState.DEGRADED)
    world.clock.time += 2
    world.work()
    assert world.agents.named("start_backup") and world.agents.named("start_primary")
    assert world.shown == ("syncing", shown.SYNCING) and world.pair.step == ""


def test_a_pair_in_the_line_is_not_given_up_for_waiting_long(world):
    world.cloud.boot()
    world.pass_by()
    world.cloud.boot("a", metadata={"ft": "true"})
    occupy(world, "a", "hy", "hz")
    world.clock.time += 1
    world.spawn_backup()
    world.manager.reconciler._one(world.cloud.store[VM], world.pair, {}, world.store.hosts())
    for _ in range(20):
        world.clock.time += 60
        world.report_all_alive()
        world.manager.reconciler.some([VM])
        world.work()
    assert world.pair.state is PairState.SYNCING and "1 other is first" in world.shown[1]


@pytest.mark.parametrize("how", ["disarmed", "its host lost"])
def test_a_pair_in_the_line_can_end_like_any_other(world, how):
    world.cloud.boot()
    world.pass_by()
    occupy(world, "a", "hy", "hz")
    world.clock.time += 1
    world.spawn_backup()
    if how == "disarmed":
        world.manager.disarm(VM, "stop")
    else:
        world.agents.silent.add("hy")
        world.clock.time += 11
        world.report_all_alive()
        world.manager.reconciler.some([VM])
    world.work()
    assert world.pair.state is PairState.DISABLED
    assert not [backup for backup in world.cloud.backups() if backup.task_state != "deleting"]


def test_another_manager_comes_to_the_same_end(world):
    world.cloud.boot()
    world.pass_by()
    first = occupy(world, "a", "hy", "hz")
    world.clock.time += 1
    world.spawn_backup()
    world.new_manager("m2")
    assert world.manager.follow(world.pair.id) == 2.0 and not world.agents.named("start_backup")
    world.store.change(first, state=PairState.PROTECTED)
    assert world.manager.follow(world.pair.id) is None and world.agents.named("start_backup")


def test_a_new_backup_is_asked_for_where_there_is_room(world):
    world.cloud.boot()
    occupy(world, "a", "hw", "hy")
    world.manager.reconciler.some([VM])
    world.work()
    assert world.cloud.named("create_backup")[0][2] == ("hz",)


def test_a_backup_that_found_no_place_where_there_was_room_is_asked_for_anywhere(world):
    world.cloud.boot()
    occupy(world, "a", "hw", "hy")
    world.manager.reconciler.some([VM])
    world.work()
    world.cloud.alter(world.pair.backup_id, vm_state="error", task_state=None, fault="No valid host was found")
    for _ in range(12):
        world.clock.time += 1
        world.report_all_alive()
        world.manager.reconciler.some([VM])
        world.work()
    assert world.cloud.named("create_backup")[1][2] == ("hy", "hz")
