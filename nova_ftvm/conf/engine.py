"""[engine]: the epoch loop of one protected server, on both sides."""

from oslo_config import cfg

GROUP = "engine"

OPTS = [
    cfg.StrOpt(
        "policy", default="adaptive",
        choices=[("adaptive", "When output waits and the guest has said all it had to say, or has talked for long."),
                 ("event", "As soon as output waits."),
                 ("fixed", "Every epoch_ms.")],
        help="When a checkpoint is taken. A server may ask for another with its property ft:policy."),
    cfg.FloatOpt(
        "epoch_ms", default=20.0, min=1.0, max=1000.0,
        help="Of the policy 'fixed': milliseconds from the end of one checkpoint to the start of the next. "
             "A reply waits for half of it or more, plus the pause and the backup's acknowledgement."),
    cfg.FloatOpt(
        "max_pause_percent", default=50.0, min=1.0, max=50.0,
        help="The most of a guest's time, in percent, that it may stand in pauses; every policy keeps it. A checkpoint "
             "waits until the guest has run for its share, and so does the output that it covers. A guest whose clock "
             "stands in pauses, as any does under TCG, falls behind by that at most: set 5 or less, so that chrony "
             "in it keeps up. 50: the guest runs at least as long as it stood."),
    cfg.FloatOpt(
        "hold_limit_ms", default=1000.0, min=100.0,
        help="Watchdog: the kernel kills an engine that hangs for longer: its guest's checkpoint, disk writes or "
             "output wait for it. QEMU then lets the guest run on by itself."),
    cfg.FloatOpt(
        "beat_ms", default=100.0, min=10.0,
        help="Milliseconds between two heartbeats on the synchronisation connection."),
    cfg.IntOpt(
        "beat_misses", default=3, min=2,
        help="Heartbeats in a row that must be missing before the backup asks the arbiter for the pair."),
    cfg.FloatOpt(
        "ack_limit_ms", default=500.0, min=50.0,
        help="How long the primary waits for an acknowledgement, its output held, before it asks the "
             "arbiter to go on without its backup."),
    cfg.IntOpt(
        "live_passes", default=8, min=1,
        help="Most passes over RAM before the first pause."),
    cfg.IntOpt(
        "live_rest_pages", default=1024, min=1,
        help="The first pause is taken as soon as a pass leaves no more than this number of dirty pages."),
    cfg.IntOpt(
        "disk_copy_mib_s", default=100, min=0,
        help="Most MiB a second that the first copy reads from each disk, so that the guest keeps its share. "
             "0: no limit. What the guest writes itself is not limited by it."),
    cfg.IntOpt(
        "disk_log_mib", default=64, min=1, max=4096,
        help="Most MiB of a server's disk writes that may be on their way to the backup. A guest that writes faster "
             "than that waits; nothing is dropped. Bounds the memory of the primary's engine, and the backup's."),
    cfg.IntOpt(
        "replica_backlog_mib", default=64, min=1, max=4096,
        help="Most MiB of committed disk writes that the backup may still have to write. Beyond it the primary waits "
             "for its acknowledgement. A promotion writes the rest before the guest runs."),
    cfg.IntOpt(
        "nice", default=-10, min=-20, max=19,
        help="Scheduling priority of the engines' processes. They need little of a processor, but at once: a "
             "guest stands still while they wait for one."),
    cfg.BoolOpt(
        "realtime_pauses", default=True,
        help="While a guest stands still for a checkpoint, QEMU's main thread and the engine, which end that, go "
             "before whatever else runs on the host: with the lowest real-time priority. A main thread that has "
             "another scheduling policy than the usual one keeps it."),
    cfg.BoolOpt(
        "forward_kvmclock", default=True,
        help="Under KVM: in some pauses, sets the number that QEMU will set the guest's kvmclock to forward by what "
             "the guest stood. It is eight bytes in the heap of the guest's QEMU (KVMClockState.clock), written from "
             "outside, only where they are the number in the device state just saved; on any doubt no more. Off: a "
             "guest that goes by kvm-clock, or Windows, loses what it stands."),
    cfg.IntOpt(
        "frame_limit_bytes", default=16 << 20, min=1 << 16, max=1 << 28,
        help="Longest frame that is accepted or sent."),
]


def register(conf: cfg.ConfigOpts) -> None:
    conf.register_opts(OPTS, group=GROUP)
