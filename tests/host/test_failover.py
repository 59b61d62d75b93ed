"""The primary dies; the guest goes on where its last acknowledged word was said."""

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.host.conftest import CHURN, Launch
from tests.host.machine import Network, Qemu, Session, wait_for
from tests.host.protection import protected

SHAPES = [{"machine_type": "pc", "vcpus": 1}, {"machine_type": "q35", "vcpus": 2}]
IDS = ["pc-1-vcpu", "q35-2-vcpus"]


def start(launch: Launch, network: Network, **shape: Any) -> tuple[Qemu, Qemu, Session]:
    """A primary that serves, its standby, and a client."""
    primary, standby = launch("p", work=CHURN, **shape), launch("b", work=CHURN, **shape, standby=True)
    primary.await_boot()
    return primary, standby, Session(network)


def goes_on(guest: Qemu, session: Session, unanswered: bytes) -> None:
    """The promoted guest: same connection, same memory, alive, and fit to boot again."""
    session.receive(unanswered)
    session.exchange(20)
    session.close()
    guest.await_sound("churn")
    guest.operator.command("system_reset")
    guest.await_boot()


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_a_connection_and_its_state_survive_the_death_of_the_primarys_qemu(shape: dict, launch: Launch,
                                                                          network: Network) -> None:
    primary, standby, session = start(launch, network, **shape)
    with protected(primary, standby) as pair:
        session.exchange(20)
        unanswered = session.send()
        primary.kill()
        asked = pair.backup.hear("ask_promotion")
        assert asked["evidence"] == "the primary's agent saw QEMU end"
        pair.backup.grant()
        timeline = pair.backup.hear("promoted")["timeline"]
        assert timeline["detected_at"] <= timeline["granted_at"] <= timeline["running_at"]
        goes_on(standby, session, unanswered)
        assert wait_for("the backup's engine ends", lambda: pair.backup.ended())


def test_a_torn_epoch_is_never_promoted(launch: Launch, network: Network) -> None:
    """The engine dies half-way through shipping, the guest with it: the last whole epoch goes on."""
    primary, standby, session = start(launch, network)
    with protected(primary, standby, primary_fault="shipped-half:kill:40") as pair:
        while True:
            unanswered = session.send()
            if not session.hears_within(0.3):
                break
            session.receive(unanswered)
        assert wait_for("the primary's engine dies", lambda: pair.primary.ended())
        primary.kill()
        assert "no heartbeat" in pair.backup.hear("ask_promotion")["evidence"]
        pair.backup.grant()
        pair.backup.hear("promoted")
        goes_on(standby, session, unanswered)


@pytest.fixture
def patient(network: Network) -> Iterator[None]:
    """A client that waits longer before it sends again than for a reply."""
    network.set_rto_min(30_000)
    yield
    network.set_rto_min(200)


@pytest.mark.usefixtures("patient")
def test_what_was_under_way_when_the_host_died_arrives_though_nobody_sends_it_again(launch: Launch,
                                                                                  network: Network) -> None:
    primary, standby, session = start(launch, network)
    with protected(primary, standby) as pair:
        session.exchange(20)
        # From now on nothing is acknowledged: an epoch is on its way, with the first request, and the guest runs on.
        os.kill(pair.backup.process.pid, signal.SIGSTOP)
        unanswered = []
        for _ in range(2):
            unanswered.append(session.send())
            time.sleep(0.1)
        pair.primary.kill()
        primary.kill()
        os.kill(pair.backup.process.pid, signal.SIGCONT)
        pair.backup.hear("ask_promotion")
        pair.backup.grant()
        pair.backup.hear("promoted")
        for reply in unanswered:
            session.receive(reply)
        goes_on(standby, session, session.send())


def test_silence_alone_asks_and_without_an_answer_nothing_is_promoted(launch: Launch, network: Network) -> None:
    """A primary that is stopped as a whole host would be: the backup asks again and again, and stays a standby."""
    primary, standby, session = start(launch, network)
    with protected(primary, standby, hold_limit_ms=20000.0) as pair:
        session.exchange(5)
        primary.process.send_signal(signal.SIGSTOP)
        os.kill(pair.primary.process.pid, signal.SIGSTOP)
        unanswered = session.send()
        for _ in range(3):
            pair.backup.hear("ask_promotion")
        assert standby.operator.command("query-status")["status"] == "inmigrate"
        asked_at = time.monotonic()
        pair.backup.grant()
        pair.backup.hear("promoted")
        assert time.monotonic() - asked_at < 2.0
        primary.kill()
        goes_on(standby, session, unanswered)


def test_a_handed_over_guest_goes_on_in_its_backup_and_its_old_self_is_never_heard(launch: Launch,
                                                                                   network: Network) -> None:
    primary, standby, session = start(launch, network)
    with protected(primary, standby) as pair:
        session.exchange(20)
        pair.primary.order("hand_over")
        assert pair.backup.hear("ask_promotion")["evidence"] == "the server is moved here"
        unanswered = session.send()
        # Both guests exist, the old one runs: until the arbiter has spoken nobody may answer.
        assert not session.hears_within(0.5)
        pair.backup.grant()
        pair.backup.hear("promoted")
        session.receive(unanswered)
        pair.primary.order("grant", granted=False, generation=2, reason="the backup speaks")
        pair.primary.hear("fenced")
        primary.kill()
        session.exchange(20)
        goes_on(standby, session, session.send())


def test_a_backup_that_may_not_take_the_guest_leaves_it_where_it_was(launch: Launch, network: Network) -> None:
    primary, standby, session = start(launch, network)
    with protected(primary, standby) as pair:
        session.exchange(20)
        unanswered = session.send()
        pair.primary.order("hand_over")
        pair.backup.hear("ask_promotion")
        pair.primary.hear("ask_degrade")
        pair.primary.grant()
        session.receive(unanswered)
        session.exchange(20)
        primary.await_sound("churn")
