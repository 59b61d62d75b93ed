"""Transport, target and one bounded call. The only importer of oslo_messaging's RPC client."""

import sys
from typing import Any

import oslo_messaging
from oslo_config import cfg

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
        self._timeout_s = timeout_s

    def call(self, method: str, server: str | None = None, timeout_s: float | None = None, **arguments: Any) -> Any:
        timeout = self._timeout_s if timeout_s is None else timeout_s
        prepared = self._client.prepare(server=server, timeout=timeout)
        return prepared.call({}, method, **arguments)
