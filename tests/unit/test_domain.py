"""core/domain.py: XML that ran, odd XML and hostile XML."""

from xml.etree import ElementTree

import pytest

from nova_ftvm.core import domain
from nova_ftvm.core.kind import Abilities, Needs
from nova_ftvm.exception import Unsupported

MONITOR = "/run/nova-ftvm/u/monitor"
MARK = domain.StandbyMark("pair-1", 3, "backup-1")
HERE = {"fa:16:3e:00:00:01": "<interface type='ethernet'><mac address='fa:16:3e:00:00:01'/><model type='virtio'/>"
                             "<target dev='tap-here'/></interface>"}

#: A guest under TCG; KVM_PLAIN is as Nova defines one under KVM.
PLAIN = """<domain type='qemu'><name>instance-00000001</name><uuid>11111111-2222-3333-4444-555555555555</uuid>
<memory unit='KiB'>131072</memory><vcpu>1</vcpu><devices><interface type='bridge'><mac address='fa:16:3e:00:00:01'/>
<model type='virtio'/><source bridge='br0'/></interface></devices></domain>"""

LIVE = """<domain type='kvm' id='7' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
<name>instance-00000001</name><uuid>11111111-2222-3333-4444-555555555555</uuid>
<metadata><nova:instance xmlns:nova='http://openstack.org/xmlns/libvirt/nova/1.1'>
<nova:name>web</nova:name></nova:instance></metadata>
<memory unit='KiB'>131072</memory><vcpu placement='static' cpuset='0-3'>1</vcpu>
<cputune><shares>1024</shares><emulatorpin cpuset='0-3'/></cputune>
<numatune><memory mode='strict' nodeset='0'/></numatune>
<resource><partition>/machine</partition></resource>
<features><acpi/><apic/><ioapic driver='qemu'/></features>
<cpu mode='custom' match='exact' check='full'><model fallback='forbid'>Icelake-Server-v2</model>
<feature policy='disable' name='vmx'/><feature policy='disable' name='svm'/><feature policy='require' name='invtsc'/>
<numa><cell id='0' cpus='0' memory='131072' unit='KiB' memAccess='private'/></numa></cpu>
<clock offset='utc'><timer name='pit' tickpolicy='delay'/><timer name='tsc' frequency='2100000000'/></clock>
<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>
<disk type='file' device='disk' snapshot='external'>
<driver name='qemu' type='qcow2' cache='none' io='native' discard='unmap' iothread='1' queues='2'/>
<source file='/var/lib/nova/instances/u/disk' index='2'><seclabel model='dac' relabel='no'/></source>
<backingStore type='file' index='3'><format type='raw'/><source file='/var/lib/nova/instances/_base/x'/>
<backingStore/></backingStore><target dev='vda' bus='virtio'/><iotune><total_iops_sec>500</total_iops_sec></iotune>
<alias name='virtio-disk0'/><address type='pci' domain='0x0000' bus='0x00' slot='0x04' function='0x0'/></disk>
<disk type='file' device='disk'><driver name='qemu' type='qcow2' cache='none'/>
<source file='/var/lib/nova/instances/u/disk.eph0' index='4'/><backingStore/><target dev='vdb' bus='virtio'/></disk>
<disk type='file' device='cdrom'><driver name='qemu' type='raw' cache='none'/>
<source file='/var/lib/nova/instances/u/disk.config' index='1'/><backingStore/>
<target dev='sda' bus='scsi' tray='closed'/><readonly/>
<address type='drive' controller='0' bus='0' target='0' unit='0'/></disk>
<disk type='file' device='cdrom'><driver name='qemu'/><target dev='sdb' bus='scsi' tray='open'/><readonly/></disk>
<interface type='bridge'><mac address='FA:16:3E:00:00:01'/><source bridge='br-there'/><target dev='tap-there'/>
<model type='virtio'/><driver name='qemu'/><mtu size='1450'/><alias name='net0'/>
<address type='pci' domain='0x0000' bus='0x00' slot='0x03' function='0x0'/></interface>
<serial type='pty'><source path='/dev/pts/4'/><log file='/var/lib/nova/instances/u/console.log'/>
<target port='0'/></serial>
<console type='pty' tty='/dev/pts/4'><source path='/dev/pts/4'/><target type='serial' port='0'/></console>
<channel type='unix'><source mode='bind' path='/var/lib/libvirt/qemu/channel/target/domain-7-i/org.qemu.guest_agent.0'/>
<target type='virtio' name='org.qemu.guest_agent.0'/></channel>
<graphics type='vnc' port='5901' autoport='yes' listen='10.0.0.1'><listen type='address' address='10.0.0.1'/></graphics>
</devices><seclabel type='dynamic' model='dac' relabel='yes'><label>+64055:+64055</label></seclabel>
<qemu:commandline><qemu:arg value='-global'/><qemu:arg value='kvm-pit.lost_tick_policy=discard'/>
<qemu:arg value='-chardev'/><qemu:arg value='socket,id=ftvm,path=/run/nova-ftvm/old/monitor,server=on,wait=off'/>
<qemu:arg value='-mon'/><qemu:arg value='chardev=ftvm,mode=control'/><qemu:env name='A' value='B'/>
</qemu:commandline></domain>"""


