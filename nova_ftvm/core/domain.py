"""libvirt's domain XML: what a protected guest needs, and how the primary's becomes the standby's.

PURE: text in, text out. The driver (cloud/) calls it; it must never read a file or ask libvirt.

The standby has to look the same to the guest: same uuid, name, devices and addresses, because the device state that is
loaded into it names devices by their place. What only belongs to the primary's host or to its run is taken out:

    <domain id=..>                      the run
    <seclabel type='dynamic'>           the run
    <resource>/machine</resource>       the host's default
    <source index=..>, <backingStore>   the run: libvirt looks again
    <source path='/dev/pts/..'>, tty    the run
    the guest agent's socket            the run: libvirt makes its own
    graphics' port and address          the host
    interface's type, source, target    the host: from the port's binding there
    vcpu's cpuset                       the host
"""

import copy
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from xml.etree import ElementTree

from nova_ftvm.core import guestcpu, unfit
from nova_ftvm.core.kind import Abilities, Needs
from nova_ftvm.exception import Unsupported
from nova_ftvm.types import Generation, PairId

QEMU_NS = "http://libvirt.org/schemas/domain/qemu/1.0"
FTVM_NS = "urn:nova-ftvm:domain:1"
#: libvirt wants every namespace to keep its prefix; Nova's is the other one that its domains carry.
_PREFIXES = {"qemu": QEMU_NS, "ftvm": FTVM_NS, "nova": "http://openstack.org/xmlns/libvirt/nova/1.1"}
for _prefix, _uri in _PREFIXES.items():
    ElementTree.register_namespace(_prefix, _uri)

#: The chardev of the second monitor. libvirt's own are called char<something>.
MONITOR_ID = "ftvm"

_COMMANDLINE = f"{{{QEMU_NS}}}commandline"
_ARG = f"{{{QEMU_NS}}}arg"
_MARK = f"{{{FTVM_NS}}}standby"
_CHARDEV = re.compile(rf"socket,id={MONITOR_ID},path=(?P<path>.*),server=on,wait=off")
#: The machine whose virtio devices speak both ways; those of its devices that do, and those that have an ioeventfd.
_PC = re.compile(r"pc(-i440fx-.*)?")
_BOTH_WAYS = ("balloon", "blk", "net", "rng", "scsi", "serial")
_NOTIFIED = ("blk", "net", "rng", "scsi", "serial")


def _virtio(setting: str, kinds: Iterable[str]) -> tuple[str, ...]:
    """QEMU's arguments for all such devices, also those that are plugged in later."""
    return tuple(word for kind in kinds for word in ("-global", f"virtio-{kind}-pci.{setting}"))


#: Virtio devices that speak only the first way.
LEGACY_VIRTIO = _virtio("disable-modern=on", _BOTH_WAYS)
#: Virtio devices that are told of work without an eventfd, which would be taken apart and put together at each stop.
NO_IOEVENTFD = _virtio("ioeventfd=off", _NOTIFIED)
#: What an interface shows to the guest: kept from the primary. All else comes from the binding.
_GUEST_SIDE_OF_INTERFACE = ("mac", "model", "driver", "mtu", "address", "alias", "boot", "rom", "link", "coalesce")


@dataclasses.dataclass(frozen=True, slots=True)
class StandbyMark:
    """Whose standby a domain is. Kept in the domain's <metadata>, for the agent and for people."""

    pair_id: PairId
    generation: Generation
    #: The backup server in Nova that holds the reservation.
    backup_id: str


@dataclasses.dataclass(frozen=True, slots=True)
class DiskFile:
    """A disk's image on its host."""

    #: The name that libvirt knows it by, e.g. vda.
    target: str
    path: str
    #: raw or qcow2.
    format: str


def obstacle(domain_xml: str) -> str:
    """Why a guest with this XML must not be checkpointed, in one sentence; '' when it can be."""
    return unfit.obstacle(_parse(domain_xml))


def needs(domain_xml: str) -> Needs:
    """What the guest asks of a host."""
    return guestcpu.needs(_parse(domain_xml))


