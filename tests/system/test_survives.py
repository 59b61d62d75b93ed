"""A protected server's host loses its power under traffic: the demo's scenario, once."""

from collections.abc import Iterator

import pytest
from ftvm_lab import failover
from ftvm_lab.failover import Outcome, Stage
from ftvm_lab.traffic import wait_for_guest

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def outcome(stage: Stage) -> Iterator[Outcome]:
    protected = failover.protect(stage, "survivor")
    result = failover.lose_host(stage, protected, rtt_ms_p50_unprotected=0.0)
    yield result
    failover.clean_up(stage, result.server, result.primary_host)


def test_the_same_server_runs_on_its_backups_host(outcome: Outcome) -> None:
    assert outcome.same_identity
    assert outcome.primary_host != outcome.backup_host == outcome.host_after


def test_no_request_is_lost_and_no_connection_is_opened_again(outcome: Outcome) -> None:
    traffic = outcome.traffic
    assert (traffic.lost, traffic.wrong, traffic.reconnects) == (0, 0, 0)
    assert traffic.requests > traffic.connections


def test_the_guest_speaks_before_nova_has_caught_up(outcome: Outcome) -> None:
    times = outcome.times
    assert times.first_reply is not None
    assert times.nova_done is not None
    assert times.first_reply < times.nova_done


def test_the_primary_has_counted_its_checkpoints(outcome: Outcome) -> None:
    assert outcome.checkpoints.count > 0
    assert outcome.checkpoints.pause_ms_p50 > 0


def test_the_guest_boots_again_after_a_failover(stage: Stage, outcome: Outcome) -> None:
    stage.openstack(["server", "reboot", "--wait", outcome.server])
    wait_for_guest(stage.servers.address(outcome.server), failover.BOOT_TIMEOUT_S)
    assert stage.servers.host(outcome.server) == outcome.backup_host
