"""Notifications of our own: what they say, and that a broker never holds anything up."""

import threading

import pytest
from oslo_messaging.notify import _impl_test

from nova_ftvm.failover import bulletin as bulletins
from nova_ftvm.failover.announce import announcer, payload
from nova_ftvm.failover.bulletin import Bulletin
from nova_ftvm.rpc import notifications
from nova_ftvm.types import Generation, PairState
from tests.unit.failover_world import World
from tests.unit.test_arbiter import pair_in


@pytest.fixture
def sent(monkeypatch):
    sent = []
    monkeypatch.setattr(_impl_test, "NOTIFICATIONS", sent)
    return sent


def test_a_move_is_told_with_all_that_its_reader_needs():
    before = pair_in(PairState.SYNCING)
    after = pair_in(PairState.PROTECTED, generation=Generation(6), reason="why", moved_at=1769860800.25)
    assert payload(before, after) == {
        "nova_ftvm_object.name": "PairPayload", "nova_ftvm_object.namespace": "nova_ftvm",
        "nova_ftvm_object.version": "1.0", "nova_ftvm_object.data": {
            "pair": "p", "instance": "i", "project": "t", "generation": 6, "old_state": "syncing",
            "state": "protected", "reason": "why", "primary_host": "hx", "backup_host": "hy", "active_host": "hx",
            "at": "2026-01-31T12:00:00.250Z"}}


def test_a_pairs_first_notification_has_no_old_state():
    assert payload(None, pair_in(PairState.PENDING))["nova_ftvm_object.data"]["old_state"] is None


def test_the_token_is_never_told():
    assert "secret" not in str(payload(pair_in(), pair_in(PairState.DEGRADED)))


@pytest.mark.parametrize("state", list(PairState))
def test_the_event_is_named_after_what_the_server_shows(state):
    posted = []
    announcer(lambda *notice: posted.append(notice))(None, pair_in(state))
    [(priority, event_type, _)] = posted
    assert event_type == f"ftvm.pair.{state.value}"
    assert priority == ("error" if state is PairState.ERROR else "info")


def test_a_notification_goes_the_way_that_the_configuration_says(conf, sent):
    notifications.sender(conf, "ctl")  # registers the options
    conf.set_override("driver", ["test"], "oslo_messaging_notifications")
    send = notifications.sender(conf, "nova-ftvm-manager:ctl")
    announcer(send)(None, pair_in(PairState.ERROR))
    [(_, message, priority, _)] = sent
    assert (message["publisher_id"], message["event_type"], priority) == (
        "nova-ftvm-manager:ctl", "ftvm.pair.error", "ERROR")
    assert message["payload"]["nova_ftvm_object.data"]["instance"] == "i"


def test_without_a_driver_nothing_is_sent(conf, sent):
    notifications.sender(conf, "ctl")("info", "ftvm.pair.pending", {})
    assert sent == []


def test_notifications_are_sent_in_their_order():
    done, sent = threading.Event(), []

    def send(*notice):
        sent.append(notice[1])
        if len(sent) == 5:
            done.set()

    bulletin = Bulletin(send)
    for number in range(5):
        bulletin.post("info", str(number), {})
    bulletin.start()
    assert done.wait(10) and sent == list("01234")


class HungBroker:
    """Takes the first notification, and does not come back before it is told to."""

    def __init__(self):
        self.taken, self.back, self.idle = threading.Event(), threading.Event(), threading.Event()
        self.sent = []

    def __call__(self, priority, event_type, payload):
        self.taken.set()
        assert self.back.wait(30)
        self.sent.append(event_type)
        if event_type == "last":
            self.idle.set()


def test_a_broker_that_hangs_holds_up_nobody_and_the_newest_are_kept(caplog):
    broker = HungBroker()
    bulletin = Bulletin(broker, room=3)
    bulletin.start()
    bulletin.post("info", "first", {})
    assert broker.taken.wait(10)
    for number in range(5):
        bulletin.post("info", str(number), {})  # would wait for ever if it waited at all
    bulletin.post("info", "last", {})
    assert not broker.sent
    broker.back.set()
    assert broker.idle.wait(10)
    assert broker.sent == ["first", "3", "4", "last"]
    assert [record.args[0] for record in caplog.records if "is dropped" in record.message] == ["0", "1", "2"]


def test_an_arbiter_behind_a_broker_that_hangs_grants(tmp_path):
    """The whole path: were anything of it done by the asking thread, this test would not end."""
    broker = HungBroker()
    bulletin = Bulletin(broker, room=2)
    bulletin.start()
    world = World(f"sqlite:///{tmp_path}/n.sqlite")
    world.manager.arbiter._announce = announcer(bulletin.post)
    world.protect()
    assert broker.taken.wait(10)
    assert world.promote()["granted"] and world.pair.primary_host == "hy"
    assert not broker.sent
    broker.back.set()


def test_a_broker_that_fails_gets_the_next_notification_all_the_same(monkeypatch):
    monkeypatch.setattr("nova_ftvm.failover.loops._BACK_OFF_S", 0.0)
    monkeypatch.setattr(bulletins, "_IDLE_S", 0.01)
    arrived = threading.Event()

    def send(priority, event_type, payload):
        if event_type == "lost":
            raise OSError("no route")
        arrived.set()

    bulletin = Bulletin(send)
    bulletin.start()
    bulletin.post("info", "lost", {})
    bulletin.post("info", "kept", {})
    assert arrived.wait(10)
