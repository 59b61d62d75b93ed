"""[agent]: the compute host's service."""

from oslo_config import cfg

GROUP = "agent"

OPTS = [
    cfg.HostAddressOpt(
        "data_address", default="127.0.0.1",
        help="Address of this host on the network that carries checkpoints. Backups listen here; "
             "the peer's agent must reach it. Use a network that only compute hosts share."),
    cfg.StrOpt(
        "runtime_dir", default="/run/nova-ftvm",
        help="Directory for monitors' sockets, FIFOs and statistics, one folder a server. "
             "QEMU must be allowed to create sockets below it."),
    cfg.StrOpt(
        "qemu_user", default="libvirt-qemu",
        help="User that QEMU runs as. The runtime folders of servers are given to it."),
    cfg.StrOpt("libvirt_uri", default="qemu:///system", help="The libvirt connection of nova-compute on this host."),
    cfg.FloatOpt(
        "report_interval_s", default=1.0, min=0.1,
        help="Seconds between two reports of this agent to the manager."),
    cfg.FloatOpt(
        "engine_start_timeout_s", default=20.0, min=1.0,
        help="How long the process of one server may take until it answers."),
]


def register(conf: cfg.ConfigOpts) -> None:
    conf.register_opts(OPTS, group=GROUP)
