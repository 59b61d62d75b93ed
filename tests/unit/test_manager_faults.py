"""The manager's own partners fail: its database, the broker, another manager."""

import threading
from contextlib import contextmanager

import pytest
from oslo_db import exception as db_exception

from nova_ftvm.db import store
from nova_ftvm.db.store import DatabaseAway, Store
from nova_ftvm.failover.service import Service
from nova_ftvm.failover.settings import Settings
from nova_ftvm.types import PairState
from tests.unit.failover_world import VM, World


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setattr("oslo_db.api.time.sleep", lambda seconds: None)
    return World(f"sqlite:///{tmp_path}/f.sqlite")


class Dark:
    """An engine of SQLAlchemy whose database is away."""

    def begin(self):
        raise db_exception.DBConnectionError("gone away")

    connect = begin


@contextmanager
def no_database(world):
    engine, world.store._engine = world.store._engine, Dark()
    yield
    world.store._engine = engine


CALLS = {
    "agent_report": ("hx", {"capable": True, "engines": []}),
    "request_promotion": ("PAIR", 1, "hy", "silence"),
    "request_degrade": ("PAIR", 1, "hx", "lost"),
    "report_protection": ("PAIR", 1, "hx", "protected", ""),
    "report_promoted": ("PAIR", 1, "hy", {}, ""),
    "standby_plan": ("BACKUP", "hy"),
    "standby_ready": ("PAIR", 1, "hy", ""),
    "disarm": (VM, "stop"),
    "adoption": (VM, "hy"),
    "switchover": (VM, "hy"),
}


def ask(world, name):
    pair = world.pair
    known = {"PAIR": pair.id, "BACKUP": pair.backup_id}
    arguments = [known.get(value, value) if isinstance(value, str) else value for value in CALLS[name]]
    return lambda: getattr(world.manager, name)(*arguments)


@pytest.mark.parametrize("name", CALLS)
def test_without_its_database_the_manager_answers_nothing(world, name):
    """No answer is what every caller waits out; 'no pair' or 'not granted' would be believed."""
    world.protect()
    call, before, calls = ask(world, name), world.pair, list(world.agents.calls)
    with no_database(world), pytest.raises(DatabaseAway):
        call()
    assert world.pair == before and world.agents.calls == calls


def test_a_grant_whose_commit_is_in_doubt_is_found_when_it_is_asked_for_again(world):
    """The database took the write, and its answer was lost: the retry loses its own race, and judges what is there."""
    world.protect()
    change = Store.change.__wrapped__
    taken = []

    def in_doubt(tables, pair, **changes):
        moved = change(tables, pair, **changes)
        if not taken:
            taken.append(moved)
            raise db_exception.DBConnectionError("lost connection during query")
        return moved

    world.store.change = lambda pair, **changes: store._again(in_doubt)(world.store, pair, **changes)
    pair = world.pair
    grant = world.manager.request_promotion(pair.id, pair.generation, "hy", "silence")
    assert taken and grant["granted"] and grant["generation"] == 2
    assert (world.pair.state, world.pair.active_host) == (PairState.PROMOTING, "hy")
    assert not world.manager.request_degrade(pair.id, pair.generation, "hx", "silence")["granted"]


def test_a_manager_whose_database_was_away_for_a_minute_goes_on_by_itself(world):
    """Its real threads: reconcile and workers meet the dark database, and do their work when it is back."""
    world.cloud.boot()
    placed = world.cloud.tell_of_backups()
    service = Service(world.manager, world.queue, Settings(reconcile_interval_s=0.05), workers=2)
    engine, world.store._engine = world.store._engine, Dark()
    met = threading.Event()
    select = world.store.pairs

    def pairs(*arguments):
        met.set()
        return select(*arguments)

    world.store.pairs = pairs
    service.start()
    try:
        service.wake(VM)
        world.queue.put("unknown")
        assert met.wait(10) and not placed.is_set()
        world.store._engine = engine
        assert placed.wait(20)
    finally:
        service.stop()


def test_a_pair_whose_work_met_a_dark_database_is_worked_on_again(world):
    world.cloud.boot()
    world.manager.reconciler.some([VM])
    service = Service(world.manager, world.queue, Settings(), workers=1)
    with no_database(world):
        service._work()
    assert not world.cloud.backups()
    world.clock.time += 2
    service._work()
    assert len(world.cloud.backups()) == 1


def test_a_protected_pair_lasts_through_a_minute_without_its_manager(world):
    world.protect()
    world.clock.time += 60
    world.new_manager("m1")
    world.manager.reconciler.all()
    assert world.pair.state is PairState.PROTECTED
    for _ in range(6):
        world.pass_by(5)
    assert world.pair.state is PairState.PROTECTED and world.pair.generation == 1


def test_a_call_that_comes_twice_changes_nothing_more(world):
    """Lost answers make callers repeat themselves."""
    world.cloud.boot()
    world.pass_by()
    backup = world.cloud.backups()[0].id
    plan = world.manager.standby_plan(backup, "hy")
    assert world.manager.standby_plan(backup, "hy") == plan
    manager, pair_id = world.manager, plan["pair_id"]
    for call in (lambda: manager.standby_ready(pair_id, 1, "hy", ""),
                 lambda: manager.report_protection(pair_id, 1, "hx", "protected", ""),
                 lambda: manager.request_promotion(pair_id, 1, "hy", "silence"),
                 lambda: manager.report_promoted(pair_id, 1, "hy", {"running_at": 1.0}, "")):
        assert call()["granted"]
        after = world.pair
        assert call()["granted"] and world.pair == after
        world.work()
    assert len(world.cloud.named("evacuate")) == len(world.agents.named("start_primary")) == 1


LATE = {
    "a standby that was ready long ago": ("standby_ready", 1, "hy", ""),
    "a standby that failed long ago": ("standby_ready", 1, "hy", "no room"),
    "a first copy that ended long ago": ("report_protection", 1, "hx", "protected", ""),
    "a first copy that failed long ago": ("report_protection", 1, "hx", "failed", "broke"),
    "an old backup's question": ("request_promotion", 1, "hy", "silence"),
    "an old backup's failure": ("report_promoted", 1, "hy", {}, "died"),
    "an old backup's report": ("report_promoted", 1, "hy", {}, ""),
}


@pytest.mark.parametrize("what", LATE)
def test_a_call_of_an_earlier_protection_does_not_touch_a_later_one(world, what):
    world.protect()
    world.lose_backup()
    world.pass_by(5)
    world.spawn_backup()
    world.finish_copy()
    assert (world.pair.state, world.pair.generation) == (PairState.PROTECTED, 3)
    before = world.pair
    name, *arguments = LATE[what]
    getattr(world.manager, name)(before.id, *arguments)
    assert world.pair == before
