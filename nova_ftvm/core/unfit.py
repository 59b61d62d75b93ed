"""What of a domain cannot be checkpointed, each as one sentence that names it and says what to do. PURE.

Works on the tree that core/domain.py gives it. Two ways lead past a checkpoint: memory that is written to through
another mapping than QEMU's, or by a device, is not tracked; and state that lies outside QEMU is not saved.
"""

from collections.abc import Callable
from xml.etree import ElementTree

from nova_ftvm.core import guestcpu

#: Interfaces whose packets, and writes to the guest's memory, pass QEMU by.
_BYPASSING = ("hostdev", "vdpa", "vhostuser")
#: What a passed-through device is called, and where its address is, by <hostdev>'s type.
_HOST_DEVICES = {"pci": "PCI device", "mdev": "mediated device", "usb": "USB device", "scsi": "SCSI device",
                 "scsi_host": "vhost SCSI device"}
#: What is not tracked, or keeps its state outside QEMU; where it is; and what to do.
_UNSAVED = (
    ("huge pages of the flavor's", "./memoryBacking/hugepages", "use a flavor without hw:mem_page_size"),
    ("a virtual TPM", "./devices/tpm", "use a flavor and an image without hw_tpm_version"),
    ("a shared folder", "./devices/filesystem", "detach the share"),
    ("a memory device", "./devices/memory", "use a flavor without hw:pmem"),
    ("shared memory with other guests", "./devices/shmem", "take <shmem> out of the domain"),
    ("a socket to the host", "./devices/vsock", "take <vsock> out of the domain"))
_CONFIDENTIAL = {"sev": "AMD SEV", "sev-snp": "AMD SEV-SNP", "tdx": "Intel TDX", "s390-pv": "s390 protection"}


def obstacle(root: ElementTree.Element) -> str:
    """Why a guest must not be checkpointed; '' when it can be."""
    return (_sealed(root) or _ide_drive(root) or _memory(root) or _unsaved(root)
            or _first(root, "./devices/hostdev", _host_device) or _first(root, "./devices/interface", _interface)
            or _first(root, "./devices/disk", _disk) or guestcpu.obstacle(root))


def _first(root: ElementTree.Element, path: str, why: Callable[[ElementTree.Element], str]) -> str:
    return next(filter(None, map(why, root.findall(path))), "")


def _sealed(root: ElementTree.Element) -> str:
    """Memory that the host cannot read: sealed by the processor, in guest_memfd."""
    security = root.find("launchSecurity")
    if security is None:
        return ""
    kind = security.get("type", "")
    return (f"the guest's memory is sealed by {_CONFIDENTIAL.get(kind, kind) or 'its launch security'} and cannot be "
            "read: use a flavor and an image without memory encryption")


def _ide_drive(root: ElementTree.Element) -> str:
    if root.find("./devices/disk/target[@bus='ide']") is None:
        return ""
    # QEMU saves an IDE controller wrongly between the start of a transfer and its command: an assertion in
    # hw/ide/pci.c ends it. See doc/source/contributor/decisions/ide-drives.rst.
    return ("a drive on the IDE bus can make QEMU abort at a checkpoint: give the image the properties "
            "hw_cdrom_bus=scsi and hw_scsi_model=virtio-scsi (and no hw_disk_bus=ide), and create the server anew")


def _memory(root: ElementTree.Element) -> str:
    # What another process writes through its own mapping is not seen by a look at QEMU's.
    if (root.find("./memoryBacking/access[@mode='shared']") is not None
            or root.find("./cpu/numa/cell[@memAccess='shared']") is not None
            or root.find("./memoryBacking/source[@type='file']") is not None):
        return "shared or file-backed memory is not tracked: use a host without [libvirt]file_backed_memory"
    if root.find("./memoryBacking/source[@type='memfd']") is not None:
        return "memory in a memfd is not tracked: take <source type='memfd'/> out of the server's memory backing"
    return ""


def _unsaved(root: ElementTree.Element) -> str:
    return next((f"{what} cannot be checkpointed: {remedy}" for what, path, remedy in _UNSAVED
                 if root.find(path) is not None), "")


def _host_device(device: ElementTree.Element) -> str:
    kind = device.get("type", "")
    what = " ".join(filter(None, (_HOST_DEVICES.get(kind, "device"), _place(device))))
    return (f"{what} of the host is passed through, and neither its state nor what it writes into memory is seen: "
            "detach it, or use a flavor without it")


def _place(device: ElementTree.Element) -> str:
    """A host device's address as people write it: 0000:3b:00.1, a uuid, or what its source says."""
    source = device.find("source")
    if source is None:
        return ""
    address = source.find("address")
    if address is None:
        adapter = source.find("adapter")
        return source.get("wwpn", "") or ("" if adapter is None else adapter.get("name", ""))
    if uuid := address.get("uuid"):
        return uuid
    parts = [address.get(part, "0x0").removeprefix("0x") for part in ("domain", "bus", "slot", "function")]
    if device.get("type") == "pci":
        return "{:0>4}:{:0>2}:{:0>2}.{}".format(*parts)
    return " ".join(f"{name} {value}" for name, value in sorted(address.attrib.items()))


def _interface(interface: ElementTree.Element) -> str:
    kind, mac = interface.get("type", ""), interface.find("mac")
    if kind not in _BYPASSING:
        return ""
    name = "an interface" if mac is None else f"interface {mac.get('address')}"
    return f"{name} of type {kind} passes QEMU by: use a port with vnic_type normal, bound by Open vSwitch or OVN"


def _disk(disk: ElementTree.Element) -> str:
    """Why a disk's writes cannot be followed, or its image not be had on another host; '' when they can be."""
    target, driver = disk.find("target"), disk.find("driver")
    name = "a disk" if target is None else f"disk {target.get('dev')}"
    if disk.get("device") == "floppy":
        return "a floppy drive is not replicated: create the server without it"
    if disk.get("type", "file") != "file":
        return (f"{name} is no file of its host but of type {disk.get('type')}: detach it if it is a volume; local "
                "disks are replicated with [libvirt]images_type qcow2, raw or flat")
    image_format = "raw" if driver is None else driver.get("type", "raw")
    if image_format not in ("raw", "qcow2"):
        return f"{name} is an image of format {image_format}: only raw and qcow2 are replicated"
    if image_format != "raw" and (disk.get("device") == "cdrom" or disk.find("readonly") is not None):
        return f"{name} is read-only and of format {image_format}: create the server from a disk image, not from an ISO"
    if disk.find(".//encryption") is not None:
        return f"{name} is encrypted, and its key is on this host only: use a flavor and an image without encryption"
    if disk.find("shareable") is not None:
        return f"{name} may be written to by others, whose writes are not seen: detach the shared volume"
    if disk.find("transient") is not None:
        return f"{name} is transient and would be lost with its host: make it an ordinary one"
    if driver is not None and driver.get("copy_on_read") == "on":
        return f"{name} has copy_on_read, which writes what the guest did not: switch it off"
    if disk.find("mirror") is not None:
        # QEMU takes one such job a disk.
        return f"{name} is being copied by a block job of libvirt: the server is protected once that has ended"
    return ""
