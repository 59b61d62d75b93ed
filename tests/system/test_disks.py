"""What a protected guest wrote to its disks is there after its host died, byte for byte, and Nova goes on with them."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from ftvm_lab import computes, failover, leftovers, pairs
from ftvm_lab.blocks import PORT, Blocks, Extent, sum_of
from ftvm_lab.command import run, wait_until
from ftvm_lab.failover import Kind, Protected, Stage
from ftvm_lab.layout import Node, compute
from ftvm_lab.seed import IMAGE
from ftvm_lab.traffic import wait_for_guest

pytestmark = pytest.mark.timeout(900)

PROGRESS_KEY = "ft:progress"
SETTLE_S = 60.0
SLOW_MIB_S = 4
GIB = 1 << 20
SWAP_MIB = 16
FLAVOR = "ftvm.disks"
KIND = Kind(IMAGE, FLAVOR, PORT, failover.BOOT_TIMEOUT_S)
#: The image has 32 MiB; the root disk lies on it and goes on beyond it.
IMAGE_END = 32 << 10
BEFORE_THE_COPY = (
    Extent("vda", 0, 64),
    Extent("vda", IMAGE_END - 60, 128),
    Extent("vda", GIB // 2 + 3, 4096),
    Extent("vda", GIB - 64, 64),
    Extent("vdb", 0, 64),
    Extent("vdb", GIB // 3, 2048),
    Extent("vdb", GIB - 64, 64),
    Extent("vdc", 4, 1024),
    Extent("vdc", (SWAP_MIB << 10) - 64, 64),
)
#: Some again, some for the first time.
WHILE_PROTECTED = (
    Extent("vda", 0, 64),
    Extent("vda", GIB // 4 + 1, 2048),
    Extent("vdb", GIB // 3, 2048),
    Extent("vdb", GIB - 256, 128),
    Extent("vdc", 2048, 1024),
)
#: Image files by their format, as Nova calls them.
DISKS = {"disk": "qcow2", "disk.eph0": "qcow2", "disk.swap": "qcow2", "disk.config": "raw"}
CONFIG_DRIVE = Extent("sr0", 0, 64 << 10)


@dataclass(slots=True)
class Story:
    """One server through all tests of this module, which run in their order."""

    stage: Stage
    protected: Protected
    config_drive: str
    #: What the disks hold.
    words: dict[Extent, str] = field(default_factory=dict)
    dead_host: Node | None = None

    @property
    def id(self) -> str:
        return self.protected.before.server_id

    @property
    def blocks(self) -> Blocks:
        return Blocks(self.protected.before.address)

    @property
    def here(self) -> Node:
        return compute(self.stage.servers.host(self.id))

    @property
    def state(self) -> str:
        return self.stage.servers.protection(self.id)[0]

    def is_up(self) -> None:
        wait_for_guest(self.protected.before.address, failover.BOOT_TIMEOUT_S, PORT)

    def fill(self, extents: Iterable[Extent], prefix: str) -> None:
        for extent in extents:
            word = f"{prefix}-{extent.disk}-{extent.offset}"
            self.blocks.fill(extent, word)
            self.words[extent] = word

    def faults(self) -> list[Extent]:
        """Where the guest reads what was not written."""
        wrong = [extent for extent, word in self.words.items() if self.blocks.sum(extent) != sum_of(word, extent.size)]
        return wrong + ([CONFIG_DRIVE] if self.blocks.sum(CONFIG_DRIVE) != self.config_drive else [])


@pytest.fixture(scope="module")
def story(stage: Stage) -> Iterator[Story]:
    stage.servers.connection.compute.create_flavor(
        name=FLAVOR, ram=192, vcpus=1, disk=1, ephemeral=1, swap=SWAP_MIB
    )
    protected = failover.protect(stage, "disks", KIND)
    found = Story(stage, protected, Blocks(protected.before.address).sum(CONFIG_DRIVE))
    yield found
    failover.clean_up(stage, found.id, found.dead_host.name if found.dead_host else None)


def slow_copies(stage: Stage) -> AbstractContextManager[None]:
    """First copies crawl."""
    return computes.engine_options(stage.layout, disk_copy_mib_s=SLOW_MIB_S)


def _switch(story: Story, word: str) -> None:
    story.stage.openstack(["server", "set", "--property", f"ft={word}", story.id])


def test_progress_is_shown_while_the_disks_are_copied_and_gone_when_they_are(story: Story) -> None:
    _switch(story, "false")
    wait_until("protection to end", lambda: story.state == "unprotected", SETTLE_S)
    story.fill(BEFORE_THE_COPY, "early")
    story.blocks.fill(Extent("vdb", GIB // 2, 48 << 10), "ballast")
    shown: list[int] = []

    def is_protected() -> bool:
        metadata = story.stage.servers.get(story.id).metadata
        if PROGRESS_KEY in metadata:
            assert metadata["ft:state"] == "syncing", metadata
            shown.append(int(metadata[PROGRESS_KEY]))
        return bool(metadata["ft:state"] == "protected")

    with slow_copies(story.stage):
        _switch(story, "true")
        wait_until("protection", is_protected, failover.PROTECT_TIMEOUT_S)
    assert [percent for percent in shown if 0 < percent < 100], shown
    assert shown == sorted(shown)
    assert PROGRESS_KEY not in story.stage.servers.get(story.id).metadata


def test_nova_tells_the_use_of_disks_that_are_mirrored(story: Story) -> None:
    told = story.stage.servers.connection.compute.get_server_diagnostics(story.id)
    assert len(told.disk_details) >= len(DISKS)
    assert any(disk["write_bytes"] > 0 for disk in told.disk_details)
    assert story.state == "protected"


def test_a_snapshot_ends_protection_for_a_while_and_works(story: Story, tmp_path: Path) -> None:
    assert story.state == "protected"
    before = pairs.pair(story.stage.layout, story.id).generation
    _snapshot(story, "while-protected", tmp_path)
    # Whoever looks late finds it protected again, but not by the same pairing.
    assert pairs.pair(story.stage.layout, story.id).generation > before
    wait_until("protection after the snapshot", lambda: story.state == "protected", failover.PROTECT_TIMEOUT_S)


def _snapshot(story: Story, name: str, folder: Path) -> None:
    """Takes it, downloads it, and looks for what the guest wrote to its root disk."""
    story.stage.openstack(["server", "image", "create", "--wait", "--name", name, "-c", "id", story.id])
    image, raw = folder / f"{name}.qcow2", folder / f"{name}.raw"
    story.stage.openstack(["image", "save", "--file", str(image), name])
    run(["qemu-img", "convert", "-O", "raw", str(image), str(raw)])
    with raw.open("rb") as contents:
        for extent, word in story.words.items():
            if extent.disk == "vda":
                contents.seek(extent.offset * 1024)
                found = hashlib.sha256(contents.read(extent.size * 1024)).hexdigest()
                assert found == sum_of(word, extent.size), extent
    story.stage.openstack(["image", "delete", name])


def test_what_was_written_is_there_after_the_host_died(story: Story) -> None:
    stage, before = story.stage, story.protected.before
    backup = stage.servers.wait_for_backup(story.id, failover.PROTECT_TIMEOUT_S)
    assert story.state == "protected" and story.faults() == []
    # These go over in epochs, those before came with the first copy.
    story.fill(WHILE_PROTECTED, "late")
    story.dead_host = compute(before.host)
    computes.kill(stage.layout, story.dead_host)
    stage.servers.wait_for_move(story.id, str(backup.compute_host), failover.MOVE_TIMEOUT_S)
    assert story.faults() == []


def test_every_byte_of_every_disk_is_the_dead_primarys(story: Story) -> None:
    stage = story.stage
    stage.openstack(["server", "stop", story.id])
    wait_until("the server to stop", lambda: stage.servers.get(story.id).status == "SHUTOFF", SETTLE_S)
    assert story.dead_host is not None
    for name, image_format in DISKS.items():
        sides = [_image(story, node, name, image_format) for node in (story.dead_host, story.here)]
        assert "identical" in run(["qemu-img", "compare", *sides], timeout_s=300), name


def _image(story: Story, node: Node, name: str, image_format: str) -> str:
    """A server's image on a host, as qemu-img finds it from outside: the path of its base is the inside one."""
    folder = story.stage.layout.instances(node)
    file = {"driver": "file", "filename": str(folder / story.id / name)}
    if image_format == "raw":
        return "json:" + json.dumps({"driver": "raw", "file": file})
    told = json.loads(run(["qemu-img", "info", "--output=json", "-f", image_format, str(file["filename"])]))
    assert told["format"] == image_format
    base = None
    if "backing-filename" in told:
        base_file = {"driver": "file", "filename": str(folder / "_base" / Path(told["backing-filename"]).name)}
        base = {"driver": told["backing-filename-format"], "file": base_file}
    return "json:" + json.dumps({"driver": image_format, "file": file, "backing": base})