def with_processor(domain_xml: str, running_xml: str) -> str:
    """Returns the migratable XML of a KVM guest with the processor that it has by the running domain's XML.

    The migratable one tells what was asked for: `host-model` would be another processor on another host. The running
    one's is checked in full by libvirt, wherever it starts it. Guests under TCG stay as they are.
    """
    root, processor = _parse(domain_xml), _parse(running_xml).find("cpu")
    if not guestcpu.is_kvm(root) or processor is None:
        return domain_xml
    _remove(root, "cpu")
    root.append(processor)
    return _text(root)


def disks(domain_xml: str) -> list[DiskFile]:
    """The disks that lie in files of the host; an empty drive has none."""
    found = []
    for disk in _parse(domain_xml).findall("./devices/disk[@type='file']"):
        source, target, driver = (disk.find(tag) for tag in ("source", "target", "driver"))
        if source is not None and target is not None and "file" in source.attrib:
            image_format = "raw" if driver is None else driver.get("type", "raw")
            found.append(DiskFile(target.get("dev", ""), source.attrib["file"], image_format))
    return found


def arm(domain_xml: str, monitor_path: str, *, legacy_virtio: bool = False, abilities: Abilities | None = None) -> str:
    """Returns the XML with our monitor, with its virtio interfaces on QEMU's own backend, and with clocks that go on.

    legacy_virtio: each virtio device of a `pc` machine speaks virtio 0.9 only, which keeps a checkpoint's pause short
    (doc/source/contributor/decisions/legacy-virtio.rst). Other machines' devices cannot.
    abilities: what the host's KVM can, for the guest's processor and clocks (core/guestcpu.py).

    vhost would move packets past QEMU, where no filter holds them. Free page reporting is switched off: what the guest
    frees would be discarded by QEMU, and each discarded page is a written one for the next checkpoint. Disks leave
    their iothreads, in which QEMU 10.0 forgets a request over a stop (doc/source/contributor/decisions/iothreads.rst).
    Virtio devices have no ioeventfd, with which each stop of the guest drains its disks two times more
    (doc/source/contributor/decisions/no-ioeventfd.rst). Idempotent. Raises Unsupported for an obstacle, for XML that
    libvirt would not take, or a path that QEMU's option syntax cannot carry.
    """
    root = _parse(domain_xml)
    guestcpu.arm(root, abilities)
    if why := unfit.obstacle(root):
        raise Unsupported(why)
    for interface in root.findall("./devices/interface"):
        model = interface.find("model")
        if model is not None and model.get("type", "").startswith("virtio"):
            _child(interface, "driver").set("name", "qemu")
    for balloon in root.findall("./devices/memballoon[@freePageReporting]"):
        balloon.set("freePageReporting", "off")
    for kind in ("disk", "controller"):
        for driver in root.findall(f"./devices/{kind}/driver[@iothread]"):
            del driver.attrib["iothread"]
    foreign = _foreign_arguments(root)
    wanted = NO_IOEVENTFD + (LEGACY_VIRTIO if legacy_virtio and _knows_legacy_virtio(root) else ())
    present = set(_pairs(foreign))
    foreign += [word for pair in _pairs(wanted) if pair not in present for word in pair]
    _set_arguments(root, [*foreign, *_monitor_arguments(monitor_path)])
    return _text(root)


def standby(domain_xml: str, monitor_path: str, mark: StandbyMark, interfaces: Mapping[str, str], *,
            graphics_listen: str | None = None, cpuset: str | None = None) -> str:
    """Returns the standby's XML, made from the primary's live XML (VIR_DOMAIN_XML_MIGRATABLE).

    interfaces: <interface> for this host by MAC address in lower case, one for each of the primary's.
    graphics_listen: this host's address for graphics. cpuset: processors for floating vCPUs, None for all.
    Raises Unsupported for what cannot be moved to another host this way.
    """
    root = _parse(domain_xml)
    _refuse_what_stays(root)
    if why := unfit.obstacle(root):
        raise Unsupported(why)
    root.attrib.pop("id", None)
    for seclabel in root.findall("seclabel"):
        if seclabel.get("type") == "dynamic":
            root.remove(seclabel)
    for resource in root.findall("resource"):
        if resource.findtext("partition") == "/machine":
            root.remove(resource)
    _float_vcpus(root, cpuset)
    for disk in root.findall("./devices/disk"):
        _forget_chain(disk)
    for kind in ("serial", "console", "parallel", "channel"):
        for device in root.findall(f"./devices/{kind}"):
            _forget_endpoint(device)
    for graphics in root.findall("./devices/graphics"):
        _listen(graphics, graphics_listen)
    _move_interfaces(root, interfaces)
    _set_mark(root, mark)
    _set_arguments(root, [*_foreign_arguments(root), *_monitor_arguments(monitor_path), "-incoming", "defer"])
    return _text(root)