def arguments(xml):
    return [arg.get("value") for arg in ElementTree.fromstring(xml).iter(f"{{{domain.QEMU_NS}}}arg")]


def made(xml=LIVE, **more):
    return ElementTree.fromstring(domain.standby(xml, MONITOR, MARK, HERE, **more))


def test_arming_adds_a_monitor_and_takes_vhost_out():
    armed = domain.arm(PLAIN, MONITOR)
    assert domain.monitor_path(armed) == MONITOR
    assert ElementTree.fromstring(armed).find("./devices/interface/driver").get("name") == "qemu"
    assert arguments(armed) == [*domain.NO_IOEVENTFD, "-chardev", f"socket,id=ftvm,path={MONITOR},server=on,wait=off",
                                "-mon", "chardev=ftvm,mode=control"]


LEGACY = "-global", "virtio-blk-pci.disable-modern=on"
VIRTIO = [*domain.NO_IOEVENTFD, *domain.LEGACY_VIRTIO]


@pytest.mark.parametrize(("machine", "is_legacy"), [
    ("pc", True), ("pc-i440fx-9.2", True), ("q35", False), ("pc-q35-9.2", False), ("microvm", False)])
def test_virtio_devices_of_a_pc_speak_the_short_way(machine, is_legacy):
    xml = PLAIN.replace("<vcpu>", f"<os><type machine='{machine}'>hvm</type></os><vcpu>")
    said = arguments(domain.arm(xml, MONITOR, legacy_virtio=True))
    assert said[:len(domain.NO_IOEVENTFD)] == list(domain.NO_IOEVENTFD)
    assert (said[:len(VIRTIO)] == VIRTIO) == is_legacy
    assert (LEGACY[1] in said) == is_legacy
    assert LEGACY[1] not in arguments(domain.arm(xml, MONITOR))


def test_a_guest_keeps_what_its_devices_speak_on_its_way_to_another_host_and_home():
    xml = PLAIN.replace("<vcpu>", "<os><type machine='pc'>hvm</type></os><vcpu>")
    armed = domain.arm(xml, MONITOR, legacy_virtio=True)
    assert domain.arm(armed, MONITOR, legacy_virtio=True) == armed
    standby = domain.standby(armed, "/there", MARK, HERE)
    for text in (standby, domain.ordinary(standby)):
        assert arguments(text)[:len(VIRTIO)] == VIRTIO


def test_a_guest_that_was_armed_before_has_each_setting_once():
    xml = PLAIN.replace("<vcpu>", "<os><type machine='pc'>hvm</type></os><vcpu>")
    said = arguments(domain.arm(domain.arm(xml, MONITOR), MONITOR, legacy_virtio=True))
    assert sorted(said[:len(VIRTIO)]) == sorted(VIRTIO) and len(said) == len(VIRTIO) + 4


def test_devices_behind_an_iommu_speak_as_they_did():
    xml = PLAIN.replace("<vcpu>", "<os><type machine='pc'>hvm</type></os><vcpu>").replace(
        "<source bridge", "<driver iommu='on'/><source bridge")
    assert LEGACY[1] not in arguments(domain.arm(xml, MONITOR, legacy_virtio=True))


def test_devices_speak_as_they_did_when_no_machine_is_named():
    assert LEGACY[1] not in arguments(domain.arm(PLAIN, MONITOR, legacy_virtio=True))


