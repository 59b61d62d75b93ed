"""What a user asks for and cannot have: the server runs, and says why it is not protected."""

from collections.abc import Iterator

import pytest
from ftvm_lab import cloud, computes, failover
from ftvm_lab.command import wait_until
from ftvm_lab.failover import Stage
from ftvm_lab.layout import COMPUTES
from ftvm_lab.machine import Machine
from ftvm_lab.seed import IMAGE, NETWORK
from ftvm_lab.servers import BACKUP_PREFIX, NotProtected
from ftvm_lab.traffic import wait_for_guest
from openstack.image.v2._proxy import Proxy

pytestmark = pytest.mark.timeout(600)

TOLD_S = 60.0


@pytest.fixture(autouse=True)
def clean_cloud(stage: Stage) -> Iterator[None]:
    yield
    for server in stage.servers.all():
        if not server.name.startswith(BACKUP_PREFIX) or server.project_id == _demo_project(stage):
            stage.servers.delete(server.id)
    stage.servers.wait_until_clean(failover.CLEAN_TIMEOUT_S)


def _demo_project(stage: Stage) -> str:
    """The plain user's project."""
    return str(cloud.connect(stage.layout, "demo").current_project_id)


def test_a_value_that_cannot_be_read_leaves_the_server_unprotected_with_a_reason(stage: Stage) -> None:
    server_id = stage.create("undecided", "ft=maybe")
    with pytest.raises(NotProtected) as refused:
        stage.servers.wait_for_state(server_id, "protected", TOLD_S)
    assert "maybe" in refused.value.reason
    assert stage.servers.protection(server_id)[0] == "unprotected"
    server = stage.servers.get(server_id)
    assert (server.status, server.task_state) == ("ACTIVE", None)
    assert [found.id for found in stage.servers.all()] == [server_id]


def test_a_plain_users_server_cannot_pass_for_a_backup(stage: Stage) -> None:
    victim = stage.create("victim")
    forged = BACKUP_PREFIX + victim
    stage.openstack(
        [
            *("server", "create", "--image", IMAGE, "--flavor", "ftvm.nano", "--network", NETWORK),
            *("--property", "ft:state=protected", "--hint", f"ftvm:primary={victim}"),
            *("--wait", "-c", "id", "-c", "status", forged),
        ]
    )
    server = next(found for found in stage.servers.all() if found.name == forged)
    # A standby would wait for a migration: it would not boot.
    wait_for_guest(stage.servers.address(server.id), failover.BOOT_TIMEOUT_S)
    domain = _on_its_host(stage, server.compute_host, "virsh", "dumpxml", server.id)
    assert "incoming" not in domain


def _on_its_host(stage: Stage, host: str, *argv: str) -> str:
    (node,) = (node for node in COMPUTES if node.name == host)
    return Machine(stage.layout, node).call(argv)


def test_a_drive_on_the_ide_bus_is_refused_with_what_to_do(stage: Stage) -> None:
    image = stage.servers.connection.image
    assert isinstance(image, Proxy)
    good = image.find_image(IMAGE, ignore_missing=False)
    bad = image.create_image(
        name="ide",
        filename=str(stage.layout.guest / "disk.qcow2"),
        container_format="bare",
        disk_format="qcow2",
        visibility="public",
        wait=True,
        kernel_id=good.kernel_id,
        ramdisk_id=good.ramdisk_id,
        hw_machine_type="pc",
        hw_cdrom_bus="ide",
    )
    words = ["server", "create", "--property", "ft=true", "--image", "ide", "--flavor", "ftvm.nano"]
    stage.openstack([*words, "--network", NETWORK, "--wait", "-c", "id", "-c", "status", "ide"])
    (server,) = stage.servers.all()
    with pytest.raises(NotProtected) as refused:
        stage.servers.wait_for_state(server.id, "protected", TOLD_S)
    assert "hw_cdrom_bus=scsi" in refused.value.reason
    assert stage.servers.get(server.id).status == "ACTIVE"
    image.delete_image(bad)


def test_glance_describes_both_ways_to_ask(stage: Stage) -> None:
    image = stage.servers.connection.image
    assert isinstance(image, Proxy)
    described = {
        namespace.namespace: {found.name for found in image.metadef_properties(namespace)}
        for namespace in image.metadef_namespaces()
    }
    assert "ft" in described["OS::Compute::FaultTolerance"]
    assert "enabled" in described["OS::Compute::FaultToleranceFlavor"]


def test_a_server_waits_with_a_reason_while_only_one_host_can_protect(stage: Stage) -> None:
    only, *others = COMPUTES
    spares = [Machine(stage.layout, node) for node in others]
    for spare in spares:
        spare.stop(computes.AGENT)
        # Where there is no agent a guest starts unarmed: Nova must put this one on the host that has one.
        _let_nova_use(stage, spare, False)
    try:
        server_id = stage.create("lonely", "ft=true")
        assert stage.servers.host(server_id) == only.name
        wait_until(
            "the reason, with what to do",
            lambda: "start nova-ftvm-agent on another compute host" in stage.servers.protection(server_id)[1],
            TOLD_S,
        )
        assert stage.servers.protection(server_id)[0] != "protected"
        assert stage.servers.get(server_id).status == "ACTIVE"
    finally:
        for spare in spares:
            computes.start(spare, computes.AGENT)
            _let_nova_use(stage, spare, True)
    wait_until(
        "protection, as soon as there is another host",
        lambda: stage.servers.protection(server_id)[0] == "protected",
        failover.PROTECT_TIMEOUT_S,
    )


def _let_nova_use(stage: Stage, machine: Machine, usable: bool) -> None:
    word = "--enable" if usable else "--disable"
    stage.openstack(["compute", "service", "set", word, machine.node.name, "nova-compute"], cloud="admin")