def ordinary(domain_xml: str) -> str:
    """Returns the XML that a promoted standby keeps for its next starts: it waits for nobody, and bears no mark.

    Its monitor stays, so that it can be protected again.
    """
    root = _parse(domain_xml)
    root.attrib.pop("id", None)
    _set_mark(root, None)
    path = _monitor_path(root)
    _set_arguments(root, [*_foreign_arguments(root), *(_monitor_arguments(path) if path else [])])
    return _text(root)


def monitor_path(domain_xml: str) -> str | None:
    """Returns the path of our monitor; None for a domain that was not armed."""
    return _monitor_path(_parse(domain_xml))


def standby_mark(domain_xml: str) -> StandbyMark | None:
    """Returns whose standby the domain is; None for an ordinary domain. Raises Unsupported for a damaged mark."""
    element = _parse(domain_xml).find(f"./metadata/{_MARK}")
    if element is None:
        return None
    try:
        return StandbyMark(PairId(element.attrib["pair"]), Generation(int(element.attrib["generation"])),
                           element.attrib["backup"])
    except (KeyError, ValueError) as error:
        raise Unsupported(f"the domain's standby mark cannot be read: {error}") from error


def _parse(domain_xml: str) -> ElementTree.Element:
    # A document type could make entities expand without end, and libvirt never writes one.
    if "<!DOCTYPE" in domain_xml or "<!ENTITY" in domain_xml:
        raise Unsupported("the domain's XML has a document type, which libvirt never writes")
    try:
        root = ElementTree.fromstring(domain_xml)  # noqa: S314 (no document type, see above)
    except ElementTree.ParseError as error:
        raise Unsupported(f"the domain's XML cannot be read: {error}") from error
    if root.tag != "domain":
        raise Unsupported(f"a <domain> was expected, not <{root.tag}>")
    return root


def _text(root: ElementTree.Element) -> str:
    return ElementTree.tostring(root, encoding="unicode")


def _child(parent: ElementTree.Element, tag: str) -> ElementTree.Element:
    found = parent.find(tag)
    return ElementTree.SubElement(parent, tag) if found is None else found


def _remove(parent: ElementTree.Element, *tags: str) -> None:
    for tag in tags:
        for found in parent.findall(tag):
            parent.remove(found)


def _knows_legacy_virtio(root: ElementTree.Element) -> bool:
    """Would QEMU start with it? Behind an IOMMU there is virtio 1 only."""
    machine = root.find("./os/type[@machine]")
    return (machine is not None and _PC.fullmatch(machine.attrib["machine"]) is not None
            and root.find("./devices//driver[@iommu='on']") is None)


def _arguments(root: ElementTree.Element) -> list[str]:
    return [arg.get("value", "") for arg in root.findall(f"./{_COMMANDLINE}/{_ARG}")]


def _monitor_arguments(path: str) -> list[str]:
    # QEMU would read a comma as the next option; doubling it works in QEMU but not for whoever reads it back.
    if not path.startswith("/") or "," in path:
        raise Unsupported(f"the monitor's path must be absolute and without commas: {path}")
    return ["-chardev", f"socket,id={MONITOR_ID},path={path},server=on,wait=off",
            "-mon", f"chardev={MONITOR_ID},mode=control"]


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Options with their values; an option without a value comes alone."""
    position = 0
    while position < len(arguments):
        takes = position + 1 < len(arguments) and not arguments[position + 1].startswith("-")
        yield tuple(arguments[position:position + 1 + takes])
        position += 1 + takes


def _foreign_arguments(root: ElementTree.Element) -> list[str]:
    """The command line's arguments that are not ours."""
    kept: list[str] = []
    for pair in _pairs(_arguments(root)):
        ours = (pair[0] == "-incoming"
                or (pair[0] == "-chardev" and len(pair) == 2 and f"id={MONITOR_ID}" in pair[1].split(","))
                or (pair[0] == "-mon" and len(pair) == 2 and f"chardev={MONITOR_ID}" in pair[1].split(",")))
        if not ours:
            kept.extend(pair)
    return kept


