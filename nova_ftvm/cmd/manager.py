"""nova-ftvm-manager: the failover manager. Builds the objects from the configuration, runs until SIGTERM."""

from nova_ftvm.cmd import native  # noqa: F401

# isort: split
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from oslo_config import cfg
from oslo_log import log

from nova_ftvm.conf import manager as manager_conf
from nova_ftvm.conf import service as service_conf
from nova_ftvm.db import connect
from nova_ftvm.db.store import Store
from nova_ftvm.failover.announce import announcer
from nova_ftvm.failover.bulletin import Bulletin
from nova_ftvm.failover.loops import Queue
from nova_ftvm.failover.manager import Manager
from nova_ftvm.failover.nova_cloud import NovaCloud
from nova_ftvm.failover.service import Service
from nova_ftvm.failover.settings import Settings, SystemClock
from nova_ftvm.rpc import agent as agent_rpc
from nova_ftvm.rpc import common, notifications
from nova_ftvm.rpc import manager as manager_rpc
from nova_ftvm.rpc import server as rpc_server
from nova_ftvm.types import PairId

LOG = log.getLogger(__name__)

_END_LIMIT_S = 8.0
#: More threads make each answer later, and none of them sooner: a guest may stand still until it comes.
_CALLS_AT_ONCE = 32


def configuration(arguments: list[str]) -> cfg.ConfigOpts:
    """All options that the manager knows, read from --config-file."""
    conf = cfg.ConfigOpts()
    log.set_defaults(default_log_levels=[*log.get_default_log_levels(), "alembic=WARN"])
    log.register_options(conf)
    service_conf.register(conf)
    manager_conf.register(conf)
    connect.register(conf)
    conf(arguments, project="nova-ftvm", prog="nova-ftvm-manager")
    log.setup(conf, "nova-ftvm-manager")
    return conf


def store(conf: cfg.ConfigOpts) -> Store:
    """The tables, in the version that this release needs."""
    engine = connect.engine(conf)
    found, needed = connect.version(engine), connect.newest()
    if found != needed:
        sys.exit(f"The database has version {found or 'none'}, this release needs {needed}: "
                 "run nova-ftvm-manage db sync")
    return Store(engine)


def main() -> None:
    conf = configuration(sys.argv[1:])
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    run(conf, stopping)


def run(conf: cfg.ConfigOpts, stopping: threading.Event) -> None:
    settings = Settings.of(conf)
    transport = common.transport(conf)
    queue: Queue[PairId] = Queue()
    bulletin = Bulletin(notifications.sender(conf, f"nova-ftvm-manager:{conf.host}"))
    manager = Manager(store(conf), NovaCloud(conf), agent_rpc.AgentClient(transport), SystemClock(), settings, queue,
                      announcer(bulletin.post))
    service = Service(manager, queue, settings, conf.manager.workers)
    endpoint = rpc_server.Endpoint(manager, rpc_server.methods_of(manager_rpc.ManagerApi))
    calls = rpc_server.serve(transport, common.MANAGER_TOPIC, conf.host, endpoint)
    notices = notifications.listener(conf, conf.manager.notification_exchange, conf.manager.notification_topic,
                                     service.wake)
    rpc_server.leave_with_broker(conf)
    calls.start(override_pool_size=_CALLS_AT_ONCE)
    notices.start()
    service.start()
    bulletin.start()
    LOG.info("The failover manager runs on %s", conf.host)
    stopping.wait()
    LOG.info("The failover manager ends")
    end_within(_END_LIMIT_S, lambda: _close([notices, calls], service, transport))


def _close(servers: list[Any], service: Service, transport: Any) -> None:
    for server in servers:
        server.stop()
    service.stop()
    for server in servers:
        server.wait()
    transport.cleanup()


def end_within(limit_s: float, close: Callable[[], None]) -> None:
    """A broker that is away would hold the end up for ever. Whatever is cut off is in the rows."""
    closing = threading.Thread(target=close, name="closing", daemon=True)
    closing.start()
    closing.join(limit_s)
    if closing.is_alive():
        LOG.warning("The connections did not close within %g s and are dropped", limit_s)
        os._exit(0)


if __name__ == "__main__":
    main()
