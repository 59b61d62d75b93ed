"""[ftvm] in nova.conf: what the driver and the filter need to know."""

from oslo_config import cfg

GROUP = "ftvm"

OPTS = [
    cfg.StrOpt(
        "service_project_id",
        help="Id of the project in which the manager keeps backup servers. Only its servers can be backups; "
             "without it nothing is protected."),
    cfg.FloatOpt(
        "rpc_timeout_s", default=5.0, min=0.5,
        help="Longest wait for an answer of the agent or of the manager. "
             "A server boots unprotected when it runs out."),
]


def register(conf: cfg.ConfigOpts) -> None:
    conf.register_opts(OPTS, group=GROUP)
