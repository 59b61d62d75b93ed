"""The manager behind oslo.messaging, in process: names, arguments and answers are those of the contract."""

import time

import oslo_messaging
import pytest

from nova_ftvm.failover.pairing import NotPlanned
from nova_ftvm.failover.service import Service
from nova_ftvm.failover.settings import Settings
from nova_ftvm.rpc import common, notifications
from nova_ftvm.rpc import server as rpc_server
from nova_ftvm.rpc.agent import AgentClient
from nova_ftvm.rpc.manager import ManagerApi, ManagerClient
from nova_ftvm.types import PairState
from tests.unit.failover_world import PORT, VM, World


@pytest.fixture
def world(tmp_path):
    return World(f"sqlite:///{tmp_path}/r.sqlite")


@pytest.fixture
def client(conf, world):
    wire = common.transport(conf)
    endpoint = rpc_server.Endpoint(world.manager, rpc_server.methods_of(ManagerApi))
    server = rpc_server.serve(wire, common.MANAGER_TOPIC, "ctl", endpoint)
    server.start()
    yield ManagerClient(wire, 5.0)
    server.stop()
    server.wait()


def test_a_whole_failover_over_rpc(client, world):
    world.cloud.boot()
    assert client.agent_report("hx", {"capable": True, "reason": "", "data_address": "a", "engines": []}) == {
        "stale": []}
    world.pass_by()
    plan = client.standby_plan(world.cloud.backups()[0].id, "hy")
    assert client.standby_ready(plan["pair_id"], plan["generation"], "hy").granted
    world.work()
    assert client.report_protection(plan["pair_id"], 1, "hx", "protected", "").granted
    grant = client.request_promotion(plan["pair_id"], 1, "hy", "silence")
    assert grant.granted and grant.generation == 2
    assert not client.request_degrade(plan["pair_id"], 1, "hx", "silence").granted
    assert client.report_promoted(plan["pair_id"], 1, "hy", {"running_at": 3.0}).granted
    assert client.adoption(VM, "hy")["adopt"]
    assert client.disarm(VM, "start") is False
    world.work()
    assert world.cloud.store[VM].host == "hy"
    assert client.disarm(VM, "stop") is True


def test_a_plan_is_refused_to_a_backup_that_is_over(client, world):
    """A real broker wraps it in RemoteError; the one in process hands the exception itself on."""
    world.cloud.boot()
    world.pass_by()
    old = world.cloud.backups()[0].id
    client.disarm(VM, "stop")
    with pytest.raises(NotPlanned):
        client.standby_plan(old, "hy")


def test_a_switchover_makes_way_for_novas_own_bindings(client, world):
    world.protect()
    assert set(world.cloud.bound[PORT]) == {"hx", "hy"}
    assert not client.switchover(VM, "hz")["ready"]
    assert client.switchover(VM, "hy") == {"ready": True, "reason": ""}
    assert set(world.cloud.bound[PORT]) == {"hx"}
    world.manager.disarm(VM, "stopped")
    assert "not protected" in client.switchover("nobody", "hy")["reason"]
    assert not client.switchover(VM, "hy")["ready"]


def test_the_endpoint_exposes_the_contract_and_nothing_else(world):
    names = rpc_server.methods_of(ManagerApi)
    assert len(names) == 10
    endpoint = rpc_server.Endpoint(world.manager, names)
    assert not hasattr(endpoint, "follow") and hasattr(endpoint, "disarm")


def test_a_notification_wakes_and_other_events_do_not(conf):
    woken = []
    wake = notifications.Wake(woken.append)
    wake.info({}, "nova", "instance.update", {"nova_object.data": {"uuid": VM}}, {})
    wake.info({}, "nova", "instance.update", {}, {})
    assert woken == [VM]
    for event, matters in (("instance.create.end", True), ("instance.update", True), ("instance.delete.end", True),
                           ("instance.create.error", True), ("instance.create.start", False),
                           ("compute.task.create", False)):
        assert wake.filter_rule.match({}, "nova", event, {}, {}) is matters, event


def test_the_threads_protect_a_server_that_a_notification_names(world):
    """The one test with real threads: from the notification to the asked-for backup."""
    placed = world.cloud.tell_of_backups()
    queue = world.queue
    queue._clock = time.monotonic
    service = Service(world.manager, queue, Settings(reconcile_interval_s=3600), workers=2)
    service.start()
    try:
        world.cloud.boot()
        service.wake(VM)
        assert placed.wait(10)
    finally:
        service.stop()
    assert world.pair.state is PairState.PENDING


class _Forgetful:
    """An agent of whose messages the first ones go to its dead self."""

    def __init__(self, deaf):
        self.deaf = deaf
        self.asked = 0

    def prepare_domain(self, context, instance_id):
        self.asked += 1
        if self.asked <= self.deaf:
            time.sleep(0.5)
        return {"capable": True, "asked": self.asked}


@pytest.fixture
def forgetful(conf):
    def make(deaf):
        wire = common.transport(conf)
        agent = _Forgetful(deaf)
        server = oslo_messaging.get_rpc_server(
            wire, oslo_messaging.Target(exchange=common.EXCHANGE, topic=common.AGENT_TOPIC, server="hx"), [agent],
            access_policy=oslo_messaging.DefaultRPCAccessPolicy)
        server.start()
        servers.append(server)
        return AgentClient(wire, 0.6)

    servers = []
    yield make
    for server in servers:
        server.stop()
        server.wait()


def test_a_question_that_went_to_a_dead_agents_queue_is_asked_again(forgetful):
    assert forgetful(deaf=2).prepare_domain("hx", VM) == {"capable": True, "asked": 3}


def test_a_question_is_not_asked_for_ever(forgetful):
    with pytest.raises(oslo_messaging.MessagingTimeout):
        forgetful(deaf=3).prepare_domain("hx", VM)
