"""A KVM guest's processor and clocks, in its domain's XML. PURE: works on the tree that core/domain.py gives it.

A checkpoint stops QEMU's virtual clock, and kvmclock with it. The processor's TSC goes on. So the guest is told that it
may take the TSC for its clock (`invtsc`, with a frequency that stays the same on every host), its PIT is QEMU's own (a
split irqchip), and it is shown no virtualisation: what its own guests write would not be seen. Guests under TCG stay as
they are: there is no such clock. Why each: doc/source/contributor/decisions/kvm-domain.rst.
"""

from xml.etree import ElementTree

from nova_ftvm.core.kind import Abilities, Needs

#: By these a guest has guests of its own: Intel's name and AMD's.
NESTED = ("vmx", "svm")
#: What QEMU, and so libvirt, give a guest of an x86 machine that names no processor (Nova's cpu_mode=none).
_UNNAMED = "qemu64"
_HIDDEN = ("disable", "forbid")


def is_kvm(root: ElementTree.Element) -> bool:
    return root.get("type") == "kvm"


def arm(root: ElementTree.Element, abilities: Abilities | None) -> None:
    """Gives a KVM guest the processor and the clocks that a protected one needs. Idempotent.

    abilities: its host's; None when its agent is too old to tell: then the TSC is not promised.
    """
    if not is_kvm(root):
        return
    cpu = _processor(root)
    for name in NESTED:
        _set_feature(cpu, name, "disable")
    _child(_child(root, "features"), "ioapic").set("driver", "qemu")
    if abilities is not None and abilities.tsc_hz:
        _promise_tsc(root, cpu, abilities)


def obstacle(root: ElementTree.Element) -> str:
    """Why a guest with this processor must not be checkpointed; '' when it can be. An armed one can."""
    shown = [name for name in NESTED if _policy(root.find("cpu"), name) not in _HIDDEN] if is_kvm(root) else []
    if not shown:
        return ""
    # Absence says nothing: a named model, or the host's own, may bring it along.
    return (f"the guest may be shown {' and '.join(shown)}, and what guests of its own write is not tracked: "
            "hard-reboot the server, which hides it")


def needs(root: ElementTree.Element) -> Needs:
    """What the guest asks of each host that it ever runs on."""
    if not is_kvm(root):
        return Needs()
    timer = root.find("./clock/timer[@name='tsc'][@frequency]")
    frequency = timer.get("frequency", "") if timer is not None else ""
    return Needs(kvm=True, tsc_hz=int(frequency) if frequency.isascii() and frequency.isdigit() else 0)


def _processor(root: ElementTree.Element) -> ElementTree.Element:
    """<cpu>, naming a model if nothing else does: libvirt takes no features without one."""
    cpu = _child(root, "cpu")
    if cpu.get("mode", "custom") == "custom" and cpu.find("model") is None:
        cpu.attrib.update({"mode": "custom", "match": "exact", "check": "none"})
        model = ElementTree.Element("model", {"fallback": "forbid"})
        model.text = _UNNAMED
        cpu.insert(0, model)
    return cpu


def _promise_tsc(root: ElementTree.Element, cpu: ElementTree.Element, abilities: Abilities) -> None:
    _set_feature(cpu, "invtsc", "require")
    if abilities.tsc_adjust:
        # By it Linux trusts the TSC without a watchdog, whose own clock stands in each pause.
        _set_feature(cpu, "tsc_adjust", "require")
    clock = root.find("clock")
    if clock is None:
        clock = ElementTree.SubElement(root, "clock", {"offset": "utc"})
    timer = clock.find("timer[@name='tsc']")
    if timer is None:
        timer = ElementTree.SubElement(clock, "timer", {"name": "tsc"})
    if "frequency" not in timer.attrib:
        timer.set("frequency", str(abilities.tsc_hz))


def _set_feature(cpu: ElementTree.Element, name: str, policy: str) -> None:
    feature = cpu.find(f"feature[@name='{name}']")
    if feature is None:
        feature = ElementTree.SubElement(cpu, "feature")
    feature.attrib.update({"policy": policy, "name": name})


def _policy(cpu: ElementTree.Element | None, name: str) -> str:
    """libvirt's default is require; '' for a feature that is not named."""
    feature = None if cpu is None else cpu.find(f"feature[@name='{name}']")
    return "" if feature is None else feature.get("policy", "require")


def _child(parent: ElementTree.Element, tag: str) -> ElementTree.Element:
    found = parent.find(tag)
    return ElementTree.SubElement(parent, tag) if found is None else found
