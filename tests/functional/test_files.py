"""The files of a standby, made by Nova's real code: in the primary's form, and never at the primary's cost.

Both hosts of the tests have one file system. So the files of a primary are moved aside where its host is to have a disk
of its own, and left where the hosts are to share theirs.
"""

import hashlib
import io
import json
import pathlib
import subprocess

import fixtures
import nova.conf
from nova.tests import fixtures as nova_fixtures
from nova.virt.libvirt import driver as libvirt_driver
from nova.virt.libvirt import imagebackend
from nova.virt.libvirt import utils as libvirt_utils
from oslo_utils import units

from nova_ftvm.cloud import claims
from nova_ftvm.core import domain
from tests.functional import base

CONF = nova.conf.CONF
#: What Nova's fixtures replace, as it was.
REAL = {
    "nova.virt.libvirt.LibvirtDriver._create_image": libvirt_driver.LibvirtDriver._create_image,
    "nova.virt.libvirt.driver.LibvirtDriver._create_ephemeral": libvirt_driver.LibvirtDriver._create_ephemeral,
    "nova.virt.libvirt.driver.LibvirtDriver._create_swap": libvirt_driver.LibvirtDriver._create_swap,
    "nova.virt.libvirt.imagebackend.Backend.backend": imagebackend.Backend.backend,
    "nova.virt.libvirt.utils.fetch_image": libvirt_utils.fetch_image,
    "nova.virt.libvirt.utils.fetch_raw_image": libvirt_utils.fetch_raw_image,
    "nova.virt.libvirt.driver.libvirt_utils.file_open": libvirt_utils.file_open,
}
IMAGE_BYTES = 3 * units.Mi
ON_SCSI = {"hw_cdrom_bus": "scsi", "hw_scsi_model": "virtio-scsi"}


def asked(*words):
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout


def image_info(path):
    return json.loads(asked("qemu-img", "info", "--output=json", "-U", str(path)))


def holds_nothing(disk, path):
    """No block of its own, whatever it lies on."""
    if disk.format == "raw":
        return pathlib.Path(path).stat().st_blocks == 0
    found = json.loads(asked("qemu-img", "map", "--output=json", "-f", "qcow2", str(path)))
    return not any(extent["depth"] == 0 and extent["data"] for extent in found)