def test_the_server_starts_again_from_its_disks(story: Story) -> None:
    story.stage.openstack(["server", "start", story.id])
    wait_until("the start", lambda: story.stage.servers.get(story.id).status == "ACTIVE", SETTLE_S)
    story.is_up()
    assert story.faults() == []


def test_a_hard_reboot_keeps_the_disks(story: Story) -> None:
    story.stage.openstack(["server", "reboot", "--hard", "--wait", story.id])
    story.is_up()
    assert story.faults() == []


def test_a_snapshot_on_the_new_host_has_what_was_written_on_the_old_one(story: Story, tmp_path: Path) -> None:
    _snapshot(story, "after-the-failover", tmp_path)
    assert story.faults() == []


def test_the_deleted_server_leaves_nothing_on_any_host(story: Story) -> None:
    stage = story.stage
    stage.servers.delete(story.id)
    wait_until("the server and its backup to go", lambda: not stage.servers.all(), SETTLE_S)
    wait_until("hosts with nothing on them", lambda: not any(leftovers.on_hosts(stage.layout).values()), SETTLE_S)
    assert story.dead_host is not None
    computes.power_on(stage.layout, story.dead_host)
    returned, story.dead_host = story.dead_host, None
    stage.servers.wait_until_clean(failover.CLEAN_TIMEOUT_S)
    assert leftovers.on_hosts(stage.layout)[returned.name] == []
    assert leftovers.in_cloud(stage.servers.connection) == []
