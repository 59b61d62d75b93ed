"""What kind of host a guest needs: its standby's device state must load there, and its clock must go on at its rate.

PURE. An agent tells its host's `Abilities`; `core.domain.needs` reads a guest's `Needs` from its domain; `misfit` says
why the two do not go together. Callers: the manager, which chooses the backup's host, and the driver on that host.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

#: KVM and libvirt take two frequencies of the TSC for one when they differ by no more: 250 parts in a million.
TSC_TOLERANCE = 250e-6

#: An emulator's name, as the engines tell each other.
KVM, TCG = "kvm", "tcg"


@dataclasses.dataclass(frozen=True, slots=True)
class Abilities:
    """What a compute host's KVM can. Told by its agent; a host whose agent is too old to tell is None."""

    #: /dev/kvm makes virtual machines.
    kvm: bool = False
    #: Hz of the TSC; 0 when it is no clock there: it stands or changes its rate, or its rate is not known.
    tsc_hz: int = 0
    #: A guest's TSC can have another frequency than the host's.
    tsc_scaling: bool = False
    #: A guest can be given the MSR by which it finds out that nobody has set its TSC.
    tsc_adjust: bool = False

    def told(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def read(cls, told: Mapping[str, Any] | None) -> "Abilities | None":
        """What `told` made; None when nothing was told. What a newer agent tells besides is not read."""
        if told is None:
            return None
        return cls(kvm=bool(told.get("kvm")), tsc_hz=int(told.get("tsc_hz", 0)),
                   tsc_scaling=bool(told.get("tsc_scaling")), tsc_adjust=bool(told.get("tsc_adjust")))


@dataclasses.dataclass(frozen=True, slots=True)
class Needs:
    """What a guest's domain asks of a host."""

    kvm: bool = False
    #: Hz that its TSC was promised to run at; 0 when nothing was promised.
    tsc_hz: int = 0


NOTHING_NEEDED = Needs()


def misfit(needs: Needs, abilities: Abilities | None) -> str:
    """Why a host cannot take over such a guest, in one sentence; '' when it can, or when it did not tell.

    State that was saved under KVM does not load under TCG. A guest under TCG runs on every host.
    """
    if abilities is None or not needs.kvm:
        return ""
    if not abilities.kvm:
        return "the guest runs under KVM, and KVM does not work there: load the kernel's module kvm_intel or kvm_amd"
    if not needs.tsc_hz:
        return ""
    if not abilities.tsc_hz:
        return "the guest's clock is the TSC, which is no clock there: use processors with an invariant TSC"
    if abs(needs.tsc_hz - abilities.tsc_hz) > TSC_TOLERANCE * needs.tsc_hz and not abilities.tsc_scaling:
        return (f"the guest's TSC runs at {_mhz(needs.tsc_hz)}, that host's at {_mhz(abilities.tsc_hz)}, and it cannot "
                "scale it: use hosts with processors of one kind")
    return ""


def _mhz(frequency_hz: int) -> str:
    return f"{frequency_hz / 1e6:.1f} MHz"
