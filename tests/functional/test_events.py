"""cloud/events.py and cloud/claims.py: small rules on which much hangs."""

import dataclasses
import threading

import pytest
from nova.virt import event as virt_event

from nova_ftvm.cloud import claims, events
from nova_ftvm.cloud.settings import CONF
from nova_ftvm.exception import Unsupported
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


def test_a_folder_that_is_there_is_not_claimed_and_not_changed(folder):
    (folder / "u1").mkdir()
    (folder / "u1" / "disk").write_text("the primary's")
    with pytest.raises(Unsupported, match="there already"):
        claims.stake(claim())
    assert [path.name for path in (folder / "u1").iterdir()] == ["disk"]
    claims.remove_files(claim())
    assert (folder / "u1" / "disk").read_text() == "the primary's"


def test_of_many_hosts_on_shared_storage_one_gets_the_folder(folder):
    won = []

    def stake(host):
        try:
            claims.stake(claim(host=host))
            won.append(host)
        except Unsupported:
            pass

    threads = [threading.Thread(target=stake, args=(f"host{number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(won) == 1 and claims.of("u1", won[0]) == claim(host=won[0])


def test_a_claim_that_cannot_be_written_leaves_no_folder(folder, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(claims.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        claims.stake(claim())
    assert list(folder.iterdir()) == []


def test_files_go_with_their_claim_and_nothing_else_does(folder):
    for uuid in ("u1", "u2"):
        claims.stake(claim(uuid))
        (folder / uuid / "disk").touch()
    claims.remove_files(claim("u1"))
    claims.remove_files(claim("u1"))
    assert [path.name for path in folder.iterdir()] == ["u2"]


@pytest.mark.parametrize("other", [
    claim(host="elsewhere"), dataclasses.replace(claim(), backup_id="another"), None])
def test_files_of_another_claim_or_of_none_stay(folder, other, monkeypatch):
    claims.stake(claim())
    (folder / "u1" / "disk").touch()
    claims.drop("u1")
    if other is not None:
        claims._write(claims._path("u1"), other)
    moves = []
    monkeypatch.setattr(claims.os, "rename", lambda *names: moves.append(names))
    claims.remove_files(claim())
    assert moves == []
    assert (folder / "u1" / "disk").exists() and [path.name for path in folder.iterdir()] == ["u1"]


def test_files_that_become_the_servers_at_the_last_moment_are_put_back(folder, monkeypatch):
    claims.stake(claim())
    (folder / "u1" / "disk").touch()
    rename = claims.os.rename

    def adopted_first(source, target):
        (folder / "u1" / "ftvm-standby.json").unlink(missing_ok=True)
        rename(source, target)

    monkeypatch.setattr(claims.os, "rename", adopted_first)
    claims.remove_files(claim())
    assert (folder / "u1" / "disk").exists() and [path.name for path in folder.iterdir()] == ["u1"]


def test_an_interrupted_removal_is_ended_later(folder, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(_):
        raise Killed

    claims.stake(claim())
    (folder / "u1" / "disk").touch()
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(claims.os, "unlink", killed)
        claims.remove_files(claim())
    assert claims.of("u1", "here") is None and list(folder.glob("*/disk"))
    claims.remove_leftovers("elsewhere")
    assert list(folder.glob("*/disk"))
    claims.remove_leftovers("here")
    assert list(folder.iterdir()) == []
