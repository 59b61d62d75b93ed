"""nova-ftvm-engine: the process of one protected guest, on one side. Started by the agent only.

Reads one JSON object from its standard input (`Order`), joins the ports and runs the engine until it is over.
Exit status: 0 ended as decided, 3 promoted, 1 failed (the log and the last report say why).
"""

import dataclasses
import json
import logging
import os
import sys
import time
from typing import Any

from nova_ftvm.core import kind, wire
from nova_ftvm.core.epoch import EpochLoop, Pace
from nova_ftvm.core.lease import Lease
from nova_ftvm.core.policy import Policy
from nova_ftvm.engine import link as links
from nova_ftvm.engine.backup import BackupEngine
from nova_ftvm.engine.capture import Conversation
from nova_ftvm.engine.clockforward import ClockForward
from nova_ftvm.engine.primary import PrimaryEngine
from nova_ftvm.engine.stats import EpochLog
from nova_ftvm.exception import FtvmError, InTheWay, Unsupported
from nova_ftvm.host import guestclock, netfilter, qmp
from nova_ftvm.host.control import ControlServer
from nova_ftvm.host.disks import (
    AttendedMonitor,
    DiskMirror,
    StandbyDisks,
    ended_mirror,
    guest_disks,
    read_only_contents,
    replicas,
)
from nova_ftvm.host.gate import Gate
from nova_ftvm.host.kvmclock import QemuHeap
from nova_ftvm.host.lifesigns import ProcessLife
from nova_ftvm.host.memory import GuestMemory, RangedMemory, TrackedMemory, ram_blocks
from nova_ftvm.host.netbuf import OutputBuffer
from nova_ftvm.host.note import NoteFile
from nova_ftvm.host.precedence import NoPrecedence, Precedence
from nova_ftvm.host.processors import Processors
from nova_ftvm.host.replay import Replay
from nova_ftvm.host.watchdog import Watchdog
from nova_ftvm.types import Generation, Role

LOG = logging.getLogger(__name__)

ENDED, FAILED, PROMOTED = 0, 1, 3

#: QEMU writes to the mirror in pieces of at most so many bytes.
_MAX_REQUEST = 1 << 20
#: How long the process stays after its end, for an agent that has not read the last report.
_FAREWELL_S = 60.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What the agent asks for. Times are in the units of the option of the same name.

    An agent that was started before its package was upgraded does not know the newest settings: they have their
    options' defaults then.
    """

    role: Role
    pair_id: str
    generation: Generation
    instance_id: str
    token: str
    #: The server's runtime folder: monitor.sock is in it, all else is made in it.
    folder: str
    #: Backup: where to listen. Primary: the backup's agent.
    address: str
    port: int
    qemu_owner: tuple[int, int]
    policy: str
    epoch_ms: float
    max_pause_percent: float = 50.0
    hold_limit_ms: float
    beat_ms: float
    beat_misses: int
    ack_limit_ms: float
    disk_copy_mib_s: int
    disk_log_mib: int
    replica_backlog_mib: int
    live_passes: int
    live_rest_pages: int
    nice: int
    realtime_pauses: bool
    forward_kvmclock: bool = True
    frame_limit_bytes: int

    @classmethod
    def parse(cls, text: str) -> "Order":
        fields: dict[str, Any] = json.loads(text)
        fields["role"] = Role(fields["role"])
        fields["qemu_owner"] = tuple(fields["qemu_owner"])
        return cls(**fields)

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)


def main() -> int:
    order = Order.parse(sys.stdin.readline())
    os.setpriority(os.PRIO_PROCESS, 0, order.nice)
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO,
        format=f"%(asctime)s.%(msecs)03d %(levelname)s {order.role.value} {order.pair_id} g{order.generation} "
               "%(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    control = ControlServer(order.path(f"{order.role.value}.ctl"), {
        "role": order.role.value, "pair_id": order.pair_id, "generation": order.generation,
        "instance_id": order.instance_id})
    try:
        return run_primary(order, control) if order.role is Role.PRIMARY else run_backup(order, control)
    except FtvmError as error:
        LOG.error("%s", error)
        control.report("failed", reason=str(error), lasting=isinstance(error, Unsupported))
        return FAILED
    except Exception:
        LOG.exception("the engine failed")
        control.report("failed", reason="the engine failed: see its log")
        return FAILED
    finally:
        control.farewell(_FAREWELL_S)
        control.close()


def run_primary(order: Order, control: ControlServer) -> int:
    """The primary's side: connect first, so that a guest is not touched for a backup that is not there."""
    monitor = AttendedMonitor(order.path("monitor.sock"))
    blocks, disks, accelerated_by = ram_blocks(monitor), guest_disks(monitor), accelerator(monitor)
    hello = wire.Hello(order.pair_id, machine_type(monitor), tuple(blocks), disks=tuple(disks),
                       accelerator=accelerated_by)
    link, shallow = links.dial(order.address, order.port, order.generation, hello, order.token,
                               order.frame_limit_bytes)
    note = NoteFile(order.folder, order.pair_id, order.generation, order.instance_id, monitor.pid)
    # The manager begins only with a guest that may speak, and the backup that answered waits for its first epoch: what
    # an engine holds that died here is let go now, and not at the end of the first copy.
    interfaces = netfilter.interfaces(monitor)
    netfilter.remove(monitor, interfaces)
    note.remove()
    pidfd = qmp.pidfd_of(monitor)
    memory = tracking(accelerated_by)(monitor.pid, pidfd, blocks)
    buffers = OutputBuffer(monitor, interfaces)
    processors = Processors(monitor)
    mirror = DiskMirror(monitor, disks, order.path("disks.sock"), order.qemu_owner, order.disk_copy_mib_s << 20,
                        _MAX_REQUEST)
    precedence = Precedence(monitor.pid) if order.realtime_pauses else NoPrecedence()
    gate = Gate(order.path("state.fifo"), order.qemu_owner, precedence.leave_qemu)
    pace = Pace(policy=Policy(order.policy), epoch_s=order.epoch_ms / 1000, ack_limit_s=order.ack_limit_ms / 1000,
                beat_s=order.beat_ms / 1000, live_passes=order.live_passes, live_rest_pages=order.live_rest_pages,
                most_paused=order.max_pause_percent / 100)
    stats = EpochLog(order.path("epochs.jsonl"), guest_clock=guestclock.of(monitor),
                     tell=lambda figures: control.tell("figures", **dataclasses.asdict(figures)))
    talk = Conversation(monitor, gate, ended_mirror)
    forwards = order.forward_kvmclock and accelerated_by == kind.KVM
    engine = PrimaryEngine(
        generation=order.generation, loop=EpochLoop(pace, time.monotonic()), memory=memory,
        kvmclock=ClockForward(QemuHeap(monitor.pid, blocks), talk, gate, stats.on_kvmclock) if forwards else None,
        talk=talk, monitor=monitor, gate=gate, buffers=buffers,
        mirror=mirror, fixed=read_only_contents(disks), shallow=shallow, log_limit=order.disk_log_mib << 20, link=link,
        note=note, processors=processors, precedence=precedence, control=control, pidfd=pidfd,
        life=ProcessLife(monitor.pid, pidfd),
        watchdog=Watchdog(order.hold_limit_ms / 1000), stats=stats,
        frame_limit=order.frame_limit_bytes)
    control.report("started")
    try:
        phase = engine.run()
    finally:
        # Before the farewell: whatever ended the engine, a guest that waits at the gate or for its disks runs on.
        gate.close()
        buffers.close()
        processors.close()
        mirror.close()
        try:
            mirror.remove()
        except FtvmError as error:
            # QEMU is gone, or the next engine takes it away; what ended this one is what counts.
            LOG.warning("mirrors are left behind: %s", error)
    control.report("ended", phase=phase.name.lower())
    return ENDED


