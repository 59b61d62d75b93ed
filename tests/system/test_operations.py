"""Every operation of Nova's on a protected server, on real guests: what its user expects comes of it, the guest is not
harmed, nothing is left behind, and protection comes back by itself.

One server goes through most of it, in this order. tests/functional/test_operations.py has the same operations in the
states that last too short a time here, and what comes of them when the failover manager does not answer.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from ftvm_lab import cloud, computes, control, failover, pairs
from ftvm_lab.blocks import PORT as BLOCKS
from ftvm_lab.blocks import Blocks, Extent, sum_of
from ftvm_lab.command import run, wait_until
from ftvm_lab.failover import Stage
from ftvm_lab.faults import FAULTS, scene_of
from ftvm_lab.layout import COMPUTES, CONTROL, Node, compute
from ftvm_lab.machine import Machine
from ftvm_lab.seed import NETWORK
from ftvm_lab.traffic import IN_CLIENT, Traffic, wait_for_guest
from openstack.compute.v2._proxy import Proxy

from tests.system.footprint import Expected, check
from tests.system.test_disks import slow_copies

pytestmark = [pytest.mark.trial, pytest.mark.timeout(900)]

ACT_S = 60.0
CONTROL_PORT = 7003
#: So much that a slow first copy of it lasts until a test is done with it.
BALLAST = Extent("vda", 128 << 10, 64 << 10)
MARK = Extent("vda", 64 << 10, 64)
LARGER = "ftvm.larger"

#: What is done to the server of that id.
Act = Callable[[str], Any]


@dataclass(slots=True)
class Story:
    """One server, and what its user and its operator do."""

    stage: Stage
    id: str
    address: str

    @property
    def compute(self) -> Proxy:
        proxy = self.stage.servers.connection.compute
        assert isinstance(proxy, Proxy)
        return proxy

    @property
    def host(self) -> Node:
        return compute(self.stage.servers.host(self.id))

    @property
    def backup_host(self) -> Node:
        backup = self.stage.servers.wait_for_backup(self.id, failover.PROTECT_TIMEOUT_S)
        return compute(str(backup.compute_host))

    @property
    def state(self) -> str:
        return self.stage.servers.protection(self.id)[0]

    @property
    def generation(self) -> int:
        return pairs.pair(self.stage.layout, self.id).generation

    def becomes(self, status: str) -> None:
        def reached() -> bool:
            server = self.stage.servers.get(self.id)
            return bool(server.status == status and server.task_state is None)

        wait_until(f"the server to be {status}", reached, ACT_S)

    def shows(self, state: str) -> None:
        wait_until(f"ft:state to be {state}", lambda: self.state == state, failover.PROTECT_TIMEOUT_S)

    def serves(self) -> None:
        wait_for_guest(self.address, failover.BOOT_TIMEOUT_S)

    def is_whole(self, *images: str) -> None:
        """Protected, and nothing is there that should not be."""
        # The row first: what the server shows may be from before.
        wait_until(
            "the pair to be protected",
            lambda: pairs.pair(self.stage.layout, self.id).state == "protected",
            failover.PROTECT_TIMEOUT_S,
            1.0,
        )
        self.shows("protected")
        check(self.stage, Expected(self.stage, self.id, protected=True, images=images))

    def is_alone(self) -> None:
        """Without a backup, and without anything of one."""
        check(self.stage, Expected(self.stage, self.id))

    def boot(self) -> str:
        """Which boot of the guest this is. Tells a reboot from a pause."""
        return _ask(self.address, "boot").strip()

    def does(self, word: str) -> None:
        """The guest does something to itself."""
        _ask(self.address, word)

    @contextmanager
    def ended_and_protected_again(self, *images: str) -> Iterator[None]:
        """Around an operation that ends protection: it ends by a word of the driver, and comes back by itself."""
        before = self.generation
        yield
        wait_until("protection to end", lambda: self.generation > before, ACT_S)
        self.is_whole(*images)

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Around what no client may notice."""
        with Traffic(self.address) as traffic:
            time.sleep(1.0)
            yield
            time.sleep(1.0)
            report = traffic.finish()
        assert (report.lost, report.wrong, report.reconnects) == (0, 0, 0)
        assert report.requests > report.connections


