"""What has to come of each fault: who runs the guest, what its clients may notice, what the server shows."""

import enum
from dataclasses import dataclass

from ftvm_lab.faults import FAULTS, Side


class Fate(enum.StrEnum):
    """Of the guest and its protection."""

    UNTOUCHED = "protected all the time"
    ALONE = "goes on where it is, then with a new backup"
    MOVED = "goes on from its backup, then with a new one"
    #: Both sides ask the arbiter at nearly the same time.
    EITHER = "goes on where it is or from its backup, then with a new backup"


@dataclass(frozen=True)
class Claim:
    fate: Fate
    #: What a reason that the server shows meanwhile must match; '' where it has none to show.
    reason: str = ""


#: No client waits longer, whatever the fault.
GAP_MS = 1000.0

_ALONE = Claim(Fate.ALONE, "no backup: ")
_MOVED = Claim(Fate.MOVED, "failed over from")
_EITHER = Claim(Fate.EITHER, "no backup: |failed over from")
_UNTOUCHED = Claim(Fate.UNTOUCHED)

_TOUCHING = {
    "backup-qemu-killed": _ALONE,
    "backup-engine-killed": _ALONE,
    "backup-engine-stopped": _ALONE,
    "backup-host-frozen": _ALONE,
    "backup-host-killed": _ALONE,
    "backup-links-cut": _ALONE,
    "primary-qemu-killed": _MOVED,
    "primary-engine-killed": _EITHER,
    "primary-engine-stopped": _MOVED,
    "primary-host-frozen": _MOVED,
    "primary-host-killed": _MOVED,
    "primary-links-cut": _MOVED,
    "data-link-cut": _EITHER,
    "data-link-cut-to-backup": _MOVED,
    "data-link-cut-to-primary": _EITHER,
}

#: Those have tests of their own: they need more than a strike, or end otherwise.
ELSEWHERE = frozenset(
    {"backup-disk-full", "backup-memory-full", "data-link-flapping", "data-link-squeezed", "both-hosts-killed"}
)

CLAIMS = {name: _TOUCHING.get(name, _UNTOUCHED) for name in FAULTS if name not in ELSEWHERE}

assert all(
    claim.fate is Fate.UNTOUCHED for name, claim in CLAIMS.items() if FAULTS[name].side is Side.CONTROL
), "a fault of the control plane alone touches no guest"
assert all(
    FAULTS[name].may_fail_over for name, claim in CLAIMS.items() if claim.fate in (Fate.MOVED, Fate.EITHER)
), "a fault that moves the guest says so"