def run_backup(order: Order, control: ControlServer) -> int:
    """The backup's side. The standby's RAM is made zero first: pages that are zero on the primary never come."""
    monitor = qmp.Monitor(order.path("monitor.sock"))
    status = monitor.command("query-status")["status"]
    if status != "inmigrate":
        raise InTheWay(f"the standby does not wait for its stream, it is {status}: it is a guest by now")
    blocks, disks = ram_blocks(monitor), replicas(monitor)
    pidfd = qmp.pidfd_of(monitor)
    life = ProcessLife(monitor.pid, pidfd)
    memory = GuestMemory(monitor.pid, blocks)
    memory.clear()
    listener = links.listen(order.address)
    lease = Lease(order.generation, order.beat_ms * order.beat_misses / 1000, time.monotonic())
    engine = BackupEngine(
        generation=order.generation, token=order.token,
        expected=wire.Hello(order.pair_id, machine_type(monitor), tuple(blocks), disks=tuple(disks),
                            accelerator=accelerator(monitor)), memory=memory,
        disks=StandbyDisks(monitor, disks, order.path("replica.sock")), backlog_limit=order.replica_backlog_mib << 20,
        monitor=monitor, replay=Replay(monitor), listener=listener, control=control,
        pidfd=pidfd, life=life, lease=lease, beat_s=order.beat_ms / 1000, frame_limit=order.frame_limit_bytes,
        stream_path=order.path("incoming.sock"))
    control.report("listening", port=listener.getsockname()[1])
    if engine.run():
        return PROMOTED
    control.report("ended", phase="given up")
    return ENDED


def machine_type(monitor: qmp.Monitor) -> str:
    """The versioned machine type, e.g. pc-i440fx-10.0."""
    return str(monitor.command("qom-get", path="/machine", property="type")).removesuffix("-machine")


def tracking(accelerated_by: str) -> type[TrackedMemory]:
    """How written pages are found: what spares a guest under KVM its faults is more work for one under TCG."""
    way = RangedMemory if accelerated_by == kind.KVM else TrackedMemory
    LOG.info("the guest runs under %s: written pages are protected %s", accelerated_by,
             "range by range" if way is RangedMemory else "by one scan")
    return way


def accelerator(monitor: qmp.Monitor) -> str:
    """What runs the guest's processors: kind.KVM or kind.TCG. State of the one does not load into the other."""
    return kind.KVM if monitor.command("query-kvm")["enabled"] else kind.TCG


if __name__ == "__main__":
    sys.exit(main())