def _ask(address: str, word: str) -> str:
    program = (
        "import socket, sys\n"
        "connection = socket.create_connection((sys.argv[1], int(sys.argv[2])), 10)\n"
        "connection.settimeout(10)\n"
        "connection.sendall((sys.argv[3] + '\\n').encode())\n"
        "try: print(connection.makefile().read(), end='')\n"
        "except (TimeoutError, ConnectionResetError): pass\n"
    )
    return run([*IN_CLIENT, sys.executable, "-c", program, address, str(CONTROL_PORT), word], timeout_s=30)


@pytest.fixture(scope="module")
def story(stage: Stage) -> Iterator[Story]:
    stage.servers.connection.compute.create_flavor(name=LARGER, ram=256, vcpus=1, disk=1)
    made = failover.protect(stage, "operations")
    yield Story(stage, made.before.server_id, made.before.address)
    failover.clean_up(stage, made.before.server_id, None)
    check(stage)


def _switched(story: Story, word: str) -> None:
    story.compute.set_server_metadata(story.id, ft=word)


def test_what_leaves_the_guest_alone_leaves_its_protection_alone(story: Story) -> None:
    story.is_whole()
    before = story.generation
    with story.undisturbed():
        story.compute.lock_server(story.id)
        story.compute.set_server_metadata(story.id, colour="blue")
        story.compute.delete_server_metadata(story.id, ["colour"])
        story.compute.delete_server_metadata(story.id, ["ft:state"])
        story.compute.update_server(story.id, name="operations-renamed")
        story.shows("protected")
        story.compute.unlock_server(story.id)
    assert story.generation == before
    story.is_whole()


def test_images_and_interfaces_end_it_for_a_while_and_no_client_notices(story: Story) -> None:
    images = ("operations-image", "operations-backup")
    with story.undisturbed():
        with story.ended_and_protected_again(images[0]):
            story.compute.create_server_image(story.id, images[0])
            story.becomes("ACTIVE")
        with story.ended_and_protected_again(*images):
            story.compute.backup_server(story.id, images[1], "daily", 1)
            story.becomes("ACTIVE")
        with story.ended_and_protected_again(*images):
            network = story.stage.servers.connection.network.find_network(NETWORK, ignore_missing=False)
            added = story.compute.create_server_interface(story.id, net_id=network.id)
        with story.ended_and_protected_again(*images):
            story.compute.delete_server_interface(added.port_id, server=story.id)
    for name in images:
        story.stage.servers.connection.delete_image(name)


def test_protection_is_switched_off_and_on_in_any_state_and_no_client_notices(story: Story) -> None:
    Blocks(story.address).fill(BALLAST, "ballast")
    with story.undisturbed():
        _switched(story, "false")
        story.shows("unprotected")
        story.is_alone()
        with slow_copies(story.stage):
            _switched(story, "true")
            story.shows("syncing")
            _switched(story, "false")
            story.shows("unprotected")
            story.is_alone()
        _switched(story, "true")
        story.is_whole()


def test_a_pause_and_a_suspension_keep_the_guest_as_it_was(story: Story) -> None:
    for begin, status, end in (
        (story.compute.pause_server, "PAUSED", story.compute.unpause_server),
        (story.compute.suspend_server, "SUSPENDED", story.compute.resume_server),
    ):
        boot = story.boot()
        with story.ended_and_protected_again():
            begin(story.id)
            story.becomes(status)
            end(story.id)
            story.becomes("ACTIVE")
            story.serves()
        assert story.boot() == boot


