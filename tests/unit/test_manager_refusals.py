"""What will never work as things are is not tried again and again; what may work is."""

import pytest

from nova_ftvm.types import PairState
from tests.unit.failover_world import VM, World

SHARED = "instances_path is shared"


@pytest.fixture
def world(tmp_path):
    world = World(f"sqlite:///{tmp_path}/m.sqlite")
    world.cloud.boot()
    world.pass_by()
    return world


def refuse(world, host="hy"):
    plan = world.manager.standby_plan(world.cloud.backups()[-1].id, host)
    world.manager.standby_ready(plan["pair_id"], plan["generation"], host, SHARED, lasting=True)
    world.work()


def tries(world):
    return len(world.cloud.named("create_backup"))


def go_on(world, seconds, step=5):
    for _ in range(int(seconds / step)):
        world.pass_by(step)


def test_a_host_that_refused_is_not_asked_again_before_its_time(world):
    refuse(world)
    go_on(world, 3580, step=8)
    assert tries(world) == 1 and not world.cloud.backups()
    assert world.shown == ("unprotected", f"protection failed on hy: {SHARED}")
    go_on(world, 100)
    assert tries(world) == 2


def test_a_failure_that_may_pass_is_tried_again_soon(world):
    plan = world.manager.standby_plan(world.cloud.backups()[-1].id, "hy")
    world.manager.standby_ready(plan["pair_id"], plan["generation"], "hy", "no room for its disk")
    world.work()
    go_on(world, 20)
    assert tries(world) == 2


def test_another_host_is_asked_at_once(world):
    world.hosts.append("hz")
    refuse(world)
    go_on(world, 10)
    assert world.cloud.named("create_backup")[-1][2] == ("hz",)
    refuse(world, "hz")
    go_on(world, 120)
    assert tries(world) == 2
    assert world.shown[1] == f"protection failed on hy: {SHARED}; protection failed on hz: {SHARED}"


def test_a_host_that_refused_while_the_server_ran_alone_is_shown_beside_the_reason(world):
    world.spawn_backup()
    world.finish_copy()
    world.lose_backup()
    go_on(world, 10)
    refuse(world)
    assert world.pair.state is PairState.DISABLED
    go_on(world, 60)
    assert tries(world) == 2


@pytest.mark.parametrize("change", ["incarnation", "gap", "word"])
def test_a_host_whose_agent_changed_is_asked_again(world, change):
    refuse(world)
    go_on(world, 60)
    assert tries(world) == 1
    if change == "gap":
        world.agents.silent.add("hy")
        go_on(world, 15)
        world.agents.silent.clear()
    else:
        said = {"incarnation": "2"} if change == "incarnation" else {"data_address": "10.0.0.9"}
        report = world.report
        world.report = lambda host, **changes: report(host, **changes, **(said if host == "hy" else {}))
    go_on(world, 10)
    assert tries(world) == 2


@pytest.mark.parametrize("change", ["rebooted", "moved", "switched off and on"])
def test_a_server_that_changed_is_tried_again(world, change):
    refuse(world)
    go_on(world, 60)
    if change == "rebooted":
        world.manager.disarm(VM, "rebooted")
    elif change == "moved":
        world.hosts.append("hz")
        world.cloud.alter(VM, host="hz")
        world.manager.disarm(VM, "live-migrated")
    else:
        for word in ("false", "true"):
            world.cloud.alter(VM, metadata={**world.cloud.store[VM].metadata, "ft": word})
            world.pass_by(5)
    go_on(world, 10)
    assert tries(world) == 2


def test_the_primarys_host_can_refuse_too(world):
    world.spawn_backup()
    pair = world.pair
    world.manager.report_protection(pair.id, pair.generation, "hx", "refused", "QEMU tells no host addresses")
    world.work()
    go_on(world, 600, step=8)
    assert tries(world) == 1 and world.shown[1] == "protection failed on hx: QEMU tells no host addresses"


@pytest.mark.parametrize("call, host", [("start_backup", "hy"), ("start_primary", "hx")])
def test_an_agent_that_says_unsupported_is_not_asked_again_soon(world, call, host):
    world.agents.refused.add(call)
    world.spawn_backup()
    go_on(world, 600, step=8)
    assert tries(world) == 1
    assert world.shown[1] == f"the engine on {host} did not start: {call} needs a newer QEMU"


def test_a_refusal_outlives_the_manager(world):
    refuse(world)
    world.new_manager("m2")
    go_on(world, 120)
    assert tries(world) == 1


def test_a_server_that_is_gone_for_good_takes_its_refusals_with_it(world):
    refuse(world)
    del world.cloud.store[VM]
    go_on(world, 15)
    assert world.pair is None
