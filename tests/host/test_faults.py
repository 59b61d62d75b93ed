"""An engine dies, hangs or is stopped at each named point: the guest runs on, silent until somebody may release it.

One guest lives through all of it; its workload checks its memory all the time, its session is checked by each case.
"""

import os
import socket
import time
from collections.abc import Iterator

import pytest

from nova_ftvm.cmd.agent import lost_engines
from nova_ftvm.engine.faults import Fault
from nova_ftvm.host.guests import Guests
from tests.host.conftest import CHURN, Launch
from tests.host.machine import ORDER, Engine, Network, Qemu, Session, wait_for
from tests.host.protection import Protection, protected

#: What a busy machine may add to the watchdog's limit.
SLACK_S = 1.0
#: What QEMU may take to be asked for the end of its filters (engine/primary.py).
ASKING_SLACK_S = 10.0
#: How often a point is passed before it harms: checkpoints on the primary; on the backup also pieces of the first copy.
PASSES = {"primary": 30, "backup": 160}

ON_BACKUP = (Fault.BEFORE_APPLY, Fault.APPLIED)
IN_PROMOTION = (Fault.BEFORE_LOAD, Fault.LOADED)
#: Those of disks are in test_disk_faults.py: the guest here has none.
OF_DISKS = (Fault.MIRROR_STARTED, Fault.DISK_SHIPPED, Fault.BEFORE_SETTLE, Fault.SETTLED)
IN_HAND_OVER = (Fault.HANDED_OVER, Fault.ASKED)
#: Those of a guest under KVM are in tests/kvm.
UNDER_KVM = (Fault.PROTECTED, Fault.BEFORE_FORWARD, Fault.FORWARDED)
BY_THEMSELVES = (*ON_BACKUP, *UNDER_KVM, *IN_PROMOTION, *OF_DISKS, *IN_HAND_OVER, Fault.BUFFERED, Fault.BEFORE_UNBUFFER)
ON_PRIMARY = tuple(fault for fault in Fault if fault not in BY_THEMSELVES)
HOWS = ("kill", "hang", "stop")


@pytest.fixture(scope="module")
def primary(module_launch: Launch) -> Qemu:
    guest = module_launch("p", work=CHURN)
    guest.await_boot()
    return guest


@pytest.fixture
def standby(launch: Launch) -> Qemu:
    return launch("b", work=CHURN, standby=True)


@pytest.fixture
def session(primary: Qemu, network: Network) -> Iterator[Session]:
    made = Session(network)
    made.exchange()
    yield made
    made.close()


def ask_until_silence(session: Session, engine: Engine) -> tuple[bytes, float]:
    """(the reply that is held, when the last one before it came). A busy machine is silent too, before the fault."""
    heard = time.monotonic()
    while True:
        unanswered = session.send()
        while not session.hears_within(0.3):
            if engine.has_tripped() and not session.hears_within(0.1):
                return unanswered, heard
        session.receive(unanswered)
        heard = time.monotonic()
        assert session.count < 2000, "the fault did not come"


def has_precedence(guest: Qemu) -> bool:
    """Before whatever else runs on the host (host/precedence.py)."""
    return os.sched_getscheduler(guest.process.pid) != os.SCHED_OTHER


def stays_silent(session: Session) -> bool:
    return not session.hears_within(0.4)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("point", ON_PRIMARY, ids=lambda point: point.value)
def test_the_guest_runs_on_in_silence_when_its_engine_fails(point: Fault, how: str, primary: Qemu, standby: Qemu,
                                                            session: Session) -> None:
    with protected(primary, standby, primary_fault=f"{point.value}:{how}:{PASSES['primary']}") as pair:
        unanswered, heard = ask_until_silence(session, pair.primary)
        assert primary.is_running()
        bound_s = ORDER["hold_limit_ms"] / 1000 + SLACK_S
        assert time.monotonic() - heard < bound_s, "the guest was held for longer than the watchdog allows"
        primary.await_ticks()
        assert "no heartbeat" in pair.backup.hear("ask_promotion")["evidence"]
        assert stays_silent(session), "output left that nobody may release"
        wait_for("the watchdog ends an engine that does not go on", pair.primary.ended, bound_s)
        wait_for("nothing is left of its precedence", lambda: not has_precedence(primary), 1.0)
        pair.end()
        session.receive(unanswered)
        session.exchange(5)
        primary.await_sound("churn")