def test_a_drive_on_the_ide_bus_is_refused_with_what_to_do():
    xml = PLAIN.replace("<devices>", "<devices><disk type='file' device='cdrom'><target dev='hda' bus='ide'/></disk>")
    with pytest.raises(Unsupported, match="hw_cdrom_bus=scsi"):
        domain.arm(xml, MONITOR)
    assert not domain.obstacle(xml.replace("ide", "scsi"))


DISK = "<disk type='file' device='disk'>{}<source file='/d'/><target dev='vdb' bus='virtio'/></disk>"


@pytest.mark.parametrize(("disk", "says"), [
    (DISK.replace("type='file'", "type='network'").format(""), "disk vdb is no file of its host but of type network"),
    (DISK.replace("type='file'", "type='block'").format(""), "detach it if it is a volume"),
    (DISK.replace("type='file'", "type='vhostuser'").format(""), "of type vhostuser"),
    (DISK.format("<driver name='qemu' type='vmdk'/>"), "of format vmdk"),
    (DISK.format("<driver name='qemu' type='qcow2' copy_on_read='on'/>"), "copy_on_read"),
    (DISK.replace("device='disk'", "device='cdrom'").format("<driver type='qcow2'/>"), "not from an ISO"),
    (DISK.format("<driver type='qcow2'/><readonly/>"), "read-only and of format qcow2"),
    (DISK.format("<shareable/>"), "written to by others"),
    (DISK.format("<transient/>"), "transient"),
    (DISK.format("<encryption format='luks'/>"), "encrypted"),
    (DISK.replace("<source file='/d'/>", "<source file='/d'><encryption format='luks'/></source>").format(""),
     "encrypted"),
    (DISK.format("<mirror type='file' job='copy'><source file='/e'/></mirror>"), "by a block job of libvirt"),
    (DISK.replace("device='disk'", "device='floppy'").format(""), "a floppy drive"),
])
def test_a_disk_that_cannot_be_followed_is_refused_by_name(disk, says):
    xml = PLAIN.replace("<devices>", f"<devices>{disk}")
    assert says in domain.obstacle(xml)
    for call in (lambda: domain.arm(xml, MONITOR), lambda: domain.standby(xml, MONITOR, MARK, HERE)):
        with pytest.raises(Unsupported, match=r"disk vdb|floppy"):
            call()


@pytest.mark.parametrize("disk", [
    DISK.format(""), DISK.format("<driver name='qemu' type='raw' cache='writeback' copy_on_read='off'/>"),
    DISK.format("<driver name='qemu' type='qcow2' io='native' iothread='1'/><iotune/>"), DISK.format("<readonly/>"),
    "<disk type='file' device='cdrom'><target dev='sda' bus='scsi'/><readonly/></disk>",
    DISK.replace("bus='virtio'", "bus='scsi'").format(""), DISK.replace("bus='virtio'", "bus='sata'").format("")])
def test_an_ordinary_local_disk_is_no_obstacle(disk):
    assert domain.obstacle(PLAIN.replace("<devices>", f"<devices>{disk}")) == ""


def test_a_refusal_leaves_room_for_who_says_it():
    long_name = DISK.format("").replace("vdb", "sdabc").replace("type='file'", "type='network'")
    assert len(domain.obstacle(PLAIN.replace("<devices>", f"<devices>{long_name}"))) < 200


def test_disks_are_told_with_their_files_and_formats():
    folder = "/var/lib/nova/instances/u"
    assert domain.disks(LIVE) == [
        domain.DiskFile("vda", f"{folder}/disk", "qcow2"), domain.DiskFile("vdb", f"{folder}/disk.eph0", "qcow2"),
        domain.DiskFile("sda", f"{folder}/disk.config", "raw")]
    assert domain.disks(PLAIN) == []


def test_each_disk_of_the_standby_is_the_primarys_without_its_run():
    root = made()
    paths = [source.get("file") for source in root.findall("./devices/disk/source")]
    assert paths == [disk.path for disk in domain.disks(LIVE)]
    for before, after in zip(ElementTree.fromstring(LIVE).findall("./devices/disk"), root.findall("./devices/disk"),
                             strict=True):
        assert after.attrib == before.attrib
        kept = [child for child in before if child.tag not in ("backingStore", "source")]
        assert [ElementTree.tostring(child).strip() for child in after if child.tag != "source"] == [
            ElementTree.tostring(child).strip() for child in kept]
        assert not after.findall("./source/*") and set(getattr(after.find("source"), "attrib", {})) <= {"file"}


