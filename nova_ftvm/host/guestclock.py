"""Does the guest's clock go on while it stands in a checkpoint's pause? Asked of QEMU, once."""

from nova_ftvm.core.losttime import GuestClock
from nova_ftvm.exception import QemuError
from nova_ftvm.host import qmp


def of(monitor: qmp.Monitor) -> GuestClock:
    """Without KVM all of a guest's clocks are QEMU's, which stand. With it the TSC goes on, and a Linux guest takes it
    if it is told that it is invariant; else kvmclock, which stands. UNKNOWN: QEMU does not tell. Raises GuestGone."""
    try:
        if not monitor.command("query-kvm")["enabled"]:
            return GuestClock.STANDS
        invariant = [monitor.command("qom-get", path=processor["qom-path"], property="invtsc")
                     for processor in monitor.command("query-cpus-fast")]
    except QemuError:
        # A processor of another architecture, for one.
        return GuestClock.UNKNOWN
    return GuestClock.GOES_ON if all(invariant) else GuestClock.STANDS
