"""Transport, target and one bounded call. The only importer of oslo_messaging's RPC client."""

import sys
from typing import Any

import oslo_messaging
from kombu import exceptions as broker
from oslo_config import cfg
from oslo_log import log

LOG = log.getLogger(__name__)

EXCHANGE = "nova_ftvm"
MANAGER_TOPIC = "ftvm_manager"
AGENT_TOPIC = "ftvm_agent"
VERSION = "1.0"

#: What a caller has to expect: the broker is away, nobody answered in time, or the other side raised.
Unreachable = (oslo_messaging.MessagingTimeout, oslo_messaging.MessageDeliveryFailure)
Failed = (*Unreachable, oslo_messaging.RemoteError)

#: Options that oslo.messaging registers with oslo.config's global object only, and then reads from the one it is given.
_ON_GLOBAL_ONLY = (("oslo_messaging._metrics.client", "oslo_messaging_metrics"),
                   ("oslo_messaging._tracing.client", "oslo_messaging_tracing"))


def transport(conf: cfg.ConfigOpts) -> oslo_messaging.Transport:
    """RPC over [DEFAULT]transport_url of whichever configuration is handed in (ours, or Nova's)."""
    for module, group in _ON_GLOBAL_ONLY:
        options = getattr(sys.modules.get(module), group, None)
        if options is not None:
            conf.register_opts(options, group=group)
    return oslo_messaging.get_rpc_transport(conf)


class Client:
    """Calls of one topic. Every call has a deadline, in seconds."""

    def __init__(self, transport: oslo_messaging.Transport, topic: str, timeout_s: float) -> None:
        target = oslo_messaging.Target(exchange=EXCHANGE, topic=topic, version=VERSION)
        # Without a limit the sending itself would wait for a broker that is away, whatever the answer's deadline.
        self._client = oslo_messaging.get_rpc_client(transport, target, retry=1)
        self._topic = topic
        self._timeout_s = timeout_s

    def call(self, method: str, server: str | None = None, timeout_s: float | None = None, tries: int = 1,
             **arguments: Any) -> Any:
        """tries: the call's deadline is shared by so many, for what may well be done twice; each waits twice as long as
        the one before it, as who is asked by many must not be asked by ever more.

        The broker deals a queue's messages out in turn among its consumers, and a host that lost its power is one of
        them until its heartbeats are missed: what is dealt to the dead is lost in time, though the host may be back.
        """
        timeout = (self._timeout_s if timeout_s is None else timeout_s) / (2**tries - 1)
        for _ in range(tries - 1):
            try:
                return _call(self._client.prepare(server=server, timeout=timeout), method, arguments)
            except oslo_messaging.MessagingTimeout:
                LOG.info("%s of %s has no answer to %s within %.1f s and is asked again", self._topic,
                         server or "any host", method, timeout)
            timeout *= 2
        return _call(self._client.prepare(server=server, timeout=timeout), method, arguments)


def _call(prepared: Any, method: str, arguments: dict[str, Any]) -> Any:
    try:
        return prepared.call({}, method, **arguments)
    except broker.OperationalError as error:
        # oslo.messaging does not translate what it gets where it makes a new connection, and a host that is cut off
        # makes one. Nobody who calls may die of that.
        raise oslo_messaging.MessageDeliveryFailure(f"the broker cannot be reached: {error}") from error
