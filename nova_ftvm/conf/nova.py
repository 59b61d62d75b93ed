"""[ftvm] in nova.conf: what the driver and the filter need to know."""

from oslo_config import cfg

from nova_ftvm.core.request import Virtio

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
    cfg.StrOpt(
        "virtio", default=Virtio.LEGACY.value, choices=[
            (Virtio.LEGACY.value, "virtio 0.9, which every usual guest speaks: checkpoints are shorter"),
            (Virtio.MODERN.value, "both, as without protection: for guests that speak virtio 1 only")],
        help="What the virtio devices of a server speak that is to be protected, on machines of type pc, from its next "
             "start on. A server's property ft:virtio comes first. Each device that speaks virtio 1 makes each pause "
             "of its guest longer by some 0.4 ms. Other types of machines have virtio 1 only."),
]


def register(conf: cfg.ConfigOpts) -> None:
    conf.register_opts(OPTS, group=GROUP)
