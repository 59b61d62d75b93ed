"""[DEFAULT] options that agent and manager share."""

import socket

from oslo_config import cfg

OPTS = [
    cfg.HostAddressOpt(
        "host", default=socket.gethostname(), sample_default="compute1",
        help="Name of this host. On a compute host it must be the same as nova.conf's host."),
]


def register(conf: cfg.ConfigOpts) -> None:
    conf.register_opts(OPTS)