@pytest.mark.parametrize("backing", ["<access mode='shared'/>", "<source type='file'/>", "<source type='memfd'/>"])
def test_memory_that_others_may_write_is_refused(backing):
    xml = PLAIN.replace("<vcpu>", f"<memoryBacking>{backing}</memoryBacking><vcpu>")
    with pytest.raises(Unsupported, match="not tracked"):
        domain.arm(xml, MONITOR)


def test_an_armed_guest_keeps_the_pages_that_it_frees():
    balloon = "<memballoon model='virtio' autodeflate='on' freePageReporting='on'/>"
    armed = ElementTree.fromstring(domain.arm(PLAIN.replace("</devices>", balloon + "</devices>"), MONITOR))
    assert armed.find("./devices/memballoon").attrib == {
        "model": "virtio", "autodeflate": "on", "freePageReporting": "off"}


def test_an_armed_guests_disks_leave_their_iothreads_and_keep_the_rest():
    disks = ("<disk type='file' device='disk'><driver name='qemu' type='raw' cache='none' iothread='1'/>"
             "<source file='/d'/><target dev='vda' bus='virtio'/></disk>"
             "<controller type='scsi' model='virtio-scsi'><driver iothread='1' queues='2'/></controller>")
    armed = ElementTree.fromstring(domain.arm(PLAIN.replace("</devices>", disks + "</devices>"), MONITOR))
    assert [driver.attrib for driver in armed.iter("driver") if "cache" in driver.attrib or "queues" in driver.attrib][
        -2:] == [{"name": "qemu", "type": "raw", "cache": "none"}, {"queues": "2"}]
    assert not [driver for driver in armed.iter("driver") if "iothread" in driver.attrib]


def test_arming_twice_is_arming_once():
    once = domain.arm(PLAIN, MONITOR)
    assert domain.arm(once, MONITOR) == once


def test_a_new_path_replaces_the_old_monitor_and_leaves_foreign_arguments():
    armed = domain.arm(LIVE, MONITOR)
    assert arguments(armed)[:2] == ["-global", "kvm-pit.lost_tick_policy=discard"]
    assert arguments(armed).count("-chardev") == 1
    assert domain.monitor_path(armed) == MONITOR
    assert ElementTree.fromstring(armed).find(f".//{{{domain.QEMU_NS}}}env").get("name") == "A"


def test_the_driver_element_of_an_interface_keeps_its_other_settings():
    xml = PLAIN.replace("<source bridge", "<driver name='vhost' rx_queue_size='512'/><source bridge")
    armed = domain.arm(xml, MONITOR)
    assert ElementTree.fromstring(armed).find(".//driver").attrib == {"name": "qemu", "rx_queue_size": "512"}


def test_an_interface_that_is_not_virtio_is_left_as_it_is():
    assert "driver" not in domain.arm(PLAIN.replace("virtio", "e1000"), MONITOR)


@pytest.mark.parametrize("path", ["monitor", "/run/a,server=off", ""])
def test_a_path_that_qemu_would_misread_is_refused(path):
    with pytest.raises(Unsupported):
        domain.arm(PLAIN, path)


@pytest.mark.parametrize("xml", ["", "<domain", "<network/>", "<!DOCTYPE d [<!ENTITY a 'b'>]><domain>&a;</domain>"])
def test_xml_that_no_libvirt_writes_is_refused(xml):
    for call in (lambda: domain.arm(xml, MONITOR), lambda: domain.monitor_path(xml), lambda: domain.ordinary(xml)):
        with pytest.raises(Unsupported):
            call()


def test_a_domain_without_our_monitor_has_no_path():
    assert domain.monitor_path(PLAIN) is None
    assert domain.monitor_path(LIVE.replace("id=ftvm", "id=other")) is None


def test_the_standby_is_the_same_to_the_guest():
    root = made()
    assert root.findtext("uuid") == "11111111-2222-3333-4444-555555555555"
    assert root.findtext("name") == "instance-00000001"
    assert [a.get("slot") for a in root.iter("address") if a.get("type") == "pci"] == ["0x04", "0x03"]
    interface = root.find("./devices/interface")
    assert interface.find("mtu").get("size") == "1450"
    assert interface.find("driver").get("name") == "qemu"