def contents(folder):
    return {path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


class FilesTestCase(base.CloudTestCase):
    """Nova makes real files; guests are those of its fake libvirt."""

    def setUp(self):
        super().setUp()
        for place, real in REAL.items():
            self.useFixture(fixtures.MonkeyPatch(place, real))
        self.useFixture(nova_fixtures.PrivsepFixture())
        self.flags(mkisofs_cmd="genisoimage", default_ephemeral_format="ext4")
        self.instances = pathlib.Path(CONF.instances_path)
        self.elsewhere = pathlib.Path(self.useFixture(fixtures.TempDir()).path)
        self.kernel = self.add_image(b"kernel", disk_format="aki")
        self.ramdisk = self.add_image(b"ramdisk", disk_format="ari")
        self.image = self.add_image(self.qcow2_bytes(), disk_format="qcow2", kernel_id=self.kernel,
                                    ramdisk_id=self.ramdisk, **ON_SCSI)

    def add_image(self, data, disk_format, **properties):
        return self.glance.create(None, {
            "name": disk_format, "container_format": "bare", "disk_format": disk_format, "size": len(data),
            "min_ram": 0, "min_disk": 0, "visibility": "public", "properties": properties}, io.BytesIO(data))["id"]

    def qcow2_bytes(self):
        raw, made = self.elsewhere / "raw", self.elsewhere / "qcow2"
        raw.write_bytes(b"image" * 10000)
        with raw.open("ab") as target:
            target.truncate(IMAGE_BYTES)
        asked("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(made))
        return made.read_bytes()

    def primary(self, disk=0, ephemeral=0, swap=0, config_drive=True, more=None):
        self.flavor = self._create_flavor(memory_mb=64, vcpu=1, disk=disk, ephemeral=ephemeral, swap=swap)
        return self.boot(host="alpha", image=self.image, flavor=self.flavor, ft="true",
                         more={"config_drive": config_drive, **(more or {})})

    def apart(self, server):
        """From now on each host has its own file system. Returns the primary's folder."""
        return (self.instances / server["id"]).rename(self.elsewhere / server["id"])

    def disks_of(self, server):
        return domain.disks(self.domain_on("alpha", server["id"]).XMLDesc(0))

    def sizes(self, server, folder):
        return {disk.target: image_info(folder / pathlib.Path(disk.path).name)["virtual-size"]
                for disk in self.disks_of(server)}

    def refusal(self, server, **more):
        """Why the standby could not be made; nothing of it is left."""
        backup = self.back_up(server, expected="ERROR", **more)
        self.service_api.delete_server(backup["id"])
        self.wait_until_gone(backup)
        self.assertEqual({}, self.claims("beta"))
        self.assertIsNone(self.domain_on("beta", server["id"]))
        reason = self.ftvm.manager.ready[-1][3]
        # Nova takes 255, and the manager says first on which host it was.
        self.assertLess(len(reason), 220)
        return reason


class ReplicaTest(FilesTestCase):
    """Every kind of disk, as each of Nova's settings makes it."""

    def assert_replica(self, server, has_base=False):
        folder = self.apart(server)
        sizes = self.sizes(server, folder)
        self.back_up(server, disks=sizes)
        here = self.instances / server["id"]
        for disk in self.disks_of(server):
            made = image_info(disk.path)
            self.assertEqual((disk.format, sizes[disk.target]), (made["format"], made["virtual-size"]), disk)
            self.assertTrue(holds_nothing(disk, disk.path), disk)
            backing = made.get("backing-filename") if disk.path.endswith("/disk") else None
            self.assertEqual(image_info(folder / "disk").get("backing-filename") if backing else None, backing)
            self.assertEqual(has_base and disk.path.endswith("/disk"), "backing-filename" in made, disk)
        self.assertEqual(json.loads((folder / "disk.info").read_text()), json.loads((here / "disk.info").read_text()))
        self.assertEqual({path.name for path in folder.iterdir()} | {"ftvm-standby.json"},
                         {path.name for path in here.iterdir()})
        for name in ("kernel", "ramdisk"):
            self.assertEqual((folder / name).read_bytes(), (here / name).read_bytes())
        return here

    def test_disks_that_lie_on_the_image(self):
        server = self.primary(disk=1, ephemeral=1, swap=8)
        self.assertEqual(["vda", "vdb", "vdc", "sda"], [disk.target for disk in self.disks_of(server)])
        self.assert_replica(server, has_base=True)

    def test_disks_that_lie_on_an_image_that_stays_qcow2(self):
        self.flags(force_raw_images=False)
        self.assert_replica(self.primary(disk=1, swap=8), has_base=True)

    def test_an_image_that_brings_its_own_size(self):
        server = self.primary(disk=0)
        here = self.assert_replica(server, has_base=True)
        self.assertEqual(IMAGE_BYTES, image_info(here / "disk")["virtual-size"])

    def test_raw_disks(self):
        self.flags(images_type="raw", group="libvirt")
        self.assert_replica(self.primary(disk=1, ephemeral=1, swap=8))

    def test_flat_disks_of_an_image_that_stays_qcow2(self):
        self.flags(images_type="flat", group="libvirt")
        self.flags(force_raw_images=False)
        server = self.primary(disk=1, swap=8)
        self.assertEqual(["qcow2", "raw", "raw"], [disk.format for disk in self.disks_of(server)])
        self.assert_replica(server)

    def test_disks_without_copy_on_write(self):
        for compute in self.computes.values():
            compute.driver.image_backend = imagebackend.Backend(use_cow=False)
        self.assert_replica(self.primary(disk=1))

    def test_several_ephemeral_disks_of_a_users_own_sizes(self):
        local = {"source_type": "blank", "destination_type": "local", "delete_on_termination": True}
        server = self.primary(ephemeral=3, more={"block_device_mapping_v2": [
            {"source_type": "image", "destination_type": "local", "uuid": self.image, "boot_index": 0},
            {**local, "boot_index": -1, "volume_size": 1, "guest_format": "ext4"},
            {**local, "boot_index": -1, "volume_size": 2}]})
        self.assertEqual(["vda", "vdb", "vdc", "sda"], [disk.target for disk in self.disks_of(server)])
        self.assert_replica(server, has_base=True)

    def test_a_configuration_drive_that_is_a_disk(self):
        self.flags(config_drive_format="vfat")
        self.useFixture(fixtures.MonkeyPatch(
            "nova.virt.configdrive.ConfigDriveBuilder._make_vfat",
            lambda builder, path, folder: pathlib.Path(path).write_bytes(bytes(64 * units.Ki))))
        server = self.primary()
        self.assertNotIn('device="cdrom"', self.domain_on("alpha", server["id"]).XMLDesc(0))
        self.assert_replica(server, has_base=True)

    def test_disks_that_grew_after_their_creation(self):
        server = self.primary(disk=1, swap=8)
        for name in ("disk", "disk.swap"):
            asked("qemu-img", "resize", "-q", str(self.instances / server["id"] / name), "+1M")
        self.assert_replica(server, has_base=True)

    def test_disks_that_are_smaller_than_their_flavor_says(self):
        server = self.primary(disk=0)
        folder = self.apart(server)
        self.back_up(server, disks={**self.sizes(server, folder), "vda": IMAGE_BYTES - units.Mi, "sda": 2048})
        here = self.instances / server["id"]
        self.assertEqual(IMAGE_BYTES - units.Mi, image_info(here / "disk")["virtual-size"])
        self.assertEqual(2048, (here / "disk.config").stat().st_size)

    def test_a_configuration_drive_is_as_long_as_the_primarys(self):
        server = self.primary()
        folder = self.apart(server)
        with (folder / "disk.config").open("ab") as drive:
            drive.write(bytes(4096))
        self.back_up(server, disks=self.sizes(server, folder))
        self.assertEqual((folder / "disk.config").stat().st_size,
                         (self.instances / server["id"] / "disk.config").stat().st_size)

    def test_nothing_is_injected_into_a_replica(self):
        self.flags(inject_partition=-1, group="libvirt")
        self.useFixture(fixtures.MonkeyPatch("nova.virt.disk.api.inject_data", lambda *args, **kwargs: True))
        server = self.primary(config_drive=False)
        injected = []
        self.useFixture(fixtures.MonkeyPatch(
            "nova.virt.disk.api.inject_data", lambda image, *args, **kwargs: injected.append(image.path)))
        self.apart(server)
        self.back_up(server)
        self.assertEqual([], injected)

    def test_room_is_taken_in_advance_where_nova_does_so(self):
        self.flags(preallocate_images="space")
        server = self.primary(swap=8)
        self.back_up(server, disks=self.sizes(server, self.apart(server)))
        for name, size in (("disk", IMAGE_BYTES), ("disk.swap", 8 * units.Mi)):
            self.assertGreaterEqual((self.instances / server["id"] / name).stat().st_blocks * 512, size)

    def test_an_old_agents_silence_keeps_novas_sizes(self):
        server = self.primary(disk=1, swap=8)
        folder = self.apart(server)
        self.back_up(server, disks={})
        here = self.instances / server["id"]
        for name in ("disk", "disk.swap"):
            self.assertEqual(image_info(folder / name)["virtual-size"], image_info(here / name)["virtual-size"])

    def test_a_deleted_backups_files_go(self):
        server = self.primary(disk=1, ephemeral=1, swap=8)
        self.apart(server)
        backup = self.back_up(server)
        self.service_api.delete_server(backup["id"])
        self.wait_until_gone(backup)
        self.assertEqual({"_base", "locks", "compute_nodes"},
                         {path.name for path in self.instances.iterdir()} | {"compute_nodes"})


class RefusedStandbyTest(FilesTestCase):
    """What cannot be had is said, and the primary's files outlive each try."""

    def test_a_shared_instances_path_is_refused_and_loses_nothing(self):
        server = self.primary(disk=1, ephemeral=1, swap=8)
        folder = self.instances / server["id"]
        before = contents(folder)
        for _ in range(2):
            self.assertIn("instances_path is shared", self.refusal(server))
            self.assertEqual(before, contents(folder))
        self.restart_compute_service("beta")
        self._run_periodics()
        self.assertEqual(before, contents(folder))
        self.assertEqual("ACTIVE", self.api.get_server(server["id"])["status"])

    def test_a_folder_that_appears_at_the_last_moment_is_not_taken(self):
        server = self.primary()
        folder = self.apart(server)
        make_room = self.computes["beta"].driver.standbys._make_room

        def and_then_shared(instance_id):
            make_room(instance_id)
            folder.rename(self.instances / instance_id)

        self.computes["beta"].driver.standbys._make_room = and_then_shared
        before = contents(folder)
        self.assertIn("are there already", self.refusal(server))
        self.assertEqual(before, contents(self.instances / server["id"]))

    def test_a_standbys_folder_that_became_the_servers_is_not_removed(self):
        server = self.primary()
        folder = self.apart(server)
        backup = self.back_up(server)
        here = self.instances / server["id"]
        (claim,) = self.claims("beta").values()
        here.rename(self.elsewhere / "standby")
        folder.rename(here)
        before = contents(here)
        claims.remove_files(claim)
        self.assertEqual(before, contents(here))
        self.service_api.delete_server(backup["id"])
        self.wait_until_gone(backup)
        self.assertEqual(before, contents(here))

    def test_disks_on_shared_storage_are_refused(self):
        server = self.primary()
        self.apart(server)
        for images_type in ("rbd", "lvm", "ploop"):
            self.flags(images_type=images_type, group="libvirt")
            self.assertIn(f"images_type={images_type}", self.refusal(server))
            self.assertFalse((self.instances / server["id"]).exists())

    def test_a_host_that_makes_other_disks_is_refused(self):
        server = self.primary(disk=1)
        self.apart(server)
        self.flags(images_type="raw", group="libvirt")
        self.assertIn("disk vda as qcow2", self.refusal(server))
        self.assertFalse((self.instances / server["id"]).exists())

    def test_a_host_with_another_instances_path_is_refused(self):
        server = self.primary()
        self.apart(server)
        guest = self.domain_on("alpha", server["id"])
        guest.live_xml = guest.live_xml.replace(str(self.instances), "/srv/nova")
        self.assertIn("instances_path must be the same", self.refusal(server))

    def test_an_image_that_is_gone_is_said_with_what_to_do(self):
        for gone in (self.image, self.kernel):
            server = self.primary()
            self.apart(server)
            kept = self.glance.images.pop(gone)
            for cached in (self.instances / "_base").iterdir():
                cached.unlink()
            reason = self.refusal(server, image=self.add_image(b"x", disk_format="raw"))
            self.assertIn(gone, reason)
            self.assertIn("make one of the server", reason)
            self.assertFalse((self.instances / server["id"]).exists())
            self.glance.images[gone] = kept

    def test_a_volume_that_came_after_the_arming_is_refused(self):
        server = self.primary()
        self.apart(server)
        guest = self.domain_on("alpha", server["id"])
        guest.live_xml = guest.live_xml.replace(
            "</devices>", "<disk type='block' device='disk'><source dev='/dev/sdx'/><target dev='vdb' bus='virtio'/>"
            "</disk></devices>")
        self.assertIn("disk vdb is no file of its host", self.refusal(server))