def test_a_reboot_by_nova_is_followed_by_protection(story: Story) -> None:
    for kind in ("SOFT", "HARD"):
        boot = story.boot()
        with story.ended_and_protected_again():
            story.compute.reboot_server(story.id, kind)
            story.becomes("ACTIVE")
            story.serves()
            assert story.boot() != boot
    assert story.host.name != story.backup_host.name


def test_a_guest_that_reboots_or_panics_stays_protected(story: Story) -> None:
    for word in ("reboot", "panic"):
        before, host, boot = story.generation, story.host, story.boot()
        story.does(word)
        wait_until("another boot", partial(_in_another_boot, story, boot), failover.BOOT_TIMEOUT_S)
        story.is_whole()
        assert (story.generation, story.host) == (before, host)


def _in_another_boot(story: Story, boot: str) -> bool:
    story.serves()
    return story.boot() not in ("", boot)


def test_a_guest_that_powers_itself_off_stays_off(story: Story) -> None:
    host = story.host
    story.does("poweroff")
    story.becomes("SHUTOFF")
    wait_until("its backup to go", lambda: [s.id for s in story.stage.servers.all()] == [story.id], ACT_S)
    story.is_alone()
    assert (story.stage.servers.get(story.id).status, story.host) == ("SHUTOFF", host)
    with story.ended_and_protected_again():
        story.compute.start_server(story.id)
        story.becomes("ACTIVE")
        story.serves()


def test_a_rescued_server_is_protected_again_with_its_own_disks(story: Story) -> None:
    Blocks(story.address).fill(MARK, "mine")
    with story.ended_and_protected_again():
        story.compute.rescue_server(story.id)
        story.becomes("RESCUE")
        assert story.state == "unprotected"
        story.compute.unrescue_server(story.id)
        story.becomes("ACTIVE")
        wait_for_guest(story.address, failover.BOOT_TIMEOUT_S, BLOCKS)
        assert Blocks(story.address).sum(MARK) == sum_of("mine", MARK.size)


def test_a_shelved_server_comes_back_with_its_disk(story: Story) -> None:
    with story.ended_and_protected_again():
        story.compute.shelve_server(story.id)
        story.becomes("SHELVED_OFFLOADED")
        check(story.stage, Expected(story.stage, story.id, images=("operations-renamed-shelved",)))
        story.compute.unshelve_server(story.id)
        story.becomes("ACTIVE")
        wait_for_guest(story.address, failover.BOOT_TIMEOUT_S, BLOCKS)
        assert Blocks(story.address).sum(MARK) == sum_of("mine", MARK.size)


def test_a_rebuilt_server_is_protected_with_its_new_disk(story: Story) -> None:
    image = story.stage.servers.get(story.id).image.id
    with story.ended_and_protected_again():
        story.compute.rebuild_server(story.id, image=image, name="operations-rebuilt")
        story.becomes("ACTIVE")
        wait_for_guest(story.address, failover.BOOT_TIMEOUT_S, BLOCKS)
        assert Blocks(story.address).sum(MARK) != sum_of("mine", MARK.size)


def test_a_resized_server_is_protected_once_it_is_confirmed_or_reverted(story: Story) -> None:
    flavor = story.compute.find_flavor(LARGER, ignore_missing=False).id
    moves: tuple[tuple[Act, Act], ...] = (
        (lambda server: story.compute.resize_server(server, flavor), story.compute.revert_server_resize),
        (story.compute.migrate_server, story.compute.confirm_server_resize),
    )
    for begin, end in moves:
        with story.ended_and_protected_again():
            begin(story.id)
            story.becomes("VERIFY_RESIZE")
            story.serves()
            assert story.state == "unprotected"
            end(story.id)
            story.becomes("ACTIVE")
            story.serves()