def test_the_standbys_interface_is_this_hosts():
    interface = made().find("./devices/interface")
    assert interface.get("type") == "ethernet"
    assert interface.find("target").get("dev") == "tap-here"
    assert interface.find("source") is None


def test_the_standby_waits_for_its_stream_with_the_primarys_memory_settings():
    root = made(PLAIN.replace("<vcpu>", "<memoryBacking><nosharepages/></memoryBacking><vcpu>"))
    assert [child.tag for child in root.find("memoryBacking")] == ["nosharepages"]
    assert arguments(ElementTree.tostring(root))[-2:] == ["-incoming", "defer"]


def test_nothing_of_the_primarys_run_is_left():
    root = made(graphics_listen="10.0.0.2")
    text = ElementTree.tostring(root, encoding="unicode")
    assert "id" not in root.attrib
    for trace in ("seclabel", "/dev/pts", "domain-7-", "index=", "backingStore", "partition", "cpuset", "nodeset",
                  "10.0.0.1", "5901", "/run/nova-ftvm/old", "there"):
        assert trace not in text, trace
    graphics = root.find("./devices/graphics")
    assert (graphics.get("port"), graphics.get("listen")) == ("-1", "10.0.0.2")
    assert root.find("./devices/serial/log") is not None
    assert root.find("./cputune/shares").text == "1024"


def test_what_the_operator_set_on_purpose_is_kept():
    xml = LIVE.replace("/machine", "/gold").replace("type='dynamic'", "type='none'")
    xml = xml.replace("/var/lib/libvirt/qemu/channel/target/domain-7-i/org.qemu.guest_agent.0", "/srv/agent.sock")
    text = ElementTree.tostring(made(xml, cpuset="4-7"), encoding="unicode")
    for kept in ("/gold", "seclabel", "/srv/agent.sock", 'cpuset="4-7"'):
        assert kept in text


def test_novas_metadata_stays_beside_our_mark():
    xml = domain.standby(LIVE, MONITOR, MARK, HERE)
    assert domain.standby_mark(xml) == MARK
    assert "<nova:name>web</nova:name>" in xml


def test_a_standby_of_a_former_standby_bears_one_mark_and_waits_once():
    first = domain.standby(LIVE, "/run/nova-ftvm/old/monitor", MARK, HERE)
    second = domain.standby(first, MONITOR, domain.StandbyMark("pair-1", 5, "backup-2"), HERE)
    assert domain.standby_mark(second).backup_id == "backup-2"
    assert arguments(second).count("-incoming") == 1
    assert domain.monitor_path(second) == MONITOR


def test_a_promoted_standby_starts_like_any_guest():
    xml = domain.ordinary(domain.standby(LIVE, MONITOR, MARK, HERE))
    assert domain.standby_mark(xml) is None
    assert "-incoming" not in arguments(xml)
    assert domain.monitor_path(xml) == MONITOR
    assert arguments(xml)[:2] == ["-global", "kvm-pit.lost_tick_policy=discard"]


def test_a_plain_domain_stays_without_a_commandline():
    assert "commandline" not in domain.ordinary(PLAIN)


def test_an_interface_without_a_binding_here_is_refused():
    with pytest.raises(Unsupported, match="fa:16:3e:00:00:01"):
        domain.standby(LIVE, MONITOR, MARK, {})


@pytest.mark.parametrize(("old", "new"), [
    ("<emulatorpin cpuset='0-3'/>", "<vcpupin vcpu='0' cpuset='2'/>"),
    ("<serial type='pty'>", "<serial type='tcp'>"),
])
def test_what_is_bound_to_the_primarys_host_is_refused(old, new):
    with pytest.raises(Unsupported):
        made(LIVE.replace(old, new))


@pytest.mark.parametrize(("old", "new", "says"), [
    ("<vcpu ", "<memoryBacking><hugepages/></memoryBacking><vcpu ", "huge pages"),
    ("<emulator>", "<tpm model='tpm-crb'/><emulator>", "TPM"),
    ("<emulator>", "<filesystem type='mount'/><emulator>", "shared folder"),
    ("<emulator>", "<memory model='nvdimm'/><emulator>", "memory device"),
    ("<emulator>", "<shmem name='x'/><emulator>", "shared memory"),
    ("<emulator>", "<vsock model='virtio'/><emulator>", "socket to the host"),
])
def test_what_is_not_saved_is_told_before_anything_is_done_and_refused_for_a_standby(old, new, says):
    xml = LIVE.replace(old, new)
    assert says in domain.obstacle(xml) and ": " in domain.obstacle(xml)
    with pytest.raises(Unsupported, match=says):
        domain.arm(xml, MONITOR)
    with pytest.raises(Unsupported, match=says):
        made(xml)


