"""[manager] and [service_auth]: the failover manager."""

from keystoneauth1 import loading
from oslo_config import cfg

GROUP = "manager"
AUTH_GROUP = "service_auth"

OPTS = [
    cfg.FloatOpt(
        "reconcile_interval_s", default=5.0, min=0.5,
        help="Seconds between two full comparisons of Nova's servers with the pairs. "
             "Notifications only make the manager look earlier."),
    cfg.FloatOpt(
        "agent_down_s", default=10.0, min=1.0,
        help="An agent that has not reported for so long is taken for down."),
    cfg.FloatOpt(
        "step_timeout_s", default=120.0, min=1.0,
        help="Longest time for one step of the catch-up with Nova after a promotion, "
             "and for a backup server to become ACTIVE."),
    cfg.FloatOpt(
        "retry_s", default=2.0, min=0.1,
        help="Pause before a failed step is tried again."),
    cfg.FloatOpt(
        "retry_limit_s", default=60.0, min=1.0,
        help="The pause doubles with each failure in a row, up to this. A row of failures ends when the server has "
             "been protected for so long."),
    cfg.FloatOpt(
        "settle_s", default=3.0, min=0.0,
        help="A server whose pair has just ended (a reboot, a failure) is left alone for so long before it is "
             "protected again."),
    cfg.FloatOpt(
        "poll_s", default=0.15, min=0.05,
        help="Seconds between two looks at Nova while a step waits for it."),
    cfg.FloatOpt(
        "fence_answer_s", default=0.5, min=0.1,
        help="How long, in a failover, the source's agent may take to confirm that the old guest is destroyed. "
             "Silence does not stop the failover: the old guest's output is held either way."),
    cfg.BoolOpt(
        "repair", default=True,
        help="Make a new backup by itself, on another host, for a server that runs without one after a failover or a "
             "lost backup. Without it, unset and set the server's property ft."),
    cfg.IntOpt(
        "sync_limit_per_host", default=2, min=1, max=64,
        help="How many first copies may run on a host at a time, to it and from it together. Further pairs wait in "
             "line, the oldest first; ft:reason says behind how many."),
    cfg.FloatOpt(
        "refused_retry_s", default=3600.0, min=1.0,
        help="A host that can never work with a server as things are (its disks are shared, its QEMU is too old) is "
             "asked again after so long, or as soon as the server moves, stops or restarts, or the host's agent does."),
    cfg.IntOpt(
        "workers", default=8, min=1, max=64,
        help="How many pairs are worked on at a time: backups made and removed, failovers followed."),
    cfg.StrOpt(
        "notification_exchange", default="nova",
        help="Exchange of Nova's notifications: nova.conf's [DEFAULT]control_exchange."),
    cfg.StrOpt(
        "notification_topic", default="ftvm_notifications",
        help="Topic of Nova's versioned notifications that only this manager consumes. "
             "Add it to nova.conf: [notifications] versioned_notifications_topics."),
]


def register(conf: cfg.ConfigOpts) -> None:
    conf.register_opts(OPTS, group=GROUP)
    loading.register_auth_conf_options(conf, AUTH_GROUP)
    loading.register_session_conf_options(conf, AUTH_GROUP)
    loading.register_adapter_conf_options(conf, AUTH_GROUP)
    # No request may hang: keystoneauth's own default is to wait for ever.
    conf.set_default("timeout", 30, group=AUTH_GROUP)


def auth_opts() -> list[cfg.Opt]:
    """Every option of [service_auth], for the sample configuration."""
    return [*loading.get_auth_common_conf_options(), *loading.get_auth_plugin_conf_options("password"),
            *loading.get_session_conf_options(), *loading.get_adapter_conf_options()]