def _set_arguments(root: ElementTree.Element, arguments: list[str]) -> None:
    commandline = root.find(_COMMANDLINE)
    if commandline is None:
        if not arguments:
            return
        commandline = ElementTree.SubElement(root, _COMMANDLINE)
    _remove(commandline, _ARG)
    # libvirt's schema has the arguments before the environment.
    for position, argument in enumerate(arguments):
        commandline.insert(position, ElementTree.Element(_ARG, {"value": argument}))


def _monitor_path(root: ElementTree.Element) -> str | None:
    for pair in _pairs(_arguments(root)):
        match = _CHARDEV.fullmatch(pair[1]) if pair[0] == "-chardev" and len(pair) == 2 else None
        if match:
            return match["path"]
    return None


def _refuse_what_stays(root: ElementTree.Element) -> None:
    if root.find("./cputune/vcpupin") is not None:
        raise Unsupported("the server's vCPUs are pinned to its host's processors: use a flavor without pinning")
    for kind in ("serial", "console"):
        if root.find(f"./devices/{kind}[@type='tcp']") is not None:
            raise Unsupported("a serial console on TCP is bound to its host: set [serial_console]enabled=false")


def _float_vcpus(root: ElementTree.Element, cpuset: str | None) -> None:
    vcpu = root.find("vcpu")
    if vcpu is not None:
        vcpu.attrib.pop("cpuset", None)
        if cpuset:
            vcpu.set("cpuset", cpuset)
    cputune = root.find("cputune")
    if cputune is not None:
        _remove(cputune, "emulatorpin", "iothreadpin")
    _remove(root, "numatune")


def _forget_chain(disk: ElementTree.Element) -> None:
    _remove(disk, "backingStore")
    source = disk.find("source")
    if source is not None:
        source.attrib.pop("index", None)
        # The labels of a run.
        _remove(source, "seclabel")


def _forget_endpoint(device: ElementTree.Element) -> None:
    device.attrib.pop("tty", None)
    source = device.find("source")
    if source is None:
        return
    if device.get("type") == "pty":
        device.remove(source)
    elif device.tag == "channel" and device.get("type") == "unix":
        target = device.find("target")
        name = target.get("name", "") if target is not None else ""
        if name and source.get("path", "").endswith("/" + name):
            device.remove(source)


def _listen(graphics: ElementTree.Element, address: str | None) -> None:
    if "port" in graphics.attrib:
        graphics.set("port", "-1")
        graphics.set("autoport", "yes")
    if address is None:
        return
    _remove(graphics, "listen")
    graphics.set("listen", address)
    ElementTree.SubElement(graphics, "listen", {"type": "address", "address": address})


def _move_interfaces(root: ElementTree.Element, moved: Mapping[str, str]) -> None:
    devices = root.find("devices")
    if devices is None:
        return
    for position, interface in enumerate(list(devices)):
        if interface.tag != "interface":
            continue
        mac = interface.find("mac")
        address = "" if mac is None else mac.get("address", "").lower()
        if address not in moved:
            raise Unsupported(f"no binding on this host for the interface {address or 'without an address'}")
        devices[position] = _merged(interface, ElementTree.fromstring(moved[address]))  # noqa: S314 (our own text)


def _merged(primary: ElementTree.Element, here: ElementTree.Element) -> ElementTree.Element:
    """The guest's side of the primary's interface on this host's side of the new one."""
    merged = copy.deepcopy(here)
    _remove(merged, *_GUEST_SIDE_OF_INTERFACE)
    for tag in _GUEST_SIDE_OF_INTERFACE:
        merged.extend(copy.deepcopy(found) for found in primary.findall(tag))
    return merged


def _mark_element(mark: StandbyMark) -> ElementTree.Element:
    return ElementTree.Element(_MARK, {"pair": mark.pair_id, "generation": str(mark.generation),
                                       "backup": mark.backup_id, "role": "standby"})


def _set_mark(root: ElementTree.Element, mark: StandbyMark | None) -> None:
    metadata = root.find("metadata")
    if metadata is not None:
        _remove(metadata, _MARK)
    if mark is not None:
        _child(root, "metadata").append(_mark_element(mark))