def test_qemu_has_precedence_in_a_pause_and_not_after_it(primary: Qemu, standby: Qemu, session: Session) -> None:
    with protected(primary, standby, primary_fault=f"{Fault.CAPTURED.value}:stop:{PASSES['primary']}",
                   hold_limit_ms=2000.0) as pair:
        wait_for("the engine is stopped in a pause", pair.primary.has_tripped)
        assert has_precedence(primary)
        wait_for("the keeper gives it back", lambda: not has_precedence(primary))
        primary.await_ticks()


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("point", ON_BACKUP, ids=lambda point: point.value)
def test_the_primary_goes_on_alone_by_grant_when_the_backups_engine_fails(
        point: Fault, how: str, primary: Qemu, standby: Qemu, session: Session) -> None:
    with protected(primary, standby, backup_fault=f"{point.value}:{how}:{PASSES['backup']}") as pair:
        unanswered, _ = ask_until_silence(session, pair.backup)
        assert pair.primary.hear("ask_degrade", 5.0)["reason"]
        assert primary.is_running()
        assert stays_silent(session), "output left that nobody granted"
        pair.primary.grant()
        session.receive(unanswered)
        session.exchange(5)
        assert pair.primary.hear("ended")["phase"] == "alone"
        wait_for("the primary's engine ends", lambda: pair.primary.ended())
        assert pair.primary.process.returncode == 0
        primary.await_sound("churn")


@pytest.mark.parametrize(("point", "left_in"), [(Fault.BEFORE_LOAD, "inmigrate"), (Fault.LOADED, "paused")],
                         ids=["before-load", "loaded"])
def test_a_promotion_that_dies_half_way_leaves_no_running_guest(point: Fault, left_in: str, primary: Qemu,
                                                                standby: Qemu, session: Session) -> None:
    with protected(primary, standby, backup_fault=f"{point.value}:kill") as pair:
        session.exchange(5)
        pair.primary.kill()
        pair.backup.hear("ask_promotion")
        pair.backup.grant()
        wait_for("the backup's engine dies", lambda: pair.backup.ended())
        assert pair.backup.heard("promoted") is None
        assert standby.operator.command("query-status")["status"] == left_in


@pytest.mark.parametrize("how", HOWS)
def test_a_guest_that_was_handed_over_goes_on_in_its_backup_though_the_engine_that_did_it_failed(
        how: str, primary: Qemu, standby: Qemu, session: Session) -> None:
    with protected(primary, standby, primary_fault=f"{Fault.HANDED_OVER.value}:{how}") as pair:
        session.exchange(5)
        pair.primary.order("hand_over")
        pair.backup.hear("ask_promotion")
        unanswered = session.send()
        assert primary.is_running() and stays_silent(session), "output left that nobody granted"
        pair.backup.grant()
        pair.backup.hear("promoted")
        session.receive(unanswered)
        session.exchange(5)
        standby.await_sound("churn")


@pytest.mark.parametrize("how", HOWS)
def test_a_guest_that_was_handed_over_stays_by_grant_when_the_engine_that_asked_for_it_fails(
        how: str, primary: Qemu, standby: Qemu, session: Session) -> None:
    with protected(primary, standby, backup_fault=f"{Fault.ASKED.value}:{how}") as pair:
        session.exchange(5)
        pair.primary.order("hand_over")
        pair.backup.hear("ask_promotion")
        unanswered = session.send()
        pair.primary.hear("ask_degrade")
        assert primary.is_running() and stays_silent(session), "output left that nobody granted"
        pair.primary.grant()
        session.receive(unanswered)
        session.exchange(5)
        assert standby.operator.command("query-status")["status"] == "inmigrate"
        primary.await_sound("churn")