@pytest.mark.parametrize("mark", [
    "<f:standby xmlns:f='{ns}' pair='p' generation='x' backup='b'/>", "<f:standby xmlns:f='{ns}'/>"])
def test_a_damaged_mark_is_not_taken_for_none(mark):
    xml = PLAIN.replace("<vcpu>", f"<metadata>{mark.format(ns=domain.FTVM_NS)}</metadata><vcpu>")
    with pytest.raises(Unsupported):
        domain.standby_mark(xml)


def test_a_mark_in_somebody_elses_namespace_is_none_of_ours():
    xml = PLAIN.replace("<vcpu>", "<metadata><f:standby xmlns:f='http://example.net/' pair='p'/></metadata><vcpu>")
    assert domain.standby_mark(xml) is None


def test_the_texts_of_others_are_escaped_not_believed():
    xml = PLAIN.replace("instance-00000001", "a&lt;/name&gt;&lt;evil/&gt;")
    root = made(xml)
    assert root.findtext("name") == "a</name><evil/>"
    assert root.find("evil") is None


# -- the processor and the clocks of a KVM guest

TOPOLOGY = "<topology sockets='2' cores='1' threads='1'/>"
#: Nova's cpu_mode -> what it writes.
CPUS = {
    "none": f"<cpu match='exact'>{TOPOLOGY}</cpu>",
    "host-model": f"<cpu mode='host-model' match='exact'>{TOPOLOGY}</cpu>",
    "host-passthrough": f"<cpu mode='host-passthrough' match='exact'>{TOPOLOGY}</cpu>",
    "maximum": f"<cpu mode='maximum' match='exact'>{TOPOLOGY}</cpu>",
    "custom": f"<cpu mode='custom' match='exact'><model>EPYC</model>{TOPOLOGY}"
              "<feature policy='require' name='pcid'/><feature policy='require' name='svm'/></cpu>",
}
KVM_PLAIN = PLAIN.replace("type='qemu'", "type='kvm'").replace("<vcpu>", CPUS["host-model"] + """
<features><acpi/><apic/></features><clock offset='localtime'><timer name='pit' tickpolicy='delay'/>
<timer name='rtc' tickpolicy='catchup'/><timer name='hpet' present='no'/></clock><vcpu>""")
ABLE = Abilities(kvm=True, tsc_hz=2_100_000_000, tsc_adjust=True)


def kvm_guest(mode):
    return KVM_PLAIN.replace(CPUS["host-model"], CPUS[mode])


def armed_root(xml=KVM_PLAIN, abilities=ABLE):
    return ElementTree.fromstring(domain.arm(xml, MONITOR, abilities=abilities))


def features(root):
    return {feature.get("name"): feature.get("policy") for feature in root.findall("./cpu/feature")}


@pytest.mark.parametrize("mode", CPUS)
def test_a_kvm_guest_of_each_cpu_mode_is_promised_the_tsc_and_shown_no_nesting(mode):
    root = armed_root(kvm_guest(mode))
    given = {"vmx": "disable", "svm": "disable", "invtsc": "require", "tsc_adjust": "require"}
    assert features(root) == given | ({"pcid": "require"} if mode == "custom" else {})
    assert root.find("./cpu/topology").attrib == {"sockets": "2", "cores": "1", "threads": "1"}
    assert root.find("./cpu").get("mode") == ("custom" if mode == "none" else mode)
    assert root.findtext("./cpu/model") == {"none": "qemu64", "custom": "EPYC"}.get(mode)
    assert len(root.findall("./cpu")) == 1 and root.find("./cpu").get("match") == "exact"


def test_a_kvm_guest_without_a_processor_is_given_the_one_that_libvirt_would_take():
    root = armed_root(KVM_PLAIN.replace(CPUS["host-model"], ""))
    assert root.findtext("./cpu/model") == "qemu64" and root.find("./cpu").get("check") == "none"


