"""What a user does to a protected server on purpose is never taken for a failure, and leaves nothing behind."""

from collections.abc import Iterator

import pytest
from ftvm_lab import failover, leftovers
from ftvm_lab.command import wait_until
from ftvm_lab.failover import Protected, Stage
from ftvm_lab.traffic import wait_for_guest

pytestmark = pytest.mark.timeout(600)

SETTLE_S = 60.0


@pytest.fixture(scope="module")
def protected(stage: Stage) -> Iterator[Protected]:
    made = failover.protect(stage, "planned")
    yield made
    failover.clean_up(stage, made.before.server_id, None)


def test_a_stopped_server_stays_stopped_and_is_protected_again_once_started(
    stage: Stage, protected: Protected
) -> None:
    server_id = protected.before.server_id
    stage.openstack(["server", "stop", server_id], cloud="admin")
    wait_until("the server to stop", lambda: stage.servers.get(server_id).status == "SHUTOFF", SETTLE_S)
    wait_until("its backup to go", lambda: [s.id for s in stage.servers.all()] == [server_id], SETTLE_S)
    assert stage.servers.get(server_id).status == "SHUTOFF"
    assert stage.servers.protection(server_id)[0] == "unprotected"
    stage.openstack(["server", "start", server_id], cloud="admin")
    wait_until(
        "protection after the start",
        lambda: stage.servers.protection(server_id)[0] == "protected",
        failover.PROTECT_TIMEOUT_S,
    )
    wait_for_guest(protected.before.address, failover.BOOT_TIMEOUT_S)
    assert stage.servers.host(server_id) == protected.before.host


def test_a_deleted_server_leaves_nothing_on_the_hosts_and_in_the_cloud(stage: Stage, protected: Protected) -> None:
    stage.servers.delete(protected.before.server_id)
    stage.servers.wait_until_clean(failover.CLEAN_TIMEOUT_S)
    wait_until("hosts with nothing on them", lambda: not any(leftovers.on_hosts(stage.layout).values()), SETTLE_S)
    assert leftovers.in_cloud(stage.servers.connection) == []