def test_a_reboot_while_degraded_and_a_stop_while_syncing_do_what_they_say(story: Story) -> None:
    _lose_backup(story)
    story.compute.reboot_server(story.id, "HARD")
    story.becomes("ACTIVE")
    story.serves()
    story.is_whole()
    Blocks(story.address).fill(BALLAST, "ballast-again")
    with slow_copies(story.stage):
        story.compute.reboot_server(story.id, "HARD")
        story.shows("syncing")
        story.compute.stop_server(story.id)
        story.becomes("SHUTOFF")
        story.is_alone()
    story.compute.start_server(story.id)
    story.becomes("ACTIVE")
    story.is_whole()


def _lose_backup(story: Story) -> None:
    """Returns as soon as the guest runs alone; a new backup may come by itself."""
    before = story.generation
    FAULTS["backup-engine-killed"].strike(scene_of(story.stage.layout, story.id))
    wait_until("the backup to be given up", lambda: story.generation > before, ACT_S)


def test_nothing_is_done_to_a_backup_but_its_deletion(story: Story) -> None:
    backup = story.stage.servers.wait_for_backup(story.id, ACT_S).id
    before = story.generation
    with story.undisturbed():
        acts: tuple[Act, ...] = (
            story.compute.stop_server,
            story.compute.pause_server,
            story.compute.rescue_server,
            lambda server: story.compute.reboot_server(server, "HARD"),
        )
        for act in acts:
            act(backup)
            wait_until("it to be refused", lambda: _is_idle(story, backup), ACT_S)
        assert story.generation == before
        story.compute.delete_server(backup)
        wait_until("the pair to notice", lambda: story.generation > before, ACT_S)
        story.is_whole()


def _is_idle(story: Story, server_id: str) -> bool:
    server = story.stage.servers.get(server_id)
    return bool((server.status, server.task_state) == ("ACTIVE", None))


def test_what_is_refused_says_so_and_changes_nothing(story: Story) -> None:
    manager = Machine(story.stage.layout, CONTROL)
    acts: dict[str, Act] = {
        "reboot": lambda server: story.compute.reboot_server(server, "HARD"),
        "pause": story.compute.pause_server,
        "rescue": story.compute.rescue_server,
    }
    before = story.generation
    manager.stop(control.MANAGER)
    try:
        with story.undisturbed():
            for action in ("reboot", "pause", "rescue"):
                acts[action](story.id)
                wait_until(f"{action} to be refused", partial(_refusal, story, action), ACT_S)
                story.becomes("ACTIVE")
    finally:
        control.start(manager, control.MANAGER)
    story.shows("protected")
    assert story.generation == before
    story.is_whole()


def _refusal(story: Story, action: str) -> bool:
    """The newest action of that name failed, and its user can read why."""
    for shown in story.compute.server_actions(story.id):
        if shown.action == action:
            events = story.compute.get_server_action(shown.request_id, story.id).events
            return any("before its protection has ended" in (event.details or "") for event in events)
    return False


def test_a_server_is_deleted_in_any_state_and_leaves_nothing(stage: Stage, story: Story) -> None:
    story.is_whole()
    whole = Expected(stage, story.id, protected=True)
    with _only_host(stage, story.host):
        pending = Story(stage, stage.create("pending", "ft=true"), "")
        pending.shows("pending")
        stage.servers.delete(pending.id)
    check(stage, whole)
    with slow_copies(stage):
        address = stage.servers.address(syncing := stage.create("syncing"))
        wait_for_guest(address, failover.BOOT_TIMEOUT_S, BLOCKS)
        Blocks(address).fill(BALLAST, "ballast")
        _switched(Story(stage, syncing, address), "true")
        stage.servers.connection.compute.reboot_server(syncing, "HARD")
        Story(stage, syncing, address).shows("syncing")
        stage.servers.delete(syncing)
        check(stage, whole)