def test_a_guest_whose_engine_died_unseen_is_found_by_its_note_and_let_go(primary: Qemu, standby: Qemu,
                                                                          session: Session) -> None:
    name, runtime = primary.folder.name, str(primary.folder.parent)
    with protected(primary, standby, instance_id=name) as pair:
        session.exchange(5)
        pair.primary.kill()
        unanswered = session.send()
        (lost,) = lost_engines(runtime, [])
        assert (lost.pair_id, lost.generation, lost.instance_id) == ("pair", 1, name)
        assert stays_silent(session)
        Guests(runtime, (0, 0), "").let_go(name)
        session.receive(unanswered)
        session.exchange(5)
        assert lost_engines(runtime, []) == []
        primary.await_sound("churn")


def test_a_guest_whose_engine_died_before_its_first_checkpoint_is_found_by_its_note_and_let_go(
        primary: Qemu, standby: Qemu, session: Session) -> None:
    name, runtime = primary.folder.name, str(primary.folder.parent)
    with protected(primary, standby, instance_id=name, primary_fault=f"{Fault.BUFFERED.value}:kill", until="") as pair:
        wait_for("the primary's engine dies", lambda: pair.primary.ended())
        unanswered = session.send()
        assert primary.is_running() and stays_silent(session), "output left that nobody may release"
        (lost,) = lost_engines(runtime, [])
        assert (lost.pair_id, lost.generation, lost.instance_id) == ("pair", 1, name)
        Guests(runtime, (0, 0), "").let_go(name)
        session.receive(unanswered)
        session.exchange(5)
        assert lost_engines(runtime, []) == []


@pytest.mark.parametrize("how", HOWS)
def test_a_guest_that_may_go_on_alone_is_let_go_by_its_note_when_its_engine_fails_to(
        how: str, primary: Qemu, standby: Qemu, session: Session) -> None:
    name, runtime = primary.folder.name, str(primary.folder.parent)
    fault = f"{Fault.BEFORE_UNBUFFER.value}:{how}"
    with protected(primary, standby, instance_id=name, primary_fault=fault) as pair:
        session.exchange(5)
        pair.backup.kill()
        unanswered = session.send()
        pair.primary.hear("ask_degrade")
        pair.primary.grant()
        bound_s = ORDER["hold_limit_ms"] / 1000 + ASKING_SLACK_S + SLACK_S
        wait_for("the primary's engine ends, by the watchdog's hand at the latest", pair.primary.ended, bound_s)
        assert primary.is_running() and stays_silent(session)
        (lost,) = lost_engines(runtime, [])
        assert (lost.instance_id, lost.generation) == (name, 1)
        Guests(runtime, (0, 0), "").let_go(name)
        session.receive(unanswered)
        session.exchange(5)
        assert lost_engines(runtime, []) == []
        primary.await_sound("churn")


def test_a_planned_end_releases_everything_and_leaves_no_standby(primary: Qemu, standby: Qemu,
                                                                 session: Session) -> None:
    with protected(primary, standby) as pair:
        session.exchange(5)
        unanswered = session.send()
        pair.primary.order("stop", reason="switched off")
        session.receive(unanswered)
        session.exchange(5)
        assert pair.primary.hear("ended")["phase"] == "ended"
        assert pair.backup.hear("ended")["phase"] == "given up"
        assert pair.backup.heard("ask_promotion") is None
        assert not list(primary.folder.glob("*.note"))


def protection_goes_on(pair: Protection, session: Session) -> None:
    session.exchange(5)
    assert not pair.primary.ended() and not pair.backup.ended()


def test_a_stranger_on_the_synchronisation_port_changes_nothing(primary: Qemu, standby: Qemu,
                                                                session: Session) -> None:
    with protected(primary, standby) as pair, socket.create_connection(("127.0.0.1", pair.port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
        protection_goes_on(pair, session)


# The last one: the guest ends with it.


def test_a_refused_primary_ends_with_its_output_unsaid(primary: Qemu, standby: Qemu, session: Session) -> None:
    with protected(primary, standby) as pair:
        session.exchange(5)
        pair.backup.kill()
        session.send()
        pair.primary.hear("ask_degrade")
        pair.primary.order("grant", granted=False, generation=2, reason="the backup was promoted")
        assert pair.primary.hear("fenced")["reason"] == "the backup was promoted"
        wait_for("the guest's QEMU ends", lambda: primary.process.poll() is not None)
        assert stays_silent(session)
