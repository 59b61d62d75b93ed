"""cloud/events.py and cloud/claims.py: small rules on which much hangs."""

import pytest
from nova.virt import event as virt_event

from nova_ftvm.cloud import claims, events
from nova_ftvm.cloud.settings import CONF
from nova_ftvm.types import InstanceId, PairId

ALL = (virt_event.EVENT_LIFECYCLE_STARTED, virt_event.EVENT_LIFECYCLE_STOPPED, virt_event.EVENT_LIFECYCLE_PAUSED,
       virt_event.EVENT_LIFECYCLE_RESUMED)


@pytest.fixture(autouse=True)
def folder(tmp_path):
    CONF.set_override("instances_path", str(tmp_path))
    yield tmp_path
    CONF.clear_override("instances_path")


def claim(uuid="u1", host="here"):
    return claims.Claim(InstanceId(uuid), "backup", PairId("pair"), host, "[]")


class Guests:
    def __init__(self, *armed):
        self.armed = armed
        self.asked = 0

    def is_armed(self, uuid):
        self.asked += 1
        return uuid in self.armed


def passed(sieve, uuid="u1", transitions=ALL):
    return [transition for transition in transitions if sieve.passes(virt_event.LifecycleEvent(uuid, transition))]


def test_checkpoints_of_an_armed_guest_are_not_told():
    sieve = events.EventFilter(Guests("u1").is_armed, lambda: "here")
    assert passed(sieve) == list(ALL[:2])


def test_an_ordinary_guests_events_all_pass():
    sieve = events.EventFilter(Guests().is_armed, lambda: "here")
    assert passed(sieve) == list(ALL)


def test_nothing_of_a_standby_is_told():
    claims.stake(claim())
    assert passed(events.EventFilter(Guests().is_armed, lambda: "here")) == []


def test_a_thousand_checkpoints_ask_libvirt_once():
    guests = Guests("u1")
    sieve = events.EventFilter(guests.is_armed, lambda: "here")
    passed(sieve, transitions=ALL[2:] * 500)
    assert guests.asked == 1


def test_a_new_start_is_looked_at_anew():
    guests = Guests("u1")
    sieve = events.EventFilter(guests.is_armed, lambda: "here")
    passed(sieve, transitions=ALL[2:])
    guests.armed = ()
    assert passed(sieve) == list(ALL)


def test_events_that_are_not_of_life_pass():
    assert events.EventFilter(Guests("u1").is_armed, lambda: "here").passes(virt_event.InstanceEvent("u1"))


def test_a_claim_is_this_hosts_only():
    claims.stake(claim(host="elsewhere"))
    assert claims.of("u1", "here") is None
    assert claims.held("here") == {}
    assert claims.of("u1", "elsewhere") == claim(host="elsewhere")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"instance_id": "u1"}', "\xff"])
def test_a_damaged_claim_cleans_nothing_up(folder, text):
    claims.stake(claim())
    (folder / "u1" / "ftvm-standby.json").write_bytes(text.encode("latin-1"))
    assert claims.of("u1", "here") is None
    assert claims.held("here") == {}


def test_a_claim_that_lies_in_another_servers_folder_is_none(folder):
    claims.stake(claim("u1"))
    (folder / "u1").rename(folder / "u2")
    assert claims.held("here") == {}


def test_a_dropped_claim_leaves_the_files(folder):
    claims.stake(claim())
    (folder / "u1" / "disk").touch()
    claims.drop("u1")
    claims.drop("u1")
    assert claims.held("here") == {}
    assert (folder / "u1" / "disk").exists()