def test_a_users_own_port_is_free_again_after_its_server(stage: Stage, story: Story) -> None:
    network = stage.servers.connection.network
    port = network.create_port(
        network_id=network.find_network(NETWORK, ignore_missing=False).id,
        project_id=stage.servers.get(story.id).project_id,
    )
    own = (str(port.id),)
    whole = Expected(stage, story.id, protected=True)
    with story.undisturbed():
        with story.ended_and_protected_again():
            story.compute.create_server_interface(story.id, port_id=port.id)
        before = story.generation
        story.compute.delete_server_interface(port.id, server=story.id)
        wait_until("protection to end", lambda: story.generation > before, ACT_S)
        check(stage, whole, free_ports=own)
    server = stage.create("with-a-port", "ft=true", port=own[0])
    stage.servers.wait_for_backup(server, failover.PROTECT_TIMEOUT_S)
    stage.servers.wait_for_state(server, "protected", failover.PROTECT_TIMEOUT_S)
    stage.servers.delete(server)
    check(stage, whole, free_ports=own)
    network.delete_port(port)


@contextmanager
def _only_host(stage: Stage, usable: Node) -> Iterator[None]:
    """Nova takes the others for down."""
    others = [node for node in COMPUTES if node != usable]
    for node in others:
        assert _force_down(stage, node, True)
    try:
        yield
    finally:
        for node in others:
            _force_down(stage, node, False)
        wait_until(
            "all hosts to be usable",
            lambda: cloud.usable_hosts(stage.servers.connection) >= {node.name for node in COMPUTES},
            ACT_S,
        )


def test_an_evacuation_by_the_operator_boots_the_server_anew_where_no_backup_has_it(stage: Stage, story: Story) -> None:
    _lose_backup(story)
    lost = story.host
    computes.kill(stage.layout, lost)
    _force_down(stage, lost, True)
    try:
        _post(stage, f"/servers/{story.id}/action", {"evacuate": {}})
        wait_until("it to be elsewhere", lambda: story.host != lost, failover.MOVE_TIMEOUT_S)
        story.becomes("ACTIVE")
        story.serves()
    finally:
        computes.power_on(stage.layout, lost)
    wait_until("the host to be let in again", lambda: _let_in(stage, lost), failover.MOVE_TIMEOUT_S, 1.0)
    story.is_whole()


def _post(stage: Stage, url: str, body: dict[str, Any], method: str = "POST") -> bool:
    """As the operator, in words of our own: the SDK's evacuation stops the server. Says whether Nova agreed."""
    answer = stage.servers.connection.compute.request(
        url, method, json=body, microversion=cloud.COMPUTE_MICROVERSION, raise_exc=False
    )
    return bool(answer.ok)


def _force_down(stage: Stage, node: Node, down: bool) -> bool:
    (service,) = stage.servers.connection.compute.services(binary="nova-compute", host=node.name)
    return _post(stage, f"/os-services/{service.id}", {"forced_down": down}, "PUT")


def _let_in(stage: Stage, node: Node) -> bool:
    """Nova refuses until the host has cleaned up after itself."""
    return _force_down(stage, node, False) and node.name in cloud.usable_hosts(stage.servers.connection)


def test_a_live_migration_elsewhere_ends_it_for_a_while_and_no_client_notices(story: Story) -> None:
    """After all that boots the server: Nova copies no configuration drive, protected or not, and it finds an empty one.
    """
    third = next(node for node in COMPUTES if node not in (story.host, story.backup_host))
    with story.undisturbed(), story.ended_and_protected_again():
        story.compute.live_migrate_server(story.id, host=third.name, block_migration="auto")
        story.stage.servers.wait_for_move(story.id, third.name, failover.MOVE_TIMEOUT_S)
    assert story.host == third


def test_a_server_that_is_deleted_while_it_fails_over_is_gone(stage: Stage, story: Story) -> None:
    story.is_whole()
    lost, before = story.host, story.generation
    computes.kill(stage.layout, lost)
    wait_until("the failover to begin", lambda: story.generation > before, ACT_S, 0.05)
    stage.servers.delete(story.id)
    try:
        wait_until("it to be gone", lambda: not stage.servers.all(), failover.MOVE_TIMEOUT_S)
    finally:
        computes.power_on(stage.layout, lost)
    check(stage)
