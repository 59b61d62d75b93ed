"""The files of a standby: Nova's own, in Nova's own places, each in the form that a replica of the primary's needs.

Nova makes them, so that it finds what it expects after a promotion: base image, kernel, disk.info, console log. Then
each disk is made anew, empty and of the primary's exact size: what Nova does on the way (a file system in a grown
image, its own configuration drive) would be a difference that the first copy need not overwrite.

Called by standby.py, for a folder that bears this host's claim. Touches no file outside of it but Nova's image cache.
"""

# Nova registers its objects when its services start, which may be after this import.
from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from nova import context as nova_context
from nova import exception, objects
from nova.network import model as network_model
from nova.virt import driver as virt_driver
from nova.virt.libvirt import blockinfo, imagecache
from nova.virt.libvirt import driver as libvirt_driver
from nova.virt.libvirt import utils as libvirt_utils
from oslo_concurrency import processutils

from nova_ftvm.cloud.settings import CONF
from nova_ftvm.core.domain import DiskFile
from nova_ftvm.exception import Unsupported

#: Values of [libvirt]images_type whose disks are files of the host.
_LOCAL = ("default", "raw", "flat", "qcow2")
_QCOW2_MAGIC = b"QFI\xfb"


def refuse_shared_storage() -> None:
    """Raises Unsupported where this host's disks are no files of its own."""
    if CONF.libvirt.images_type not in _LOCAL:
        raise Unsupported(f"this host keeps disks as [libvirt]images_type={CONF.libvirt.images_type}, which are not "
                          f"replicated: use hosts with one of {', '.join(_LOCAL)}")


def make(driver: libvirt_driver.LibvirtDriver, context: nova_context.RequestContext, primary: objects.Instance,
         vifs: network_model.NetworkInfo) -> None:
    """Has Nova make the server's files on this host."""
    mappings = objects.BlockDeviceMappingList.get_by_instance_uuid(primary._context, primary.uuid)
    block_devices = virt_driver.get_block_device_info(primary, mappings)
    disks = blockinfo.get_disk_info(CONF.libvirt.virt_type, primary, primary.image_meta, block_devices)
    try:
        # Without injection: what it would write is in the primary's image, and comes from there.
        driver._create_image(context, primary, disks["mapping"], block_device_info=block_devices)
    except exception.ImageNotFound as error:
        raise Unsupported(f"{error.format_message()} A backup's host needs the images that the server was made from: "
                          "make one of the server (openstack server image create), and a new server from that"
                          ) from error
    driver._ensure_console_log_for_instance(primary)
    driver._create_configdrive(context, primary, libvirt_driver.InjectionInfo(
        network_info=vifs, files=[], admin_pass=""))


def fit(primary: objects.Instance, disks: Iterable[DiskFile], sizes: Mapping[str, int]) -> None:
    """Makes each disk one that the primary's can be copied into.

    sizes: the primary's, in bytes as the guest sees them, by target; of one that is not in it Nova's size is kept.
    """
    folder = libvirt_utils.get_instance_path(primary)
    for disk in disks:
        if os.path.dirname(disk.path) != folder:
            raise Unsupported(f"the primary's disk {disk.target} is {disk.path}, and this host has "
                              f"{CONF.instances_path}: instances_path must be the same on both")
        if not os.path.exists(disk.path) or _is_qcow2(disk.path) != (disk.format == "qcow2"):
            raise Unsupported(f"Nova does not make disk {disk.target} as {disk.format} here, as it did for the "
                              "primary: set images_type, use_cow_images and force_raw_images alike on hosts that "
                              "protect one another")
        size = sizes.get(disk.target)
        if disk.format == "qcow2":
            _renew_qcow2(disk.path, size, primary.image_ref)
        elif size is not None:
            _renew_raw(disk.path, size)


def _renew_qcow2(path: str, size: int | None, image_id: str) -> None:
    found = libvirt_utils.get_disk_backing_file(path, basename=False, format="qcow2")
    # Only the image's base is safe from Nova's clean-up of its cache, by the backup server: it has the same image, but
    # not the same ephemeral disks.
    keeps = found is not None and os.path.basename(found) == imagecache.get_cache_fname(image_id)
    size = size or libvirt_utils.get_disk_size(path, format="qcow2")
    libvirt_utils.create_image(path, "qcow2", size, backing_file=found if keeps else None)
    _preallocate(path, size)


def _renew_raw(path: str, size: int) -> None:
    os.truncate(path, 0)
    os.truncate(path, size)
    _preallocate(path, size)


def _preallocate(path: str, size: int) -> None:
    """As Nova does it for its own."""
    if CONF.preallocate_images == "space":
        processutils.execute("fallocate", "-n", "-l", str(size), path)


def _is_qcow2(path: str) -> bool:
    with open(path, "rb") as image:
        return image.read(len(_QCOW2_MAGIC)) == _QCOW2_MAGIC
