"""A protected server moves to its backup's host because its owner's operator says so, and no client notices."""

import time
from collections.abc import Iterator

import pytest
from ftvm_lab import failover
from ftvm_lab.command import wait_until
from ftvm_lab.failover import Protected, Stage
from ftvm_lab.layout import COMPUTES, compute
from ftvm_lab.machine import Machine
from ftvm_lab.traffic import Traffic

pytestmark = pytest.mark.timeout(600)

BEFORE_S = 3.0
#: A planned failover has nothing to detect.
GAP_MS = 1000.0
SETTLE_S = 60.0


@pytest.fixture(scope="module")
def protected(stage: Stage) -> Iterator[Protected]:
    made = failover.protect(stage, "moves")
    yield made
    failover.clean_up(stage, made.before.server_id, None)


def _running(stage: Stage, host: str) -> list[str]:
    """The guests that run there. The server's next standby may be there too, and is paused."""
    return Machine(stage.layout, compute(host)).call(["virsh", "list", "--state-running", "--uuid"]).split()


def _switch_over(stage: Stage, server_id: str, host: str) -> None:
    stage.openstack(["server", "migrate", "--live-migration", "--host", host, "--wait", server_id], cloud="admin")


@pytest.mark.parametrize("turn", ["there", "and on"])
def test_a_live_migration_to_the_backups_host_is_a_failover_without_a_failure(
    stage: Stage, protected: Protected, turn: str
) -> None:
    before = stage.place(protected.before.server_id)
    stage.servers.wait_for_state(before.server_id, "protected", failover.PROTECT_TIMEOUT_S)
    backup = stage.servers.wait_for_backup(before.server_id, failover.PROTECT_TIMEOUT_S)
    with Traffic(before.address) as traffic:
        time.sleep(BEFORE_S)
        _switch_over(stage, before.server_id, str(backup.compute_host))
        stage.servers.wait_for_move(before.server_id, str(backup.compute_host), failover.MOVE_TIMEOUT_S)
        time.sleep(BEFORE_S)
        report = traffic.finish()
    print(f"longest gap {report.longest_gap_ms} ms, {report.requests} requests")
    assert (report.lost, report.wrong, report.reconnects) == (0, 0, 0)
    assert report.longest_gap_ms < GAP_MS
    after = stage.place(before.server_id)
    assert (after.address, after.port_id) == (before.address, before.port_id)
    assert before.server_id in _running(stage, after.host)
    wait_until("the old guest to go", lambda: before.server_id not in _running(stage, before.host), SETTLE_S)
    wait_until("protection, by itself",
               lambda: stage.servers.protection(before.server_id)[0] == "protected", failover.PROTECT_TIMEOUT_S)


def test_a_host_that_is_not_the_backups_takes_the_server_in_novas_own_way(stage: Stage, protected: Protected) -> None:
    server_id = protected.before.server_id
    backup = stage.servers.wait_for_backup(server_id, failover.PROTECT_TIMEOUT_S)
    here = stage.servers.host(server_id)
    (other,) = (node.name for node in COMPUTES if node.name not in (here, str(backup.compute_host)))
    _switch_over(stage, server_id, other)
    stage.servers.wait_for_move(server_id, other, failover.MOVE_TIMEOUT_S)
    wait_until("protection, by itself",
               lambda: stage.servers.protection(server_id)[0] == "protected", failover.PROTECT_TIMEOUT_S)
