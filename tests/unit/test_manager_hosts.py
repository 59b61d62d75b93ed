"""What follows from the agents' reports."""

import pytest

from nova_ftvm.db.records import Engine
from nova_ftvm.failover import hosts
from nova_ftvm.types import PairState, Role
from tests.unit.failover_world import World
from tests.unit.test_arbiter import pair_in


def engine(role, generation):
    return Engine("p", role.value, generation, "")


@pytest.fixture
def world(tmp_path):
    world = World(f"sqlite:///{tmp_path}/h.sqlite", repair=False)
    world.protect()
    return world


def listed(world, role, generation=1):
    return [{"pair_id": world.pair.id, "instance_id": "x", "role": role, "generation": generation, "state": ""}]


def test_the_old_primary_is_fenced_once_its_backup_was_promoted(world):
    assert world.report("hx", engines=listed(world, "primary")) == []
    world.promote()
    assert world.report("hx", engines=listed(world, "primary")) == [world.pair.id]


def test_the_promoted_engine_is_not_fenced(world):
    world.promote()
    assert world.report("hy", engines=listed(world, "backup")) == []


def test_a_primary_that_went_on_alone_is_not_fenced(world):
    pair = world.pair
    world.manager.request_degrade(pair.id, 1, "hx", "lost")
    assert world.report("hx", engines=listed(world, "primary")) == []


def test_an_unknown_pairs_engine_is_not_fenced(world):
    assert world.report("hx", engines=[{"pair_id": "gone", "instance_id": "x", "role": "primary", "generation": 1,
                                        "state": ""}]) == []


def test_an_engine_whose_stop_was_not_heard_is_stopped_later(world):
    world.agents.silent.add("hy")
    pair = world.pair
    world.manager.request_degrade(pair.id, 1, "hx", "lost")
    world.work()
    world.agents.silent.clear()
    world.clock.time += 6
    world.report("hy", engines=listed(world, "backup"))
    stops = len(world.agents.named("stop_engine"))
    world.manager.reconciler.all()
    assert world.agents.named("stop_engine")[stops:] == [("stop_engine", "hy", 1)], "and no newer one"


@pytest.mark.parametrize("state", list(PairState))
def test_the_voices_own_host_is_never_over(state):
    pair = pair_in(state, active_since=5)
    assert not any(hosts.is_over(pair, "hx", engine(role, generation)) for role in Role for generation in range(8))


@pytest.mark.parametrize("state", list(PairState))
def test_an_engine_of_the_generation_in_force_does_not_linger(state):
    pair = pair_in(state)
    assert not any(hosts.lingers(pair, host, engine(role, 5), 1e9) for host in ("hx", "hy") for role in Role)


def test_a_report_does_not_forget_that_we_forced_the_host_down(world):
    world.store.mark_forced_down("hx", True)
    world.report("hx")
    assert world.store.hosts()["hx"].forced_down_by_us


@pytest.mark.parametrize("said, number", [("40", 40), ("40%", 40), ("99.6 %", 99.6), ("syncing 7 %", 7), ("", 0),
                                          ("syncing 42.37 %", 42.37), ("soon", 0), ("250", 100)])
def test_progress_is_read_from_any_wording(said, number):
    assert hosts.percent(said) == number
