"""An armed domain is what libvirt takes, what QEMU is then started with, and what the guest is shown."""

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

import libvirt
import pytest
from lxml import etree

from nova_ftvm.cmd.engine import accelerator
from nova_ftvm.core import domain
from nova_ftvm.core.kind import TSC_TOLERANCE, Abilities, Needs
from nova_ftvm.host import kvm, qmp
from nova_ftvm.host.libvirt import Host
from nova_ftvm.types import Generation, PairId
from tests.host.machine import wait_for
from tests.kvm import machine
from tests.kvm.libvirtd import libvirtd

SCHEMA = "/usr/share/libvirt/schemas/domain.rng"
UUID = "11111111-2222-3333-4444-555555555555"
#: Where guest/clocks.S writes what CPUID told it: 1 is an invariant TSC.
CPUID_TOLD = 0x2000 + 0x2c
MARK = domain.StandbyMark(PairId("pair"), Generation(1), "backup")

TOPOLOGY = "<topology sockets='1' cores='1' threads='1'/>"
#: What Nova writes for each [libvirt]cpu_mode.
CPUS = {"none": f"<cpu match='exact'>{TOPOLOGY}</cpu>",
        "host-model": f"<cpu mode='host-model' match='exact'>{TOPOLOGY}</cpu>",
        "host-passthrough": f"<cpu mode='host-passthrough' match='exact'>{TOPOLOGY}</cpu>",
        "custom": f"<cpu mode='custom' match='exact'><model>qemu64</model>{TOPOLOGY}"
                  "<feature policy='require' name='svm'/></cpu>"}


def nova_xml(mode: str, machine_type: str = "pc") -> str:
    """What Nova defines under KVM, with a bare-metal guest in place of the firmware."""
    rom = machine.build("clocks", CPUS=1, PERIOD=0, PVCLOCK=0)
    return f"""<domain type='kvm'><name>instance-1</name><uuid>{UUID}</uuid><memory unit='MiB'>64</memory><vcpu>1</vcpu>
<os><type machine='{machine_type}'>hvm</type><loader type='rom'>{rom}</loader></os><features><acpi/><apic/></features>
<clock offset='utc'><timer name='pit' tickpolicy='delay'/><timer name='rtc' tickpolicy='catchup'/>
<timer name='hpet' present='no'/></clock>{CPUS[mode]}<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>
<video><model type='vga'/></video><memballoon model='none'/></devices></domain>"""


@pytest.fixture(scope="module")
def able() -> Abilities:
    return kvm.abilities()


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with TemporaryDirectory(prefix="ftvm-") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def uri(folder: Path) -> Iterator[str]:
    with libvirtd(folder) as address:
        yield address


@pytest.fixture
def start(uri: str) -> Iterator[Callable[[str], libvirt.virDomain]]:
    """Starts a domain paused, from its XML; it ends with the test."""
    connection = libvirt.open(uri)
    yield lambda xml: connection.createXML(xml, libvirt.VIR_DOMAIN_START_PAUSED)
    for left in connection.listAllDomains():
        left.destroy()
    connection.close()


@pytest.fixture
def monitor_path(folder: Path) -> str:
    return str(folder / "monitor.sock")


def options(monitor: qmp.Monitor) -> dict[str, set[str]]:
    """QEMU's -machine and -cpu, as sets of their parts."""
    words = Path(f"/proc/{monitor.pid}/cmdline").read_text().split("\0")
    return {name: set(words[words.index(f"-{name}") + 1].split(",")) for name in ("machine", "cpu")}


def processor(xml: str) -> tuple[str | None, dict[str | None, str | None]]:
    """A domain's model, and its features with their policies."""
    cpu = ElementTree.fromstring(xml).find("cpu")
    assert cpu is not None
    return cpu.findtext("model"), {feature.get("name"): feature.get("policy") for feature in cpu.findall("feature")}


def told_by_cpuid(monitor: qmp.Monitor) -> int:
    answer = monitor.command("human-monitor-command", **{"command-line": f"xp /1wx {CPUID_TOLD:#x}"})
    return int(str(answer).split()[-1], 16)


def test_this_host_has_what_the_tests_are_about(able: Abilities) -> None:
    assert able.kvm and able.tsc_hz and able.tsc_adjust


@pytest.mark.parametrize("mode", CPUS)
def test_an_armed_domain_is_valid_by_libvirts_schema(mode: str, able: Abilities, monitor_path: str) -> None:
    schema = etree.RelaxNG(file=SCHEMA)
    for xml in (nova_xml(mode), domain.arm(nova_xml(mode), monitor_path, abilities=able)):
        schema.assertValid(etree.fromstring(xml))


@pytest.mark.parametrize(("mode", "machine_type"), [
    ("none", "pc"), ("custom", "q35"), ("host-model", "pc"), ("host-passthrough", "q35")])
def test_an_armed_guest_has_an_invariant_tsc_a_split_irqchip_and_no_nesting(
        mode: str, machine_type: str, able: Abilities, monitor_path: str, uri: str,
        start: Callable[[str], libvirt.virDomain]) -> None:
    start(domain.arm(nova_xml(mode, machine_type), monitor_path, abilities=able))
    monitor = qmp.Monitor(monitor_path)
    given = options(monitor)
    assert "kernel_irqchip=split" in given["machine"]
    assert given["cpu"] >= {"invtsc=on", "tsc-adjust=on", f"tsc-frequency={able.tsc_hz}", "vmx=off", "svm=off"}
    assert accelerator(monitor) == machine.KVM
    live = Host(uri).live_xml(UUID)
    assert domain.obstacle(live) == "" and domain.needs(live) == Needs(kvm=True, tsc_hz=able.tsc_hz)
    monitor.command("cont")
    assert wait_for("the guest looked at CPUID", lambda: told_by_cpuid(monitor)) & 1
    monitor.close()


def test_a_standby_has_the_processor_of_its_primary(able: Abilities, monitor_path: str, uri: str,
                                                    start: Callable[[str], libvirt.virDomain]) -> None:
    primary = start(domain.arm(nova_xml("host-model"), monitor_path, abilities=able))
    live = Host(uri).live_xml(UUID)
    assert ElementTree.fromstring(live).find("cpu").get("mode") == "custom", "not the next host's own"
    primary.destroy()
    start(domain.standby(live, monitor_path, MARK, {}))
    monitor = qmp.Monitor(monitor_path)
    assert monitor.command("query-status")["status"] == "inmigrate"
    monitor.close()
    assert processor(Host(uri).live_xml(UUID)) == processor(live)


@pytest.mark.parametrize(("parts", "is_taken"), [(0.8, True), (1.2, False)])
def test_libvirt_draws_the_line_between_two_frequencies_where_we_do(
        parts: float, is_taken: bool, able: Abilities, monitor_path: str,
        start: Callable[[str], libvirt.virDomain]) -> None:
    if able.tsc_scaling:
        pytest.skip("this host scales its TSC: every frequency is right")
    other = Abilities(kvm=True, tsc_hz=int(able.tsc_hz * (1 + parts * TSC_TOLERANCE)), tsc_adjust=True)
    xml = domain.arm(nova_xml("none"), monitor_path, abilities=other)
    if is_taken:
        assert start(xml).isActive()
    else:
        with pytest.raises(libvirt.libvirtError, match="TSC frequency"):
            start(xml)
