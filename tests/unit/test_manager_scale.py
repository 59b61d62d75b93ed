"""What the manager does for one host or pair does not grow with all the others. Statements are counted, not time."""

import contextlib
import threading

import pytest
import sqlalchemy as sa

from nova_ftvm.failover.loops import Precedence, Queue
from nova_ftvm.failover.service import Service
from nova_ftvm.failover.settings import Settings
from nova_ftvm.types import InstanceId, PairId, PairState
from tests.unit.failover_world import World
from tests.unit.test_arbiter import pair_in


@pytest.fixture
def world(tmp_path):
    world = World(f"sqlite:///{tmp_path}/s.sqlite", repair=False)
    world.protect()
    return world


@contextlib.contextmanager
def counted(engine):
    """The statements that are executed meanwhile."""
    statements = []

    def note(connection, cursor, statement, *rest):
        statements.append(statement)
    sa.event.listen(engine, "before_cursor_execute", note)
    try:
        yield statements
    finally:
        sa.event.remove(engine, "before_cursor_execute", note)


def add_pairs(world, count, hosts=("h1", "h2"), state=PairState.PROTECTED):
    """Pairs on other hosts, which report them."""
    added = [world.store.add(pair_in(state, id=PairId(f"p{number}"), instance_id=InstanceId(f"i{number}"),
                                     primary_host=hosts[0], active_host=hosts[0], backup_host=hosts[1],
                                     backup_id=f"b{number}")) for number in range(count)]
    for host, role in zip(hosts, ("primary", "backup"), strict=True):
        world.report(host, engines=[engine(pair, role) for pair in added])
    return added


def engine(pair, role):
    return {"pair_id": pair.id, "instance_id": pair.instance_id, "role": role, "generation": pair.generation,
            "state": "protected"}


def test_a_report_costs_the_same_however_many_pairs_other_hosts_have(world):
    listed = world.engines_of("hx")
    assert listed
    with counted(world.engine) as alone:
        world.report("hx", engines=listed)
    add_pairs(world, 50)
    with counted(world.engine) as among_many:
        world.report("hx", engines=listed)
    assert among_many == alone


def test_a_report_costs_the_same_however_many_engines_it_lists(world):
    pairs = add_pairs(world, 50)
    with counted(world.engine) as one:
        world.report("h1", engines=[engine(pairs[0], "primary")])
    with counted(world.engine) as many:
        world.report("h1", engines=[engine(pair, "primary") for pair in pairs])
    assert len(many) == len(one)


def test_of_pairs_that_are_as_they_should_be_nothing_is_read(world):
    pairs = add_pairs(world, 5)
    assert world.store.unsettled([pair.id for pair in pairs], "h1") == []


@pytest.mark.parametrize("changes", [{"active_host": "h2"}, {"state": PairState.SYNCING}])
def test_a_pair_that_was_lost_or_is_copied_is_read_with_its_primarys_report(world, changes):
    pairs = add_pairs(world, 5)
    world.store.change(pairs[3], **changes)
    assert [pair.id for pair in world.store.unsettled([pair.id for pair in pairs], "h1")] == ["p3"]


def test_a_grant_costs_the_same_however_many_pairs_there_are(world):
    first = add_pairs(world, 1)[0]
    with counted(world.engine) as alone:
        world.manager.request_degrade(first.id, first.generation, "h1", "no acknowledgement")
    world.store.forget(world.store.pair(first.id))
    pairs = add_pairs(world, 50)
    with counted(world.engine) as among_many:
        world.manager.request_degrade(pairs[7].id, pairs[7].generation, "h1", "no acknowledgement")
    assert among_many == alone


def test_a_quiet_pass_reads_all_pairs_as_often_as_it_must_and_no_oftener(world):
    world.report_all_alive()
    world.manager.reconciler.all()
    with counted(world.engine) as statements:
        world.manager.reconciler.all()
    # To compare them with Nova's servers, and again for engines that have ended meanwhile.
    whole = [statement for statement in statements if "FROM pairs" in statement and "WHERE" not in statement]
    assert len(whole) == 2


def test_servers_that_are_named_in_a_burst_are_looked_at_together(world):
    add_pairs(world, 20)
    with counted(world.engine) as statements:
        world.manager.reconciler.some([f"i{number}" for number in range(20)])
    assert len([statement for statement in statements if "FROM hosts" in statement]) == 1


def test_the_service_hands_a_burst_of_names_over_at_once():
    looks = []
    done = threading.Event()

    class Reconciler:
        def all(self):
            pass

        def some(self, names):
            looks.append(sorted(names))
            done.set()

    class Manager:
        reconciler = Reconciler()

        class arbiter:
            precedence = Precedence()

    service = Service(Manager(), Queue(), Settings(reconcile_interval_s=60.0), workers=0)
    for name in ("a", "b", "c"):
        service.wake(name)
    service.start()
    assert done.wait(10)
    service.stop()
    assert looks == [["a", "b", "c"]]


def test_whoever_can_wait_waits_for_urgent_work_and_no_longer():
    precedence, passed = Precedence(), threading.Event()

    def slow_work():
        precedence.give_way(60.0)
        passed.set()
    with precedence:
        thread = threading.Thread(target=slow_work, daemon=True)
        thread.start()
        assert not passed.wait(0.05)
    assert passed.wait(10)
    thread.join(10)


def test_urgent_work_without_end_does_not_stop_the_rest():
    precedence = Precedence()
    with precedence:
        precedence.give_way(0.01)


def test_all_due_keys_are_taken_together_and_the_others_stay():
    time = [0.0]
    queue = Queue(lambda: time[0])
    for key, delay_s in (("a", 0.0), ("b", 0.0), ("later", 5.0)):
        queue.put(key, delay_s)
    assert queue.take_all(0) == ["a", "b"]
    time[0] = 5.0
    assert queue.take_all(0) == ["later"]
