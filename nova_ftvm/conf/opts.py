"""Lists of options for oslo-config-generator: one for nova-ftvm.conf, one for nova.conf."""

from collections.abc import Sequence

from oslo_config import cfg

from nova_ftvm.conf import agent, engine, manager, nova, service

Listing = list[tuple[str, Sequence[cfg.Opt]]]


def list_opts() -> Listing:
    return [
        ("DEFAULT", service.OPTS),
        (agent.GROUP, agent.OPTS),
        (engine.GROUP, engine.OPTS),
        (manager.GROUP, manager.OPTS),
        (manager.AUTH_GROUP, manager.auth_opts()),
    ]


def list_nova_opts() -> Listing:
    return [(nova.GROUP, nova.OPTS)]
