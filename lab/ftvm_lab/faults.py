"""Every fault that a protected server has to bear, by name.

Used by the command `ftvm-lab fault`, by the system tests and by the torture's nemesis. strikes.py injects them; what
has to come of each is said by those who inject them.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass

from ftvm_lab import pairs, strikes
from ftvm_lab.command import LabError
from ftvm_lab.computes import AGENT, COMPUTE, LIBVIRTD
from ftvm_lab.control import MANAGER
from ftvm_lab.databases import MARIADB, RABBIT
from ftvm_lab.layout import DATA, MGMT, Layout, compute
from ftvm_lab.strikes import LINKS, Heal, Scene, Which, backup, primary

__all__ = ["FAULTS", "Fault", "Scene", "Side", "scene_of"]

HOUR_S = 3600
#: The damage is done at once, and healing it (if it can be) may begin.
MOMENT = (0.0, 0.0)
#: Longer than the product waits for anything in its data path.
WHILE = (5.0, 15.0)
#: Longer than it takes the manager to miss an agent, and Nova to miss a host.
LONG = (16.0, 25.0)


class Side(enum.StrEnum):
    """Whose part is at fault."""

    BACKUP = "backup"
    PRIMARY = "primary"
    CONTROL = "control plane"
    LINK = "data link"


@dataclass(frozen=True)
class Fault:
    name: str
    side: Side
    #: One sentence.
    what: str
    #: Injects it; what is returned heals it, may be called twice, and starts again what was ended.
    strike: Callable[[Scene], Heal]
    #: How long it should last before it is healed: from, to.
    lasts_s: tuple[float, float]
    #: A host loses its power: what was on it is gone.
    ends_host: bool = False
    #: The guest may run on the other host afterwards.
    may_fail_over: bool = False


def _of_backup() -> list[Fault]:
    of = Side.BACKUP
    return [
        Fault("backup-qemu-killed", of, "The standby's QEMU is killed.", strikes.kills_qemu(backup), MOMENT),
        Fault("backup-memory-full", of, "The standby and its engine get no more memory.",
              strikes.fills_memory, WHILE),
        Fault("backup-disk-full", of, "There is no room on the disk of the backup's host.",
              strikes.fills_disk, WHILE),
        *_of_either(of, backup),
    ]


def _of_primary() -> list[Fault]:
    of = Side.PRIMARY
    return [
        Fault("primary-qemu-killed", of, "The guest's QEMU is killed; its host lives.",
              strikes.kills_qemu(primary), MOMENT, may_fail_over=True),
        *_of_either(of, primary),
        Fault("both-hosts-killed", of, "The hosts of guest and backup lose their power at once.",
              strikes.kills_host(primary, backup), WHILE, ends_host=True),
    ]


def _of_either(of: Side, where: Which) -> list[Fault]:
    """What may happen to both; only where the guest runs can it make the guest move."""
    moves = of is Side.PRIMARY
    return [
        Fault(f"{of}-engine-killed", of, f"The {of}'s engine is killed.",
              strikes.kills_engine(where, of), MOMENT, may_fail_over=moves),
        Fault(f"{of}-engine-stopped", of, f"The {of}'s engine stands still (SIGSTOP).",
              strikes.stops_engine(where, of), WHILE, may_fail_over=moves),
        Fault(f"{of}-agent-killed", of, f"The agent on the {of}'s host is killed.",
              strikes.kills_service(where, AGENT), LONG),
        Fault(f"{of}-agent-stopped", of, f"The agent on the {of}'s host stands still (SIGSTOP).",
              strikes.stops_service(where, AGENT), LONG),
        Fault(f"{of}-agent-restarted", of, f"The agent on the {of}'s host is restarted, as for an upgrade.",
              strikes.restarts_service(where, AGENT), MOMENT),
        Fault(f"{of}-nova-compute-restarted", of, f"nova-compute on the {of}'s host is restarted.",
              strikes.restarts_service(where, COMPUTE), MOMENT),
        Fault(f"{of}-libvirtd-restarted", of, f"libvirtd on the {of}'s host is restarted.",
              strikes.restarts_service(where, LIBVIRTD), MOMENT),
        Fault(f"{of}-clock-ahead", of, f"The wall clock of the {of}'s host jumps an hour ahead.",
              strikes.shifts_clock(where, HOUR_S), WHILE),
        Fault(f"{of}-clock-behind", of, f"The wall clock of the {of}'s host jumps an hour back.",
              strikes.shifts_clock(where, -HOUR_S), WHILE),
        Fault(f"{of}-host-frozen", of, f"The {of}'s host stands still for a while.",
              strikes.freezes_host(where), (20.0, 20.0), may_fail_over=moves),
        Fault(f"{of}-host-killed", of, f"The {of}'s host loses its power.",
              strikes.kills_host(where), LONG, ends_host=True, may_fail_over=moves),
        Fault(f"{of}-links-cut", of, f"The {of}'s host is cut off from the data and the management network.",
              strikes.cuts(where, *LINKS), LONG, may_fail_over=moves),
    ]


def _of_link() -> list[Fault]:
    of = Side.LINK
    return [
        Fault("data-link-cut", of, "No frame passes between the hosts on the data network.",
              strikes.cuts(backup, DATA), WHILE, may_fail_over=True),
        Fault("data-link-cut-to-backup", of, "What the primary sends is lost on the data network.",
              strikes.cuts_towards(backup), WHILE, may_fail_over=True),
        Fault("data-link-cut-to-primary", of, "What the backup sends is lost on the data network.",
              strikes.cuts_towards(primary), WHILE, may_fail_over=True),
        Fault("data-link-flapping", of, "The data link goes down and up again, many times.",
              strikes.flaps, WHILE, may_fail_over=True),
        Fault("data-link-squeezed", of, "The data link has a tenth of the bandwidth that checkpoints take.",
              strikes.squeezes, WHILE, may_fail_over=True),
    ]


def _of_control() -> list[Fault]:
    of = Side.CONTROL
    return [
        Fault("manager-killed", of, "The failover manager is killed.", strikes.kills_control(MANAGER), WHILE),
        Fault("manager-restarted", of, "The failover manager is restarted.",
              strikes.restarts_control(MANAGER), MOMENT),
        Fault("manager-one-of-two-killed", of, "A second failover manager comes, and the first one is killed.",
              strikes.kills_first_of_two_managers, WHILE),
        Fault("rabbitmq-down", of, "RabbitMQ is killed, and away for a while.",
              strikes.kills_control(RABBIT), (15.0, 60.0)),
        Fault("mariadb-down", of, "MariaDB is killed, and away for a while.",
              strikes.kills_control(MARIADB), (15.0, 60.0)),
        Fault("primary-management-link-cut", of, "The primary's host is cut off from the management network.",
              strikes.cuts(primary, MGMT), LONG),
        Fault("backup-management-link-cut", of, "The backup's host is cut off from the management network.",
              strikes.cuts(backup, MGMT), LONG),
    ]


FAULTS: dict[str, Fault] = {
    fault.name: fault for fault in (*_of_backup(), *_of_primary(), *_of_link(), *_of_control())
}


def scene_of(layout: Layout, server_id: str) -> Scene:
    """Which host is which now; LabError if the server has no backup."""
    found = pairs.pair(layout, server_id)
    if found.backup_host is None:
        raise LabError(f"server {server_id} is {found.state} and has no backup: {found.reason}")
    return Scene(layout, server_id, compute(found.primary_host), compute(found.backup_host))