def test_a_kvm_guests_clock_has_a_frequency_and_keeps_what_nova_wrote():
    clock = armed_root().find("clock")
    assert clock.get("offset") == "localtime"
    assert [timer.attrib for timer in clock] == [
        {"name": "pit", "tickpolicy": "delay"}, {"name": "rtc", "tickpolicy": "catchup"},
        {"name": "hpet", "present": "no"}, {"name": "tsc", "frequency": "2100000000"}]


def test_a_frequency_that_the_guest_has_already_is_kept():
    xml = KVM_PLAIN.replace("</clock>", "<timer name='tsc' frequency='2000000000'/></clock>")
    assert [timer.get("frequency") for timer in armed_root(xml).findall("./clock/timer[@name='tsc']")] == ["2000000000"]


@pytest.mark.parametrize("ioapic", ["", "<ioapic driver='kvm'/>", "<ioapic driver='qemu'/>"])
def test_a_kvm_guests_pit_is_qemus_own(ioapic):
    root = armed_root(KVM_PLAIN.replace("<apic/>", "<apic/>" + ioapic))
    assert [feature.tag for feature in root.find("features")] == ["acpi", "apic", "ioapic"]
    assert root.find("./features/ioapic").get("driver") == "qemu"


@pytest.mark.parametrize("abilities", [None, Abilities(kvm=True), Abilities()])
def test_no_tsc_is_promised_where_it_is_no_clock_or_nobody_tells(abilities):
    root = armed_root(abilities=abilities)
    assert features(root) == {"vmx": "disable", "svm": "disable"}
    assert root.find("./clock/timer[@name='tsc']") is None
    assert root.find("./features/ioapic").get("driver") == "qemu"


def test_tsc_adjust_is_asked_of_a_host_that_has_it_only():
    abilities = Abilities(kvm=True, tsc_hz=1_000_000_000)
    assert "tsc_adjust" not in features(armed_root(abilities=abilities))
    assert features(armed_root(abilities=abilities))["invtsc"] == "require"


def test_a_guest_under_tcg_keeps_its_processor_and_clocks():
    xml = KVM_PLAIN.replace("type='kvm'", "type='qemu'")
    assert domain.arm(xml, MONITOR, abilities=ABLE) == domain.arm(xml, MONITOR)
    root = armed_root(xml)
    assert features(root) == {} and root.find("./features/ioapic") is None
    assert root.find("./clock/timer[@name='tsc']") is None


@pytest.mark.parametrize("mode", CPUS)
def test_arming_a_kvm_guest_twice_is_arming_it_once(mode):
    once = domain.arm(kvm_guest(mode), MONITOR, abilities=ABLE)
    assert domain.arm(once, MONITOR, abilities=ABLE) == once


def test_a_guest_takes_its_clocks_to_its_standby_and_home():
    armed = domain.arm(KVM_PLAIN, MONITOR, abilities=ABLE)
    standby = domain.standby(armed, "/there", MARK, HERE)
    for text in (standby, domain.ordinary(standby)):
        root = ElementTree.fromstring(text)
        assert features(root) == features(ElementTree.fromstring(armed))
        assert root.find("./clock/timer[@name='tsc']").get("frequency") == "2100000000"
        assert root.find("./features/ioapic").get("driver") == "qemu"


@pytest.mark.parametrize("processor", [
    "<cpu mode='host-passthrough'/>", "<cpu mode='host-model'><feature policy='disable' name='vmx'/></cpu>",
    "<cpu mode='custom'><model>EPYC</model><feature name='svm'/><feature policy='forbid' name='vmx'/></cpu>",
    "<cpu mode='custom'><model>EPYC</model><feature policy='optional' name='vmx'/>"
    "<feature policy='forbid' name='svm'/></cpu>"])
def test_a_running_guest_that_may_have_guests_of_its_own_is_refused(processor):
    live = KVM_PLAIN.replace(CPUS["host-model"], processor)
    assert "hard-reboot" in domain.obstacle(live)
    with pytest.raises(Unsupported, match=r"vmx|svm"):
        domain.standby(live, MONITOR, MARK, HERE)
    assert domain.obstacle(live.replace("type='kvm'", "type='qemu'")) == ""
    assert domain.obstacle(domain.arm(live, MONITOR)) == ""


@pytest.mark.parametrize(("xml", "needs"), [
    (PLAIN, Needs()), (KVM_PLAIN, Needs(kvm=True)), (LIVE, Needs(kvm=True, tsc_hz=2_100_000_000)),
    (LIVE.replace("type='kvm'", "type='qemu'"), Needs()), (LIVE.replace("2100000000", "fast"), Needs(kvm=True))])
def test_a_domain_tells_what_it_needs_of_a_host(xml, needs):
    assert domain.needs(xml) == needs


def test_a_standby_is_made_with_the_processor_that_the_guest_has():
    running = KVM_PLAIN.replace(CPUS["host-model"], CPUS["custom"])
    told = domain.with_processor(KVM_PLAIN, running)
    assert ElementTree.fromstring(told).findtext("./cpu/model") == "EPYC"
    assert len(ElementTree.fromstring(told).findall("./cpu")) == 1
    for text in (KVM_PLAIN.replace("type='kvm'", "type='qemu'"), KVM_PLAIN.replace(CPUS["host-model"], "")):
        assert domain.with_processor(text, text) == text


# -- what is refused

PCI = ("<hostdev mode='subsystem' type='pci' managed='yes'><source>"
       "<address domain='0x0000' bus='0x3b' slot='0x00' function='0x1'/></source></hostdev>")
MDEV = ("<hostdev mode='subsystem' type='mdev' model='vfio-pci'><source>"
        "<address uuid='c2177883-f1bb-47f0-914d-32a22e3a8804'/></source></hostdev>")
USB = "<hostdev mode='subsystem' type='usb'><source><address bus='1' device='3'/></source></hostdev>"
VHOST_SCSI = "<hostdev mode='subsystem' type='scsi_host'><source protocol='vhost' wwpn='naa.5'/></hostdev>"
SCSI = ("<hostdev mode='subsystem' type='scsi'><source><adapter name='scsi_host0'/>"
        "<address bus='0' target='0' unit='0'/></source></hostdev>")
PORT = "<interface type='{}'><mac address='fa:16:3e:00:00:02'/></interface>"


@pytest.mark.parametrize(("device", "says"), [
    (PCI, "PCI device 0000:3b:00.1 "), (MDEV, "mediated device c2177883-f1bb-47f0-914d-32a22e3a8804 "),
    (USB, "USB device bus 1 device 3 "), (VHOST_SCSI, "vhost SCSI device naa.5 "), (SCSI, "SCSI device "),
    ("<hostdev mode='capabilities' type='misc'/>", "device of the host"),
    (PORT.format("hostdev"), "interface fa:16:3e:00:00:02 of type hostdev"),
    (PORT.format("vdpa"), "interface fa:16:3e:00:00:02 of type vdpa"),
    (PORT.format("vhostuser"), "interface fa:16:3e:00:00:02 of type vhostuser"),
    ("<interface type='vdpa'/>", "an interface of type vdpa"),
])
@pytest.mark.parametrize("guest", [PLAIN, domain.arm(KVM_PLAIN, MONITOR, abilities=ABLE)])
def test_a_device_that_passes_qemu_by_is_refused_by_name_and_with_what_to_do(guest, device, says):
    xml = guest.replace("</devices>", device + "</devices>")
    assert says in domain.obstacle(xml) and (": detach it" in domain.obstacle(xml) or ": use a" in domain.obstacle(xml))
    for call in (lambda: domain.arm(xml, MONITOR), lambda: domain.standby(xml, MONITOR, MARK, HERE)):
        with pytest.raises(Unsupported):
            call()


@pytest.mark.parametrize(("kind", "says"), [("sev", "AMD SEV "), ("sev-snp", "AMD SEV-SNP"), ("tdx", "Intel TDX"),
                                            ("other", "by other")])
def test_sealed_memory_is_refused_with_what_to_do(kind, says):
    xml = KVM_PLAIN.replace("<vcpu>", f"<launchSecurity type='{kind}'/><vcpu>")
    assert says in domain.obstacle(xml) and "without memory encryption" in domain.obstacle(xml)
    with pytest.raises(Unsupported, match="sealed"):
        domain.arm(xml, MONITOR, abilities=ABLE)


def test_a_cell_of_shared_memory_is_refused():
    assert "not tracked" in domain.obstacle(LIVE.replace("memAccess='private'", "memAccess='shared'"))
    assert domain.obstacle(LIVE) == ""
